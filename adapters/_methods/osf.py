"""OSF: the smaller singular triplets of the weight are trained, orthogonally to the larger ones, which stay.

    y = base(x) + (U diag(S) V - U0 diag(S0) V0) x,    W = U1 diag(S1) V1 + U0 diag(S0) V0

`U1`, `S1` and `V1` are the first `effective_rank` triplets of the weight, `U0`, `S0` and `V0` all others, from which
`U`, `S` and `V` start: the adapted weight is `U1 diag(S1) V1 + U diag(S) V`. A step of training moves `U` and `V` by
the part of their gradients that is orthogonal to `U1` and `V1`, which is not a property of the function but of the
step: `osf_gradients` takes it, and in place the parameters' own hooks do.

Nayak et al., *Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning*, 2025,
arXiv:2504.07097. Names, defaults and initial values are those of PEFT's `tuners/osf`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import Constants, Layer, Method, PerAdapter, Rows, Site, Varying, Weights, widen
from torchgraft.functional.extending import add_scaled

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.low_rank import route_to_linear

U, S, V = LEAVES = tuple(f"osf_svd_params.{part}_low" for part in "USV")


@dataclasses.dataclass(kw_only=True)
class OSFConfig(AdapterConfig):
    """OSF trains the smaller singular triplets of each targeted weight, whose larger ones hold what the model knows.

    Supports linear layers and, what PEFT refuses, `transformers`' `Conv1D`. The triplets are constants of the graft,
    made of the weights that it is bound to; files have only what is trained. Where no target is given and the type of
    the model is in no table, all linear layers are adapted but the output's, as in PEFT.

    The functional style, and a bank, has plain gradients, as autograd has them: `osf_gradients` is for the step. In
    place, as in PEFT, `backward` leaves projected ones in `.grad`; `torch.autograd.grad` has the plain ones, and so has
    a model that was sharded after the injection.

    Where PEFT does otherwise: it cannot unmerge; it takes an `effective_rank` that leaves nothing to train, which is an
    error here; and of several active adapters only the first one counts there.

    Attributes:
        effective_rank: Number of triplets that stay, or their share of all where it is a fraction; `None` for half.
        rank_pattern: The same for modules whose name a regular expression finds; the first one counts.
        init_weights: `False` for random numbers instead of the weight's triplets.
        target_svd_config: Has no effect, as in PEFT.

    >>> OSFConfig(effective_rank=0.75, target_modules=["q_proj"]).rank_pattern is None
    True
    """

    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None
    init_weights: bool | None = True
    target_svd_config: dict[str, int] | None = None

    method: ClassVar[Method]

    def for_model(self, model: nn.Module, modules: Mapping[str, nn.Module] | None = None) -> Self:
        """Return this config with its targets named as a model has them: all linear layers where nothing says which."""
        config = super().for_model(model, modules)
        return config if config.target_modules is not None else dataclasses.replace(config, target_modules="all-linear")


@dataclasses.dataclass(frozen=True, eq=False)
class OSFConstants(Constants):
    """What `U`, `S` and `V` start from, `"out r"`, `"r"` and `"r in"`, in the dtype of the weight, and what stays.

    `high_U`, `"out k"`, and `high_V`, `"k in"`, are there where the smaller triplets do not span all that is orthogonal
    to them.
    """

    low_U: Varying[Tensor]
    low_S: Varying[Tensor]
    low_V: Varying[Tensor]
    high_U: Varying[Tensor | None]
    high_V: Varying[Tensor | None]


def kept_rank(config: OSFConfig, site: Site) -> int:
    """Return the number of triplets that stay.

    >>> kept_rank(OSFConfig(rank_pattern={"0$": 0.75}), Site("layers.0", "linear", 8, 6))
    4
    """
    patterns, least = config.rank_pattern or {}, min(site.weight_shape)
    given = next((rank for key, rank in patterns.items() if re.search(key, site.path)), config.effective_rank)
    if given is None:
        return least // 2
    return int(least * given) if isinstance(given, float) and 0 < given <= 1 else int(given)


def plan(config: OSFConfig, sites: list[Site], weights: Weights) -> dict[str, OSFConstants]:
    """Return the singular triplets of each weight, in its dtype."""
    planned = {}
    for site in sites:
        k, least = kept_rank(config, site), min(site.weight_shape)
        what = f"effective_rank keeps {k} singular triplets at {site.path}, whose weight has {least}"
        require(0 < k < least, config, f"{what}; expected 1 to {least - 1}, so that some stay and some are trained")
        weight = weights(site.path)
        parts = (part.to(weight.dtype) for part in torch.linalg.svd(weight.float(), full_matrices=False))
        u, s, v = parts
        out, inputs = site.weight_shape
        high_u, high_v = u[:, :k].contiguous(), v[:k].contiguous()
        low = u[:, k:].contiguous(), s[k:].clone(), v[k:].contiguous()
        planned[site.path] = OSFConstants(*low, high_u if out > inputs else None, high_v if inputs > out else None)
    return planned


def shapes(config: OSFConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`U` is `"out r"`, `S` is `"r"` and `V` is `"r in"`."""
    out, inputs = site.weight_shape
    r = min(out, inputs) - kept_rank(config, site)
    return dict(zip(LEAVES, ((out, r), (r,), (r, inputs)), strict=True))


def init(
    config: OSFConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """The weights' triplets, or normal numbers in PEFT's order of draws."""
    made = {}
    for site in sites:
        made[site.path] = {
            leaf: torch.empty(shape, dtype=torch.float32).normal_(generator=generator)
            if config.init_weights is False
            else low.float().clone()
            for (leaf, shape), low in zip(shapes(config, site).items(), _low(site), strict=True)
        }
    return made


def apply(config: OSFConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + U S V x - U0 S0 V0 x`, the sum in the wider dtype and rounded once to the base's.

    Both products are made in the same way, so that they are equal bit for bit where the leaves are.
    """
    y = base(x)
    x, u, s, v, *low = widen(x, *(leaves[leaf] for leaf in LEAVES), *_low(site))
    u0, s0, v0 = low
    return add_scaled(y, F.linear(F.linear(x, v), u * s) - F.linear(F.linear(x, v0), u0 * s0), 1.0)


def routed(config: OSFConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with triplets for each row, as one product of twice the rank."""
    u, s, v = (leaves[leaf] for leaf in LEAVES)
    low = (one.values if isinstance(one, PerAdapter) else one.expand(len(u), *one.shape) for one in _low(site))
    u, s, v, u0, s0, v0 = widen(u, s, v, *low)
    a, b = torch.cat([v, v0], 1), torch.cat([u * s.unsqueeze(1), -u0 * s0.unsqueeze(1)], 2)
    return route_to_linear(base, x, a, b, 1.0, 0.0, rows)


def merge(
    config: OSFConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + U S V - U0 S0 V0`."""
    u, s, v = (leaves[leaf] for leaf in LEAVES)
    u0, s0, v0 = (one.to(weight.dtype) for one in _low(site))
    return weight + ((u * s) @ v - (u0 * s0) @ v0), bias


def _low(site: Site) -> tuple[Any, Any, Any]:
    return site.constants.low_U, site.constants.low_S, site.constants.low_V


def projected(site: Site, leaf: str, grad: Tensor) -> Tensor:
    """Return the part of a leaf's gradient that is orthogonal to the triplets that stay; of a stack each one's.

    `U1 U1^T + U0 U0^T` is the identity where `U` is square, so that `U0` alone says what is orthogonal to `U1` there.
    """
    if leaf == S:
        return grad
    low, high = (
        (site.constants.low_U, site.constants.high_U)
        if leaf == U
        else (
            site.constants.low_V,
            site.constants.high_V,
        )
    )
    basis = low if high is None else high
    grad, basis = widen(grad, basis.values if isinstance(basis, PerAdapter) else basis)
    along = basis @ (basis.mT @ grad) if leaf == U else (grad @ basis.mT) @ basis
    return along if high is None else grad - along


def _hook(config: OSFConfig, site: Site, leaf: str) -> Callable[[Tensor], Tensor] | None:
    return None if leaf == S else lambda grad: projected(site, leaf, grad).to(grad.dtype)


OSFConfig.method = Method(
    name="OSF",
    config=OSFConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=OSFConstants,
    routed=routed,
    varying=frozenset({"effective_rank", "rank_pattern", "init_weights", "target_svd_config"}),
)


def _infer(config: OSFConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the number of triplets that stay of modules where it is not the config's."""
    kept = {}
    for path, leaves in found.items():
        if U in leaves and V in leaves:
            (out, r), inputs = leaves[U].shape, leaves[V].shape[1]
            site = Site(path, "linear", inputs, out)
            if (rank := min(out, inputs) - r) != kept_rank(config, site):
                kept[f"^{re.escape(path)}$"] = rank
    return {"rank_pattern": kept | (config.rank_pattern or {})} if kept else {}


OSFConfig.form = PeftFormat(
    prefix="osf_",
    grouped=LEAVES,
    infer=_infer,
    gradients=_hook,
    values={"effective_rank": Value(kept_rank)},
    only_here=("bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform"),
)
