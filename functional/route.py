"""Routing: one batch, many adapters, each row with its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import trees
from .layout import Finder
from .method import Entry, Tree
from .routed import RoutedLayer
from .rows import Rows


class Routed:
    """A stacked tree and the adapter of each row: what `route` makes, given to a call in place of a tree.

    Attributes:
        tree: The stacked tree.
        rows: Which adapter each row uses.
        members: Which adapters of the bound stack the leading axis holds, for grafts of several configs.
    """

    __slots__ = ("members", "rows", "tree")

    def __init__(self, tree: Tree, rows: Rows, members: Tensor | None = None):
        self.tree, self.rows, self.members = tree, rows, members

    def named(self, name: str) -> Routed:
        """The part of one named adapter, over the same rows."""
        return Routed(self.tree[name], self.rows, self.members)

    def check(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], what: str) -> None:
        """Hold the stack against the shapes of one adapter, as `trees.check` does."""
        trees.check(self.tree, shapes, what, stacked=self.rows.count)

    def layer(self, below: Any, entry: Entry, finder: Finder | None) -> RoutedLayer:
        """The layer that a site gets."""
        entry, rows = entry.along(self.members, self.rows)
        return RoutedLayer(below, entry, entry.leaves(self.tree), rows, finder)

    def tensors(self) -> Any:
        """Everything that a call depends on."""
        return self.tree, self.rows.index, self.members

    def __repr__(self) -> str:
        return f"Routed({self.rows.count} adapters, {self.rows.size} rows)"


def route(
    stacked: Tree, rows: Tensor | None = None, *, batch_dim: int | None = None, members: Tensor | None = None
) -> Routed:
    """Give each row of a batch its own adapter: `graft(route(many, rows), x)`.

    Row `i` of the output is row `i` of `graft(unstack(many)[rows[i]], x)`, differentiable in the stack. The base sees
    the whole batch at once, and so do its attention kernels. Works wherever a tree does: in calls, views and as one
    of several named adapters; make it inside the function that is differentiated.

    The batch is the leading axis of the model's inputs. Inside the model it may be anywhere, and folded: where the
    shape of a site's input leaves doubt (windows, beams, sequence-first layers), the first call runs the base on two
    and on three of the rows to see where they go, and remembers it. `torch.compile` and `torch.vmap` cannot look:
    there, what an earlier call saw counts, or `batch_dim`, or else doubt is an error.

    Values of `rows` are looked at once, outside of `torch.compile` (on a GPU this waits for them), to choose the
    fastest way: equal runs of one adapter are one batched product. `rows=None` says so without looking.

    Args:
        stacked: A tree made by `stack`, leaves `"N ..."`.
        rows: `"batch"`, long: the adapter of each row, in any order; `-1` is the base alone, bit for bit. An input of
            `k` times as many rows has each one `k` times in succession. `None`: the batch is `N` equal parts, one for
            each adapter in order.
        batch_dim: The axis of every site's input that has the batch, for models where it cannot be found out.
        members: `"N"`, long: which of the configs of `bind(model, [...])` the leading axis holds, where it is not all
            of them in order.

    Raises:
        TypeError, ValueError: Rows that are no vector of integers, or out of range; a stack without leaves.

    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind, stack, unstack
    >>> graft = bind(torch.nn.Linear(4, 3), LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
    >>> many, x = stack([graft.init(), graft.init()]), torch.randn(3, 4)
    >>> y = graft(route(many, torch.tensor([1, -1, 0])), x)
    >>> torch.allclose(y[0], graft(unstack(many)[1], x)[0]), torch.equal(y[1], graft.model(x)[1])
    (True, True)
    """
    leaf = next(_leaves(stacked), None)
    if leaf is None or leaf.ndim == 0 or len(leaf) == 0:
        raise ValueError("route: the stacked tree has no leaves with a leading axis; make it with stack([tree, ...])")
    if rows is None:
        return Routed(stacked, Rows(None, len(leaf), batch_dim=batch_dim), members)
    if not isinstance(rows, Tensor):
        raise TypeError(f"route: rows is of type {type(rows).__name__}, expected a tensor: torch.tensor(rows)")
    if rows.ndim != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"route: rows has shape {tuple(rows.shape)} and dtype {rows.dtype}, expected one long index for each row "
            "of the batch, shape (batch,)"
        )
    if len(rows) == 0:
        raise ValueError("route: rows is empty, expected one index for each row of the batch")
    index = rows.to(leaf.device, torch.long)
    found = Rows(index, len(leaf), batch_dim=batch_dim)
    if found.known() is None and torch.compiler.is_compiling():
        torch._assert_async(
            ((index >= -1) & (index < len(leaf))).all(),
            f"route: a row's index is outside of -1 to {len(leaf) - 1}, the {len(leaf)} adapters in the stack",
        )
    return Routed(stacked, found, members)


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    else:
        raise TypeError(
            f"route: got a {type(tree).__name__} among the stacked tree's leaves, expected nested dicts of tensors, as "
            "stack makes them"
        )
