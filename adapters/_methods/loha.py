"""LoHa: low-rank adaptation by a Hadamard product.

    y = base(x) + s ((B1 A1) * (B2 A2)) x,    s = alpha / r

The product of two matrices of rank `r`, entry by entry, has rank up to `r^2`. With `use_effective_conv2d` each of the
two is a Tucker decomposition of the kernel, `W[p, q] = sum_ij B[i, p] T[i, j] A[j, q]` at each place of the kernel.

Hyeon-Woo et al., *FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning*, 2021,
arXiv:2108.06098; Yeh et al., *Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation*,
2023, arXiv:2309.14859. Names, defaults and initial distributions are those of PEFT's `tuners/loha`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchgraft.functional import Layer, Method, Rows, Site, TakesComplex, Weights, widen
from torchgraft.functional.extending import add_scaled

from .._config.base import AdapterConfig
from .._config.peft_format import PeftFormat
from .shared.low_rank import add_to_linear, route_to_linear
from .shared.lycoris import VALUES, RankConstants, check_dropouts, drop_outputs, plan
from .shared.scalings import of_patterns, ranks_of


@dataclasses.dataclass(kw_only=True)
class LoHaConfig(AdapterConfig):
    """LoHa adds the product, entry by entry, of two low-rank matrices to each targeted weight.

    Supports linear layers (also `transformers`' `Conv1D`, which PEFT refuses) and 1- and 2-d convolutions in any number
    of groups, whose weight is a matrix, `"out in/groups*kernel"`, but for `use_effective_conv2d`.

    Where PEFT does otherwise: it pads with zeros, whatever the base's padding mode, and a rank dropout that drops all
    outputs gives NaN; here the adapter adds nothing then.

    Attributes:
        r: Rank of each of the two matrices.
        alpha: Numerator of the scaling factor.
        rank_dropout: Probability for an output to lose the adapter's part, in training mode; those that keep it are
            scaled up by the share that was kept. The same outputs for the whole batch, as in PEFT.
        module_dropout: Probability for a module to lose the adapter's part, in training mode; not scaled up, as in
            PEFT.
        use_effective_conv2d: Decompose kernels as tensors, of convolutions whose kernel is larger than 1.
        init_weights: `True` for a zero `A2`, `False` for all random.
        rank_pattern: Ranks by pattern of the end of a module's name; the first that matches counts.
        alpha_pattern: The same for `alpha`.

    >>> LoHaConfig(r=4, target_modules=["q_proj"]).alpha
    8
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dropouts(self)


def shapes(config: LoHaConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`B` is `"out r"`, `A` is `"r in/groups*kernel"`; with Tucker `"r out"`, `"r in/groups"`, and `T` `"r r h w"`."""
    r, (out, fan_in, *kernel) = site.constants.r, site.weight_shape
    if config.use_effective_conv2d and math.prod(kernel) > 1:
        core = (r, r, *kernel) if len(kernel) > 1 else (r, r, *kernel, 1)
        pair = {"w{}_a": (r, out), "w{}_b": (r, fan_in), "t{}": core}
    else:
        pair = {"w{}_a": (out, r), "w{}_b": (r, fan_in * math.prod(kernel))}
    return {f"hada_{name.format(i)}": shape for i in (1, 2) for name, shape in pair.items()}


def init(
    config: LoHaConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws: one state of the generator gives PEFT's numbers, bit for bit."""
    made: dict[str, dict[str, Tensor]] = {}
    for site in sites:
        shape = shapes(config, site)
        made[site.path] = {leaf: torch.zeros(shape[leaf], dtype=torch.float32) for leaf in LEAVES if leaf in shape}
        for leaf, tensor in made[site.path].items():
            if leaf != "hada_w2_b" or not config.init_weights:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    return made


LEAVES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
"""All leaves, in PEFT's order of draws."""


def apply(config: LoHaConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + s ((B1 A1) * (B2 A2)) x`, the sum in the wider dtype and rounded once to the base's.

    The weight is never made where its factors of rank `r^2` take fewer multiplications at each place of the input: for
    a linear map and a convolution where `r^2 (in*kernel + out) < out * in*kernel`, in Tucker's form where
    `r^2 (in + out + r^2 kernel)` is less. Elsewhere, and in groups, it is made, and is no larger than these factors.
    """
    leaves, scaling = _dropped(config, leaves, base.training), site.constants.scaling
    if not _pays(site, leaves):
        y = base(x)
        x, weight = widen(x, _delta(site, leaves))
        return add_scaled(y, site.call(x, weight), scaling)
    up, *core, down = _factors(site, leaves)
    if site.kind == "linear":
        return add_to_linear(base, x, down, up, scaling, 0.0)
    y, ones = base(x), (..., *(None for _ in site.kernel_size))
    x, up, down, *core = widen(x, up, down, *core)
    if core:
        x = site.convolve(site.pointwise(x, down[ones]), core[0])
    else:
        x = site.convolve(x, down.unflatten(1, site.weight_shape[1:]))
    return add_scaled(y, site.pointwise(x, up[ones]), scaling)


def routed(config: LoHaConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with factors for each row; convolutions, weights that are made and dropouts take the general way."""
    dropping = base.training and (config.rank_dropout or config.module_dropout)
    if site.kind != "linear" or dropping or not _pays(site, leaves):
        return NotImplemented
    up, down = _factors(site, leaves)
    return route_to_linear(base, x, down, up, site.constants.scaling, 0.0, rows)


def merge(
    config: LoHaConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + s (B1 A1) * (B2 A2)`."""
    return add_scaled(weight, _delta(site, leaves), site.constants.scaling), bias


def _dropped(config: LoHaConfig, leaves: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
    """Return the leaves after both dropouts, which are factors of the rows of `B1`; in PEFT's order of draws."""
    b = leaves["hada_w1_a"]
    rows = b.mT if "hada_t1" in leaves else b
    factor = drop_outputs(config, len(rows), b, training, scale_up=True)
    if factor is None:
        return leaves
    rows = rows * factor.to(b.dtype).unsqueeze(1)
    return {**leaves, "hada_w1_a": rows.mT if "hada_t1" in leaves else rows}


def _pays(site: Site, leaves: dict[str, Tensor]) -> bool:
    """Return whether the factors take fewer multiplications than the weight."""
    square = leaves["hada_w1_b"].shape[-2] ** 2
    out, fan_in, *kernel = site.weight_shape
    size = math.prod(kernel)
    tucker = fan_in + out + square * size
    cost = square * (tucker if "hada_t1" in leaves else fan_in * size + out)
    return site.groups == 1 and cost < out * fan_in * size


def _factors(site: Site, leaves: dict[str, Tensor]) -> list[Tensor]:
    """Factors of rank `r^2` of the product: `"out r*r"`, for Tucker `"r*r r*r *kernel"`, and `"r*r in*kernel"`.

    Their rows and columns are products of those of `B1` and `B2`, `T1` and `T2`, `A1` and `A2`, each with each. Of a
    stack they are stacked, but for Tucker's.
    """
    b1, a1, b2, a2 = (leaves[leaf] for leaf in LEAVES[:4])
    down = (a1.unsqueeze(-2) * a2.unsqueeze(-3)).flatten(-3, -2)
    if "hada_t1" not in leaves:
        return [(b1.unsqueeze(-1) * b2.unsqueeze(-2)).flatten(-2), down]
    core = torch.einsum("ij...,kl...->ikjl...", leaves["hada_t1"], leaves["hada_t2"]).flatten(0, 1).flatten(1, 2)
    up = (b1.unsqueeze(-2) * b2.unsqueeze(-3)).flatten(-3, -2).mT
    return [up, core.reshape(*core.shape[:2], *site.kernel_size), down]


def _delta(site: Site, leaves: dict[str, Tensor]) -> Tensor:
    """`(B1 A1) * (B2 A2)`, in the shape of the weight."""
    b1, a1, b2, a2 = (leaves[leaf] for leaf in LEAVES[:4])
    if "hada_t1" in leaves:
        first, second = (
            torch.einsum("ij...,ip,jq->pq...", leaves[core], b, a)
            for core, b, a in (("hada_t1", b1, a1), ("hada_t2", b2, a2))
        )
    else:
        first, second = b1 @ a1, b2 @ a2
    return (first * second).reshape(site.weight_shape)


LoHaConfig.method = Method(
    name="LOHA",
    config=LoHaConfig,
    kinds=frozenset({"linear", "conv1d", "conv2d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=RankConstants,
    routed=routed,
    varying=frozenset({"r", "alpha", "init_weights", "rank_pattern", "alpha_pattern"}),
    abilities=(TakesComplex(),),
)


def _infer(config: LoHaConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return ranks that differ from the config's, and whether kernels are decomposed as tensors."""
    ranks = {path: len(leaves["hada_w1_b"]) for path, leaves in found.items() if "hada_w1_b" in leaves}
    tucker = config.use_effective_conv2d or any("hada_t1" in leaves for leaves in found.values())
    return {**ranks_of(config, ranks), "use_effective_conv2d": tucker}


LoHaConfig.form = PeftFormat(
    prefix="hada_",
    parameters=LEAVES,
    ranked=("hada_w1_b",),
    infer=_infer,
    express=of_patterns,
    values=VALUES,
    only_here=("bias", "fan_in_fan_out"),
)
