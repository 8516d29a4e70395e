"""Rows: which adapter of a stack each row of a batch uses, in the forms that sites need."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._unsupported import UnsupportedCall

Draw = Callable[[Tensor, float, torch.Generator], tuple[Tensor, float]]
"""`(like, p, generator) -> (keep, kept)`: which numbers dropout keeps, 0 or 1, and the probability of that."""


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
        """Return each group's own part of a stacked leaf, `"groups ..."`; zeros, without gradient, where it has none.

        >>> Groups(3, torch.tensor([1, -1, 0]), base=True).pick(torch.tensor([5.0, 6.0]))
        tensor([6., 0., 5.])
        """
        if self.index is None:
            return leaf
        return self.mask(leaf.index_select(0, self.index.clamp(min=0) if self.base else self.index), 0)

    def mask(self, picked: Tensor, identity: float = 0.0) -> Tensor:
        """Return `picked`, with `identity` in the groups that have no adapter.

        >>> Groups(2, torch.tensor([-1, 0]), base=True).mask(torch.ones(2, 2))
        tensor([[0., 0.],
                [1., 1.]])
        """
        if not self.base:
            return picked
        return torch.where(self.active(picked.ndim), picked, identity)

    def active(self, ndim: int) -> Tensor:
        """Return whether each group has an adapter, with `ndim` axes."""
        assert self.index is not None
        return (self.index >= 0).view(-1, *(1,) * (ndim - 1))


@dataclasses.dataclass(frozen=True)
class Known:
    """The facts that the values of rows tell, where they can be read: groups, and how many rows each adapter has."""

    groups: Groups
    counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slots:
    """The rows sorted by adapter into as many slots for each, some of which stay empty.

    Attributes:
        adapters: The adapters that have rows, `"groups"`; `None` for all of the stack.
        order: The rows that have an adapter, sorted by adapter.
        slot: The slot of each of these.
        place: The slot of each row, `"rows"`; any slot for a row without adapter.
        groups: Number of adapters that have rows.
        width: Number of slots of each.
        active: Whether each row has an adapter, `"rows 1 1"`; `None` where all have.
    """

    adapters: Tensor | None
    order: Tensor
    slot: Tensor
    place: Tensor
    groups: int
    width: int
    active: Tensor | None

    def fill(self, x: Tensor) -> Tensor:
        """Return the rows of `x` in their slots, `"groups*width ..."`; zeros in those that stay empty."""
        rows = x.index_select(0, self.order)
        if len(self.order) == self.groups * self.width:
            return rows
        return x.new_zeros(self.groups * self.width, *x.shape[1:]).index_copy(0, self.slot, rows)

    def pick(self, leaf: Tensor) -> Tensor:
        """Return the part of a stacked leaf that belongs to the adapters that have rows."""
        return leaf if self.adapters is None else leaf.index_select(0, self.adapters)


class Rows:
    """The adapter of a stack that each row uses; what is known of it does not change.

    Args:
        index: `"rows"`, long, `-1` for the base alone; `None` for as many equal parts as there are adapters, in order.
        count: Number of adapters.
        values: The values of `index`, where they are known without looking.
        tokens: How many in succession are the tokens of one row of the batch; `None` where each is a row of it.
        noise: A generator for each adapter, from which its rows' noise is drawn; `None` for torch's own for all.

    Attributes:
        values: The values of `index`, where they can be read.
        tokens: As given.
        noise: As given.

    >>> rows = Rows(torch.tensor([1, 1, 0, 0]), 2)
    >>> rows.groups().size, rows.known().counts
    (2, (2, 2))
    """

    def __init__(
        self,
        index: Tensor | None,
        count: int,
        values: Sequence[int] | None = None,
        tokens: int | None = None,
        noise: Sequence[torch.Generator] | None = None,
    ):
        self.index, self.count, self.tokens, self.noise = index, count, tokens, noise
        self.size = count if index is None else len(index)
        self._static = index is None or values is not None
        self.values: Sequence[int] | None = values
        self._known: Known | None = None
        self._parts: dict[tuple[bool, ...], Rows] = {}
        self._order: Tensor | None = None
        self._ends: dict[int, Tensor] = {}
        self._slots: Slots | None = None
        if index is None:
            self._known = Known(Groups(count, None, base=False), (1,) * count)
        elif values is not None or (not torch.compiler.is_compiling() and is_readable(index)):
            self.values = index.tolist() if values is None else values
            self._known = _read(self.values, index, count, tokens)

    def __len__(self) -> int:
        return self.size

    def known(self) -> Known | None:
        """Return what the values tell, `None` where they cannot be read: `torch.compile`, `torch.vmap` and export."""
        return self._known if self._static or not torch.compiler.is_compiling() else None

    def groups(self) -> Groups:
        """Return the largest equal groups that are known: runs of one adapter, or single rows."""
        known = self.known()
        if known is not None:
            return known.groups
        assert self.index is not None
        return Groups(self.size, self.index, base=True)

    def each(self) -> Groups:
        """Return every row as a group of its own."""
        if self.index is None:
            return self.groups()
        known = self.known()
        return Groups(self.size, self.index, base=known is None or known.groups.base)

    def order(self) -> Tensor:
        """Return the rows that have an adapter, sorted by adapter."""
        known = self.known()
        assert known is not None and self.index is not None
        if self._order is None:
            with torch.inference_mode(False):  # calls that are differentiated use it too
                order = self.index.argsort(stable=True)
                self._order = order[self.size - sum(known.counts) :]
        return self._order

    def slots(self) -> Slots:
        """Return the rows in equal groups of one adapter each.

        >>> Rows(torch.tensor([1, 0, 1]), 2).slots().fill(torch.tensor([5, 6, 7])).tolist()
        [6, 0, 5, 7]
        """
        known = self.known()
        assert known is not None and self.index is not None
        if self._slots is None:
            with torch.inference_mode(False):
                self._slots = self._in_slots(known)
        return self._slots

    def _in_slots(self, known: Known) -> Slots:
        assert self.index is not None
        order, device = self.order(), self.index.device
        present = [adapter for adapter, count in enumerate(known.counts) if count]
        counts = torch.tensor([known.counts[adapter] for adapter in present], device=device)
        width = max(known.counts)
        shifts = torch.arange(len(present), device=device) * width - (counts.cumsum(0) - counts)
        slot = torch.arange(len(order), device=device) + shifts.repeat_interleave(counts)
        return Slots(
            adapters=None if len(present) == self.count else torch.tensor(present, device=device),
            order=order,
            slot=slot,
            place=order.new_zeros(self.size).index_put((order,), slot),
            groups=len(present),
            width=width,
            active=None if len(order) == self.size else (self.index >= 0).view(-1, 1, 1),
        )

    def ends(self, tokens: int) -> Tensor:
        """Return where each adapter's tokens end with rows of `tokens` tokens in `order`, `"adapters"`, int32."""
        known = self.known()
        assert known is not None and self.index is not None
        if tokens not in self._ends:
            with torch.inference_mode(False):
                counts = torch.tensor(known.counts, device=self.index.device)
                self._ends[tokens] = (counts.cumsum(0) * tokens).to(torch.int32)
        return self._ends[tokens]

    def dropout(self, x: Tensor, p: float, draw: Draw | None = None) -> Tensor:
        """Return an input after dropout, the rows of each adapter with its own noise, in their order.

        Args:
            x: `"rows*k ..."`.
            p: Probability of dropout.
            draw: How it is drawn where not as `torch.nn.functional.dropout` does.

        Raises:
            UnsupportedCall: Values of rows that cannot be read, as under `torch.compile`; a second run of a part of
                the model for its backward.

        >>> rows = Rows(torch.tensor([1, 0, 1]), 2, noise=[torch.Generator().manual_seed(i) for i in (0, 1)])
        >>> alone = Rows(torch.tensor([0, 0]), 1, noise=[torch.Generator().manual_seed(1)])
        >>> torch.equal(rows.dropout(torch.ones(3, 8), 0.5)[[0, 2]], alone.dropout(torch.ones(2, 8), 0.5))
        True
        """
        if self.noise is None:
            return F.dropout(x, p)
        known = self.known()
        if known is None:
            raise UnsupportedCall(
                "dropout from generators of each adapter's own takes rows whose values can be read, which compiled and "
                "transformed calls have not; set the config's dropout to 0, or run the call as it is"
            )
        if torch._C._current_graph_task_id() != -1:
            raise UnsupportedCall(
                "dropout from generators of each adapter's own would draw anew where a part of the model is run again "
                "for its backward; set the config's dropout to 0, or run without checkpointing"
            )
        per_row, counts = x.detach().reshape(self.size, -1), known.counts
        factor = torch.ones_like(per_row)
        for generator, rows in zip(self.noise, self.order().split(counts), strict=True):
            if len(rows):
                keep, kept = (draw or _draw)(per_row[: len(rows)], p, generator)
                factor.index_copy_(0, rows, keep.to(factor.dtype).div_(kept))
        return x * factor.view(x.shape)

    def only(self, present: Tensor, values: tuple[bool, ...] | None) -> Rows:
        """Return the rows with no adapter where it is not `present`, `"adapters"`; `values` are its values if known."""
        if values is not None and all(values):
            return self
        if self.index is None:
            index = torch.where(present, torch.arange(self.count, device=present.device), -1)
            kept = None if values is None else [i if values[i] else -1 for i in range(self.count)]
            return Rows(index, self.count, kept, self.tokens, self.noise)
        if values is None or self.known() is None or self.values is None:
            index = torch.where((self.index >= 0) & present[self.index.clamp(min=0)], self.index, -1)
            return Rows(index, self.count, None, self.tokens, self.noise)
        if values not in self._parts:
            kept = [row if row >= 0 and values[row] else -1 for row in self.values]
            self._parts[values] = rows_of(kept, self.count, self.index.device, self.tokens, self.noise)
        return self._parts[values]

    def expanded(self, size: int) -> Rows:
        """Return the same rows, each repeated so that there are `size`."""
        if size == self.size:
            return self
        index = torch.arange(self.count) if self.index is None else self.index
        return Rows(index.repeat_interleave(size // self.size), self.count, noise=self.noise)


def rows_of(
    values: Sequence[int],
    count: int,
    device: torch.device,
    tokens: int | None = None,
    noise: Sequence[torch.Generator] | None = None,
) -> Rows:
    """Make rows with these values, in memory of their own, that any later call may use."""
    with torch.inference_mode(False):
        return Rows(torch.tensor(values, dtype=torch.long, device=device), count, None, tokens, noise)


def _draw(like: Tensor, p: float, generator: torch.Generator) -> tuple[Tensor, float]:
    return torch.empty_like(like).bernoulli_(1 - p, generator=generator), 1 - p


def is_readable(index: Tensor) -> bool:
    """Return whether a tensor has values to look at: not one of a vmap, of a trace or of the meta device."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(index):
        index = functorch.get_unwrapped(index)
    return type(index) is Tensor and not index.is_meta and not functorch.is_functorch_wrapped_tensor(index)


def _read(values: Sequence[int], index: Tensor, count: int, tokens: int | None) -> Known:
    runs = [(value, len(list(run))) for value, run in itertools.groupby(values)]
    for value, _ in runs:
        if not -1 <= value < count:
            row = list(values).index(value)
            place = f"{row // tokens}, {row % tokens}" if tokens else row
            raise ValueError(
                f"route: rows[{place}] is {value}, expected an index of one of the {count} adapters in the stack "
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
