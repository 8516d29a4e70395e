"""Where each leaf of an adapter is in a row of numbers, and trees of views over rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from torchgraft.functional.extending import Blocks, Tree, view_of_part

Shape = tuple[int, ...]
Shapes = Mapping[str, Mapping[str, Shape]]
"""Shapes of leaves, by path and name."""

_ALIGNED = 16
"""Bytes at whose multiples leaves begin, which kernels for matrices want."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of leaves in a row.

    Attributes:
        shapes: The shape of each leaf, by path and name.
        offsets: Where each begins, in numbers.
        size: How many numbers a row has.
        blocks: The blocks along the first axis of leaves: a smaller leaf has padding behind each.
    """

    shapes: Shapes
    offsets: Mapping[str, Mapping[str, int]]
    size: int
    blocks: Blocks = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, shapes: Shapes, dtype: torch.dtype, blocks: Blocks | None = None) -> Layout:
        """Lay out leaves one after the other, each at a multiple of 16 bytes.

        >>> Layout.of({"0": {"a": (3,), "b": (2, 2)}}, torch.float32).offsets
        {'0': {'a': 0, 'b': 4}}
        """
        step = max(1, _ALIGNED // dtype.itemsize)
        offsets: dict[str, dict[str, int]] = {}
        size = 0
        for path, leaves in shapes.items():
            offsets[path] = {}
            for name, shape in leaves.items():
                offsets[path][name] = size
                size += -(-math.prod(shape) // step) * step
        return cls(shapes, offsets, size, blocks or {})

    def leaves(self) -> Iterator[tuple[str, str, Shape, int]]:
        """Yield path, name, shape and offset of each leaf."""
        for path, leaves in self.shapes.items():
            for name, shape in leaves.items():
                yield path, name, shape, self.offsets[path][name]

    def views(self, rows: Tensor, cut: Shapes | None = None) -> Tree:
        """Return the tree of leaves that rows hold, as views: where blocks are cut, they have an axis of their own.

        Args:
            rows: `"size"`, or `"n size"` for a stack of `n`.
            cut: Shapes to cut leaves to, from their beginning; leaves that it lacks are left out.

        >>> layout = Layout.of({"0": {"a": (2, 2)}}, torch.float32)
        >>> layout.views(torch.arange(4.0), {"0": {"a": (1, 2)}})
        {'0': {'a': tensor([[0., 1.]])}}
        """
        tree: Tree = {}
        lead = rows.shape[:-1]
        for path, name, shape, offset in self.leaves():
            kept = shape if cut is None else cut.get(path, {}).get(name)
            if kept is None:
                continue
            leaf = rows[..., offset : offset + math.prod(shape)].view((*lead, *shape))
            tree.setdefault(path, {})[name] = view_of_part(leaf, kept, self.blocks_of(path, name))
        return tree

    def tree(self, row: Tensor, cut: Shapes) -> Tree:
        """Return the tree of leaves that a row holds, in these shapes; views, but for blocks that are cut."""
        return {
            path: {name: leaf.reshape(cut[path][name]) for name, leaf in leaves.items()}
            for path, leaves in self.views(row, cut).items()
        }

    def blocks_of(self, path: str, name: str) -> int:
        """Return how many blocks a leaf has."""
        return self.blocks.get(path, {}).get(name, 1)

    def write(self, row: Tensor, tree: Tree) -> None:
        """Write a tree into a row, `"size"`, with zeros wherever it has none."""
        row.zero_()
        own = {path: {name: tuple(leaf.shape) for name, leaf in leaves.items()} for path, leaves in tree.items()}
        for path, leaves in self.views(row, own).items():
            for name, leaf in leaves.items():
                leaf.copy_(tree[path][name].detach().view(leaf.shape))


def rounded(shapes: Shapes, layout: Layout, least: Shapes) -> Shapes:
    """Return shapes of all leaves that there can be, lengths that are not the most cut to one power of two of it.

    So compiled calls meet few shapes, whatever the ranks and sites of adapters are.

    Args:
        shapes: What has to fit.
        layout: The largest shapes, of all leaves.
        least: The smallest that were ever seen: an axis that is shorter here is one that differs between adapters.

    >>> layout = Layout.of({"0": {"a": (16, 5)}, "1": {"a": (16, 2)}}, torch.float32)
    >>> rounded({"0": {"a": (3, 5)}}, layout, {"0": {"a": (3, 5)}, "1": {"a": (8, 2)}})
    {'0': {'a': (4, 5)}, '1': {'a': (4, 2)}}
    """
    most = layout.shapes
    pairs = [
        (length, full)
        for path, leaves in shapes.items()
        for name, shape in leaves.items()
        for length, full in zip(shape, most[path][name], strict=True)
        if length < full
    ]
    halvings = min(((full // length).bit_length() - 1 for length, full in pairs), default=0)

    def cut(path: str, name: str, full: Shape) -> Shape:
        own, units = shapes.get(path, {}).get(name), (layout.blocks_of(path, name), *(1 for _ in full[1:]))
        if own is None:  # nobody here has it
            seen = zip(least.get(path, {}).get(name, full), full, units, strict=True)
            own = tuple(min(short, unit) if short < long else long for short, long, unit in seen)
        axes = zip(own, full, units, strict=True)
        return tuple(
            long if short == long else max(short, (long // unit >> halvings) * unit) for short, long, unit in axes
        )

    return {path: {name: cut(path, name, full) for name, full in leaves.items()} for path, leaves in most.items()}


def smallest(shapes: Sequence[Shapes]) -> Shapes:
    """Return the smallest length of each axis of the leaves in these.

    >>> smallest([{"0": {"a": (2, 1)}}, {"0": {"a": (1, 3)}, "1": {"a": (1, 1)}}])
    {'0': {'a': (1, 1)}, '1': {'a': (1, 1)}}
    """
    return _extreme(shapes, min)


def largest(shapes: Sequence[Shapes]) -> Shapes:
    """Return the shapes that hold each of these.

    >>> largest([{"0": {"a": (2, 1)}}, {"0": {"a": (1, 3)}, "1": {"a": (1, 1)}}])
    {'0': {'a': (2, 3)}, '1': {'a': (1, 1)}}
    """
    if all(one is shapes[0] for one in shapes):
        return shapes[0]
    return _extreme(shapes, max)


def _extreme(shapes: Sequence[Shapes], choose: Callable[[Iterable[int]], int]) -> Shapes:
    result: dict[str, dict[str, Shape]] = {}
    for one in shapes:
        for path, leaves in one.items():
            known = result.setdefault(path, {})
            for name, shape in leaves.items():
                known[name] = tuple(map(choose, zip(known.get(name, shape), shape, strict=True)))
    return result
