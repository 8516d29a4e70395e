"""VeRA: vector-based random matrix adaptation.

    y = base(x) + b * (B (d * (A x))),    A and B random, frozen and shared by all modules

Kopiczko et al., *VeRA: Vector-based Random Matrix Adaptation*, 2023, arXiv:2310.11454. Names, defaults and initial
distributions are those of PEFT's `tuners/vera`.
"""

from __future__ import annotations

import dataclasses
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
    RunsInOneStep,
    Site,
    TakesComplex,
    Varying,
    Weights,
    widen,
)
from torchgraft.functional.extending import Leaves, Step

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared import fused
from .shared.called import DROPOUT, dropped, is_dropping
from .shared.projections import check_rank, draw_pair


@dataclasses.dataclass(kw_only=True)
class VeraConfig(AdapterConfig):
    """VeRA learns two vectors per module, around one pair of random matrices that all modules share.

    Supports linear layers (also `transformers`' `Conv1D`). The shared matrices are as large as the largest targeted
    module; each module takes its first rows and columns. They are constants of the graft, drawn from
    `projection_prng_key` alone, and no leaves of the tree.

    Attributes:
        r: Rank.
        projection_prng_key: Seed of the shared matrices.
        save_projection: Whether files hold the shared matrices too.
        vera_dropout: Probability of dropout on the adapter's input, in training mode.
        d_initial: Initial value of the vector `d`.
        init_weights: `True` for a constant `d` and a zero `b`, `False` for a normal `d` and a `b` of ones.

    >>> VeraConfig(r=64, target_modules=["q_proj"]).d_initial
    0.1
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.r, int) and self.r > 0, self, f"r is {self.r!r}, expected a positive integer")
        require(0 <= self.vera_dropout < 1, self, f"vera_dropout is {self.vera_dropout}, expected 0 <= p < 1")


@dataclasses.dataclass(frozen=True, eq=False)
class VeraConstants(Constants):
    """The matrices that all sites share: `"r max_in"` and `"max_out r"`."""

    vera_A: Varying[Tensor]
    vera_B: Varying[Tensor]


def plan(config: VeraConfig, sites: list[Site], weights: Weights) -> dict[str, VeraConstants]:
    """Return the shared matrices: `vera_A` is `"r max_in"` and `vera_B` is `"max_out r"`, over all sites."""
    a, b = draw_pair(config.projection_prng_key, sites, config.r, config.r)
    return {site.path: VeraConstants(a, b) for site in sites}


def shapes(config: VeraConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`vera_lambda_b` is `"out"`, `vera_lambda_d` is `"r"`."""
    return {"vera_lambda_b": (site.out_features,), "vera_lambda_d": (config.r,)}


def init(
    config: VeraConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws; a constant `d` uses up the same random numbers."""
    made = {}
    for site in sites:
        b = torch.ones(site.out_features, dtype=torch.float32)
        d = torch.randn(config.r, dtype=torch.float32, generator=generator)
        if config.init_weights:
            b, d = torch.zeros_like(b), torch.full_like(d, config.d_initial)
        made[site.path] = {"vera_lambda_b": b, "vera_lambda_d": d}
    return made


def apply(config: VeraConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + b * (B (d * (A dropout(x))))`, the sum in the wider dtype and rounded once to the base's."""
    lambda_b, lambda_d = leaves["vera_lambda_b"], leaves["vera_lambda_d"]
    dropout = leaves.get(DROPOUT, config.vera_dropout)
    linear = None if torch.compiler.is_compiling() or is_dropping(dropout, base.training) else base.as_linear
    if linear is not None and fused.fits(x, linear[0], lambda_b, lambda_d):
        return _linear(x, *linear, *_projections(site, x.dtype), lambda_b, lambda_d)
    y = base(x)
    x, lambda_b, lambda_d = widen(dropped(x, dropout, base.training), lambda_b, lambda_d)
    a, b = _projections(site, x.dtype)
    wide, lambda_b, up = widen(y, lambda_b, F.linear(lambda_d * F.linear(x, a), b))
    return torch.addcmul(wide, lambda_b, up).to(y.dtype)


def _decide(config: VeraConfig, site: Site) -> Step:
    """Return `apply` as one step."""
    up, down = (site.out_features,), (config.r,)

    def step(x: Tensor, weight: Tensor, bias: Tensor | None, leaves: Leaves, training: bool) -> Tensor | None:
        b, d = leaves["vera_lambda_b"], leaves["vera_lambda_d"]
        if b.is_meta or d.is_meta or x.is_nested or (training and config.vera_dropout):
            return None
        if b.shape != up or d.shape != down:
            return None
        return _linear(x, weight, bias, *_projections(site, x.dtype), b, d) if fused.fits(x, weight, b, d) else None

    return step


def routed(config: VeraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with vectors for each row; adapters with projections of their own take the general way."""
    if isinstance(site.constants.vera_A, PerAdapter) or isinstance(site.constants.vera_B, PerAdapter):
        return NotImplemented
    y = base(x)
    if config.vera_dropout:
        x = F.dropout(x, config.vera_dropout, training=base.training)
    x, lambda_b, lambda_d = widen(x, leaves["vera_lambda_b"], leaves["vera_lambda_d"])
    a, b = _projections(site, x.dtype)
    groups = rows.groups()
    lambda_b, lambda_d = (groups.pick(vector).unsqueeze(1) for vector in (lambda_b, lambda_d))
    per_group = F.linear(x, a).reshape(groups.size, -1, a.shape[0])
    wide, lambda_b, up = widen(y, lambda_b, F.linear(lambda_d * per_group, b))
    return torch.addcmul(wide.reshape(up.shape), lambda_b, up).view(y.shape).to(y.dtype)


def merge(
    config: VeraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + diag(b) B diag(d) A`."""
    a, b = _projections(site, weight.dtype)
    return torch.addmm(weight, leaves["vera_lambda_b"].unsqueeze(1) * b, leaves["vera_lambda_d"].unsqueeze(1) * a), bias


def _projections(site: Site, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the site's part of the shared matrices."""
    a = site.constants.vera_A[:, : site.in_features]
    b = site.constants.vera_B[: site.out_features]
    return a.to(dtype), b.to(dtype)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, lambda_b: Tensor, lambda_d: Tensor
) -> Tensor:
    """`x W^T + bias + b * (B (d * (A x)))`, of large inputs as one step of autograd, which keeps what PEFT does."""
    if not fused.pays(x) or a.requires_grad or b.requires_grad:
        return F.linear(x, weight, bias) + lambda_b * F.linear(lambda_d * F.linear(x, a), b)
    down = F.linear(x.flatten(0, -2), a)
    if torch.is_grad_enabled():
        arguments = (x, weight, bias, a, b, lambda_b, lambda_d, down)
        result: Tensor = _Linear.apply(*arguments)  # type: ignore[no-untyped-call,unused-ignore]
        return result
    up = F.linear(down.mul_(lambda_d), b)
    return fused.shaped(fused.base_output(x, weight, bias).addcmul_(lambda_b, up), x)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        lambda_b: Tensor,
        lambda_d: Tensor,
        down: Tensor,
    ) -> Tensor:
        up = F.linear(lambda_d * down, b)
        ctx.save_for_backward(x if weight.requires_grad else None, weight, a, b, lambda_b, lambda_d, down, up)
        return fused.shaped(fused.base_output(x, weight, bias).addcmul_(lambda_b, up), x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, a, b, lambda_b, lambda_d, down, up = ctx.saved_tensors
        for_x, for_weight, for_bias, _, _, for_b, for_d, _ = ctx.needs_input_grad
        flat = g.reshape(-1, g.shape[-1])
        if torch.is_grad_enabled():  # what was kept is no function of `down` and `d` to a second derivative
            up = F.linear(lambda_d * down, b)
        g_down = (flat * lambda_b) @ b
        gb, gd = (flat * up).sum(0) if for_b else None, (g_down * down).sum(0) if for_d else None
        gx = None
        if for_x:  # with what comes through `down`, which is an input for the sake of second derivatives alone
            gx = (flat @ weight).addmm_(g_down * lambda_d, a).view(*g.shape[:-1], a.shape[1])
        gw = flat.mT @ x.reshape(-1, x.shape[-1]) if for_weight else None
        return gx, gw, flat.sum(0) if for_bias else None, None, None, gb, gd, None


VeraConfig.method = Method(
    name="VERA",
    config=VeraConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=VeraConstants,
    routed=routed,
    varying=frozenset({"r", "projection_prng_key", "save_projection", "d_initial", "init_weights"}),
    abilities=(TakesComplex(), RunsInOneStep(_decide)),
)


VeraConfig.form = PeftFormat(
    prefix="vera_",
    dropout="vera_dropout",
    parameters=("vera_lambda_b", "vera_lambda_d"),
    ranked=("vera_lambda_d",),
    values={
        "r": Value(lambda config, site: config.r),
        "vera_A": Value(lambda config, site: site.constants.vera_A),
        "vera_B": Value(lambda config, site: site.constants.vera_B),
    },
    infer=lambda config, found: {"r": len(next(iter(found.values()))["vera_lambda_d"])},
    shared=("vera_A", "vera_B"),
    saves_shared=lambda config: config.save_projection,
    check=lambda config, found: check_rank(config, found, "vera_lambda_d", config.r, "r"),
    only_here=("exclude_modules",),
)
