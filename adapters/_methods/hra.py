"""HRA: Householder reflection adaptation, a chain of reflections of the input.

    y = base(H_1 H_2 ... H_r x),    H_i = I - 2 u_i u_i^T / |u_i|^2

so that `W' = W H_1 ... H_r`, an orthogonal transform of the weight. With `apply_GS` the vectors are made orthonormal
first, `W' = W (I - 2 Q Q^T)`. The chain is never multiplied out: it is `x + A C x` with thin `A` and `C`.

Two reflections by unit vectors `a` and `b = a + e` are `I + 2 a (e - |e|^2 b)^T - 2 e b^T`. Written so, pairs of equal
vectors, with which training starts, cancel exactly and not up to rounding.

Yuan et al., *Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation*, 2024,
arXiv:2405.17484. Names, defaults and initial distributions are those of PEFT's `tuners/hra`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import Constants, Layer, Method, Rows, Site, Varying, Weights, widen

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.low_rank import add_product, add_routed
from .shared.padded import unpadded
from .shared.rotated import laid_out
from .shared.scalings import same_rank


@dataclasses.dataclass(kw_only=True)
class HRAConfig(AdapterConfig):
    """HRA reflects the input of each targeted module at `r` learned hyperplanes, one after the other.

    Supports linear layers and 2-d convolutions and, what PEFT refuses, `transformers`' `Conv1D` and other convolutions,
    in any number of groups. A convolution's reflections are of the inputs of one output, over the kernel.

    Where PEFT does otherwise: it ignores a convolution's dilation and padding mode, and takes the kernel for a square;
    here the base's settings hold. A vector of zeros is NaN there, and reflects nothing here. With `apply_GS`, an even
    `r` and `init_weights=True` it starts with rounding errors divided by their length; here that is an error.

    Attributes:
        r: Number of reflections.
        apply_GS: Make the vectors orthonormal (Gram and Schmidt). The adapter is then never the identity.
        init_weights: `True` for pairs of equal vectors, whose reflections cancel, where `r` is even; `False`, and an
            odd `r`, for vectors that are all random.

    >>> HRAConfig(r=4, target_modules=["q_proj"]).apply_GS
    False
    """

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r > 0, self, f"r is {self.r}, expected a positive integer")


@dataclasses.dataclass(frozen=True, eq=False)
class HRAConstants(Constants):
    """Number of reflections."""

    r: Varying[int]


def plan(config: HRAConfig, sites: list[Site], weights: Weights) -> dict[str, HRAConstants]:
    """Check that vectors that are made orthonormal can be."""
    for site in sites:
        size = _width(site)
        require(
            not config.apply_GS or config.r <= size,
            config,
            f"r is {config.r} at {site.path}, whose vectors have {size} entries; apply_GS makes them orthonormal, "
            f"which needs r <= {size}",
        )
    return {site.path: HRAConstants(config.r) for site in sites}


def _width(site: Site) -> int:
    """Number of inputs of one output, over the kernel."""
    return math.prod(site.weight_shape[1:])


def shapes(config: HRAConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`"in/groups*kernel r"`."""
    return {"hra_u": (_width(site), config.r)}


def init(
    config: HRAConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws: one state of the generator gives PEFT's numbers, bit for bit.

    Raises:
        ValueError: Pairs of equal vectors that are to be made orthonormal.
    """
    paired = config.init_weights and config.r % 2 == 0
    require(
        not (paired and config.apply_GS),
        config,
        f"apply_GS=True, init_weights=True and r={config.r} start with pairs of equal vectors, which cannot be made "
        "orthonormal; set init_weights=False",
    )
    if config.init_weights and not paired:
        warnings.warn(
            f"HRAConfig: r is {config.r}, an odd number of reflections, which do not cancel in pairs, so the adapter "
            "does not start as the identity; make r even",
            UserWarning,
            stacklevel=2,
        )
    made = {}
    for site in sites:
        leaf = torch.zeros(_width(site), config.r // 2 if paired else config.r, dtype=torch.float32)
        nn.init.kaiming_uniform_(leaf, a=math.sqrt(5), generator=generator)
        made[site.path] = {"hra_u": leaf.repeat_interleave(2, 1) if paired else leaf}
    return made


def apply(config: HRAConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`base(x + A C x)`, the input rounded once to its dtype; a convolution `base(x) + (W A) C x`."""
    down, up = _factors(config, site, leaves)
    if site.kind == "linear":
        wide, down, up = widen(x, down, up)
        return base(laid_out(add_product(wide, F.linear(wide, down), up, 1.0).to(x.dtype), x))
    y, weight = base(x), base.weight
    wide, weight, down, up = widen(x, weight, down, up)
    kernel = down.unflatten(1, site.weight_shape[1:]).repeat(site.groups, *(1 for _ in site.weight_shape[1:]))
    ones = (..., *(None for _ in site.kernel_size))
    added = site.pointwise(site.convolve(wide, kernel, groups=site.groups), (weight.flatten(1) @ up)[ones])
    wide, added = widen(y, added)
    return (wide + added).to(y.dtype)


def routed(config: HRAConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` for linear layers, each row reflected by its own adapter, and all of them one input of the base."""
    if site.kind != "linear":
        return NotImplemented
    wide, down, up = widen(x, *_factors(config, site, leaves))
    return base(laid_out(add_routed(wide, wide, down, up, 1.0, rows).to(x.dtype), x))


def merge(
    config: HRAConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + (W A) C`."""
    down, up = _factors(config, site, leaves)
    flat = weight.flatten(1)
    return torch.addmm(flat, flat @ up, down).reshape(weight.shape), bias


def _factors(config: HRAConfig, site: Site, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`C`, `"... r in"`, and `A`, `"... in r"`, in float32 or wider; an odd `r` is one more, by a vector of zeros."""
    u = unpadded(leaves["hra_u"], site.constants.r)
    vectors = u.to(torch.promote_types(u.dtype, torch.float32)).mT.contiguous()
    square = vectors.square().sum(-1, keepdim=True)
    unit = vectors * torch.where(square == 0, 1, square).rsqrt()
    if config.apply_GS:
        gram = (unit @ unit.mT).to(unit.dtype) + torch.diag_embed((square == 0).to(unit.dtype).squeeze(-1))
        return torch.linalg.solve(gram, unit), -2 * unit.mT
    unit = F.pad(unit, (0, 0, 0, unit.shape[-2] % 2))
    a, b = unit[..., 0::2, :], unit[..., 1::2, :]
    e = b - a
    c = torch.stack([e - e.square().sum(-1, keepdim=True) * b, b], -2).flatten(-3, -2)
    up = torch.stack([2 * a, -2 * e], -2).flatten(-3, -2).mT
    pair = torch.arange(c.shape[-2], device=c.device) // 2
    between = torch.where(
        pair.unsqueeze(1) < pair, (c @ up).to(c.dtype), 0
    )  # what one pair says of those that come before it
    return torch.linalg.solve_triangular(-between, c, upper=True, unitriangular=True), up


HRAConfig.method = Method(
    name="HRA",
    config=HRAConfig,
    kinds=frozenset({"linear", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=HRAConstants,
    routed=routed,
    varying=frozenset({"r", "init_weights"}),
)


HRAConfig.form = PeftFormat(
    prefix="hra_",
    layers="HRA{}",
    parameters=("hra_u",),
    values={
        "hra_r": Value(lambda config, site: config.r),
        "hra_apply_GS": Value(lambda config, site: config.apply_GS),
    },
    infer=same_rank("hra_u", 1),
    reads=("apply_GS",),
    only_here=("fan_in_fan_out",),
)
