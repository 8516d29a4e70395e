"""Modules whose parameters differ between the rows of a batch: run once for each adapter, on the rows that have it.

A parameter is read, not called, so its reader cannot tell whose row it is multiplied with. Its module can: where the
rows are in what it gets and gives is looked at and proved, as for the input of a layer. Then each run is one with a
single adapter, in which the parameter is what it is without routing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .._locating.finder import declared_axis, locate
from .._locating.layout import LEADING, SHARED, Layout
from .._method import SiteAdapter, is_per_row
from .._sites.site import Site
from .._unsupported import UnsupportedCall
from .context import CallContext

_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
"""Types of arguments that are the same for every row."""

Part = tuple[Sequence[int], list[Any]]
"""Rows, and the leaves of the outputs for them; tensors lead by these rows."""


class Runtime(Protocol):
    """What an adapted parameter knows: the call in progress, and its adapters by name."""

    context: CallContext
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
    site = next(iter(first.entries.values())).site
    see, context.see = context.see, None  # modules within are run once for each group, which nobody could compare
    try:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        _show(see, site.path, leaves)
        y = RowGroups(site, context, stacks, forward, leaves, spec).run() if stacks else forward(*args, **kwargs)
        _show(see, _behind(site), pytree.tree_leaves(y))
        return y
    finally:
        context.see = see


def _behind(site: Site) -> str:
    """Return the name under which rows are found in the outputs of a parameter's module."""
    return f"{site.path} (behind its module)"


def _show(see: Callable[[str, Tensor], None] | None, path: str, leaves: Iterable[Any]) -> None:
    for x in leaves if see is not None else ():
        if isinstance(x, Tensor) and x.ndim:
            see(path, x)  # type: ignore[misc]


def _is_differentiated(x: Tensor) -> bool:
    return x.is_floating_point() and (x.requires_grad or torch._C._functorch.maybe_current_level() is not None)


class RowGroups:
    """One run of a module in groups of rows that have the same adapters.

    Args:
        site: One of its parameters, in whose name rows are found.
        context: The context of the call.
        stacks: The routed stacks of the call.
        forward: The forward of the module's class, bound.
        leaves: The leaves of its arguments.
        spec: Their structure, as `tree_unflatten` wants it.
    """

    def __init__(
        self, site: Site, context: CallContext, stacks: Mapping[str, Any], forward: Any, leaves: list[Any], spec: Any
    ):
        self.site, self.context, self.stacks, self.forward = site, context, stacks, forward
        self.leaves, self.spec = leaves, spec
        self.size = max(tree.rows.size for tree in stacks.values())
        self.output_spec: Any = None
        self.layouts: list[Layout | None] = []
        self.output_layouts: list[Layout | None] = []

    def run(self) -> Any:
        """Return the module's outputs, each row's with its own adapters."""
        sizes = sorted({tree.rows.size for tree in self.stacks.values()})
        if any(self.size % size for size in sizes):
            raise ValueError(
                f"{self.site.path}: adapters are routed over {sizes} rows in one call; give one batch one length of "
                "rows"
            )
        self.layouts = [self._layout(x) for x in self.leaves]
        values = {name: self._values(tree) for name, tree in self.stacks.items()}
        if any(value is None for value in values.values()):
            return self._row_by_row()
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, adapters in enumerate(zip(*values.values(), strict=True)):
            rows.setdefault(adapters, []).append(row)
        if len(rows) == 1:
            return self._under(self._trees(next(iter(rows))), self.leaves)
        return self._joined([self._part(adapters, own) for adapters, own in rows.items()])

    # -- arguments ----------------------------------------------------------------------------------------------------

    def _layout(self, x: Any) -> Layout | None:
        """Return where the rows are in an argument; `None` for what is the same for every row."""
        if not isinstance(x, Tensor):
            if not isinstance(x, _PLAIN):
                raise UnsupportedCall(self._words(f"its module gets a {type(x).__name__}, which has no rows to cut"))
            return None
        if not x.ndim:
            return None
        batch_dim = next(iter(self.stacks.values())).declared.batch_dim
        layout = locate(self.site, x, self.size, batch_dim, self.context.finder, self)
        return None if layout == SHARED else layout

    def _cut(self, rows: Sequence[int]) -> list[Any]:
        """Return the arguments for some rows."""
        index = torch.tensor(rows)
        return [
            x
            if layout is None
            else layout.from_rows(
                layout.each(x, self.size).index_select(0, index.to(x.device)).flatten(0, 1), len(rows)
            )
            for x, layout in zip(self.leaves, self.layouts, strict=True)
        ]

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
            return rows, self._by_rows(self._under(self._trees(adapters), self._cut(rows)), len(rows))
        every = self._by_rows(self._under(self._trees(adapters), self._only(set(rows))), self.size)
        index = torch.tensor(rows)
        return rows, [x.index_select(0, index.to(x.device)) if isinstance(x, Tensor) else x for x in every]

    def _row_by_row(self) -> Any:
        """Return the outputs where nobody can read which adapter a row has: each row is run by itself."""
        index = [
            torch.arange(tree.rows.count) if tree.rows.index is None else tree.rows.index
            for tree in self.stacks.values()
        ]
        index = [each.repeat_interleave(self.size // len(each)) for each in index]
        parts = []
        for row in range(self.size):
            trees = self._trees([each[row : row + 1] for each in index])
            parts.append(([row], self._by_rows(self._under(trees, self._cut([row])), 1)))
        active = torch.stack([each.to(index[0].device) >= 0 for each in index]).any(0)
        base = self._by_rows(self._under(self._trees([-1] * len(index)), self._only(())), self.size)
        return self._joined(parts, (active, base))

    # -- outputs ------------------------------------------------------------------------------------------------------

    def _by_rows(self, y: Any, count: int) -> list[Any]:
        """Return the leaves of a run's outputs, with the rows leading: `"count parts ..."`."""
        leaves, spec = pytree.tree_flatten(y)
        if self.output_spec is None:
            self.output_spec = spec
            self.output_layouts = [self._output_layout(x) for x in leaves]
        if spec != self.output_spec:
            raise UnsupportedCall(self._words("its module returns other things for some of the rows than for others"))
        return [
            x if layout is None else self._led(x, layout, count)
            for x, layout in zip(leaves, self.output_layouts, strict=True)
        ]

    def _output_layout(self, x: Any) -> Layout | None:
        """Return where the rows are in an output; `None` for what is no tensor."""
        if not isinstance(x, Tensor):
            if not isinstance(x, _PLAIN):
                raise UnsupportedCall(self._words(f"its module returns a {type(x).__name__}, which has no rows to cut"))
            return None
        declared, path = next(iter(self.stacks.values())).declared.batch_dim, _behind(self.site)
        axis = declared_axis(declared, self.site.path)
        finder = self.context.finder
        layout = None
        if axis is not None and -x.ndim <= axis < x.ndim:
            layout = Layout(axis % x.ndim)
        elif axis is None and finder is not None and x.ndim:
            layout = finder.expect(path, x.ndim, self)
        if layout is None:
            raise ValueError(
                self._words(
                    f"its module returns a tensor of shape {tuple(x.shape)}, and it is not known which axis of it has "
                    "the rows"
                )
            )
        return layout

    def _led(self, x: Tensor, layout: Layout, count: int) -> Tensor:
        """Return an output with the rows leading; what all rows shared has become each one's own."""
        if layout == SHARED and len(x) == 1:
            return x.expand(count, *x.shape[1:]).unsqueeze(1)
        layout = LEADING if layout == SHARED else layout
        assert layout.axis is not None
        if layout.axis >= x.ndim or x.shape[layout.axis] % count:
            raise ValueError(
                self._words(
                    f"its module returns a tensor of shape {tuple(x.shape)} for {count} of them, which are not along "
                    f"axis {layout.axis}, where they were when a call of this kind was looked at"
                )
            )
        return layout.each(x, count)

    def _joined(self, parts: Sequence[Part], base: tuple[Tensor, list[Any]] | None = None) -> Any:
        """Return the outputs of all rows; those of the base where a row has no adapter and that was not known."""
        order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
        leaves = []
        for i, layout in enumerate(self.output_layouts):
            each = [leaves_of_part[i] for _, leaves_of_part in parts]
            if layout is None:
                leaves.append(self._same(each))
                continue
            if len({x.shape[1:] for x in each}) > 1:
                shapes = sorted({tuple(x.shape[1:]) for x in each})
                raise ValueError(self._words(f"its module returns tensors of shapes {shapes} for one row each"))
            y = torch.cat(each).index_select(0, order.to(each[0].device))
            if base is not None:
                active = base[0].to(y.device).view(-1, *(1,) * (y.ndim - 1))
                y = torch.where(active, y, base[1][i])
            leaves.append((LEADING if layout == SHARED else layout).from_rows(y.flatten(0, 1), self.size))
        return pytree.tree_unflatten(leaves, self.output_spec)

    def _same(self, values: Sequence[Any]) -> Any:
        """Return an output that is no tensor, the same for every row."""
        if any(value != values[0] for value in values):
            raise UnsupportedCall(
                self._words(f"its module returns {values[0]!r} for some of the rows and other values for others")
            )
        return values[0]

    def _words(self, why: str) -> str:
        return (
            f"{self.site.path}: this parameter is adapted in a call that routes {self.size} rows, and {why}; use "
            "torch.vmap over the stack, call the graft with one adapter at a time, or leave it out of target_parameters"
        )
