"""DeLoRA: decoupled low-rank adaptation, whose distance from the base has a bound of its own.

    y = base(x) + (lambda / r) sum_i b_i / |b_i| (a_i / |a_i|) (n * x),    n_j = |W_j|, the norm of a column of W

Columns `b_i` of `B` and rows `a_i` of `A` say in which directions the weight moves, and the one number `lambda` how
far: the sum has at most the norm `lambda`, and `n` makes that relative to the weight. Norms below 1e-4 count as 1e-4.

Bini et al., *DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation*, 2025, arXiv:2503.18225. The norms of
columns in the place of the weight's are PEFT's, as are names, defaults and initial distributions, `tuners/delora`.
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
from .._config.matching import by_pattern
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared import fused
from .shared.called import DROPOUT, dropped
from .shared.low_rank import add_to_site, route_to_linear
from .shared.scalings import ranks_of, warn_of_unused_patterns

NORM = "delora_w_norm"
"""The constant that has the norms of the weight's columns."""

_SMALLEST = 1e-4


@dataclasses.dataclass(kw_only=True)
class DeloraConfig(AdapterConfig):
    """DeLoRA adds a product of two thin matrices whose directions and whose strength are trained apart.

    Supports linear layers and, what PEFT refuses, `transformers`' `Conv1D`, embeddings and convolutions in any number
    of groups, whose weight is a matrix, `"out in/groups*kernel"`. The norms of the weight's columns are constants of
    the graft, taken from the base when it is bound; files hold them, and in place they are
    buffers.

    Attributes:
        r: Rank.
        delora_lambda: What `lambda` starts with, a positive number.
        module_dropout: Probability of dropout on the adapter's input, in training mode, element by element, as in
            PEFT, in spite of the name; embeddings ignore it.
        init_weights: `True` for a zero `B`, `False` for both random.
        rank_pattern: Ranks by pattern of the end of a module's name; the first that matches counts.
        lambda_pattern: The same for `delora_lambda`.

    >>> DeloraConfig(r=4, target_modules=["q_proj"]).delora_lambda
    15
    """

    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    init_weights: bool = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    lambda_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        p = self.module_dropout
        require(0 <= p < 1, self, f"module_dropout is {p}, expected 0 <= p < 1")


@dataclasses.dataclass(frozen=True, eq=False)
class DeloraConstants(Constants):
    """Rank of a site, what its `lambda` starts with, and the norms of its weight's columns, `"in/groups*kernel"`."""

    r: Varying[int]
    start: Varying[float]
    delora_w_norm: Tensor


def plan(config: DeloraConfig, sites: list[Site], weights: Weights) -> dict[str, DeloraConstants]:
    """Return rank and start of each site, and the norms of its weight's columns."""
    warn_of_unused_patterns(config, sites, ("rank_pattern", "lambda_pattern"))
    planned = {}
    for site in sites:
        r = by_pattern(config.rank_pattern, site.path, config.r)
        start = by_pattern(config.lambda_pattern, site.path, config.delora_lambda)
        require(r > 0, config, f"r is {r} at {site.path}, expected a positive integer")
        what = f"delora_lambda is {start} at {site.path}, expected a positive number, the bound of the change"
        require(0 < start < math.inf, config, what)
        weight = weights(site.path).flatten(1)
        norm = weight.to(torch.promote_types(weight.dtype, torch.float32)).norm(dim=0)
        planned[site.path] = DeloraConstants(r, start, norm)
    return planned


def shapes(config: DeloraConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`A` is `"r in/groups*kernel"`, `B` is `"out r"`, `lambda` is `"1"`."""
    r, (rows, *columns) = site.constants.r, site.weight_shape
    return {"delora_A": (r, math.prod(columns)), "delora_B": (rows, r), "delora_lambda": (1,)}


def init(
    config: DeloraConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws: one state of the generator gives PEFT's numbers, bit for bit."""
    made = {}
    for site in sites:
        leaves = {leaf: torch.zeros(shape, dtype=torch.float32) for leaf, shape in shapes(config, site).items()}
        nn.init.kaiming_uniform_(leaves["delora_A"], a=math.sqrt(5), generator=generator)
        if not config.init_weights:
            nn.init.kaiming_uniform_(leaves["delora_B"], a=math.sqrt(5), generator=generator)
        leaves["delora_lambda"].fill_(site.constants.start)
        made[site.path] = leaves
    return made


def apply(config: DeloraConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + (lambda / r) B A (n * x)` with unit vectors in `A` and `B`, rounded once to the base's dtype.

    Both are scaled before they meet the input, so a linear layer takes what LoRA's does; of a small one it is what
    comes out of `A` that is scaled. The weight is made for convolutions in groups alone.
    """
    dropout = leaves.get(DROPOUT, config.module_dropout)
    if site.kind == "linear" and not fused.pays(x):
        norm, length, strength = _scales(site, leaves)
        y = base(x)
        x, a, b = widen(dropped(x, dropout, base.training), leaves["delora_A"] * norm, leaves["delora_B"])
        return add_scaled(y, F.linear(F.linear(x, a) * (strength / length).to(x.dtype), b), 1.0)
    a, b = _factors(site, leaves)
    return add_to_site(site, base, x, a, b, dropout)


def routed(config: DeloraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with factors for each row; embeddings and convolutions take the general way."""
    if site.kind != "linear":
        return NotImplemented
    return route_to_linear(base, x, *_factors(site, leaves), 1.0, config.module_dropout, rows)


def merge(
    config: DeloraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + (lambda / r) B A diag(n)` with unit vectors in `A` and `B`."""
    a, b = _factors(site, leaves)
    return add_scaled(weight, (b @ a).reshape(weight.shape), 1.0), bias


def _factors(site: Site, leaves: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return `A` of unit rows, times the columns' norms, and `B` of unit columns, times `lambda / r`; also stacked."""
    a, b = leaves["delora_A"], leaves["delora_B"]
    norm, length, strength = _scales(site, leaves)
    return a / length.to(a.dtype).unsqueeze(-1) * norm, (b * strength.unsqueeze(-2)).to(b.dtype)


def _scales(site: Site, leaves: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the columns' norms, the lengths of the rows of `A`, and `lambda / r` over those of the columns of `B`."""
    a, b, r = leaves["delora_A"], leaves["delora_B"], site.constants.r
    norm = leaves.get(NORM, site.constants.delora_w_norm).to(a.dtype)
    if norm.is_meta and not a.is_meta:
        raise ValueError(
            f"{site.path}: the weight was on the meta device when DeLoRA's norms were taken of it, so they have no "
            "values; bind the model again, now that it is loaded, or load an adapter, whose file has them"
        )
    r = r.values.unsqueeze(-1) if isinstance(r, PerAdapter) else r
    wide = torch.promote_types(b.dtype, torch.float32)  # of which the quotient of two small numbers is one
    strength = (leaves["delora_lambda"].to(wide) / r).to(wide) / _lengths(b, -2)
    return norm, _lengths(a, -1), strength


def _lengths(vectors: Tensor, dim: int) -> Tensor:
    """Return the norms of vectors along an axis, in float32 or wider."""
    wide = torch.promote_types(vectors.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=dim, dtype=wide)
    return norms.clamp(min=_SMALLEST)


DeloraConfig.method = Method(
    name="DELORA",
    config=DeloraConfig,
    kinds=frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=DeloraConstants,
    routed=routed,
    varying=frozenset({"r", "delora_lambda", "init_weights", "rank_pattern", "lambda_pattern"}),
)


def _infer(config: DeloraConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return ranks that differ from the config's."""
    return ranks_of(config, {path: len(leaves["delora_A"]) for path, leaves in found.items() if "delora_A" in leaves})


DeloraConfig.form = PeftFormat(
    prefix="delora_",
    layers="Delora{}",
    parameters=("delora_A", "delora_B", "delora_lambda", NORM),
    dropout="delora_dropout",
    probability="module_dropout",
    fixed=lambda config, site: (NORM,),
    buffers=(NORM,),
    infer=_infer,
    ranked=("delora_A",),
    values={"r": Value(lambda config, site: site.constants.r)},
    only_here=("fan_in_fan_out",),
)
