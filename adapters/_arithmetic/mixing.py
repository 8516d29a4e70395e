"""Weighted sums of tensors that are pruned, or agree on a sign, first: TIES, DARE, pruning by magnitude.

Yadav et al., *TIES-Merging: Resolving Interference When Merging Models*, 2023, arXiv:2306.01708; Yu et al., *Language
Models are Super Mario* (DARE), 2023, arXiv:2311.03099. Densities and signs are those of PEFT's `utils/merge_utils.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

Scalar = float | Tensor
"""A number, or a tensor without axes, to which gradients flow."""

PRUNING = {
    "ties": "magnitude",
    "dare_ties": "random",
    "dare_linear": "random",
    "magnitude_prune": "magnitude",
}
"""How each way that prunes does it."""
HOW = ("cat", "svd", "linear", *PRUNING, *(f"{name}_svd" for name in PRUNING))
"""All ways to combine."""
SIGNS = ("total", "frequency")


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How adapters are combined.

    Attributes:
        how: One of `HOW`.
        rank: The rank of the result, for `"svd"` and those that end in it.
        density: The share of entries that is kept, for those that prune.
        majority_sign: `"total"` or `"frequency"`.
        clamp: The quantile of the factors' entries, and their negatives, that limits them, after a decomposition.
        generator: The source of randomness, for DARE.
    """

    how: str = "cat"
    rank: int | None = None
    density: float | None = None
    majority_sign: str = "total"
    clamp: float | None = None
    generator: torch.Generator | None = None

    @property
    def truncates(self) -> bool:
        """Whether the result is cut to a rank."""
        return self.how.endswith("svd")

    @property
    def elementwise(self) -> str:
        """How tensors are added entry by entry: `"linear"` where none is pruned."""
        name = self.how.removesuffix("_svd")
        return name if name in PRUNING else "linear"

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            ValueError: Says what was given, and what to give.
        """
        if self.how not in HOW:
            raise ValueError(f"combine: how is {self.how!r}, expected one of {', '.join(map(repr, HOW))}")
        if self.rank is not None and not (self.truncates and isinstance(self.rank, int) and self.rank > 0):
            what = "a positive integer" if self.truncates else f"none with how={self.how!r}, which fixes the rank"
            raise ValueError(f"combine: rank is {self.rank!r}, expected {what}")
        prunes = self.elementwise in PRUNING
        if prunes and (self.density is None or not 0 < self.density <= 1):
            raise ValueError(
                f"combine: density is {self.density!r}, expected the share of entries that how={self.how!r} keeps, "
                "0 < density <= 1"
            )
        if not prunes and self.density is not None:
            raise ValueError(f"combine: density is {self.density!r}, and how={self.how!r} prunes nothing; leave it out")
        if self.majority_sign not in SIGNS:
            raise ValueError(f"combine: majority_sign is {self.majority_sign!r}, expected 'total' or 'frequency'")
        if self.clamp is not None and not (self.truncates and 0.5 < self.clamp <= 1):
            raise ValueError(f"combine: clamp is {self.clamp!r}, expected a quantile, 0.5 < clamp <= 1, with an svd")


def mix(tensors: Sequence[Tensor], weights: Sequence[Scalar], mixing: Mixing) -> Tensor:
    """Add tensors of one shape with weights, pruned first as asked.

    A negative weight counts as the negated tensor with a positive one, also where signs are elected.

    Args:
        tensors: The tensors.
        weights: A number for each.
        mixing: How.

    >>> one, two = torch.tensor([2.0, -1.0]), torch.tensor([3.0, 4.0])
    >>> mix([one, two], [1.0, 1.0], Mixing("ties", density=1.0))
    tensor([2.5000, 4.0000])
    """
    how = mixing.elementwise
    if how in PRUNING and mixing.density is not None and mixing.density != 1:
        tensors = [_pruned(tensor, PRUNING[how], mixing.density, mixing.generator) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    factors = torch.stack([torch.as_tensor(w, dtype=stacked.dtype, device=stacked.device) for w in weights])
    factors = factors.view(-1, *(1 for _ in stacked.shape[1:]))
    if how not in ("ties", "dare_ties"):
        return (stacked * factors).sum(0)
    signed = stacked * factors.sign()
    agree = (signed.sign() == elected(signed, mixing.majority_sign)).to(stacked.dtype)
    result: Tensor = (signed * factors.abs() * agree).sum(0) / agree.sum(0).clamp(min=1)
    return result


def _pruned(tensor: Tensor, method: str, density: float, generator: torch.Generator | None) -> Tensor:
    return keep_at_random(tensor, density, generator) if method == "random" else keep_largest(tensor, density)


def elected(stacked: Tensor, method: str) -> Tensor:
    """Return the sign of each entry that outweighs the other, or that more tensors have; 1 where neither does.

    >>> elected(torch.tensor([[3.0, 1.0], [-1.0, -1.0], [-1.0, 0.0]]), "total")
    tensor([1, 1])
    >>> elected(torch.tensor([[3.0, 1.0], [-1.0, -1.0], [-1.0, 0.0]]), "frequency")
    tensor([-1,  1])
    """
    balance = (stacked if method == "total" else stacked.sign()).sum(0)
    return torch.where(balance >= 0, 1, -1)


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Set all but the largest entries to zero: `int(density * n)` of `n` stay.

    >>> keep_largest(torch.tensor([1.0, -3.0, 2.0]), 0.67)
    tensor([ 0., -3.,  2.])
    """
    flat = tensor.reshape(-1)
    index = flat.detach().abs().topk(int(density * flat.numel())).indices
    mask = torch.zeros_like(flat).scatter(0, index, 1.0)
    return tensor * mask.view(tensor.shape)


def keep_at_random(tensor: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """Set entries to zero at random, and divide those that stay by the density, so that the mean is the same.

    >>> set(keep_at_random(torch.ones(100), 0.5, torch.Generator().manual_seed(0)).tolist())
    {0.0, 2.0}
    """
    mask = torch.bernoulli(torch.full_like(tensor, density, requires_grad=False), generator=generator)
    return tensor * mask / density


def square_root(weight: Scalar) -> Scalar:
    """Return the root of a weight's size, with a gradient of zero, not of infinity, at zero.

    >>> square_root(-4.0)
    2.0
    """
    if not isinstance(weight, Tensor):
        return float(abs(weight) ** 0.5)
    empty = weight == 0
    return torch.where(empty, 0.0, torch.where(empty, 1.0, weight).abs().sqrt())


def sign(weight: Scalar) -> Scalar:
    """Return the sign of a weight, 1 for zero.

    >>> sign(-4.0)
    -1.0
    """
    if isinstance(weight, Tensor):
        return torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype)
    return 1.0 if weight >= 0 else -1.0
