"""Adapters of a stack copied over others of it, as population-based training does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from ._messages import given_type
from ._rows import is_readable
from ._trees import adapters_in


def copy_rows(tree: Any, from_: int | Sequence[int] | Tensor, to: int | Sequence[int] | Tensor) -> Any:
    """Return a stack in which adapters `to` are copies of adapters `from_`; nothing is changed.

    Adapter `to[i]` of the result is adapter `from_[i]` of `tree`, and the others are as they were. Sources are read
    before anything is written, so `copy_rows(tree, [0, 1], [1, 0])` exchanges two.

    Args:
        tree: A stack, or what else is nested dicts with leaves `"N ..."`: an optimizer's moments.
        from_: Which adapters are copied: one, or `"k"`.
        to: Where to: one, or `"k"`.

    Returns:
        A new tree like `tree`; differentiable.

    Raises:
        IndexError: There is no such adapter.
        TypeError: Indices that are not integers.
        ValueError: Other numbers of sources than of destinations, or a destination that is given twice.

    >>> copy_rows({"a": torch.tensor([1.0, 2.0, 3.0])}, 2, 0)
    {'a': tensor([3., 2., 3.])}
    """
    count = adapters_in(tree, "copy_rows")
    device = optree.tree_leaves(tree)[0].device
    sources, targets = (_index(given, name, count, device) for given, name in ((from_, "from_"), (to, "to")))
    if sources.shape != targets.shape:
        raise ValueError(
            f"copy_rows: from_ has {len(sources)} adapters and to has {len(targets)}; give each destination its source"
        )
    if _can_read(targets) and len(set(targets.tolist())) < len(targets):
        raise ValueError(f"copy_rows: to is {targets.tolist()}, and an adapter can be the copy of one only")
    index = torch.arange(count, device=device).scatter(0, targets, sources)
    return optree.tree_map(lambda leaf: leaf.index_select(0, index), tree)


def _index(given: Any, name: str, count: int, device: torch.device) -> Tensor:
    index = torch.as_tensor(given, device=device) if isinstance(given, (int, Sequence, Tensor)) else None
    if index is None or index.ndim > 1 or (index.numel() and (index.is_floating_point() or index.dtype is torch.bool)):
        what = f"{index.dtype} of shape {tuple(index.shape)}" if index is not None else given_type(given)
        raise TypeError(f"copy_rows: {name} is {what}, expected an integer, or a list or tensor of them")
    index = index.reshape(-1).long()
    wrong = [i for i in index.tolist() if not 0 <= i < count] if _can_read(index) else []
    if wrong:
        raise IndexError(f"copy_rows: {name} has {wrong[0]}, and the stack has adapters 0 to {count - 1}")
    return index


def _can_read(index: Tensor) -> bool:
    return not torch.compiler.is_compiling() and is_readable(index)
