"""Experts that differ between the rows of a batch, as a forward gets them that runs once for all rows.

    y_i = x_i W_e + s (x_i L_ae) R_ae

for an entry `i` of expert `e` that belongs to a row with adapter `a`. The base's grouped product is computed once for
all entries, the thin ones in groups of one adapter and expert each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._sites.factored import FACTS, OPERATIONS, Factored, for_kernel, is_grouped
from .._sites.tensors import add_scaled
from .entries import Entries


class NotFollowed(Exception):
    """A use of a parameter of which it is not known whose rows it is multiplied with."""


class RowTerm(NamedTuple):
    """Thin products of the adapters of a stack.

    Attributes:
        left: `"adapters experts rows r"`.
        right: `"adapters experts r columns"`.
        scaling: What all of them are multiplied by.
        adapters: The adapter of each row of the batch, `-1` for none.
        base: Whether there are rows without any.
    """

    left: Tensor
    right: Tensor
    scaling: float
    adapters: Tensor
    base: bool


class RowWeight:
    """Matrices of experts that are others for each row of a batch.

    They can be transposed, and multiplied in groups with a tensor of which each entry's row is known. All else raises
    `NotFollowed`, and has `entries` note it, should the forward catch that.

    Args:
        weight: The weight with the adapters that all rows have.
        terms: What the rows' own adapters add.
        entries: Knows whose the entries of tensors are.
    """

    __slots__ = ("entries", "terms", "weight")

    def __init__(self, weight: Tensor | Factored, terms: Sequence[RowTerm], entries: Entries):
        self.weight, self.terms, self.entries = weight, terms, entries

    @property
    def mT(self) -> RowWeight:
        """The weight with its last two axes exchanged."""
        terms = [term._replace(left=term.right.mT, right=term.left.mT) for term in self.terms]
        return RowWeight(self.weight.mT, terms, self.entries)

    def transpose(self, dim0: int, dim1: int) -> RowWeight:
        """Exchange the last two axes."""
        return self.mT if {dim0 % 3, dim1 % 3} == {1, 2} else self._lose("transpose")

    swapaxes = swapdims = transpose

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight, name) if name in FACTS else self._lose(name)

    def _lose(self, name: str) -> Any:
        self.entries.lost = True
        raise NotFollowed(name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        y = _grouped(func, *args, **(kwargs or {})) if is_grouped(func) else NotImplemented
        if y is NotImplemented:
            weight = next(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, RowWeight))
            weight._lose(getattr(func, "__name__", ""))
        return y


for _name in (*OPERATIONS, "getitem", "iter", "len", "matmul", "rmatmul"):
    setattr(RowWeight, f"__{_name}__", lambda self, *others, _name=_name: self._lose(_name))


def _grouped(func: Any, a: Any, b: Any, offs: Any = None, **options: Any) -> Any:
    """Multiply entries sorted by expert, `"entries rows"`, by their experts; `offs` is where each expert's end."""
    rows = None if isinstance(a, RowWeight) else b.entries.rows_of(a)
    if rows is None or a.ndim != 2 or not isinstance(offs, Tensor):
        return NotImplemented
    y = func(a, b.weight, offs=offs, **options)
    places = torch.arange(len(a), device=a.device, dtype=offs.dtype)
    experts = torch.searchsorted(offs, places, right=True)
    for term in b.terms:
        y = add_scaled(y, _in_groups(func, a, term, term.adapters[rows], experts), term.scaling)
    b.entries.note(y, rows)
    return y


def _in_groups(func: Any, x: Tensor, term: RowTerm, adapters: Tensor, experts: Tensor) -> Tensor:
    """Multiply the entries of each adapter and expert by its thin matrices, in one grouped product.

    Entries without adapter, or behind all experts, stand behind all groups, where kernels leave memory as it is.
    """
    count = term.left.shape[1]
    groups = len(term.left) * count
    active = (adapters >= 0) & (experts < count)
    group = torch.where(active, adapters * count + experts, groups)
    ordered, order = group.sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(groups, device=x.device), right=True, out_int32=True)
    left, right = for_kernel(term.left.flatten(0, 1).to(x.dtype), term.right.flatten(0, 1).to(x.dtype))
    x = torch.where(active.unsqueeze(1), x, 0) if term.base else x
    y = func(func(x.index_select(0, order), left, offs=ends), right, offs=ends).index_select(0, order.argsort())
    return torch.where(active.unsqueeze(1), y, 0) if term.base else y
