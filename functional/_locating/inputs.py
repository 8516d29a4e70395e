"""Inputs of a call: of what kind they are, where their rows are, and copies with a few of these."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


Axis = Callable[[Tensor], int | None]
"""The axis of an input that has rows, or `None`."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """A way to read inputs as rows.

    Attributes:
        axis: Where a tensor has rows.
        entries: How many entries a list of tensors has that has one for each row; 0 for no such lists.
    """

    axis: Axis
    entries: int = 0

    def is_rows(self, x: Any) -> bool:
        """Return whether a list has an entry for each row."""
        return self.entries > 0 and len(x) == self.entries and all(isinstance(item, Tensor) for item in x)


_DEPTH = 6


def kind_of(x: Any, inside: bool = True, numbers: bool = True) -> Any:
    """Return what may decide which way a model takes: types, axes, flags, numbers, whether a cache is filled.

    Args:
        x: Arguments.
        inside: Whether to look into objects and single values on the CPU; not under `torch.compile`.
        numbers: Whether numbers count; else their types do.

    >>> kind_of({"x": torch.ones(2, 3), "flag": True, "k": 2})
    (<class 'dict'>, (('x', (2, True)), ('flag', True), ('k', ('int', 2))))
    """
    if isinstance(x, Tensor):
        value = inside and numbers and x.ndim == 0 and x.device.type == "cpu" and not x.is_nested
        return (x.ndim, x.is_floating_point(), *([unwrapped(x).item()] if value else []))
    if x is None or isinstance(x, (bool, str)):
        return x
    if isinstance(x, int):
        return ("int", int(x)) if numbers else "int"
    if isinstance(x, float):
        return ("float", float(x)) if numbers else "float"
    if isinstance(x, Mapping):
        items = ((key, value) for key, value in x.items() if value is not None)
        return type(x), tuple((key, kind_of(value, inside, numbers)) for key, value in items)
    if isinstance(x, (list, tuple)):
        return type(x), tuple(kind_of(value, inside, numbers) for value in x)
    if not inside:
        return type(x)
    return type(x), next(_inside(x), None) is not None


def tensors_in(x: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested arguments, without those inside of objects."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from tensors_in(value)
    elif isinstance(x, (list, tuple)):
        for value in x:
            yield from tensors_in(value)


def every_tensor(x: Any, depth: int = 6) -> Iterator[Tensor]:
    """Yield the tensors of nested arguments, also those inside of objects, as often as they are there.

    >>> import types
    >>> [len(t) for t in every_tensor([torch.ones(2), types.SimpleNamespace(lengths=torch.ones(3))])]
    [2, 3]
    """
    if isinstance(x, Tensor):
        yield x
    elif depth and not (x is None or callable(x) or isinstance(x, (str, bytes, int, float, complex))):
        if isinstance(x, Mapping):
            parts = list(x.values())
        elif isinstance(x, (list, tuple)):
            parts = list(x)
        else:
            slots = (
                [getattr(x, field.name, None) for field in dataclasses.fields(x)] if dataclasses.is_dataclass(x) else []
            )
            parts = list(getattr(x, "__dict__", {}).values()) or slots
        for part in parts:
            yield from every_tensor(part, depth - 1)


def lists_in(x: Any) -> Iterator[Sequence[Tensor]]:
    """Yield the lists of tensors in nested arguments."""
    if isinstance(x, (list, tuple)) and x and all(isinstance(item, Tensor) for item in x):
        yield x
    elif isinstance(x, (Mapping, list, tuple)):
        for value in x.values() if isinstance(x, Mapping) else x:
            yield from lists_in(value)


def unwrapped(x: Tensor) -> Tensor:
    """Return a tensor as it is outside of `torch.func.grad`, without autograd."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return x.detach()


def length_of(inputs: Inputs, size: int) -> int | None:
    """Return the length of the batch, in a call that routes `size` rows: that, or the first multiple of it.

    >>> length_of(((torch.ones(4, 3),), {}), 2)
    4
    """
    lengths = [len(x) for x in tensors_in(inputs) if x.ndim and not x.is_nested and len(x) and len(x) % size == 0]
    return size if size in lengths else next(iter(lengths), None)


def check_length(inputs: Inputs, size: int) -> None:
    """Refuse a call whose batch has several times as many rows as were given: which repeats which is not said.

    >>> check_length(((torch.ones(6, 3),), {}), 2)
    Traceback (most recent call last):
        ...
    ValueError: route: rows has 2, the inputs have 6; give one index for each row of the inputs, such as \
rows.repeat_interleave(3) where each row stands 3 times in succession
    """
    length = length_of(inputs, size)
    if length is None or length == size or any(len(items) == size for items in lists_in(inputs)):
        return
    times = length // size
    raise ValueError(
        f"route: rows has {size}, the inputs have {length}; give one index for each row of the inputs, such as "
        f"rows.repeat_interleave({times}) where each row stands {times} times in succession"
    )


def readings(inputs: Inputs, size: int) -> Iterator[Reading]:
    """Yield the ways to read inputs as rows, the likeliest first; running the model tells which one it agrees with."""
    length = length_of(inputs, size)
    if length is None:
        return

    def leading(x: Tensor) -> int | None:
        return 0 if x.ndim and not x.is_nested and len(x) == length else None

    def without_vectors(x: Tensor) -> int | None:
        return leading(x) if x.ndim != 1 else None

    def behind(x: Tensor) -> int | None:
        return 1 if leading(x) is None and x.ndim > 1 and x.shape[1] == length else leading(x)

    def multiples(x: Tensor) -> int | None:
        return 0 if x.ndim > 1 and not x.is_nested and len(x) and len(x) % size == 0 else None

    given = list(tensors_in(inputs))
    seen: set[tuple[int | None, ...]] = set()
    for reading in (leading, without_vectors, behind, multiples):
        axes = tuple(map(reading, given))
        if axes not in seen and any(axis is not None for axis in axes):
            seen.add(axes)
            yield Reading(reading)
    if any(len(items) == length for items in lists_in(inputs)):
        yield Reading(leading, length)
        yield Reading(without_vectors, length)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Rows of inputs to run a model on.

    Attributes:
        inputs: The inputs they are taken from.
        reading: Where these have rows.
        size: How many.
        picks: The rows, each with how far it is rolled along its last axis.
        varied: Whether what is equal in all of them is made to differ.
    """

    inputs: Inputs
    reading: Reading
    size: int
    picks: Sequence[tuple[int, int]]
    varied: bool = False

    @property
    def count(self) -> int:
        """The number of picked rows."""
        return len(self.picks)

    @property
    def order(self) -> list[int]:
        """Another order of the picked rows, with the last one twice."""
        return rearranged(self.count)

    def first(self) -> Inputs:
        """Make arguments of their own with the picked rows.

        Raises:
            TypeError, RuntimeError: Arguments that cannot be copied.
        """
        return self._copy(range(self.count))

    def second(self) -> Inputs:
        """Make the same arguments with the rows in the other order."""
        return self._copy(self.order)

    def equal(self) -> tuple[tuple[int, int], ...]:
        """Find the tensors of the inputs that are the same in all picked rows: their places, and their axes of rows."""
        places = []
        for i, x in enumerate(every_tensor(self.inputs)):
            axis = self.reading.axis(x)
            if axis is not None and x.numel() and _are_equal(self.rows_of(unwrapped(x), axis)):
                places.append((i, axis))
        return tuple(places)

    def rows_of(self, x: Tensor, axis: int) -> list[Tensor]:
        """Return the picked rows of a tensor."""
        each = x.unflatten(axis, (self.size, -1))
        rows = [_rolled(each.select(axis, row), turn, axis) for row, turn in self.picks]
        return [varied(row, i) for i, row in enumerate(rows)] if self.varied and _are_equal(rows) else rows

    def _copy(self, order: Sequence[int]) -> Inputs:
        with _Cut(self, order):
            args, kwargs = copy.deepcopy(self.inputs)
        if self.reading.entries:
            args, kwargs = self._pick((args, kwargs), [self.picks[i][0] for i in order])
        return args, kwargs

    def _pick(self, x: Any, rows: Sequence[int]) -> Any:
        """Take the rows' entries of lists that have one for each."""
        if isinstance(x, dict):
            for key, value in x.items():
                x[key] = self._pick(value, rows)
            return x
        if not isinstance(x, (list, tuple)):
            return x
        if self.reading.is_rows(x):
            step = len(x) // self.size
            items = [x[row * step + i] for row in rows for i in range(step)]
        else:
            items = [self._pick(value, rows) for value in x]
        return x._make(items) if hasattr(x, "_make") else type(x)(items)


@dataclasses.dataclass(frozen=True)
class GivenSample:
    """The rows that the user cut: arguments with rows 0, 1, ..., n-1, and with these in the other order."""

    inputs: Inputs
    other: Inputs
    count: int

    @property
    def order(self) -> list[int]:
        """The order of the rows in the second arguments."""
        return rearranged(self.count)

    def first(self) -> Inputs:
        """Make arguments of their own with the rows."""
        return copy.deepcopy(self.inputs)

    def second(self) -> Inputs:
        """Make the same arguments with the rows in the other order."""
        return copy.deepcopy(self.other)


def rearranged(count: int) -> list[int]:
    """Return the order of rows in the second run of a look.

    >>> rearranged(3)
    [1, 0, 2, 2]
    """
    return [1, 0, *range(2, count), count - 1]


class _Cut(TorchFunctionMode):
    """A context in which `copy.deepcopy` of a tensor with a batch axis takes some of its rows only."""

    def __init__(self, sample: Sample, order: Sequence[int]):
        super().__init__()
        self._sample, self._order = sample, order
        whole = [items for items in lists_in(sample.inputs) if sample.reading.is_rows(items)]
        self._whole = {id(x) for items in whole for x in items}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        x, memo = args
        with torch._C.DisableTorchFunction():
            if id(x) not in memo:
                memo[id(x)] = unwrapped(x).clone() if id(x) in self._whole else self._cut(unwrapped(x))
        return memo[id(x)]

    def _cut(self, x: Tensor) -> Tensor:
        axis = self._sample.reading.axis(x)
        if axis is None:
            return x.clone()
        rows = self._sample.rows_of(x, axis)
        return torch.cat([rows[i] for i in self._order], axis)


def _rolled(part: Tensor, turn: int, axis: int) -> Tensor:
    return part.roll(turn, -1) if turn and part.ndim > axis + 1 else part


def _are_equal(rows: Sequence[Tensor]) -> bool:
    return all(torch.equal(row, rows[0]) for row in rows[1:])


def varied(row: Tensor, count: int) -> Tensor:
    """Return a row whose last entries are a bit less, as many as `count` of them.

    Flags turn round, and whole numbers that are not positive stay, so that an index is still one.

    >>> varied(torch.tensor([3, 2, 0]), 2)
    tensor([3, 1, 0])
    """
    if not count:
        return row
    kept, last = row[..., :-count], row[..., -count:]
    if row.dtype == torch.bool:
        last = ~last
    elif row.is_floating_point() or row.is_complex():
        last = torch.where(last == 0, 0.5, last * 0.5).to(row.dtype)
    else:
        last = last - (last > 0).to(row.dtype)
    return torch.cat([kept, last], -1)


def have_equal_rows(inputs: Inputs, places: Iterable[tuple[int, int]]) -> bool:
    """Return whether these tensors of the inputs, by place and axis, are the same in all rows.

    >>> have_equal_rows(((torch.ones(3), torch.arange(3)), {}), [(0, 0)])
    True
    """
    given = list(every_tensor(inputs))
    for i, axis in places:
        if i >= len(given) or given[i].ndim <= axis or not given[i].numel():
            return False
        x = unwrapped(given[i])
        if not bool((x == x.narrow(axis, 0, 1)).all()):
            return False
    return True


def choose_rows(inputs: Inputs, axis: Axis, size: int) -> list[tuple[int, int]]:
    """Choose three rows that are finite and differ in as much as possible, rolled where they are equal.

    >>> choose_rows(((torch.tensor([[1.0], [1.0], [2.0], [3.0]]),), {}), lambda x: 0, 4)
    [(0, 0), (2, 0), (3, 0)]
    >>> choose_rows(((torch.ones(2, 3),), {}), lambda x: 0, 2)
    [(0, 0), (1, 1), (0, 2)]
    """
    tensors = [unwrapped(x) for x in tensors_in(inputs) if axis(x) is not None]
    rows = [x.movedim(axis(x) or 0, 0).unflatten(0, (size, -1)).flatten(1) for x in tensors]
    number = [x for x in rows if x.is_floating_point() or x.is_complex()]
    good = torch.ones(size, dtype=torch.bool)
    for rule in (torch.isfinite, lambda x: ~x.isnan()):
        good = torch.stack([rule(x).all(1).cpu() for x in number] or [good]).all(0)
        if good.any():
            break
    order = [*good.nonzero().flatten().tolist()] or list(range(size))

    def differing(row: int) -> Tensor:
        return torch.stack([(x != x[row]).any(1).cpu() for x in rows])

    picks, apart = [(order[0], 0)], [differing(order[0])]
    while len(picks) < 3:
        new = [row for row in order if all(bool(differs[:, row].any()) for differs in apart)]
        if new:
            best = max(new, key=lambda row: int(torch.stack([differs[:, row] for differs in apart]).all(0).sum()))
            picks.append((best, 0))
            apart.append(differing(best))
        else:
            others = [row for row in order if row not in (picked for picked, _ in picks)] or order
            picks.append((others[0], 1 + sum(turn > 0 for _, turn in picks)))
    return picks


def _inside(x: Any, depth: int = _DEPTH, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the tensors that an object holds, with or without the help of lists, dicts and other objects."""
    seen = set() if seen is None else seen
    if id(x) in seen or depth < 0 or isinstance(x, (str, bytes, int, float, type, torch.nn.Module)):
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        if x.numel():
            yield x
        return
    parts: Any = x.values() if isinstance(x, Mapping) else x if isinstance(x, (list, tuple)) else ()
    for part in parts or getattr(x, "__dict__", {}).values():
        yield from _inside(part, depth - 1, seen)
