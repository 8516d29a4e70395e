"""DEFT: decompositional fine-tuning, a part of the weight taken out and another put in.

    y = base(x) + Q (s R - P^T W) x,    W the base's own weight

`Q P^T` projects on a few directions of the outputs, in which the weight is replaced by `s R`. With
`decomposition_method="relu"` a trained matrix `p` gives both, `Q = p` and `P = relu(p)`, with `"qr"` it is made
orthonormal, `Q = P = qr(p)`. `para=True` only takes out, without `R`.

Kumar et al., *DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models*, 2025, arXiv:2509.22793. Names,
defaults and initial distributions are those of PEFT's `tuners/deft`.
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
    KeepsDtype,
    Layer,
    MergesOver,
    Method,
    PerAdapter,
    Rows,
    Site,
    Varying,
    Weights,
    widen,
)
from torchgraft.functional.extending import Dense, Original

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared import remade
from .shared.called import DROPOUT, Called, dropped
from .shared.low_rank import add_product, add_to_linear, route_to_linear

P, R = "deft_P", "deft_R"


@dataclasses.dataclass(kw_only=True)
class DeftConfig(AdapterConfig):
    """DEFT learns a few directions of a module's outputs and what the weight is to be in these.

    Supports linear layers (also `transformers`' `Conv1D`). A rank above the number of outputs is that number. Beside
    other adapters what is taken out is the base's own, as in PEFT.

    Where PEFT does otherwise: it starts from the identity up to rounding; here the two terms of the start are the same
    numbers, so that it is the base's output bit for bit, if `alpha / r` is a power of two. `P^T W` has the precision of
    `R`.

    Attributes:
        r: Number of directions.
        decomposition_method: `"relu"` or `"qr"`.
        init_scale: Factor of the standard deviation of `R`, for `init_weights=False`.
        alpha: Numerator of the scaling factor, `s = alpha / r`; 1 for `None` and 0.
        para: Only take out; this starts away from the base.
        deft_dropout: Probability of dropout on the input of `R`, in training mode.
        init_weights: `True` for the base's own `R`, `False` for a normal one.

    >>> DeftConfig(r=4, target_modules=["q_proj"]).decomposition_method
    'relu'
    """

    r: int = 8
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        p, how = self.deft_dropout, self.decomposition_method
        require(self.r > 0, self, f"r is {self.r}, expected a positive integer")
        require(how in ("relu", "qr"), self, f"decomposition_method is {how!r}, expected 'relu' or 'qr'")
        require(0 <= p < 1, self, f"deft_dropout is {p}, expected 0 <= p < 1")


@dataclasses.dataclass(frozen=True, eq=False)
class DeftConstants(Constants):
    """Rank of a site, and the scaling factor of `R`."""

    r: int
    scaling: Varying[float]


def plan(config: DeftConfig, sites: list[Site], weights: Weights) -> dict[str, DeftConstants]:
    """Return rank and scaling factor of each site."""
    ranks = {site.path: min(config.r, site.out_features) for site in sites}
    return {path: DeftConstants(r, config.alpha / r if config.alpha else 1.0) for path, r in ranks.items()}


def shapes(config: DeftConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`deft_P` is `"out r"` and `deft_R` is `"r in"`, which `para` has not."""
    r = site.constants.r
    own = {} if config.para else {R: (r, site.in_features)}
    return {P: (site.out_features, r), **own}


def init(
    config: DeftConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws; `R` is `P^T W / s`, with which nothing changes."""
    made = {}
    for site in sites:
        leaves = {leaf: torch.zeros(shape, dtype=torch.float32) for leaf, shape in shapes(config, site).items()}
        leaves[P].normal_(0.0, 0.02, generator=generator)
        if R in leaves and config.init_weights:
            weight = weights(site.path).to(leaves[P].device)
            leaves[P] = leaves[P].to(weight.dtype).to(torch.float32)  # as layers in place have it, of which `R` is made
            leaves[R] = _taken(config, leaves[P], weight)[1] / site.constants.scaling
        elif R in leaves:
            leaves[R].normal_(0.0, 0.02 * config.init_scale, generator=generator)
        made[site.path] = leaves
    return made


def apply(config: DeftConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + Q (s R dropout(x) - P^T W x)`, rounded once to the base's dtype; `P^T W` is `r` products with `W`."""
    q, taken = _taken(config, leaves[P], base.original.weight)
    put = _put(site, leaves, taken)
    dropout = leaves.get(DROPOUT, config.deft_dropout)
    if put is None or not (isinstance(dropout, Called) or (dropout and base.training)):
        return add_to_linear(base, x, _difference(put, taken), q, 1.0, 0.0)
    y, noisy = base(x), dropped(x, dropout, base.training)
    x, noisy, put, taken, q = widen(x, noisy, put, taken, q)
    return add_product(y, F.linear(noisy, put) - F.linear(x, taken), q, 1.0)


def routed(config: DeftConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with matrices for each row; with dropout it takes the general way."""
    if config.deft_dropout and base.training:
        return NotImplemented
    q, taken = _taken(config, leaves[P], base.original.weight)
    return route_to_linear(base, x, _difference(_put(site, leaves, taken), taken), q, 1.0, 0.0, rows)


def merge(config: DeftConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    """`W' = W + Q (s R - P^T W)`."""
    return merge_over(config, site, leaves, weight, bias, lambda: (weight, bias))


def merge_over(
    config: DeftConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None, original: Original
) -> Dense:
    """`merge` on a weight that other adapters are in; what is taken out is the base's own."""
    q, taken = _taken(config, leaves[P], original()[0])
    weight, q, difference = widen(weight, q, _difference(_put(site, leaves, taken), taken))
    return torch.addmm(weight, q, difference), bias


def _taken(config: DeftConfig, p: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return `Q`, `"out r"`, and `P^T W`, `"r in"`, in float32 or wider, as the weight is; also of a stack."""
    p = p.to(torch.promote_types(torch.promote_types(p.dtype, weight.dtype), torch.float32))
    if config.decomposition_method == "qr":
        q = torch.linalg.qr(p)[0]
        return q, remade.product(q.mT, weight)
    return p, remade.product(p.relu().mT, weight)


def _put(site: Site, leaves: dict[str, Tensor], taken: Tensor) -> Tensor | None:
    """Return `s R`; `None` where there is no `R`."""
    if R not in leaves:
        return None
    r, scaling = leaves[R], site.constants.scaling
    if isinstance(scaling, PerAdapter):
        scaling = scaling.values.view(-1, 1, 1)
    put: Tensor = (r.to(taken.dtype) * scaling).to(r.dtype)
    return put


def _difference(put: Tensor | None, taken: Tensor) -> Tensor:
    """Return what the input meets; `P^T W` is rounded as `R` is, so that a start without change is exactly that."""
    if put is None:
        return -taken
    return put.to(taken.dtype) - taken.to(put.dtype).to(taken.dtype)


DeftConfig.method = Method(
    name="DEFT",
    config=DeftConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=DeftConstants,
    routed=routed,
    varying=frozenset({"alpha", "init_scale", "init_weights"}),
    abilities=(MergesOver(merge_over), KeepsDtype(frozenset({R}))),
)


def _infer(config: DeftConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the rank, and whether there is an `R`."""
    ranks = [leaves[P].shape[1] for leaves in found.values() if P in leaves]
    return {"r": max(ranks), "para": not any(R in leaves for leaves in found.values())} if ranks else {}


DeftConfig.form = PeftFormat(
    prefix="deft_",
    layers="Deft{}",
    dropout="deft_dropout",
    parameters=(P, R),
    values={
        "deft_r": Value(lambda config, site: site.constants.r),
        "deft_scaling": Value(lambda config, site: site.constants.scaling),
    },
    infer=_infer,
    ranked=(R,),
    reads=("decomposition_method", "para"),
)
