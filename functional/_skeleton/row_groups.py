"""Modules whose parameters differ between the rows of a batch: run once for each adapter, on the rows that have it.

A parameter is read, not called, so its reader cannot tell whose row it is multiplied with. Its module can: where the
rows are in what it gets and gives is looked at and proved, as for the input of a layer. Then each run is one with a
single adapter, in which the parameter is what it is without routing. Experts in a grouped product run once for
all rows (`followed`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .._locating.finder import locate
from .._locating.layout import SHARED, Layout
from .._method import SiteAdapter, is_per_row
from .._sites.site import Site
from .._unsupported import UnsupportedCall
from .followed import Runtime as FollowedRuntime
from .followed import run_followed
from .row_outputs import WITHOUT_ROWS, Part, RowOutputs, behind, cannot_route


class Runtime(FollowedRuntime, Protocol):
    """What an adapted parameter knows: its adapters by name too."""

    entries: Mapping[str, SiteAdapter]


def run_in_groups(runtimes: Iterable[Runtime], forward: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Run a module's forward, group by group where its parameters differ between rows.

    Args:
        runtimes: The facts of its adapted parameters; rows are found in the name of the first.
        forward: The forward of the module's class, bound.
        args: Its arguments.
        kwargs: Its arguments by name.

    Raises:
        UnsupportedCall: An argument or an output that cannot be cut by rows.
        ValueError: Rows that are not where they were looked for, or not known.
    """
    first, *others = runtimes
    context = first.context
    stacks = {name: tree for name, tree in (context.trees or {}).items() if is_per_row(tree) and tree.rows.size > 1}
    if not (stacks or context.apart):
        return forward(*args, **kwargs)
    if not any(name in stacks or name in context.apart for one in (first, *others) for name in one.entries):
        return forward(*args, **kwargs)
    see, context.see = context.see, None  # modules within are run once for each group, which cannot be compared
    try:
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_packed)
        path = next(iter(first.entries.values())).site.path
        _show(see, path, leaves)
        y = RowGroups((first, *others), stacks, forward, leaves, spec).run() if stacks else forward(*args, **kwargs)
        _show(see, behind(path), pytree.tree_leaves(y))
        return y
    finally:
        context.see = see


def _show(see: Callable[[str, Tensor], None] | None, path: str, leaves: Iterable[Any]) -> None:
    for x in leaves if see is not None else ():
        if isinstance(x, Tensor) and x.ndim:
            see(path, x)  # type: ignore[misc]


def _is_packed(x: Any) -> bool:
    return isinstance(x, PackedSequence)  # a tuple of tensors that have no axis of rows


def _is_differentiated(x: Tensor) -> bool:
    transformed = torch._C._functorch.maybe_current_level() is not None
    return (x.is_floating_point() or x.is_complex()) and (x.requires_grad or transformed)


class RowGroups:
    """One run of a module in groups of rows that have the same adapters.

    Args:
        runtimes: The facts of its parameters; rows are found in the name of the first.
        stacks: The routed stacks of the call.
        forward: The forward of the module's class, bound.
        leaves: The leaves of its arguments.
        spec: Their structure, as `tree_unflatten` wants it.
    """

    def __init__(
        self, runtimes: Sequence[Runtime], stacks: Mapping[str, Any], forward: Any, leaves: list[Any], spec: Any
    ):
        self.runtimes, self.runtime, self.stacks, self.forward = runtimes, (runtime := runtimes[0]), stacks, forward
        self.context = runtime.context
        self.site: Site = next(iter(runtime.entries.values())).site
        self.leaves, self.spec = leaves, spec
        self.size = max(tree.rows.size for tree in stacks.values())
        self.declared = next(iter(stacks.values())).declared
        self.layouts: list[Layout | None] = []
        self.outputs = RowOutputs(self.site.path, self.size, self.declared.batch_dim, self.context.finder, runtime)

    def run(self) -> Any:
        """Return the module's outputs, each row's with its own adapters."""
        sizes = sorted({tree.rows.size for tree in self.stacks.values()})
        if any(self.size % size for size in sizes):
            raise ValueError(
                f"{self.site.path}: adapters are routed over {sizes} rows in one call; give one batch one length of "
                "rows"
            )
        self.layouts = [self._layout(x) for x in self.leaves]
        rows = self._rows_by_adapters()
        if rows is not None and len(rows) == 1:
            return self._under(self._trees(next(iter(rows))), self.leaves)
        before = self._writes()
        if rows is None:
            y = self._row_by_row()
        elif (once := self._once()) is not None:
            return once[0]
        else:
            y = self.outputs.joined([self._part(adapters, own) for adapters, own in rows.items()])
        if self._writes() != before:
            raise UnsupportedCall(
                cannot_route(self.site.path, "its module writes to a buffer, which each group of rows would do")
            )
        return y

    # -- arguments ----------------------------------------------------------------------------------------------------

    def _layout(self, x: Any) -> Layout | None:
        """Return where the rows are in an argument; `None` for what is the same for every row."""
        if not isinstance(x, Tensor):
            if not isinstance(x, WITHOUT_ROWS):
                raise UnsupportedCall(
                    cannot_route(self.site.path, f"its module gets a {type(x).__name__}, which has no rows to cut")
                )
            return None
        if not x.ndim:
            return None
        layout = locate(self.site, x, self.size, self.declared, self.context.finder, self.runtime)
        return None if layout == SHARED else layout

    def _cut(self, rows: Sequence[int]) -> list[Any]:
        """Return the arguments for some rows."""
        index = torch.tensor(rows)
        leaves = []
        for x, layout in zip(self.leaves, self.layouts, strict=True):
            if layout is not None:
                each = layout.each(x, self.size).index_select(0, index.to(x.device))
                x = layout.from_rows(each.flatten(0, 1), len(rows))
            leaves.append(x)
        return leaves

    def _only(self, rows: Collection[int]) -> list[Any]:
        """Return the arguments for all rows, as they are in memory, with a gradient to some of them alone."""
        leaves = []
        for x, layout in zip(self.leaves, self.layouts, strict=True):
            if layout is not None and layout.axis is not None and _is_differentiated(x):
                parts = x.shape[layout.axis] // self.size
                own = torch.tensor([row in rows for row in range(self.size)], device=x.device)
                own = own.repeat(parts) if layout.minor else own.repeat_interleave(parts)
                x = torch.where(own.view(-1, *(1,) * (x.ndim - 1 - layout.axis)), x, x.detach())
            leaves.append(x)
        return leaves

    # -- runs ---------------------------------------------------------------------------------------------------------

    def _rows_by_adapters(self) -> dict[tuple[int, ...], list[int]] | None:
        """Return the rows by their adapters; `None` where these cannot be read, as under `torch.vmap`."""
        rows: dict[tuple[int, ...], list[int]] = {}
        values = [self._values(tree) for tree in self.stacks.values()]
        if any(value is None for value in values):
            return None
        for row, adapters in enumerate(zip(*(value or () for value in values), strict=True)):
            rows.setdefault(adapters, []).append(row)
        return rows

    def _values(self, tree: Any) -> Sequence[int] | None:
        """Return the adapter of each row, where that can be read."""
        rows = tree.rows
        if rows.known() is None:
            return None
        values = range(rows.count) if rows.index is None else rows.values
        return [value for value in values for _ in range(self.size // rows.size)]

    def _trees(self, adapters: Sequence[Any]) -> dict[str, Any]:
        """Return the trees of the call for rows that have one adapter of each stack, `-1` for none."""
        own = dict(zip(self.stacks, adapters, strict=True))
        return {
            name: tree.single(own[name]) if name in own else tree for name, tree in (self.context.trees or {}).items()
        }

    def _under(self, trees: Mapping[str, Any], leaves: Sequence[Any]) -> Any:
        """Run the forward with these trees."""
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        before, self.context.trees = self.context.trees, trees
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.context.trees = before

    def _part(self, adapters: Sequence[int], rows: list[int]) -> Part:
        """Return the outputs for the rows of one group.

        Rows without any adapter are computed among all others, as by the base: kernels round by their sizes.
        """
        if any(adapter >= 0 for adapter in adapters):
            return rows, self.outputs.by_rows(self._under(self._trees(adapters), self._cut(rows)), len(rows))
        every = self.outputs.by_rows(self._under(self._trees(adapters), self._only(set(rows))), self.size)
        index = torch.tensor(rows)
        return rows, [x.index_select(0, index.to(x.device)) if isinstance(x, Tensor) else x for x in every]

    def _once(self) -> tuple[Any] | None:
        """Return the outputs of one run for all rows, where that is possible."""
        known = []
        for x, layout in zip(self.leaves, self.layouts, strict=True):
            if layout is not None and layout.axis == 0:
                rows, parts = torch.arange(self.size, device=x.device), len(x) // self.size
                known.append((x, rows.repeat(parts) if layout.minor else rows.repeat_interleave(parts)))
        module = self.forward.__self__
        return run_followed(
            self.runtimes, module, known, self.size, lambda: self._under(self.context.trees or {}, self.leaves)
        )

    def _row_by_row(self) -> Any:
        """Return the outputs where the adapter of a row cannot be read: each row is run by itself."""
        index = [
            torch.arange(tree.rows.count) if tree.rows.index is None else tree.rows.index
            for tree in self.stacks.values()
        ]
        index = [each.repeat_interleave(self.size // len(each)) for each in index]
        parts = []
        for row in range(self.size):
            trees = self._trees([each[row : row + 1] for each in index])
            parts.append(([row], self.outputs.by_rows(self._under(trees, self._cut([row])), 1)))
        active = torch.stack([each.to(index[0].device) >= 0 for each in index]).any(0)
        base = self.outputs.by_rows(self._under(self._trees([-1] * len(index)), self._only(())), self.size)
        return self.outputs.joined(parts, (active, base))

    def _writes(self) -> int:
        """Return a count of what has been written to the buffers of the module, where torch counts it."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return 0
        return sum(buffer._version for buffer in self.forward.__self__.buffers() if not buffer.is_inference())
