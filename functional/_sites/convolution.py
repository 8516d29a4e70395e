"""Convolutions of one, two or three axes; their weight is `"out in/groups *kernel"`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .geometry import geometry_of
from .site import Kind, Registration, Site, add_kind


def _call(site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return site.convolve(x, weight, bias, groups=site.groups)


def _pieces(site: Site) -> str | None:
    if site.groups == 1:
        return None
    return f"a convolution with {site.groups} groups has parameters group by group"


def _registered(path: str, module: Any, sizes: tuple[int, int], kernel: tuple[int, ...]) -> Site:
    geometry, (inputs, outputs) = geometry_of(module, kernel), sizes
    sizes = inputs * geometry.groups, outputs
    return Site(path, f"conv{len(kernel)}d", *sizes, kernel_size=kernel, geometry=geometry)


CONVOLUTIONS = tuple(
    add_kind(
        Kind(
            f"conv{n}d",
            _call,
            features=1 + n,
            pieces=_pieces,
            registration=Registration(_registered, weight_axes=2 + n, transposable=False),
        )
    )
    for n in (1, 2, 3)
)


def describe_convolution(path: str, module: nn.Conv2d) -> Site:
    """Describe a convolution of torch's."""
    kernel = tuple(module.kernel_size)
    sizes = module.in_channels, module.out_channels
    has_bias = module.bias is not None
    geometry = geometry_of(module, kernel)
    return Site(path, f"conv{len(kernel)}d", *sizes, has_bias, kernel_size=kernel, geometry=geometry)
