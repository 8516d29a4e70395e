"""Uni-LoRA: low-rank adaptation whose matrices are all made of the entries of one trained vector.

    y = base(x) + B A x,    A_ij = theta_k / sqrt(n_k),    k = the index of the entry

Each entry of `A` and `B` of all modules has a fixed random index into the vector `theta`, which is all that is trained.
`n_k` is how many entries have the index `k`, so that the map from `theta` to all of them preserves lengths. Indices are
dealt out evenly: each `n_k` is one of two neighbouring numbers.

Li et al., *Uni-LoRA: One Vector Is All You Need*, 2025, arXiv:2506.00799. Names, defaults, indices and initial
distributions are those of PEFT's `tuners/unilora`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchgraft.functional import (
    Constants,
    KeepsDtype,
    Layer,
    Method,
    PerAdapter,
    Rows,
    SharesLeaves,
    Site,
    Varying,
    Weights,
    widen,
)
from torchgraft.functional.extending import SHARED

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.called import DROPOUT
from .shared.low_rank import add_to_linear, route_to_linear

THETA = "unilora_theta_d"
INDICES = ("unilora_indices_A", "unilora_indices_B")
SCALES = ("unilora_scales_A", "unilora_scales_B")
FIXED = (*INDICES, *SCALES)


@dataclasses.dataclass(kw_only=True)
class UniLoraConfig(AdapterConfig):
    """Uni-LoRA learns one vector for all modules; each entry of their low-rank matrices is one of its entries.

    Supports linear layers (also `transformers`' `Conv1D`). The vector is one leaf, `params["*"]["unilora_theta_d"]`.
    Indices are constants of the graft, which NumPy's generator draws from `proj_seed` as in PEFT, so that `bind` needs
    NumPy; factors are in single precision, rounded to the base's. An adapter is not the identity at first, as in the
    paper and in PEFT.

    Attributes:
        r: Rank.
        theta_d_length: Number of entries of the vector.
        proj_seed: Seed of the indices.
        unilora_dropout: Probability of dropout on the adapter's input, in training mode.
        init_theta_d_bound: The vector starts uniform between this and its negative.
        init_weights: Whether it does; else it starts with normal numbers.
        save_indices: Whether files hold indices and factors too; else they are made again.

    >>> UniLoraConfig(theta_d_length=1000, target_modules=["q_proj"]).r
    4
    """

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "theta_d_length"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} is {value}, expected a positive integer")
        require(self.proj_seed >= 0, self, f"proj_seed is {self.proj_seed}, expected an integer >= 0")
        p, bound = self.unilora_dropout, self.init_theta_d_bound
        require(0 <= p < 1, self, f"unilora_dropout is {p}, expected 0 <= p < 1")
        require(bound > 0, self, f"init_theta_d_bound is {bound}, expected a positive number")


@dataclasses.dataclass(frozen=True, eq=False)
class UniLoraConstants(Constants):
    """Index into the vector, and factor, of each entry of `A`, `"r in"`, and of `B`, `"out r"`."""

    unilora_indices_A: Varying[Tensor]
    unilora_indices_B: Varying[Tensor]
    unilora_scales_A: Varying[Tensor]
    unilora_scales_B: Varying[Tensor]


def plan(config: UniLoraConfig, sites: list[Site], weights: Weights) -> dict[str, UniLoraConstants]:
    """Return indices and factors of all entries, module by module, `A` before `B`."""
    sizes = [size for site in sites for size in (config.r * site.in_features, site.out_features * config.r)]
    indices = deal(sum(sizes), config.theta_d_length, config.proj_seed)
    scales = indices.bincount(minlength=config.theta_d_length).float().rsqrt()[indices]
    parts = iter(zip(indices.split(sizes), scales.split(sizes), strict=True))
    planned = {}
    for site in sites:
        weight, (a, scales_a), (b, scales_b) = weights(site.path), next(parts), next(parts)
        places = a.view(config.r, -1).clone(), b.view(-1, config.r).clone()
        factors = (one.view(like.shape) for one, like in zip((scales_a, scales_b), places, strict=True))
        given = (*(one.to(weight.device) for one in places), *(one.to(weight, copy=True) for one in factors))
        planned[site.path] = UniLoraConstants(*given)
    return planned


def deal(count: int, length: int, seed: int) -> Tensor:
    """Return an index for each of `count` entries, each index as often as the others or once more, in random order.

    Raises:
        ImportError: NumPy, whose generator draws them as in PEFT, is not installed.

    >>> deal(5, 2, seed=0).bincount().sort().values
    tensor([2, 3])
    """
    try:
        import numpy as np
    except ImportError as error:
        raise ImportError("Uni-LoRA's indices are drawn by NumPy, which is not installed; install numpy") from error
    generator, times = np.random.default_rng(seed), count // length
    dealt: Any = np.repeat(np.arange(length), times)
    if count % length:
        dealt = np.concatenate([dealt, generator.choice(length, size=count % length, replace=False)])
    generator.shuffle(dealt)
    return torch.as_tensor(dealt, dtype=torch.long, device="cpu")


def shared_shapes(config: UniLoraConfig, sites: list[Site]) -> dict[str, tuple[int, ...]]:
    """The vector is `"theta_d_length"`."""
    return {THETA: (config.theta_d_length,)}


def init(
    config: UniLoraConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw the vector."""
    theta, bound = torch.empty(config.theta_d_length, dtype=torch.float32), config.init_theta_d_bound
    if config.init_weights:
        return {SHARED: {THETA: theta.uniform_(-bound, bound, generator=generator)}}
    return {SHARED: {THETA: theta.normal_(generator=generator)}}


def apply(config: UniLoraConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + B A dropout(x)`, the sum in the wider dtype and rounded once to the base's."""
    return add_to_linear(base, x, *_factors(site, leaves), 1.0, leaves.get(DROPOUT, config.unilora_dropout))


def routed(config: UniLoraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with a vector for each row."""
    theta = leaves[THETA]
    factors: list[Tensor] = []
    for one, other in zip(INDICES, SCALES, strict=True):
        index, scales = (getattr(site.constants, name) for name in (one, other))
        index, scales = (
            each.values if isinstance(each, PerAdapter) else each.expand(len(theta), *each.shape)
            for each in (index, scales)
        )
        entries, scales = widen(theta.gather(1, index.flatten(1)).view(index.shape), scales)
        factors.append(entries * scales)
    a, b = factors
    return route_to_linear(base, x, a, b, 1.0, config.unilora_dropout, rows)


def merge(
    config: UniLoraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + B A`."""
    a, b = (one.to(weight.dtype) for one in _factors(site, leaves))
    return torch.addmm(weight, b, a), bias


def _factors(site: Site, leaves: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`A`, `"r in"`, and `B`, `"out r"`; an injected layer may have their indices and factors among its leaves."""
    made = []
    for one, other in zip(INDICES, SCALES, strict=True):
        index, scales = (leaves[name] if name in leaves else getattr(site.constants, name) for name in (one, other))
        entries, scales = widen(leaves[THETA].index_select(0, index.flatten()).view(index.shape), scales)
        made.append(entries * scales)
    a, b = made
    return a, b


UniLoraConfig.method = Method(
    name="UNILORA",
    config=UniLoraConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=lambda config, site: {},
    init=init,
    apply=apply,
    merge=merge,
    constants=UniLoraConstants,
    routed=routed,
    varying=frozenset({"r", "proj_seed", "theta_d_length", "init_theta_d_bound", "init_weights", "save_indices"}),
    abilities=(
        SharesLeaves(lambda config, sites: {site.path: {THETA: THETA} for site in sites}, shared_shapes),
        KeepsDtype(frozenset(INDICES)),
    ),
)


def _infer(config: UniLoraConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the length of the vector and the rank, where there are tensors that say them."""
    ranks = {len(leaves[INDICES[0]]) for leaves in found.values() if INDICES[0] in leaves}
    theta = found.get(SHARED, {}).get(THETA)
    return {**({"r": max(ranks)} if ranks else {}), **({} if theta is None else {"theta_d_length": len(theta)})}


def _constant(name: str) -> Callable[[UniLoraConfig, Site], Any]:
    return lambda config, site: getattr(site.constants, name)


UniLoraConfig.form = PeftFormat(
    prefix="unilora_",
    dropout="unilora_dropout",
    parameters=FIXED,
    shared_leaves=(THETA,),
    fixed=lambda config, site: FIXED if config.save_indices else (),
    buffers=FIXED,
    values={
        "r": Value(lambda config, site: config.r),
        **{name: Value(_constant(name)) for name in FIXED},
    },
    infer=_infer,
    only_here=("exclude_modules",),
)
