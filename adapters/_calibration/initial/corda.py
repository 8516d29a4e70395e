"""CorDA: factors from the weight as the data sees it.

Yang et al., *CorDA: Context-Oriented Decomposition Adaptation of Large Language Models*, 2024, arXiv:2406.05223; PEFT's
`tuners/lora/corda.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spectral import Factors

MOST_ERROR = 0.05
"""Distance of `C C^-1` from the identity from which on the covariance is damped more."""


def covariance(x: Tensor) -> Tensor:
    """Return what one batch of inputs adds to the covariance: `X^T X`, with `X` relative to its largest entry.

    Args:
        x: `"tokens in"`.

    >>> covariance(torch.tensor([[1.0, 2.0]]))
    tensor([[0.2500, 0.5000],
            [0.5000, 1.0000]])
    """
    x = x / x.max().abs()
    return x.mT @ x


def oriented(weight: Tensor, cov: Tensor, r: int, mode: str) -> dict[str, Tensor]:
    """Return singular values and vectors of `W C`, those that the mode adapts: `W = U S (V^T C^-1)`.

    `C` gets a hundredth of its mean diagonal added, and twice as much again until its inverse is one.

    Args:
        weight: `"out in"`.
        cov: `C`, the mean covariance of the inputs, `"in in"`.
        r: Rank.
        mode: `"ipm"`, the instruction-previewed mode, adapts the largest; `"kpm"`, the knowledge-preserved one, the
            smallest.

    Returns:
        `U`, `"out r"`; `S`, `"r"`; `V`, `"in r"`, with the inverse of `C` in it.

    Raises:
        ValueError: A covariance that cannot be inverted.

    >>> parts = oriented(torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2), 1, "kpm")
    >>> {name: tuple(part.shape) for name, part in parts.items()}
    {'U': (2, 1), 'S': (1,), 'V': (2, 1)}
    """
    damped, inverse = _inverted(cov.to(weight.dtype))
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    v = (vh @ inverse).mT
    part = slice(0, r) if mode == "ipm" else slice(len(s) - r, len(s))
    return {"U": u[:, part].clone(), "S": s[part].clone(), "V": v[:, part].clone()}


def _inverted(cov: Tensor) -> tuple[Tensor, Tensor]:
    eye = torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    damp = 0.01
    while cov.isfinite().all() and cov.diagonal().mean() > 0 and damp < 1e6:
        damped = cov + eye * (cov.diagonal().mean() * damp)
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < MOST_ERROR:
            return damped, inverse
        damp *= 2
    raise ValueError(
        f"the covariance of the inputs cannot be inverted (its mean diagonal is {cov.diagonal().mean():.3g}); give "
        "other batches"
    )


def corda(parts: dict[str, Tensor], scaling: float) -> Factors:
    """`A = sqrt(S / s) V^T` and `B = U sqrt(S / s)`, of what `oriented` returns.

    >>> a, b = corda({"U": torch.ones(2, 1), "S": torch.full((1,), 4.0), "V": torch.ones(3, 1)}, 1.0)
    >>> a, b.flatten()
    (tensor([[2., 2., 2.]]), tensor([2., 2.]))
    """
    root = (parts["S"] / scaling).sqrt()
    return root[:, None] * parts["V"].mT, parts["U"] * root
