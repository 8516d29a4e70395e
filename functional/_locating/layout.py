"""Layouts: where the rows of a batch are in a tensor inside a model, and how two runs of the model tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """The position of the rows in a tensor.

    Attributes:
        axis: The axis of the batch; `None` for a tensor that all rows share, with a leading axis of 1.
        minor: Whether the rows are repeated one after the other (`torch.cat([x, x])`) instead of each in succession
            (`x.repeat_interleave(2, 0)`), where the axis is a multiple of them.
        tokens: Where each row's tokens are once the rows lead: another axis, or 0 where they are the row's parts;
            `None` where rows are not routed token by token.
    """

    axis: int | None = 0
    minor: bool = False
    tokens: int | None = None

    def to_rows(self, x: Tensor, size: int) -> Tensor:
        """Return `x` with the rows leading, each one's parts in succession: its tokens, where these are routed.

        >>> Layout(1).to_rows(torch.zeros(5, 2, 3), 2).shape, Layout(1, tokens=1).to_rows(torch.zeros(5, 2, 3), 2).shape
        (torch.Size([2, 5, 3]), torch.Size([10, 3]))
        """
        if self.axis is None:
            return x.expand(size, *x.shape[1:])
        x = x.movedim(self.axis, 0) if self.axis else x
        x = x.unflatten(0, (-1, size)).transpose(0, 1).flatten(0, 1) if self.minor else x
        return x.movedim(self.tokens, 1).flatten(0, 1) if self.tokens else x

    def from_rows(self, y: Tensor, size: int) -> Tensor:
        """Undo `to_rows`, for a module's output."""
        if self.axis is None:
            return y
        y = y.unflatten(0, (size, -1)).movedim(1, self.tokens) if self.tokens else y
        y = y.unflatten(0, (size, -1)).transpose(0, 1).flatten(0, 1) if self.minor else y
        return y.movedim(0, self.axis) if self.axis else y

    def with_tokens(self, axis: int) -> Layout:
        """Return where rows and tokens are if these are along an axis of the tensor; the rows' own is the folded one.

        >>> Layout(1).with_tokens(0), Layout(0).with_tokens(0).tokens
        (Layout(axis=1, minor=False, tokens=1), 0)
        """
        assert self.axis is not None
        tokens = 0 if axis == self.axis else axis if axis > self.axis else axis + 1
        return dataclasses.replace(self, tokens=tokens)

    def has_tokens(self, shape: Sequence[int], size: int, tokens: int) -> bool:
        """Return whether a tensor of this shape has `size` rows of `tokens` tokens here.

        >>> Layout(1, tokens=1).has_tokens((5, 2, 3), 2, 5), Layout(0, tokens=0).has_tokens((10, 3), 2, 5)
        (True, True)
        """
        if self.axis is None or self.tokens is None:
            return False
        if self.tokens == 0:
            return shape[self.axis] == size * tokens
        beside = self.tokens if self.tokens > self.axis else self.tokens - 1  # as the tensor itself has it
        return shape[self.axis] == size and shape[beside] == tokens

    def each(self, x: Tensor, size: int) -> Tensor:
        """Return `x` by rows, `"size parts ..."`; a shared tensor is every row's."""
        result: Tensor = self.to_rows(x, size).unflatten(0, (size, -1))
        return result


LEADING = Layout()


SHARED = Layout(None)


@dataclasses.dataclass(frozen=True)
class Place:
    """The facts that are known of one tensor inside a model.

    Attributes:
        ndim: Its number of axes.
        layout: Where its rows are.
        even: Whether its axis is as long as the batch of the model's inputs.
    """

    ndim: int
    layout: Layout
    even: bool = False

    def holds(self, shape: Sequence[int], size: int, length: int | None, tokens: int = 1) -> bool:
        """Return whether a tensor of this shape can have this layout.

        Args:
            shape: The shape.
            size: Number of rows in the call.
            length: The length of the batch of its inputs.
            tokens: How many tokens each row has, 1 where these are not routed.
        """
        axis = self.layout.axis
        if len(shape) != self.ndim:
            return False
        if tokens > 1:
            return self.layout.has_tokens(shape, size, tokens)
        if axis is None:
            return shape[0] == 1
        if self.even and length is not None:
            return shape[axis] == length
        return shape[axis] > 0 and shape[axis] % size == 0


class Record:
    """The results of a look at one kind of call: the tensors at each site, in the order of its calls.

    Args:
        places: What is known of these tensors, by path of the site.
        equal: Inputs that were the same in all rows, by place and axis, where nothing is known of others.
        lasting: Whether it holds for other calls of the kind.

    >>> Record({"a": [Place(2, LEADING)]}).anywhere("a", 2)
    Place(ndim=2, layout=Layout(axis=0, minor=False, tokens=None), even=False)
    """

    def __init__(
        self, places: Mapping[str, Sequence[Place]], equal: tuple[tuple[int, int], ...] = (), lasting: bool = True
    ):
        self.equal, self.lasting = equal, lasting
        self.places = {path: tuple(calls) for path, calls in places.items()}
        self.counts = {path: len(calls) for path, calls in self.places.items()}

    def __iter__(self) -> Iterator[tuple[str, tuple[Place, ...]]]:
        return iter(self.places.items())

    def anywhere(self, path: str, ndim: int) -> Place | None:
        """Return the place that every call of a site with so many axes has; `None` where they differ."""
        places = [place for place in self.places.get(path, ()) if place.ndim == ndim]
        return places[0] if places and all(place.layout == places[0].layout for place in places) else None


def compare(first: Tensor, second: Tensor, order: Sequence[int], axes: int) -> Layout | None:
    """Find the rows by two runs of a model.

    Args:
        first: A tensor inside the model, run on rows 0, 1, ..., n-1.
        second: The same one, run on the rows in `order`.
        order: More than n rows, among them each of the n.
        axes: How many axes, from the first, may have rows.

    Returns:
        Where the rows are; `None` where the tensor does not follow the rows.

    >>> x = torch.arange(6.0).view(3, 2)
    >>> compare(x, x[[1, 0, 2, 2]], [1, 0, 2, 2], 1) == LEADING
    True
    >>> compare(x.flip(0), x[[1, 0, 2, 2]].flip(0), [1, 0, 2, 2], 1) is None
    True
    """
    if first.ndim != second.ndim:
        return None
    n, m = len(set(order)), len(order)
    changed = [axis for axis, (a, b) in enumerate(zip(first.shape, second.shape, strict=True)) if a != b]
    if not changed:
        return SHARED if close(first, second) else None
    axis = changed[0]
    if len(changed) > 1 or axis >= axes or first.shape[axis] % n or m * first.shape[axis] != n * second.shape[axis]:
        return None
    picks = torch.tensor(order, device=first.device)
    for layout in (Layout(axis), Layout(axis, minor=True))[: 1 if first.shape[axis] == n else 2]:
        if close(layout.each(second, m), layout.each(first, n).index_select(0, picks)):
            return layout
    return None


def close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same but for rounding; NaN and infinities where the other has them."""
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    a, b = numbers(a), numbers(b)
    if not a.numel():
        return True
    scale = 1e-3 if a.dtype.itemsize > 2 else 3e-2
    alike = torch.equal(a.isfinite(), b.isfinite())
    a, b = finite(a), finite(b)
    return alike and bool((a - b).abs().max() <= scale * b.abs().max().clamp(min=1e-12))


def numbers(x: Tensor) -> Tensor:
    """Return a tensor as floating point: complex numbers as pairs, counts and flags as numbers."""
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj())
    return x if x.is_floating_point() else x.double()


def finite(x: Tensor) -> Tensor:
    """Return a tensor with zeros where it is NaN or infinite."""
    return torch.where(x.isfinite(), x, 0)
