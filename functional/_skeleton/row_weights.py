"""Parameters that differ between the rows of a batch, as a forward gets them that runs once for all rows.

    y_i = x_i W_e + (x_i L_ae) R_ae

for an entry `i` of a row with adapter `a`, and of expert `e` where the parameter is one of experts. The base's product
is computed once for all entries, the thin ones in groups of one adapter and expert each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._sites.factored import FACTS, Factored, Term, for_kernel, is_grouped
from .._sites.tensors import add_scaled, widen
from .entries import Entries

_MATMUL = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)

_BATCHED = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


class NotFollowed(Exception):
    """A use of a parameter of which it is not known whose rows it is multiplied with."""


class RowTerm(NamedTuple):
    """Thin products of the adapters of a stack.

    Attributes:
        left: `"adapters ... rows r"`.
        right: `"adapters ... r columns"`.
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
    """A matrix, or one for each expert, that is another one for each row of a batch.

    It can be multiplied with tensors of which each entry's row is known; experts can be picked, transposed and
    multiplied in groups. All else raises `NotFollowed`, and has `entries` note it.

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
        n = self.weight.ndim
        return self.mT if {dim0 % n, dim1 % n} == {n - 2, n - 1} else self._unknown("transpose")

    def t(self) -> RowWeight:
        """Transpose a matrix."""
        return self.mT if self.weight.ndim == 2 else self._unknown("t")

    T = property(t)

    def __getitem__(self, key: Any) -> Any:
        number = type(key) is int or (isinstance(key, Tensor) and key.ndim == 0 and key.dtype == torch.int64)
        if self.weight.ndim == 3 and number:
            terms = [term._replace(left=term.left[:, key], right=term.right[:, key]) for term in self.terms]
            return RowWeight(self.weight[key], terms, self.entries)
        rows = self.entries.rows_of(key)
        if self.weight.ndim != 3 or rows is None or key.ndim != 1 or key.dtype != torch.int64:
            return self._unknown("[]")
        weight = self.weight[key]
        base = weight if isinstance(weight, Factored) else Factored(weight, ())
        own = [_picked(term, term.adapters[rows], key) for term in self.terms]
        return EntryWeight(Factored(base.weight, [*base.terms, *own]), rows, self.entries)

    def __matmul__(self, other: Any) -> Any:
        return self._unknown("@")

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight, name) if name in FACTS else self._unknown(name)

    def _unknown(self, what: str) -> Any:
        self.entries.lost = True
        raise NotFollowed(what)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        w = next(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, RowWeight))
        y = NotImplemented
        if func is F.linear:
            y = _linear(func, *args, **(kwargs or {}))
        elif func in _MATMUL and len(args) == 2 and not kwargs:
            y = _matmul(func, *args)
        elif is_grouped(func):
            y = _grouped(func, *args, **(kwargs or {}))
        return w._unknown(getattr(func, "__name__", "")) if y is NotImplemented else y


class EntryWeight:
    """A matrix for each of some entries: what `RowWeight` has for their experts and rows."""

    __slots__ = ("entries", "rows", "weight")

    def __init__(self, weight: Factored, rows: Tensor, entries: Entries):
        self.weight, self.rows, self.entries = weight, rows, entries

    @property
    def mT(self) -> EntryWeight:
        """The weight with its last two axes exchanged."""
        return EntryWeight(self.weight.mT, self.rows, self.entries)

    def transpose(self, dim0: int, dim1: int) -> EntryWeight:
        """Exchange the last two axes."""
        return self.mT if {dim0 % 3, dim1 % 3} == {1, 2} else self._unknown("transpose")

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight, name) if name in FACTS else self._unknown(name)

    def _unknown(self, what: str) -> Any:
        self.entries.lost = True
        raise NotFollowed(what)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        w = next(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, EntryWeight))
        others = [x for x in args if not isinstance(x, EntryWeight)]
        if func not in _BATCHED or kwargs or len(args) != 2 or len(others) != 1:
            return w._unknown(getattr(func, "__name__", ""))
        x = others[0]
        if w.entries.rows_of(x) is not w.rows or x.ndim != 3:
            return w._unknown("bmm")
        y = torch.bmm(*(w.weight if one is w else one for one in args))
        w.entries.note(y, w.rows)
        return y


def _picked(term: RowTerm, adapters: Tensor, experts: Tensor) -> Term:
    """Return each entry's own thin matrices; zeros, without gradient, where it has no adapter."""
    at = adapters.clamp(min=0) if term.base else adapters
    left, right = term.left[at, experts], term.right[at, experts]
    if term.base:
        active = (adapters >= 0).view(-1, 1, 1)
        left, right = torch.where(active, left, 0), torch.where(active, right, 0)
    return Term(left, right, term.scaling)


def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, RowWeight) or isinstance(bias, (RowWeight, Factored)) or weight.ndim != 2:
        return NotImplemented
    return _added(func(input, weight.weight, bias), input, weight.mT, _by_counts)


def _matmul(func: Any, a: Any, b: Any) -> Any:
    if isinstance(a, RowWeight) or b.ndim != 2:
        return NotImplemented
    return _added(func(a, b.weight), a, b, _by_counts)


def _grouped(func: Any, a: Any, b: Any, offs: Any = None, **options: Any) -> Any:
    if isinstance(a, RowWeight) or b.ndim != 3 or offs is None or a.ndim != 2:
        return NotImplemented
    y = func(a, b.weight, offs=offs, **options)
    experts = torch.searchsorted(offs, torch.arange(len(a), device=a.device, dtype=offs.dtype), right=True)

    def product(x: Tensor, term: RowTerm, adapters: Tensor) -> Tensor:
        return _in_groups(func, x, term, adapters, experts)

    return _added(y, a, b, product)


def _added(y: Tensor, x: Tensor, w: RowWeight, product: Callable[[Tensor, RowTerm, Tensor], Tensor]) -> Any:
    """Return `y` with the thin products of each entry's own adapters."""
    rows = w.entries.rows_of(x)
    if rows is None or x.ndim < 2:
        return NotImplemented
    for term in w.terms if len(x) else ():
        y = add_scaled(y, product(x, term, term.adapters[rows]), term.scaling)
    w.entries.note(y, rows)
    return y


def _by_counts(x: Tensor, term: RowTerm, adapters: Tensor) -> Tensor:
    """Multiply the entries of each adapter by its thin matrices, one adapter after the other."""
    order = adapters.argsort(stable=True)
    counts = torch.bincount(adapters + 1, minlength=len(term.left) + 1).tolist()
    wide, left, right = widen(x, term.left, term.right)
    parts = wide.index_select(0, order).split(counts)
    products = [part @ left[i] @ right[i] for i, part in enumerate(parts[1:]) if len(part)]
    if counts[0]:
        products.insert(0, parts[0].new_zeros(*parts[0].shape[:-1], right.shape[-1]))
    y = torch.cat(products)
    return torch.empty_like(y).index_copy(0, order, y)


def _in_groups(func: Any, x: Tensor, term: RowTerm, adapters: Tensor, experts: Tensor) -> Tensor:
    """Multiply the entries of each adapter and expert by its thin matrices, in one grouped product.

    Entries without adapter, or behind all experts, stand behind all groups, where kernels leave memory as it is.
    """
    count = term.left.shape[1]
    groups = len(term.left) * count
    group = adapters * count + experts
    active = (adapters >= 0) & (experts < count)
    group = torch.where(active, group, groups)
    order = group.argsort(stable=True)
    ends = torch.bincount(group, minlength=groups + 1)[:groups].cumsum(0, dtype=torch.int32)
    left, right = for_kernel(term.left.flatten(0, 1).to(x.dtype), term.right.flatten(0, 1).to(x.dtype))
    x = torch.where(active.unsqueeze(1), x, 0) if term.base else x
    y = func(func(x.index_select(0, order), left, offs=ends), right, offs=ends)
    y = torch.empty_like(y).index_copy(0, order, y)
    return torch.where(active.unsqueeze(1), y, 0) if term.base else y
