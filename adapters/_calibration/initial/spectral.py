"""Initial factors from the weight's own spectrum: PiSSA, OLoRA, MiCA; and orthogonal ones from random numbers.

Each function is pure: a canonical weight (`"out in"`, float32 or wider), a rank, a scaling factor, and where numbers
are drawn a generator. The formulas are those of PEFT's `tuners/lora/layer.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""`A`, `"r in"`, and `B`, `"out r"`."""

SEED = 0
"""Seed of the randomised decompositions: a weight has one result, in whatever process."""


def pissa(weight: Tensor, r: int, scaling: float, niter: int | None = None) -> Factors:
    """Return the principal part of a weight: `s B A = U_r S_r V_r^T`, shared out evenly between the two.

    Meng et al., *PiSSA: Principal Singular Values and Singular Vectors Adaptation*, 2024, arXiv:2404.02948.

    Args:
        weight: `"out in"`.
        r: Rank.
        scaling: The adapter's scaling factor, `s`.
        niter: Steps of a randomised decomposition; `None` for the exact one.

    >>> a, b = pissa(torch.diag(torch.tensor([4.0, 1.0])), 1, 1.0)
    >>> b @ a
    tensor([[4., 0.],
            [0., 0.]])
    """
    if niter is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vh = randomised_svd(weight, r, niter, torch.Generator().manual_seed(SEED))
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def olora(weight: Tensor, r: int) -> Factors:
    """Return the first columns of `Q` and the first rows of `R`, of `W = Q R`.

    Büyükakyüz, *OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models*, 2024, arXiv:2406.01775.

    >>> a, b = olora(torch.diag(torch.tensor([4.0, 1.0])), 2)
    >>> b @ a
    tensor([[4., 0.],
            [0., 1.]])
    """
    q, upper = torch.linalg.qr(weight)
    return upper[:r].contiguous(), q[:, :r].contiguous()


def mica(weight: Tensor, r: int) -> Factors:
    """Return a zero `A`, and as `B` the left singular vectors of the smallest singular values, which stays as it is.

    *MiCA: Minor Component Adaptation*, arXiv:2604.01694.

    >>> a, b = mica(torch.diag(torch.tensor([4.0, 1.0])), 1)
    >>> b.abs().flatten().tolist(), a.tolist()
    ([0.0, 1.0], [[0.0, 0.0]])
    """
    u = torch.linalg.svd(weight, full_matrices=False)[0]
    return weight.new_zeros(r, weight.shape[1]), u[:, -r:].contiguous()


def orthogonal(in_features: int, out_features: int, r: int, generator: torch.Generator | None = None) -> Factors:
    """Random factors with `B A = 0`: `A` and `B` use every other row of one orthogonal matrix.

    Datta, *Rethinking LoRA initialisation*, 2024, datta0.github.io/posts/rethink-lora-init.

    Args:
        in_features: Columns of `A`.
        out_features: Rows of `B`.
        r: Rank, an even number.
        generator: Source of the random numbers, drawn in PEFT's order.

    >>> a, b = orthogonal(4, 3, 2, torch.Generator().manual_seed(0))
    >>> bool((b @ a).abs().max() < 1e-6)
    True
    """
    device = None if generator is None else generator.device
    q = torch.linalg.qr(torch.randn(r, r, generator=generator, device=device))[0]
    a = torch.randn(in_features, r // 2, generator=generator, device=device) @ q[0::2]
    b = torch.randn(r // 2, out_features, generator=generator, device=device).mT @ q[1::2]
    return a.mT / 10, b / 10


def randomised_svd(matrix: Tensor, q: int, niter: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first `q` singular values and vectors, by subspace iteration; the generator is the only randomness.

    Halko, Martinsson and Tropp, *Finding Structure with Randomness*, 2009, arXiv:0909.4061, algorithms 4.4 and 5.1.
    From one seed it gives what `torch.svd_lowrank` gives from the global one.

    Args:
        matrix: `"m n"`.
        q: Number of singular values, at most `min(m, n)`.
        niter: Steps of subspace iteration.
        generator: Source of the random numbers, on the CPU.

    Returns:
        `U`, `"m q"`; `S`, `"q"`; `V^T`, `"q n"`.

    >>> u, s, vh = randomised_svd(torch.diag(torch.tensor([4.0, 2.0, 1.0])), 2, 8, torch.Generator().manual_seed(0))
    >>> [round(x, 3) for x in s.tolist()]
    [4.0, 2.0]
    """
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = randomised_svd(matrix.mT, q, niter, generator)
        return vh.mT, s, u.mT
    start = torch.randn(matrix.shape[1], q, dtype=matrix.dtype, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(niter):
        basis = torch.linalg.qr(matrix.mT @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ u, s, vh
