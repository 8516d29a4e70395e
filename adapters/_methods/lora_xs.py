"""LoRA-XS: a small trained matrix between the principal singular vectors of each weight.

    y = base(x) + s B R A x,    B = U S,    A = V^T,    U S V^T = W cut to rank r

`A` and `B` are frozen, and `R`, `"r r"`, is all that is trained, so that the number of parameters does not depend on
the sizes of the layers.

Bałazy et al., *LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters*, 2024, arXiv:2405.17604. PEFT
has no such method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchgraft.functional import Constants, Layer, Method, PerAdapter, Rows, Site, Varying, Weights, widen

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.called import DROPOUT
from .shared.low_rank import add_to_site, route_to_linear
from .shared.principal import check_known, principal

R = "lora_xs_R"


@dataclasses.dataclass(kw_only=True)
class LoraXSConfig(AdapterConfig):
    """LoRA-XS trains a small square matrix between a weight's principal input and output directions.

    Supports linear layers (also `transformers`' `Conv1D`), embeddings, and convolutions in any number of groups. The
    factors are constants of the graft, made from the weights when it is bound; files hold `R` alone, so they belong to
    one base. Beside other adapters the factors are still those of the base's own weight.

    Attributes:
        r: Number of singular vectors, at most the smaller size of each weight.
        lora_alpha: Numerator of the scaling factor, `s = lora_alpha / r`.
        lora_dropout: Probability of dropout on the adapter's input, in training mode; embeddings ignore it.
        init_weights: `True` for a zero `R`, the identity, from which gradients are not zero; `"gaussian"` for the
            paper's normal one of standard deviation 1e-5.

    >>> LoraXSConfig(r=4, target_modules=["q_proj"]).lora_alpha
    16
    """

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    init_weights: bool | str = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        p, start = self.lora_dropout, self.init_weights
        require(self.r > 0, self, f"r is {self.r}, expected a positive integer")
        require(0 <= p < 1, self, f"lora_dropout is {p}, expected 0 <= p < 1")
        known = start is True or start == "gaussian"
        require(known, self, f"init_weights is {start!r}, expected True or 'gaussian'")


@dataclasses.dataclass(frozen=True, eq=False)
class LoraXSConstants(Constants):
    """The frozen factors, `"r in/groups*kernel"` and `"out r"`, and the scaling factor."""

    a: Varying[Tensor]
    b: Varying[Tensor]
    scaling: Varying[float]


def plan(config: LoraXSConfig, sites: list[Site], weights: Weights) -> dict[str, LoraXSConstants]:
    """Return the factors of each weight.

    Raises:
        ValueError: A rank above the smaller size of a weight; names the site.
    """
    planned = {}
    for site in sites:
        weight = weights(site.path)
        most = min(weight.flatten(1).shape)
        what = f"r is {config.r} at {site.path}, whose weight as a matrix has the rank {most}; expected r <= {most}"
        require(config.r <= most, config, what)
        u, s, v = principal(weight, config.r)
        planned[site.path] = LoraXSConstants(v, u * s, config.lora_alpha / config.r)
    return planned


def shapes(config: LoraXSConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`"r r"`."""
    return {R: (config.r, config.r)}


def init(
    config: LoraXSConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Zeros, or small normal numbers."""
    made = {}
    for site in sites:
        leaf = torch.zeros(config.r, config.r, dtype=torch.float32)
        made[site.path] = {R: leaf if config.init_weights is True else leaf.normal_(0.0, 1e-5, generator=generator)}
    return made


def apply(config: LoraXSConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + s B R A dropout(x)`, the sum in the wider dtype and rounded once to the base's."""
    a, b = _factors(site, leaves[R])
    return add_to_site(site, base, x, a, b, leaves.get(DROPOUT, config.lora_dropout))


def routed(config: LoraXSConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with a matrix for each row; embeddings and convolutions take the general way."""
    if site.kind != "linear":
        return NotImplemented
    a, b = _factors(site, leaves[R])
    return route_to_linear(base, x, a.expand(len(b), *a.shape[-2:]), b, 1.0, config.lora_dropout, rows)


def merge(
    config: LoraXSConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + s B R A`."""
    a, b = _factors(site, leaves[R])
    return weight + (b @ a).reshape(weight.shape), bias


def _factors(site: Site, r: Tensor) -> tuple[Tensor, Tensor]:
    """Return `A` and `s B R`; of a stack, `"N r in"` or `"r in"`, and `"N out r"`."""
    fixed = site.constants
    a, b, scaling = (one.values if isinstance(one, PerAdapter) else one for one in (fixed.a, fixed.b, fixed.scaling))
    check_known(site, b, r, "LoRA-XS")
    if isinstance(scaling, Tensor) and scaling.ndim:
        scaling = scaling.view(-1, 1, 1)
    r, a, b = widen(r, a, b)
    return a, b @ (r * scaling).to(r.dtype)


LoraXSConfig.method = Method(
    name="LORA_XS",
    config=LoraXSConfig,
    kinds=frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=LoraXSConstants,
    routed=routed,
    varying=frozenset({"r", "lora_alpha", "init_weights"}),
)


def _infer(config: LoraXSConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the rank."""
    ranks = [len(leaves[R]) for leaves in found.values() if R in leaves]
    return {"r": max(ranks)} if ranks else {}


LoraXSConfig.form = PeftFormat(
    prefix="lora_xs_",
    dropout="lora_xs_dropout",
    probability="lora_dropout",
    parameters=(R,),
    values={
        "r": Value(lambda config, site: config.r),
        "scaling": Value(lambda config, site: site.constants.scaling),
    },
    infer=_infer,
    ranked=(R,),
)
