"""Muon for the rows of a bank: each matrix is stepped along the nearest semi-orthogonal one of its momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .fused import adamw, sgd
from .layout import Layout
from .optimizers import Kernel, Row, RowOptimizer

_COEFFICIENTS = (3.4445, -4.775, 2.0315)


def muon(
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = _COEFFICIENTS,
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr: str = "original",
) -> Kernel:
    """Make Muon for the rows of a bank, as `torch.optim.Muon`, of each adapter's own matrices without padding.

        m = momentum m + (1 - momentum) g,  u = orthogonal((1 - momentum) g + momentum m)
        w = w (1 - lr decay) - lr sqrt(max(1, rows / columns)) u

    The orthogonal factor is approximated in bfloat16 by steps of Newton and Schulz,
    `x = a x + (b x x^T + c (x x^T)^2) x`. Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
    2024.

    Args:
        lr: Learning rate.
        weight_decay: Decoupled decay.
        momentum: Decay of the momentum.
        nesterov: Look ahead along it.
        ns_coefficients: `a`, `b`, `c`.
        eps: Least norm that is divided by.
        ns_steps: How many steps.
        adjust_lr: How the rate depends on a matrix's shape: `"original"` as above, `"match_rms_adamw"` for
            `0.2 sqrt(max(rows, columns))`.

    Raises:
        ValueError: A value out of its range; in a bank, leaves that are no matrices.

    >>> muon(lr=0.02).hyper["momentum"]
    0.95
    """
    hyper = {
        "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
        "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr": adjust_lr,
    }  # fmt: skip
    return Kernel("muon", hyper, ("momentum_buffer",), _step, _refuse)


def _refuse(layout: Layout) -> None:
    for path, name, shape, _ in layout.leaves():
        if len(shape) != 2:
            raise ValueError(
                f"muon: {name} of {path!r} has shape {shape}, and Muon is for matrices; give these adapters another "
                "optimizer: bank.add(..., optimizer=adamw())"
            )


def _step(rows: Sequence[Row], hyper: Mapping[str, Any]) -> None:
    for row in rows:
        _step_row(row, hyper)


def _step_row(row: Row, hyper: Mapping[str, Any]) -> None:
    lr, momentum = hyper["lr"], hyper["momentum"]
    trees = [row.layout.views(t, row.own) for t in (row.parameters, row.scaled(), row.moments["momentum_buffer"])]
    for path, leaves in trees[0].items():
        for name, weight in leaves.items():
            gradient, velocity = trees[1][path][name], trees[2][path][name]
            velocity.lerp_(gradient, 1 - momentum)
            update = gradient.lerp(velocity, momentum) if hyper["nesterov"] else velocity
            rows, columns = row.own[path][name]
            update = orthogonal(
                update.reshape(rows, columns), hyper["ns_coefficients"], hyper["ns_steps"], hyper["eps"]
            )
            weight.mul_(1 - lr * hyper["weight_decay"])
            weight.add_(update.reshape(weight.shape), alpha=-lr * _ratio(hyper["adjust_lr"], rows, columns))


def _ratio(adjust: str, rows: int, columns: int) -> float:
    return 0.2 * math.sqrt(max(rows, columns)) if adjust == "match_rms_adamw" else math.sqrt(max(1, rows / columns))


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return nearly the nearest semi-orthogonal matrix, in bfloat16.

    >>> u = orthogonal(torch.diag(torch.tensor([3.0, 4.0])), (3.4445, -4.775, 2.0315), 5, 1e-7)
    >>> bool(((u.float().diag() > 0.5) & (u.float().diag() < 1.5)).all())
    True
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


BY_NAME: dict[str, Callable[..., RowOptimizer]] = {"adamw": adamw, "sgd": sgd, "muon": muon}
"""The optimizers that files name."""
