"""HiRA: Hadamard high-rank adaptation.

    y = base(x) + (W * (B A)) x,    W the base's own weight

The product of the weight and a matrix of rank `r`, entry by entry, has a rank up to `r` times that of the weight.

Huang et al., *HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models*, 2025, OpenReview
TwJrTz9cRS. Names, defaults and initial distributions are those of PEFT's `tuners/hira`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import (
    Constants,
    Layer,
    MergesOver,
    Method,
    Rows,
    Site,
    TakesComplex,
    Varying,
    Weights,
    widen,
)
from torchgraft.functional.extending import Dense, Original, add_scaled

from .._config.base import AdapterConfig
from .._config.matching import by_pattern
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared import fused, remade
from .shared.called import DROPOUT, Called, dropped
from .shared.embedding_grad import as_embedding
from .shared.scalings import ranks_of, warn_of_unused_patterns


@dataclasses.dataclass(kw_only=True)
class HiraConfig(AdapterConfig):
    """HiRA rescales each entry of a targeted weight by one plus an entry of a matrix of low rank.

    Supports linear layers (also `transformers`' `Conv1D`), embeddings, and 1-, 2- and 3-d convolutions in any number of
    groups, of which PEFT takes one. There is no scaling factor. Beside other adapters the weight is still the base's
    own, as in PEFT.

    Where PEFT does otherwise: it pads with zeros, whatever a convolution's padding mode. It adds rows of `W * (B A)` to
    what an embedding returns, so that one that scales its rows is not what it merges; here the output is rescaled.
    It gives gradients to an embedding's padding row, and does not divide them by how often an id occurs where the
    embedding says so; here gradients follow the embedding's settings.

    Attributes:
        r: Rank of `B A`.
        hira_dropout: Probability of dropout on the adapter's input, in training mode; embeddings ignore it.
        init_weights: `True` for a uniform `A` and a zero `B` (embeddings: a zero `A` and a normal `B`), `"gaussian"`
            for a normal `A` of standard deviation `1 / r` (embeddings and convolutions: as `True`), `False` for
            both random, and `None` too but for embeddings, which are as with `True`.
        rank_pattern: Ranks by pattern of the end of a module's name; the first that matches counts.

    >>> HiraConfig(r=4, target_modules=["q_proj"]).init_weights
    True
    """

    r: int = 32
    hira_dropout: float = 0.0
    init_weights: bool | str | None = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.hira_dropout < 1, self, f"hira_dropout is {self.hira_dropout}, expected 0 <= p < 1")
        what = f"init_weights is {self.init_weights!r}, expected True, False, None or 'gaussian'"
        require(not isinstance(self.init_weights, str) or self.init_weights.lower() == "gaussian", self, what)


@dataclasses.dataclass(frozen=True, eq=False)
class HiraConstants(Constants):
    """Rank of a site."""

    r: Varying[int]


def plan(config: HiraConfig, sites: list[Site], weights: Weights) -> dict[str, HiraConstants]:
    """Return the rank of each site."""
    warn_of_unused_patterns(config, sites, ("rank_pattern",))
    ranks = {site.path: by_pattern(config.rank_pattern, site.path, config.r) for site in sites}
    for path, r in ranks.items():
        require(r > 0, config, f"r is {r!r} at {path}, expected a positive integer")
    return {path: HiraConstants(r) for path, r in ranks.items()}


def shapes(config: HiraConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`A` is `"r in/groups *kernel"` and `B` is `"out r *ones"`; of an embedding `"r vocab"` and `"dim r"`."""
    r, (out, *rest) = site.constants.r, site.weight_shape
    a, b = _names(site)
    return {a: (r, *rest), b: (out, r, *(1 for _ in site.kernel_size))}


def _names(site: Site) -> tuple[str, str]:
    """Return the leaves that hold `A` and `B`."""
    return ("hira_embedding_A", "hira_embedding_B") if site.kind == "embedding" else ("hira_A", "hira_B")


def init(
    config: HiraConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws, of which the first are drawn over."""
    made = {}
    for site in sites:
        leaves = {
            leaf: torch.randn(shape, dtype=torch.float32, generator=generator)
            for leaf, shape in shapes(config, site).items()
        }
        if config.init_weights or (config.init_weights is None and site.kind == "embedding"):
            a, b = leaves.values()
            if site.kind == "embedding":
                a.zero_()
                b.normal_(generator=generator)
            elif config.init_weights is True or site.kernel_size:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
                b.zero_()
            else:
                a.normal_(std=1 / site.constants.r, generator=generator)
                b.zero_()
        made[site.path] = leaves
    return made


def apply(config: HiraConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + (W * (B A)) dropout(x)`, the sum in the wider dtype and rounded once to the base's.

    A linear layer of full precision is one product with `W * (1 + B A)`, which is not kept for the backward. A single
    token takes `r` products with `W` instead, `sum_k b_k * (W (a_k * x))`, so that no weight is made.
    """
    a, b = (leaves[name] for name in _names(site))
    if site.kind == "embedding":
        y = base(x)
        gains = as_embedding(site, x, F.linear(*widen(F.embedding(x, a.mT), b)))
        return _add_rows(y, base, x, gains)
    dropout = leaves.get(DROPOUT, config.hira_dropout)
    dropping = isinstance(dropout, Called) or bool(dropout and base.training)
    single = site.kind == "linear" and x.numel() == x.shape[-1]
    linear = None if torch.compiler.is_compiling() or dropping or single else base.as_linear
    if linear is not None and x.itemsize >= 4 and fused.fits(x, linear[0], a, b):
        return remade.linear(_rescaled, x, *linear, a, b, pull=_pull)
    y, weight = base(x), base.original.weight
    x, a, b = widen(dropped(x, dropout, base.training), a, b)
    if single:
        each = F.linear(x.unsqueeze(-2) * a, weight.to(x.dtype))
        return add_scaled(y, (each * b.mT).sum(-2), 1.0)
    if site.kind == "linear":
        return add_scaled(y, remade.linear(_delta, x, weight, None, a, b, pull=_pull), 1.0)
    return add_scaled(y, site.call(x, _delta(weight.to(x.dtype), a, b)), 1.0)


def routed(config: HiraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` for embeddings, each row with factors of its own; other layers take the general way."""
    if site.kind != "embedding":
        return NotImplemented
    a, b = widen(*(leaves[name] for name in _names(site)))
    groups = rows.groups()
    index = torch.arange(groups.size, device=x.device) if groups.index is None else groups.index.clamp(min=0)
    ids, adapter = x.reshape(groups.size, -1), index.view(-1, 1)
    gains = as_embedding(site, ids, a.mT[adapter, ids] @ groups.pick(b).mT, adapter, len(a))
    y = base(x)
    return _add_rows(y, base, x, groups.mask(gains).reshape(y.shape))


def _add_rows(y: Tensor, base: Layer, x: Tensor, gains: Tensor) -> Tensor:
    """`y` and the base's own rows times `gains`."""
    own = base.original
    own_rows, gains = widen(y if own is base else own(x), gains)
    return add_scaled(y, own_rows * gains, 1.0)


def merge(config: HiraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    """`W' = W + W * (B A)`."""
    return merge_over(config, site, leaves, weight, bias, lambda: (weight, bias))


def merge_over(
    config: HiraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None, original: Original
) -> Dense:
    """`merge` on a weight that other adapters are in; what is rescaled is the base's own."""
    a, b = (leaves[name] for name in _names(site))
    return weight + _delta(original()[0], a, b), bias


def _delta(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`W * (B A)`."""
    return weight * _product(weight, a, b)


def _rescaled(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`W * (1 + B A)`, bit for bit `W` where `B` is zero."""
    return torch.addcmul(weight, weight, _product(weight, a, b))


def _pull(g: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of `A` and `B` behind `W * (B A)`."""
    of_product = (g.mT @ x).mul_(weight)
    return b.mT @ of_product, of_product @ a.mT


def _product(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`B A` in the shape of the weight, and laid out like one of two axes: by its strides torch chooses kernels."""
    if weight.ndim == 2 and weight.mT.is_contiguous():
        return (a.mT @ b.mT).mT
    return (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)


HiraConfig.method = Method(
    name="HIRA",
    config=HiraConfig,
    kinds=frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=HiraConstants,
    routed=routed,
    varying=frozenset({"r", "init_weights", "rank_pattern"}),
    abilities=(MergesOver(merge_over), TakesComplex()),
)


def _infer(config: HiraConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return ranks that differ from the config's, from the shapes of `A`."""
    ranks = {path: len(leaves[name]) for path, leaves in found.items() for name in leaves if name.endswith("_A")}
    return ranks_of(config, ranks)


HiraConfig.form = PeftFormat(
    prefix="hira_",
    dropout="hira_dropout",
    parameters=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    infer=_infer,
    ranked=("hira_A", "hira_embedding_A"),
    values={"r": Value(lambda config, site: site.constants.r)},
    only_here=("bias",),
)
