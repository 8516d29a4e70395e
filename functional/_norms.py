"""Norms and clipping of a stack's gradients, adapter by adapter."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from ._trees import adapters_in


def norms(stacked: Any) -> Tensor:
    """Return the norm of each adapter's numbers over all leaves of a stack.

    Args:
        stacked: A stacked tree, of gradients or parameters, leaves `"N ..."`.

    Returns:
        Norms, `"N"`.

    Raises:
        ValueError: Leaves that disagree on `N`; names them.

    >>> norms({"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor([4.0, 2.0])})
    tensor([5., 2.])
    """
    count = adapters_in(stacked, "norms")
    leaves = optree.tree_leaves(stacked)
    each = [torch.linalg.vector_norm(leaf.reshape(count, leaf.shape[1:].numel()), dim=1) for leaf in leaves]
    result: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(each[0]) for norm in each]), dim=0)
    return result


def clip_by_norm(stacked: Any, max_norm: float | Tensor) -> Any:
    """Scale each adapter's gradients down so that their norm is at most `max_norm`.

    The numbers are those of `torch.nn.utils.clip_grad_norm_` for each adapter alone, `g * min(1, max / (norm + 1e-6))`.

    Args:
        stacked: A stacked tree of gradients, leaves `"N ..."`.
        max_norm: The largest norm, one number or `"N"`.

    Returns:
        A tree like `stacked`.

    Raises:
        ValueError: Leaves that disagree on `N`; names them.

    >>> clip_by_norm({"a": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}, 1.0)["a"].round(decimals=3)
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    factor = clip_factors(norms(stacked), max_norm)
    return optree.tree_map(lambda leaf: leaf * factor.to(leaf).view(-1, *(1,) * (leaf.ndim - 1)), stacked)


def clip_factors(norms: Tensor, max_norm: float | Tensor) -> Tensor:
    """Return what gradients of these norms are multiplied with, `min(1, max_norm / (norm + 1e-6))`.

    >>> clip_factors(torch.tensor([0.5, 4.0]), 1.0)
    tensor([1.0000, 0.2500])
    """
    return (max_norm / (norms + 1e-6)).clamp(max=1.0)
