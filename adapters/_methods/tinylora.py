"""TinyLoRA: a few trained numbers between the singular vectors of each weight.

    y = base(x) + B R A x,    R = sum_i v_i P_i,    B = U sqrt(S),    A = sqrt(S) V,    U diag(S) V = W cut to rank r

`A`, `B` and the random `P` are frozen. The vector `v` is all that is trained, and groups of modules share one.

Morris et al., *Learning to Reason in 13 Parameters*, 2026, arXiv:2602.04118. Names, defaults and distributions are
those of PEFT's `tuners/tinylora`, and so is the root of the singular values in both factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.functional import (
    Constants,
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
from torchgraft.functional.extending import SHARED, add_scaled

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.called import DROPOUT
from .shared.low_rank import add_to_linear, route_to_linear


@dataclasses.dataclass(kw_only=True)
class TinyLoraConfig(AdapterConfig):
    """TinyLoRA learns one short vector for a group of modules, mapped into each by its singular vectors.

    Supports linear layers (also `transformers`' `Conv1D`) and embeddings. The vectors are leaves under `"*"`,
    `params["*"]["tinylora_v.0"]`; what is made of the weights and drawn from the seed are constants of the graft, which
    files hold. `r` is at most the smaller size of a weight, as in PEFT.

    Where PEFT does otherwise: a second adapter on a layer has the `P` of the first one's place among its modules, which
    its files without `P` do not give back; here each adapter's `P` is that of its own place.

    Attributes:
        r: Number of singular vectors.
        u: Size of each trained vector.
        weight_tying: Share of the modules that have no vector of their own: 0 for one each, 1 for one for all.
        projection_seed: Seed of `P` of the first module; each next one's is one more.
        save_projection: Whether files hold `P` too.
        init_v_bound: Bound of the uniform distribution of `init_weights="uniform"`.
        tinylora_dropout: Probability of dropout, in training mode, on the input, of an embedding on the rows of `B`.
        init_weights: `True` for zero vectors, `"uniform"` for random ones; `False`, which is memory as it comes in
            PEFT, for zero too.

    >>> TinyLoraConfig(u=13, weight_tying=1.0, target_modules=["q_proj"]).r
    2
    """

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    init_weights: bool | str = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "u"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} is {value}, expected a positive integer")
        tying, p, bound, start = self.weight_tying, self.tinylora_dropout, self.init_v_bound, self.init_weights
        require(0 <= tying <= 1, self, f"weight_tying is {tying}, expected 0 <= share <= 1")
        require(0 <= p < 1, self, f"tinylora_dropout is {p}, expected 0 <= p < 1")
        require(bound >= 0, self, f"init_v_bound is {bound}, expected a number >= 0")
        known = isinstance(start, bool) or start == "uniform"
        require(known, self, f"init_weights is {start!r}, expected True, False or 'uniform'")


V, FIXED = "tinylora_v", ("tinylora_A", "tinylora_B", "tinylora_P")


@dataclasses.dataclass(frozen=True, eq=False)
class TinyLoraConstants(Constants):
    """`A`, `"r in"`, `B`, `"out r"`, and `P`, `"u r r"`; of an embedding `A` is `"r dim"`, `B` `"vocab r"`."""

    tinylora_A: Varying[Tensor]
    tinylora_B: Varying[Tensor]
    tinylora_P: Varying[Tensor]


def plan(config: TinyLoraConfig, sites: list[Site], weights: Weights) -> dict[str, TinyLoraConstants]:
    """Return the singular vectors of each weight, and the projections from the seed, in the dtype of the weight."""
    planned = {}
    for place, site in enumerate(sites):
        weight = weights(site.path)
        stored = weight.mT if site.kind == "embedding" else weight
        u, s, v = torch.linalg.svd(stored.float(), full_matrices=False)
        r = min(config.r, len(s))
        u, s, v = (part.to(weight.dtype) for part in (u[:, :r], s[:r].clone(), v[:r]))
        generator = torch.Generator().manual_seed(config.projection_seed + place)
        p = torch.normal(0.0, r**-0.5, (config.u, r, r), generator=generator, device="cpu", dtype=torch.float32)
        a, b = s.sqrt().unsqueeze(1) * v, u * s.sqrt()
        planned[site.path] = TinyLoraConstants(a.contiguous(), b.contiguous(), p.to(weight))
    return planned


def group_of(config: TinyLoraConfig, place: int, count: int) -> int:
    """Return the group of the module at a place among those that are adapted.

    >>> [group_of(TinyLoraConfig(weight_tying=0.5), place, 5) for place in range(5)]
    [0, 0, 1, 1, 1]
    """
    groups = max(1, round(count * (1.0 - config.weight_tying)))
    return min(place // max(1, count // groups), groups - 1)


def uses(config: TinyLoraConfig, sites: list[Site]) -> dict[str, dict[str, str]]:
    """Return the vector that each site has."""
    return {site.path: {V: f"{V}.{group_of(config, place, len(sites))}"} for place, site in enumerate(sites)}


def shared_shapes(config: TinyLoraConfig, sites: list[Site]) -> dict[str, tuple[int, ...]]:
    """Each vector is `"u"`."""
    return {site.shared[V]: (config.u,) for site in sites}


def init(
    config: TinyLoraConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw the vectors, in PEFT's order of draws."""
    vectors = {}
    for name, shape in shared_shapes(config, sites).items():
        vectors[name] = torch.zeros(shape, dtype=torch.float32)
        if config.init_weights == "uniform":
            vectors[name].uniform_(-config.init_v_bound, config.init_v_bound, generator=generator)
    return {SHARED: vectors}


def apply(config: TinyLoraConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + B R A dropout(x)`, the sum in the wider dtype and rounded once to the base's."""
    a, b, p = _fixed(site, leaves)
    v, a, b, p = widen(leaves[V], a, b, p)
    between = _between(v, p)
    if site.kind == "embedding":
        y, rows = base(x), F.dropout(F.embedding(x, b), config.tinylora_dropout, base.training)
        return add_scaled(y, rows @ between @ a, 1.0)
    return add_to_linear(base, x, a, b @ between, 1.0, leaves.get(DROPOUT, config.tinylora_dropout))


def routed(config: TinyLoraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with a vector for each row; embeddings take the general way."""
    if site.kind == "embedding":
        return NotImplemented
    count = len(leaves[V])
    each = [
        one.values if isinstance(one, PerAdapter) else one.expand(count, *one.shape) for one in _fixed(site, leaves)
    ]
    v, a, b, p = widen(leaves[V], *each)
    between = _between(v, p)
    return route_to_linear(base, x, a, b @ between, 1.0, config.tinylora_dropout, rows)


def merge(
    config: TinyLoraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + B R A`, of an embedding as it is stored."""
    a, b, p = (one.to(weight.dtype) for one in _fixed(site, leaves))
    delta = b @ _between(leaves[V], p) @ a
    return weight + (delta.mT if site.kind == "embedding" else delta), bias


def _between(v: Tensor, p: Tensor) -> Tensor:
    """`R = sum_i v_i P_i`, `"r r"`, of vectors `"u"` and projections `"u r r"`; of a stack they are stacked."""
    return (v.unsqueeze(-2) @ p.flatten(-2)).view(*p.shape[:-3], *p.shape[-2:])


def _fixed(site: Site, leaves: dict[str, Any]) -> tuple[Any, Any, Any]:
    """`A`, `B` and `P`: an injected layer has them among its leaves."""
    a, b, p = (leaves[leaf] if leaf in leaves else getattr(site.constants, leaf) for leaf in FIXED)
    return a, b, p


TinyLoraConfig.method = Method(
    name="TINYLORA",
    config=TinyLoraConfig,
    kinds=frozenset({"linear", "embedding"}),
    plan=plan,
    shapes=lambda config, site: {},
    init=init,
    apply=apply,
    merge=merge,
    constants=TinyLoraConstants,
    routed=routed,
    varying=frozenset({"r", "u", "projection_seed", "save_projection", "init_v_bound", "init_weights"}),
    abilities=(SharesLeaves(uses, shared_shapes),),
)


def _infer(config: TinyLoraConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return sizes that differ from the config's, where there are such tensors."""
    ranks = [len(leaves["tinylora_A"]) for leaves in found.values() if "tinylora_A" in leaves]
    sizes = [len(v) for v in found.get(SHARED, {}).values()]
    return {**({"r": max(ranks)} if ranks else {}), **({"u": sizes[0]} if sizes else {})}


def _check(config: TinyLoraConfig, found: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Hold the size of the vectors, by which `plan` makes `P`, against the tensors."""
    for name, v in found.get(SHARED, {}).items():
        what = f"u is {config.u}, and {name} has shape {tuple(v.shape)}, expected (u,)"
        require(tuple(v.shape) == (config.u,), config, what)


TinyLoraConfig.form = PeftFormat(
    prefix="tinylora_",
    dropout="tinylora_dropout",
    parameters=FIXED,
    shared_leaves=(V,),
    fixed=lambda config, site: FIXED if config.save_projection else FIXED[:2],
    buffers=FIXED,
    values={
        "r": Value(lambda config, site: len(site.constants.tinylora_A)),
        "u": Value(lambda config, site: config.u),
    },
    infer=_infer,
    check=_check,
    only_here=("exclude_modules",),
)
