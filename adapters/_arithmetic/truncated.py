"""The best product of a rank for a sum of products, or for a matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rank = int | Callable[[Tensor], int]
"""A rank, or a function of the singular values, `"... k"`, that chooses one."""


def truncate(a: Tensor, b: Tensor, rank: Rank) -> tuple[Tensor, Tensor]:
    """Return the factors of rank `rank`, or less, whose product is nearest to `b a`, which is never formed.

    `b = Q R` and `a^T = P S`, so the singular values of `b a` are those of the small `R S^T`. The first factor that is
    returned has orthonormal rows, the second the singular values in its columns, as PEFT has them.

    Args:
        a: `"blocks r in"`.
        b: `"blocks out r"`.
        rank: The rank.

    >>> a, b = truncate(torch.ones(1, 4, 3), torch.ones(1, 2, 4), 1)
    >>> a.shape, b.shape, torch.allclose(b @ a, torch.full((1, 2, 3), 4.0))
    (torch.Size([1, 1, 3]), torch.Size([1, 2, 1]), True)
    """
    q, r = torch.linalg.qr(b)
    p, s = torch.linalg.qr(a.mT)
    small_a, small_b = truncate_matrix(r @ s.mT, rank)
    return small_a @ p.mT, q @ small_b


def truncate_matrix(matrix: Tensor, rank: Rank) -> tuple[Tensor, Tensor]:
    """Return the factors of rank `rank`, or less, whose product is nearest to a matrix, `"... out in"`."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    rank = rank(s) if callable(rank) else rank
    return v[..., :rank, :], u[..., :rank] * s[..., None, :rank]


def clamped(a: Tensor, b: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Limit the entries of both factors to a quantile of all of them and their negatives.

    PEFT's `svd_clamp` takes that of the entries alone, which depends on the signs that singular vectors happen to have.

    >>> clamped(torch.tensor([[[1.0, -9.0]]]), torch.tensor([[[2.0]]]), 0.8)
    (tensor([[[ 1., -2.]]]), tensor([[[2.]]]))
    """
    entries = torch.cat([b.flatten(), a.flatten()])
    limit = torch.quantile(torch.cat([entries, -entries]), quantile)
    return a.clamp(-limit, limit), b.clamp(-limit, limit)
