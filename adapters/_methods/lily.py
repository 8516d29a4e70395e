"""Lily: low-rank adaptation whose up-projections are shared by layers and mixed by a router.

    y = base(x) + s h sum_e p_e B_e,    h = A x,    p = the mean of softmax(R h) over an example's tokens

Layers of one target and shape have all `B_e` together, and as many of these in succession as `stride_A` says have one
`A`; each has a router `R` of its own.

Zhong et al., *Low-Rank Interconnected Adaptation across Layers*, 2024, arXiv:2407.09946. Names, defaults and initial
distributions are those of PEFT's `tuners/lily`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import (
    Constants,
    Layer,
    Method,
    Rows,
    SharesLeaves,
    Site,
    UnsupportedCall,
    UnsupportedConfig,
    Varying,
    Weights,
    widen,
)
from torchgraft.functional.extending import SHARED

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.called import Called, Map, read
from .shared.low_rank import add_product

A, B, ROUTER = "lily_A", "lily_B", "lily_router"


@dataclasses.dataclass(kw_only=True)
class LilyConfig(AdapterConfig):
    """Lily shares up-projections between layers, and a router in each layer mixes them, example by example.

    Supports linear layers (also `transformers`' `Conv1D`). What layers share are leaves of their own,
    `params["*"]["lily_A.0"]`, beside the router of each module. No weight computes it, for the mix depends on the
    input: it cannot be merged.

    The router's shares are means over all tokens of an example, so that each example has its own: the first axis of a
    layer's input counts examples, the last one features, and those between them tokens. An input without axes between
    them has one token an example. PEFT takes the mean over the whole batch, by which what is computed of an example
    depends on the others; with one example in a batch the two are equal.

    Attributes:
        r: Rank.
        stride_A: Number of layers of one target, in succession, that have one `A`.
        num_B: Number of up-projections of one target.
        scaling: `s`.
        init_weights: `True` for zeros in all `B_e`, `False` for random ones.

    >>> LilyConfig(r=16, stride_A=2, num_B=4, target_modules=["q_proj", "v_proj"]).scaling
    1.0
    """

    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("r", 1), ("stride_A", 1), ("num_B", 2)):
            value = getattr(self, name)
            require(value >= least, self, f"{name} is {value}, expected an integer >= {least}")


@dataclasses.dataclass(frozen=True, eq=False)
class LilyConstants(Constants):
    """The scaling factor."""

    scaling: Varying[float]


def plan(config: LilyConfig, sites: list[Site], weights: Weights) -> dict[str, LilyConstants]:
    """Return the scaling factor of each site."""
    return {site.path: LilyConstants(config.scaling) for site in sites}


def target_of(config: LilyConfig, path: str) -> str:
    """Return what a config says of a module: the longest of its names that this one's ends with, or its expression.

    >>> target_of(LilyConfig(target_modules=["proj", "q_proj"]), "layers.0.q_proj")
    'q_proj'
    """
    targets = config.target_modules
    if isinstance(targets, str):
        return path.rpartition(".")[2] if targets.lower() == "all-linear" else targets
    return max((target for target in targets or () if path.endswith(target)), key=len, default=path)


def uses(config: LilyConfig, sites: list[Site]) -> dict[str, dict[str, str]]:
    """Return the down-projection and the up-projections that each site has."""
    groups: dict[Any, int] = {}
    members: dict[int, int] = {}
    blocks: dict[tuple[int, int], int] = {}
    found = {}
    for site in sites:
        alike = target_of(config, site.path), site.in_features, site.out_features
        group = groups.setdefault(alike, len(groups))
        place = members[group] = members.get(group, -1) + 1
        block = blocks.setdefault((group, place // config.stride_A), len(blocks))
        found[site.path] = {A: f"{A}.{block}", B: f"{B}.{group}"}
    return found


def shapes(config: LilyConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """A router is `"num_B r"`."""
    return {ROUTER: (config.num_B, config.r)}


def shared_shapes(config: LilyConfig, sites: list[Site]) -> dict[str, tuple[int, ...]]:
    """A down-projection is `"r in"`, the up-projections of a target are `"num_B*r out"`."""
    return {name: _shared_shape(config, site, leaf) for site in sites for leaf, name in site.shared.items()}


def _shared_shape(config: LilyConfig, site: Site, leaf: str) -> tuple[int, int]:
    return (config.r, site.in_features) if leaf == A else (config.num_B * config.r, site.out_features)


def init(
    config: LilyConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws: of each module all, of which those of the first one are shared."""
    made: dict[str, dict[str, Tensor]] = {SHARED: {}}
    for site in sites:
        sizes = {leaf: _shared_shape(config, site, leaf) for leaf in (A, B)} | shapes(config, site)
        leaves = {leaf: torch.empty(size, dtype=torch.float32) for leaf, size in sizes.items()}
        for leaf in (A, B, ROUTER, A, ROUTER, *(() if config.init_weights else (B,))):
            nn.init.kaiming_uniform_(leaves[leaf], a=math.sqrt(5), generator=generator)
        if config.init_weights:
            leaves[B].zero_()
        for leaf, name in site.shared.items():
            made[SHARED].setdefault(name, leaves[leaf])
        made[site.path] = {ROUTER: leaves[ROUTER]}
    return made


def apply(config: LilyConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + s h sum_e p_e B_e`, the sum in the wider dtype and rounded once to the base's.

    `B` is multiplied with all products `p_e h_i` in one row, so that no example has a matrix of its own.
    """
    y, hidden = base(x), _mapped(leaves[A], x)
    shares = _mapped(leaves[ROUTER], hidden).softmax(-1)
    if shares.ndim > 2:
        shares = shares.mean(tuple(range(1, shares.ndim - 1)), keepdim=True)
    mixed = (shares.unsqueeze(-1) * hidden.unsqueeze(-2)).flatten(-2)
    mixed, b = widen(mixed, _matrix(leaves[B]))
    return add_product(y, mixed, b.mT, site.constants.scaling)


def _mapped(leaf: Map, x: Tensor) -> Tensor:
    """Return an input times a matrix, in the wider dtype, or what the module computes that holds it."""
    return leaf(leaf.cast(x)) if isinstance(leaf, Called) else F.linear(*widen(x, leaf))


def _matrix(leaf: Map) -> Tensor:
    return read(leaf.module, "weight", leaf.path, leaf.name) if isinstance(leaf, Called) else leaf


def routed(config: LilyConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """Take the general way, in which each row has its own shares.

    Raises:
        UnsupportedCall: Rows for each token, while the shares are of all tokens of an example.
    """
    if rows.tokens is not None:
        raise UnsupportedCall(
            f"{site.path}: Lily's router mixes by all tokens of an example, so tokens cannot have adapters of their "
            "own; give route one index for each row of the batch"
        )
    return NotImplemented


def merge(config: LilyConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> NoReturn:
    """Refuse.

    Raises:
        UnsupportedConfig: Always; no weight computes a mix that depends on the input.
    """
    raise UnsupportedConfig(
        f"{site.path}: Lily's router mixes its matrices by the input, which no weight computes, so there is nothing to "
        "merge or to read as its weight; call the graft, or use graft.view(params)"
    )


LilyConfig.method = Method(
    name="LILY",
    config=LilyConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=LilyConstants,
    routed=routed,
    varying=frozenset({"scaling", "init_weights"}),
    abilities=(SharesLeaves(uses, shared_shapes),),
)


def _infer(config: LilyConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return rank and number of up-projections of the first router."""
    router = next((leaves[ROUTER] for leaves in found.values() if ROUTER in leaves), None)
    return {} if router is None or router.ndim != 2 else {"num_B": len(router), "r": router.shape[1]}


def _holder(config: LilyConfig, site: Site, leaf: str) -> nn.Module:
    """Return the linear layer that PEFT has for a leaf, without drawing numbers for it."""
    out, inputs = shapes(config, site)[ROUTER] if leaf == ROUTER else _shared_shape(config, site, leaf)
    return nn.Linear(inputs, out, bias=False, device="meta")


LilyConfig.form = PeftFormat(
    prefix="lily_",
    modules=(A, B, ROUTER),
    repeated=(A, B),
    holder=_holder,
    values={
        "r": Value(lambda config, site: config.r),
        "scaling": Value(lambda config, site: site.constants.scaling),
        "stride_A": Value(lambda config, site: config.stride_A),
        "num_B": Value(lambda config, site: config.num_B),
    },
    infer=_infer,
    ranked=(A,),
    only_here=("bias", "fan_in_fan_out"),
)
