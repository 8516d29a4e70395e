"""GraLoRA: granular low-rank adaptation, a product of its own for each of `k` times `k` blocks of the weight.

    y = base(x) + s (G x + B' A' x),    G_jn = B_jn A_nj,    s = alpha / (r + hybrid_r)

`G_jn`, the block of outputs `j` and inputs `n`, has rank `r / k`: `A_nj` is the part `j` of the `r` coordinates that
inputs `n` are taken to, and `B_jn` takes the part `n` of those that the outputs `j` get. With as many parameters as
LoRA of rank `r` the rank of the change is up to `k r`. With `hybrid_r` a LoRA of that rank, `B' A'`, is added.

Jung et al., *GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning*, 2025, arXiv:2505.20355. Names,
defaults and initial distributions are those of PEFT's `tuners/gralora`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import Constants, Layer, Method, PerAdapter, Rows, Site, Varying, Weights, widen
from torchgraft.functional.extending import add_scaled

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.called import DROPOUT, Called, dropped

GENERAL = ("gralora_A_general", "gralora_B_general")
"""The leaves of the LoRA that `hybrid_r` adds."""


@dataclasses.dataclass(kw_only=True)
class GraloraConfig(AdapterConfig):
    """GraLoRA adds a low-rank product to each block of a targeted weight.

    Supports linear layers (also `transformers`' `Conv1D`).

    Attributes:
        r: Rank of all blocks of a row together, a multiple of `gralora_k`.
        hybrid_r: Rank of the LoRA beside the blocks; 0 for none.
        alpha: Numerator of the scaling factor.
        gralora_k: Number of blocks in a row and in a column; it divides the module's inputs and outputs.
        gralora_dropout: Probability of dropout on the adapter's input, in training mode; the LoRA beside the blocks has
            a mask of its own, as in PEFT.
        init_weights: `True` for zero `B`, `False` for random ones.

    >>> GraloraConfig(r=8, target_modules=["q_proj"]).gralora_k
    2
    """

    r: int = 32
    hybrid_r: int = 0
    alpha: int = 64
    gralora_k: int = 2
    gralora_dropout: float = 0.0
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        r, k, p = self.r, self.gralora_k, self.gralora_dropout
        require(k > 0, self, f"gralora_k is {k}, expected a positive integer")
        require(r > 0 and r % k == 0, self, f"r is {r} and gralora_k is {k}, expected a positive multiple of gralora_k")
        require(self.hybrid_r >= 0, self, f"hybrid_r is {self.hybrid_r}, expected an integer >= 0")
        require(0 <= p < 1, self, f"gralora_dropout is {p}, expected 0 <= p < 1")


@dataclasses.dataclass(frozen=True, eq=False)
class GraloraConstants(Constants):
    """Ranks and number of blocks of a site, and its scaling factor."""

    r: int
    hybrid_r: int
    k: int
    scaling: Varying[float]


def plan(config: GraloraConfig, sites: list[Site], weights: Weights) -> dict[str, GraloraConstants]:
    """Return the constants of each site, whose sizes the blocks divide."""
    k = config.gralora_k
    for site in sites:
        sizes = f"{site.path}, which has {site.in_features} inputs and {site.out_features} outputs"
        what = f"gralora_k is {k} at {sizes}, expected a divisor of {math.gcd(site.in_features, site.out_features)}"
        require(site.in_features % k == 0 and site.out_features % k == 0, config, what)
    scaling = config.alpha / (config.r + config.hybrid_r)
    return {site.path: GraloraConstants(config.r, config.hybrid_r, k, scaling) for site in sites}


def shapes(config: GraloraConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`A` is `"k in/k r"`, `B` is `"k r out/k"`; those of the LoRA are `"hybrid_r in"` and `"out hybrid_r"`."""
    constants, inputs, outputs = site.constants, site.in_features, site.out_features
    k, r, hybrid = constants.k, constants.r, constants.hybrid_r
    general = dict(zip(GENERAL, ((hybrid, inputs), (outputs, hybrid)), strict=True)) if hybrid else {}
    return {"gralora_A": (k, inputs // k, r), "gralora_B": (k, r, outputs // k), **general}


def init(
    config: GraloraConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws, of which the first of the LoRA's are drawn over."""

    def drawn(*shape: int) -> Tensor:
        tensor = torch.empty(shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
        return tensor

    def up(*shape: int) -> Tensor:
        return torch.zeros(shape) if config.init_weights else drawn(*shape)

    made = {}
    for site in sites:
        k, r, hybrid = site.constants.k, site.constants.r, site.constants.hybrid_r
        inputs, outputs = site.in_features, site.out_features
        pairs = [(drawn(r, inputs // k), up(outputs // k, r)) for _ in range(k)]
        a, b = (torch.stack(each).mT.contiguous() for each in zip(*pairs, strict=True))
        made[site.path] = {"gralora_A": a, "gralora_B": b}
        if hybrid:
            for shape in ((hybrid, inputs), (outputs, hybrid)):
                drawn(*shape)
            made[site.path] |= dict(zip(GENERAL, (drawn(hybrid, inputs), up(outputs, hybrid)), strict=True))
    return made


def apply(config: GraloraConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + s (G x + B' A' x)`, without the blocks, the sum in the wider dtype and rounded once to the base's."""
    y, dropout = base(x), leaves.get(DROPOUT, config.gralora_dropout)
    given, a, b = widen(dropped(x, dropout, base.training), leaves["gralora_A"], leaves["gralora_B"])
    delta = _blocks(given.reshape(-1, x.shape[-1]), a, b).view(y.shape)
    if site.constants.hybrid_r:
        a, b = (leaves[name] for name in GENERAL)
        if isinstance(a, Called):
            delta = delta + b(a(dropped(a.cast(x), dropout, base.training)))
        else:
            given, a, b = widen(dropped(x, dropout, base.training), a, b)
            delta = delta + F.linear(F.linear(given, a), b)
    return add_scaled(y, delta, site.constants.scaling)


def routed(config: GraloraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with factors for each group of rows."""
    y, groups = base(x), rows.groups()
    p, scaling = config.gralora_dropout if base.training else 0.0, site.constants.scaling

    def given(*names: str) -> tuple[Tensor, ...]:
        dropped_x = groups.mask(F.dropout(x, p).reshape(groups.size, -1, x.shape[-1]))
        return widen(dropped_x, *(groups.pick(leaves[name]) for name in names))

    each, a, b = given("gralora_A", "gralora_B")
    delta = torch.vmap(_blocks)(each, a, b)
    if site.constants.hybrid_r:
        each, a, b = given(*GENERAL)
        delta = delta + torch.bmm(torch.bmm(each, a.mT), b.mT)
    if isinstance(scaling, PerAdapter):
        delta, scaling = delta * groups.pick(scaling.values).to(delta.dtype).view(-1, 1, 1), 1.0
    return add_scaled(y, delta.reshape(y.shape), scaling)


def merge(
    config: GraloraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + s (G + B' A')`."""
    k = site.constants.k
    a, b = leaves["gralora_A"].unflatten(-1, (k, -1)), leaves["gralora_B"].unflatten(1, (k, -1))
    delta = torch.einsum("jnro,nijr->joni", b, a).reshape(weight.shape)
    if site.constants.hybrid_r:
        general_a, general_b = (leaves[name] for name in GENERAL)
        delta = delta + general_b @ general_a
    return add_scaled(weight, delta, site.constants.scaling), bias


def _blocks(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`G x` of `"tokens in"`: each block of inputs gives `r` coordinates, a part of them to each block of outputs."""
    k = len(a)
    down = torch.bmm(x.unflatten(-1, (k, -1)).transpose(0, 1), a)  # "n tokens r"
    exchanged = down.unflatten(-1, (k, -1)).permute(2, 1, 0, 3).flatten(-2)  # "j tokens (n r/k)"
    return torch.bmm(exchanged, b).transpose(0, 1).flatten(-2)


GraloraConfig.method = Method(
    name="GRALORA",
    config=GraloraConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=GraloraConstants,
    routed=routed,
    varying=frozenset({"alpha", "init_weights"}),
)


def _holder(config: GraloraConfig, site: Site, leaf: str) -> nn.Module:
    """Return the layer that PEFT keeps a leaf of the LoRA in."""
    out, inputs = shapes(config, site)[leaf]
    return nn.Linear(inputs, out, bias=False, device="meta")


def _infer(config: GraloraConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return ranks and number of blocks that differ from the config's, where they are the same for all modules."""
    sizes = {
        (
            leaves["gralora_A"].shape[2],
            leaves["gralora_A"].shape[0],
            len(leaves[GENERAL[0]]) if GENERAL[0] in leaves else 0,
        )
        for leaves in found.values()
        if "gralora_A" in leaves
    }
    if len(sizes) != 1:
        return {}
    fields = dict(zip(("r", "gralora_k", "hybrid_r"), sizes.pop(), strict=True))
    return {name: value for name, value in fields.items() if value != getattr(config, name)}


GraloraConfig.form = PeftFormat(
    prefix="gralora_",
    parameters=("gralora_A", "gralora_B"),
    modules=GENERAL,
    holder=_holder,
    dropout="gralora_dropout",
    infer=_infer,
    values={
        "r": Value(lambda config, site: site.constants.r),
        "hybrid_r": Value(lambda config, site: site.constants.hybrid_r),
        "alpha": Value(lambda config, site: config.alpha),
        "gralora_k": Value(lambda config, site: site.constants.k),
        "scaling": Value(lambda config, site: site.constants.scaling),
    },
    only_here=("exclude_modules",),
)
