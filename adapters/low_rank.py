"""The step that low-rank methods share: adding a product of thin matrices to the base's output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.functional import widen


def add_scaled(y: Tensor, delta: Tensor, scaling: float) -> Tensor:
    """`y + scaling * delta`, summed in the wider dtype and rounded once to that of `y`.

    >>> add_scaled(torch.ones(2), torch.ones(2), 2.0)
    tensor([3., 3.])
    """
    wide, delta = widen(y, delta)
    return torch.add(wide, delta, alpha=scaling).to(y.dtype)


def add_product(y: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """`y + scaling * down up^T`, in one kernel where the dtypes allow it.

    Args:
        y: The base's output, `"... out"`.
        down: The input on `r` coordinates, `"... r"`.
        up: `"out r"`.
        scaling: Factor of the product.

    >>> add_product(torch.ones(1, 2), torch.ones(1, 1), torch.ones(2, 1), 2.0)
    tensor([[3., 3.]])
    """
    if y.dtype == down.dtype and y.ndim > 1:
        return torch.addmm(y.flatten(0, -2), down.flatten(0, -2), up.mT, alpha=scaling).view(y.shape)
    return add_scaled(y, F.linear(down, up), scaling)
