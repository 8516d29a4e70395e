"""Leaves of a stack whose padding would be trained: their zeros get no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from torchgraft.functional import PerAdapter


def unpadded(leaf: Tensor, count: int | Tensor | PerAdapter) -> Tensor:
    """Return a leaf that has zeros, without gradients, behind the numbers of its last axis that are an adapter's own.

    Args:
        leaf: `"... size"`, of a stack `"N ... size"`.
        count: How many numbers it has, a constant that varies; one that is no tensor is all of them.

    >>> leaf = torch.ones(3, requires_grad=True)
    >>> unpadded(leaf, torch.tensor(2)).sum().backward()
    >>> leaf.grad
    tensor([1., 1., 0.])
    """
    if isinstance(count, PerAdapter):
        count = count.values.view(-1, *(1 for _ in leaf.shape[1:]))
    elif not isinstance(count, Tensor):
        return leaf
    return torch.where(torch.arange(leaf.shape[-1], device=leaf.device) < count, leaf, 0)
