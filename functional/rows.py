"""Rows: which adapter of a stack each row of a batch uses, in the forms that sites need."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class PerAdapter:
    """A constant that differs between the adapters of a stack.

    Attributes:
        values: `"N ..."`.
    """

    values: Tensor


@dataclasses.dataclass(frozen=True)
class Groups:
    """Equal groups of consecutive rows, one adapter each.

    Attributes:
        size: Number of groups.
        index: The adapter of each group, `"groups"`, `-1` for none; `None` where group `i` uses adapter `i`.
        base: Whether an index may be `-1`.
    """

    size: int
    index: Tensor | None
    base: bool

    def pick(self, leaf: Tensor) -> Tensor:
        """Each group's own part of a stacked leaf, `"groups ..."`; any adapter's where the group has none.

        >>> Groups(3, torch.tensor([1, 1, 0]), base=False).pick(torch.tensor([5.0, 6.0]))
        tensor([6., 6., 5.])
        """
        if self.index is None:
            return leaf
        return leaf.index_select(0, self.index.clamp(min=0) if self.base else self.index)

    def mask(self, picked: Tensor, identity: float = 0.0) -> Tensor:
        """`picked`, with `identity` in the groups that have no adapter.

        >>> Groups(2, torch.tensor([-1, 0]), base=True).mask(torch.ones(2, 2))
        tensor([[0., 0.],
                [1., 1.]])
        """
        if not self.base:
            return picked
        return torch.where(self.active(picked.ndim), picked, identity)

    def active(self, ndim: int) -> Tensor:
        """Whether each group has an adapter, with `ndim` axes."""
        assert self.index is not None
        return (self.index >= 0).view(-1, *(1,) * (ndim - 1))


@dataclasses.dataclass(frozen=True)
class Known:
    """What the values of rows say, where they can be read: their groups, and how many rows each adapter has."""

    groups: Groups
    counts: tuple[int, ...]


class Rows:
    """Which adapter of a stack each row uses.

    Args:
        index: `"rows"`, long, `-1` for the base alone; `None` for as many equal parts as there are adapters, in order.
        count: Number of adapters.
        values: The values of `index`, where they are known without looking.
        batch_dim: The axis of each site's input that has the rows, where the user says so.

    >>> rows = Rows(torch.tensor([1, 1, 0, 0]), 2)
    >>> rows.groups().size, rows.known().counts
    (2, (2, 2))
    """

    def __init__(
        self, index: Tensor | None, count: int, values: Sequence[int] | None = None, batch_dim: int | None = None
    ):
        self.index, self.count, self.batch_dim = index, count, batch_dim
        self.size = count if index is None else len(index)
        self._static = index is None or values is not None
        self._known: Known | None = None
        self._version: int | None = None
        self._parts: dict[tuple[bool, ...], Rows] = {}
        self._order: Tensor | None = None
        if index is None:
            self._known = Known(Groups(count, None, base=False), (1,) * count)
        elif values is not None:
            self._known = _read(values, index, count)

    def __len__(self) -> int:
        return self.size

    def known(self) -> Known | None:
        """What the values say; `None` under `torch.compile`, `torch.vmap` and export, where they cannot be read."""
        if self._static:
            return self._known
        if torch.compiler.is_compiling():
            return None
        index = self.index
        assert index is not None
        if not is_readable(index):
            return None
        if self._known is None or self._version != index._version:  # rows may be written to between calls
            self._known, self._version = _read(index.tolist(), index, self.count), index._version
            self._order, self._parts = None, {}
        return self._known

    def groups(self) -> Groups:
        """The largest equal groups that are known: runs of one adapter, or single rows."""
        known = self.known()
        if known is not None:
            return known.groups
        assert self.index is not None
        return Groups(self.size, self.index, base=True)

    def each(self) -> Groups:
        """Every row as a group of its own."""
        if self.index is None:
            return self.groups()
        known = self.known()
        return Groups(self.size, self.index, base=known is None or known.groups.base)

    def order(self) -> Tensor:
        """The rows that have an adapter, sorted by adapter."""
        known = self.known()
        assert known is not None and self.index is not None
        if self._order is None:
            order = self.index.argsort(stable=True)
            self._order = order[self.size - sum(known.counts) :]
        return self._order

    def only(self, present: Tensor, values: tuple[bool, ...] | None) -> Rows:
        """The same rows, with no adapter where it is not `present`, `"adapters"`; `values` are its values if known."""
        if values is not None and all(values):
            return self
        if self.index is None:
            index = torch.where(present, torch.arange(self.count, device=present.device), -1)
            own = None if values is None else [i if values[i] else -1 for i in range(self.count)]
            return Rows(index, self.count, own)
        known = self.known()
        if values is not None and known is not None and values in self._parts:
            return self._parts[values]
        index = torch.where((self.index >= 0) & present[self.index.clamp(min=0)], self.index, -1)
        part = Rows(index, self.count)
        if values is not None and known is not None:
            self._parts[values] = part
        return part

    def expanded(self, size: int) -> Rows:
        """The same rows, each repeated so that there are `size`."""
        if size == self.size:
            return self
        index = torch.arange(self.count) if self.index is None else self.index
        return Rows(index.repeat_interleave(size // self.size), self.count)


def is_readable(index: Tensor) -> bool:
    """Whether a tensor has values to look at: not one of a vmap, of a trace or of the meta device."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(index):
        index = functorch.get_unwrapped(index)
    return type(index) is Tensor and not index.is_meta and not functorch.is_functorch_wrapped_tensor(index)


def _read(values: Sequence[int], index: Tensor, count: int) -> Known:
    runs = [(value, len(list(run))) for value, run in itertools.groupby(values)]
    for value, _ in runs:
        if not -1 <= value < count:
            row = list(values).index(value)
            raise ValueError(
                f"route: rows[{row}] is {value}, expected an index of one of the {count} adapters in the stack "
                f"(0 to {count - 1}), or -1 for the base alone"
            )
    counts = [0] * count
    for value, length in runs:
        if value >= 0:
            counts[value] += length
    base = any(value < 0 for value, _ in runs)
    if len({length for _, length in runs}) == 1:
        adapters = [value for value, _ in runs]
        in_order = adapters == list(range(count))
        step = runs[0][1]
        return Known(Groups(len(runs), None if in_order else index[::step], base), tuple(counts))
    return Known(Groups(len(values), index, base), tuple(counts))
