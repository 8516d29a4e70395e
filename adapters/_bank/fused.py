"""AdamW and SGD for the rows of a bank: torch's fused kernels, on lists of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .optimizers import Kernel, Row

_LEAST = 1e-30
"""Factors from here to its inverse are numbers in float32."""


def adamw(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Kernel:
    """Make AdamW for the rows of a bank, as `torch.optim.AdamW`; each adapter may have other values at each step.

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        w = w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.

    Args:
        lr: Learning rate.
        betas: Decay of both moments.
        eps: Added to the denominator, above 0.
        weight_decay: Decoupled decay.

    Raises:
        ValueError: A value out of its range.

    >>> adamw(lr=3e-4).hyper["lr"]
    0.0003
    """
    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return Kernel("adamw", hyper, ("exp_avg", "exp_avg_sq"), _adamw)


def _adamw(rows: Sequence[Row], hyper: Mapping[str, Any]) -> None:
    beta1, beta2 = hyper["betas"]
    for alike, scale in _equally_scaled(rows):
        torch._fused_adamw_(
            [row.parameters for row in alike],
            [row.gradient for row in alike],
            [row.moments["exp_avg"] for row in alike],
            [row.moments["exp_avg_sq"] for row in alike],
            [],
            [row.step for row in alike],
            lr=hyper["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=hyper["weight_decay"],
            eps=hyper["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
        )


def _equally_scaled(rows: Sequence[Row]) -> Iterator[tuple[list[Row], Tensor | None]]:
    """Yield rows whose gradients have one factor, and what a fused kernel is to divide these by.

    The kernels divide in float32, and where they read the gradient anyway; other rows are multiplied before.
    """
    groups: dict[float, list[Row]] = {}
    for row in rows:
        if row.gradient.dtype == torch.float64 or not _LEAST < row.factor < 1 / _LEAST:
            row.scaled()
        groups.setdefault(row.factor, []).append(row)
    for factor, alike in groups.items():
        yield alike, None if factor == 1 else torch.full((), 1 / factor, device=alike[0].gradient.device)


def sgd(
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> Kernel:
    """Make SGD with momentum for the rows of a bank, as `torch.optim.SGD`.

        g = g + decay w,  m = momentum m + (1 - dampening) g  (m = g at first),  w = w - lr m

    Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep learning", ICML 2013.

    Args:
        lr: Learning rate.
        momentum: Decay of the velocity.
        dampening: Part of a gradient that the velocity does not take.
        weight_decay: L2 penalty.
        nesterov: Look ahead along the velocity.

    Raises:
        ValueError: A value out of its range.

    >>> sgd(momentum=0.9).moments
    ('momentum_buffer',)
    """
    hyper = {
        "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov
    }  # fmt: skip
    return Kernel("sgd", hyper, ("momentum_buffer",), _sgd)


def _sgd(rows: Sequence[Row], hyper: Mapping[str, Any]) -> None:
    for first in (True, False):
        starting = [row for row in rows if _has_no_velocity(row, hyper) == first]
        for alike, scale in _equally_scaled(starting):
            torch._fused_sgd_(
                [row.parameters for row in alike],
                [row.gradient for row in alike],
                [row.moments["momentum_buffer"] for row in alike] if hyper["momentum"] else [],
                lr=hyper["lr"],
                weight_decay=hyper["weight_decay"],
                momentum=hyper["momentum"],
                dampening=hyper["dampening"],
                nesterov=hyper["nesterov"],
                maximize=False,
                is_first_step=first,
                grad_scale=scale,
            )


def _has_no_velocity(row: Row, hyper: Mapping[str, Any]) -> bool:
    """Return whether a row's velocity begins with this step, which may be a later one than its first."""
    return row.first or bool(hyper["dampening"] and not row.moments["momentum_buffer"].any())
