"""The settings of a convolution: how it slides, and convolving that way with another kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The settings of a convolution's module: how it slides."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    pad: tuple[int, ...]

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """Convolve with these settings but for the groups."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.pad, mode=self.padding_mode), 0
        return _CONVOLVE[len(self.stride)](x, weight, bias, self.stride, padding, self.dilation, groups)

    def pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve with a kernel of ones, in these groups."""
        return _CONVOLVE[len(self.stride)](x, weight, groups=self.groups)


def geometry_of(module: Any, kernel: tuple[int, ...]) -> Geometry:
    """Read the settings of a convolution with a kernel of this extent; those that are no attributes are torch's.

    >>> from torch import nn
    >>> geometry_of(nn.Conv1d(2, 2, 3, padding="same"), (3,)).pad
    (1, 1)
    """

    def each(name: str, default: int) -> Any:
        value = getattr(module, name, default)
        return (value,) * len(kernel) if isinstance(value, int) else value if isinstance(value, str) else tuple(value)

    dilation, padding = each("dilation", 1), each("padding", 0)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        edges = [edge for t in reversed(total) for edge in (t // 2, t - t // 2)]
    else:
        edges = [edge for p in reversed(padding) for edge in (p, p)]
    mode = getattr(module, "padding_mode", "zeros")
    return Geometry(each("stride", 1), padding, dilation, getattr(module, "groups", 1), mode, tuple(edges))
