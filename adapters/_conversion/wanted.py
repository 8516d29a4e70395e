"""How much of a change to keep: a rank, a share of its energy, or all of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from .._arithmetic.truncated import truncate_matrix

_SMALL = 256
"""Up to this size of a matrix a full decomposition is as fast as a randomised one."""

_EXTRA = 16
_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to keep of a change; of several blocks (experts, groups) each has the same rank.

    Attributes:
        rank: The rank, or the most that a matrix has where that is less.
        energy: The share of the sum of squared singular values, `0 < energy <= 1`; of blocks, of their sum.

    With neither, or an energy of 1, all that is no rounding error.
    """

    rank: int | None = None
    energy: float | None = None

    def check(self, what: str) -> None:
        """Refuse what means nothing.

        Raises:
            TypeError, ValueError: Both are given, or one that is out of range.
        """
        rank: Any = self.rank
        energy: Any = self.energy
        if rank is not None and energy is not None:
            raise ValueError(f"{what}: rank is {rank!r} and energy {energy!r}; give one of the two")
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
            raise TypeError(f"{what}: rank is {rank!r:.60}, expected an integer; a share of the energy is energy=...")
        if rank is not None and rank < 1:
            raise ValueError(f"{what}: rank is {rank}, expected at least 1")
        if energy is None:
            return
        if isinstance(energy, bool) or not isinstance(energy, (int, float)):
            raise TypeError(f"{what}: energy is {energy!r:.60}, expected a number, 0 < energy <= 1")
        if not 0 < energy <= 1:
            raise ValueError(f"{what}: energy is {energy}, expected 0 < energy <= 1, the share that is kept")

    @property
    def all(self) -> bool:
        """Whether all is to be kept."""
        return self.rank is None and self.energy in (None, 1)

    def of(self, singular: Tensor, total: float, floor: float) -> int:
        """Return the rank to cut to.

        Args:
            singular: Singular values, `"blocks k"`, or those that were found.
            total: The sum of all squared ones.
            floor: Singular values up to this are rounding errors.
        """
        if self.rank is not None:
            return min(self.rank, singular.shape[-1])
        above = int((singular > floor).sum(-1).max())
        if self.all:
            return max(1, above)
        kept = singular.square().sum(0).cumsum(0)
        assert self.energy is not None
        found = int((kept < self.energy * total * (1 - 1e-12)).sum()) + 1
        return max(1, min(found, singular.shape[-1]))


def nearest(matrix: Tensor, wanted: Wanted, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the factors `A` and `B` whose product is nearest to a matrix.

    Where the rank is small against the matrix, only that much of its range is looked for, with random vectors and
    power iterations (Halko, Martinsson, Tropp, *Finding Structure with Randomness*, 2011, arXiv:0909.4061, algorithm
    4.4). That is exact for matrices of that rank, and for others nearly the nearest; the random vectors are the same
    in each call, so that one matrix has one result. For a share of the energy the range grows until it has that.

    Args:
        matrix: `"blocks out in"`.
        wanted: What to keep.
        floor: Singular values up to this are rounding errors.

    Returns:
        `A`, `"blocks r in"`, whose rows are orthonormal, and `B`, `"blocks out r"`.

    >>> a, b = nearest(torch.ones(1, 3, 2), Wanted())
    >>> a.shape, torch.allclose(b @ a, torch.ones(1, 3, 2))
    (torch.Size([1, 1, 2]), True)
    """
    most = min(matrix.shape[-2:])
    total = float(matrix.abs().square().sum())
    floor = max(floor, torch.finfo(matrix.dtype).eps * max(matrix.shape[-2:]) * total**0.5)
    size = 32 if wanted.rank is None else wanted.rank + _EXTRA
    while most > _SMALL and 4 * size <= most:
        basis = _range(matrix, size)
        inner = basis.mH @ matrix
        if wanted.rank is not None or _is_enough(matrix, basis, inner, wanted, total, floor):
            a, b = truncate_matrix(inner, lambda singular: wanted.of(singular, total, floor))
            return a, basis @ b
        size *= 2
    return truncate_matrix(matrix, lambda singular: wanted.of(singular, total, floor))


def _range(matrix: Tensor, size: int) -> Tensor:
    """Return an orthonormal basis of nearly the largest directions of a matrix's range, `"blocks out size"`."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[-1], size, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(_STEPS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mH @ basis).Q).Q
    return basis


def _is_enough(matrix: Tensor, basis: Tensor, inner: Tensor, wanted: Wanted, total: float, floor: float) -> bool:
    if not wanted.all:
        assert wanted.energy is not None
        return float(inner.abs().square().sum()) >= wanted.energy * total
    left = float(torch.linalg.matrix_norm(matrix - basis @ inner).max())
    most: int = min(matrix.shape[-2:])
    return left <= floor * math.sqrt(most)  # of as many rounding errors as there are directions
