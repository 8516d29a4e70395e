"""Super-Tuning: numbers that are added to the largest entries of the weight, and low-rank adaptation beside them.

    y = base(x) + S x + s B A x,    S_ij = v_k at the k-th largest |W_ij|, else 0

The largest entries of a weight, a share `1 - sparsity` of all, are its support, a constant; what is trained is the
vector `v`. With a rank, the paper's *Supra*, so are `A` and `B`, with `s = lora_alpha / r`; else they are not there.

*Super-Tuning*, 2026, arXiv:2607.09287. Names, defaults, support and initial distributions are those of PEFT's
`tuners/supertuning`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import Constants, KeepsDtype, Layer, Method, Site, Varying, Weights, widen
from torchgraft.functional.extending import add_scaled

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.called import DROPOUT, Called, dropped
from .shared.low_rank import add_called, add_product
from .shared.padded import unpadded
from .shared.sparse import add_sparse, dense, of_changed

VALUES, INDICES = "supertuning_values", "supertuning_indices"
FACTORS = ("supertuning_lora_A", "supertuning_lora_B")


@dataclasses.dataclass(kw_only=True)
class SupertuningConfig(AdapterConfig):
    """Super-Tuning adds trained numbers to the entries of each targeted weight that are largest already.

    Supports linear layers and, what PEFT refuses, `transformers`' `Conv1D`. Where the entries are is a constant of the
    graft, made of the weights that it is bound to; files hold it, and in place it is a buffer of integers.

    Where PEFT does otherwise: it adds to the weight in its own precision, in which small changes are lost where that is
    half, and calls no hooks of the base; here the outputs are added then, and hooks are called. It warns of
    `save_precomputed_indices=False`: entries of equal size may then be chosen otherwise by another version of torch.

    Attributes:
        sparsity: Share of the entries that stay as they are.
        select_top: Whether the entries are the largest; else the smallest.
        r: Rank of what is added beside them; `None` for nothing.
        lora_alpha: Numerator of its factor; `2 * r` where none is given.
        lora_dropout: Probability of dropout on its input, in training mode.
        init_weights: `True` for zeros in `v` and `B`, `False` for random numbers.
        save_precomputed_indices: Whether files hold where the entries are; else it is found again from the weights.

    >>> SupertuningConfig(r=4, target_modules=["q_proj"]).lora_alpha
    8
    """

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.sparsity < 1, self, f"sparsity is {self.sparsity}, expected 0 <= share < 1")
        require(self.r is None or self.r > 0, self, f"r is {self.r}, expected a positive integer or None")
        require(0 <= self.lora_dropout < 1, self, f"lora_dropout is {self.lora_dropout}, expected 0 <= p < 1")
        alpha = self.lora_alpha
        what = f"lora_alpha is {alpha} and r is None, without which it has no effect; set r, or leave it out"
        require(self.r is not None or alpha is None, self, what)
        if self.r is not None and alpha is None:
            self.lora_alpha = 2 * self.r


@dataclasses.dataclass(frozen=True, eq=False)
class SupertuningConstants(Constants):
    """Number of entries, their places in the flat weight, `"entries"`; the factor of `B A`, where that is there."""

    count: Varying[int]
    supertuning_indices: Varying[Tensor]
    scaling: Varying[float | None]


def plan(config: SupertuningConfig, sites: list[Site], weights: Weights) -> dict[str, SupertuningConstants]:
    """Return the largest entries of each weight, in PEFT's order."""
    scaling = None if config.r is None or config.lora_alpha is None else config.lora_alpha / config.r
    planned = {}
    for site in sites:
        count, entries = _count(config, site), math.prod(site.weight_shape)
        what = f"sparsity is {config.sparsity} at {site.path}, whose weight has {entries} entries"
        require(count > 0, config, f"{what}, so that none is trained; expected sparsity <= {1 - 1 / entries:.6g}")
        places = weights(site.path).abs().flatten().topk(count, largest=config.select_top).indices
        planned[site.path] = SupertuningConstants(count, places.to(torch.int32), scaling)
    return planned


def _count(config: SupertuningConfig, site: Site) -> int:
    return int(math.prod(site.weight_shape) * (1 - config.sparsity))


def shapes(config: SupertuningConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`v` is `"entries"`, `A` is `"r in"` and `B` is `"out r"`."""
    found: dict[str, tuple[int, ...]] = {VALUES: (_count(config, site),)}
    if config.r is not None:
        found |= dict(zip(FACTORS, ((config.r, site.in_features), (site.out_features, config.r)), strict=True))
    return found


def init(
    config: SupertuningConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws, some of which it draws twice."""
    made = {}
    for site in sites:
        leaves = {leaf: torch.zeros(shape, dtype=torch.float32) for leaf, shape in shapes(config, site).items()}
        if not config.init_weights:
            leaves[VALUES].normal_(generator=generator)
        a, b = FACTORS
        for leaf in (a, b, a, *(() if config.init_weights else (b,))) if config.r is not None else ():
            nn.init.kaiming_uniform_(leaves[leaf], a=math.sqrt(5), generator=generator)
        if config.init_weights and config.r is not None:
            leaves[b].zero_()
        made[site.path] = leaves
    return made


def apply(config: SupertuningConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + S x + s B A dropout(x)`, the sum in the wider dtype and rounded once to the base's."""
    entries, dropout = _entries(site, leaves), leaves.get(DROPOUT, config.lora_dropout)
    if config.r is None:
        return add_sparse(site, base, x, *entries)
    (a, b), scaling = (leaves[leaf] for leaf in FACTORS), site.constants.scaling
    if isinstance(a, Called):
        return add_called(add_sparse(site, base, x, *entries), x, a, b, scaling, dropout)
    y = of_changed(base, x, *entries)
    if y is not None and a.dtype == b.dtype == y.dtype:
        return add_product(y, F.linear(dropped(x, dropout, base.training), a), b, scaling)
    y, (values, places) = base(x), entries
    x, values, a, b = widen(x, values, a, b)
    up = F.linear(F.linear(dropped(x, dropout, base.training), a), b)
    return add_scaled(y, add_scaled(site.call(x, dense(site, values, places)), up, scaling), 1.0)


def merge(
    config: SupertuningConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + S + s B A`."""
    weight = weight + dense(site, *_entries(site, leaves))
    if config.r is None:
        return weight, bias
    a, b = (leaves[leaf] for leaf in FACTORS)
    return add_scaled(weight, b @ a, site.constants.scaling), bias


def _entries(site: Site, leaves: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return values and places; an injected layer has the places among its leaves."""
    places = leaves.get(INDICES, site.constants.supertuning_indices)
    return unpadded(leaves[VALUES], site.constants.count), places.to(torch.long)


SupertuningConfig.method = Method(
    name="SUPERTUNING",
    config=SupertuningConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=SupertuningConstants,
    varying=frozenset({"sparsity", "select_top", "lora_alpha", "init_weights", "save_precomputed_indices"}),
    abilities=(KeepsDtype(frozenset({INDICES})),),
)


def _infer(config: SupertuningConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the rank, where there are such tensors."""
    ranks = {len(leaves[FACTORS[0]]) for leaves in found.values() if FACTORS[0] in leaves}
    return {"r": max(ranks)} if ranks else {}


def _holder(config: SupertuningConfig, site: Site, leaf: str) -> nn.Module:
    """Return the linear layer that PEFT keeps a factor in."""
    out, inputs = shapes(config, site)[leaf]
    return nn.Linear(inputs, out, bias=False, device="meta")


SupertuningConfig.form = PeftFormat(
    prefix="supertuning_",
    dropout="supertuning_lora_dropout",
    probability="lora_dropout",
    parameters=(VALUES, INDICES),
    modules=FACTORS,
    holder=_holder,
    fixed=lambda config, site: (INDICES,) if config.save_precomputed_indices else (),
    buffers=(INDICES,),
    infer=_infer,
    reads=("r",),
    values={
        "supertuning_rank": Value(lambda config, site: config.r or 0),
        "supertuning_lora_alpha": Value(lambda config, site: float(config.lora_alpha or 0)),
    },
    only_here=("bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform"),
)
