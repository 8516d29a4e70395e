"""Outputs of a module that ran in groups of rows, put together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .._locating.finder import BatchDim, Finder, axis_said
from .._locating.layout import LEADING, SHARED, Layout, Place
from .._unsupported import UnsupportedCall

WITHOUT_ROWS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
"""Types of arguments and outputs that are the same for every row."""


Part = tuple[Sequence[int], list[Any]]
"""Rows, and the leaves of the outputs for them; tensors lead by these rows."""


def cannot_route(path: str, why: str) -> str:
    """Say why a parameter cannot be routed, and what to do."""
    return (
        f"{path}: this parameter is adapted in a call that routes rows, and {why}; use torch.vmap over the stack, call "
        "the graft with one adapter at a time, or leave it out of target_parameters"
    )


def behind(path: str) -> str:
    """Return the name under which rows are found in the outputs of a parameter's module."""
    return f"{path} (behind its module)"


def _grown(layout: Layout) -> Layout:
    """Return where the rows are in what is put together: each has its own of what all rows shared."""
    return LEADING if layout == SHARED else layout


class RowOutputs:
    """The outputs of one run of a module in groups of rows.

    Args:
        path: A parameter of the module, in whose name rows are found.
        size: Number of rows.
        batch_dim: What the user said of where they are.
        finder: What is known of the call.
        owner: What asks the finder, the same in each run of the module.
    """

    def __init__(self, path: str, size: int, batch_dim: BatchDim, finder: Finder | None, owner: Any):
        self.path, self.size, self.batch_dim, self.finder, self.owner = path, size, batch_dim, finder, owner
        self.spec: Any = None
        self.places: list[Place | None] = []

    def by_rows(self, y: Any, count: int) -> list[Any]:
        """Return the leaves of a run's outputs, with the rows leading: `"count parts ..."`."""
        leaves, spec = pytree.tree_flatten(y)
        if self.spec is None:
            self.spec = spec
            self.places = [self._place(x) for x in leaves]
        if spec != self.spec:
            raise UnsupportedCall(
                cannot_route(self.path, "its module returns other things for some of the rows than for others")
            )
        return [
            x if place is None else self._led(x, place, count) for x, place in zip(leaves, self.places, strict=True)
        ]

    def _place(self, x: Any) -> Place | None:
        """Return where the rows are in an output; `None` for what is no tensor."""
        if not isinstance(x, Tensor):
            if not isinstance(x, WITHOUT_ROWS):
                raise UnsupportedCall(
                    cannot_route(self.path, f"its module returns a {type(x).__name__}, which has no rows to cut")
                )
            return None
        axis = axis_said(self.batch_dim, self.path, x.ndim)
        place = None
        if axis is not None and 0 <= axis < x.ndim:
            place = Place(x.ndim, Layout(axis))
        elif axis is None and self.finder is not None and x.ndim:
            place = self.finder.expect(behind(self.path), x.ndim, self.owner)
        if place is None:
            raise ValueError(
                cannot_route(
                    self.path,
                    f"its module returns a tensor of shape {tuple(x.shape)}, and it is not known which axis of it has "
                    "the rows",
                )
            )
        return place

    def _led(self, x: Tensor, place: Place, count: int) -> Tensor:
        """Return an output with the rows leading; what all rows shared has become each one's own."""
        if place.layout == SHARED and x.ndim and len(x) == 1:
            return x.expand(count, *x.shape[1:]).unsqueeze(1)
        layout = _grown(place.layout)
        assert layout.axis is not None
        if x.ndim != place.ndim or not self._holds(x.shape[layout.axis], place, count):
            raise ValueError(
                cannot_route(
                    self.path,
                    f"its module returns a tensor of shape {tuple(x.shape)} for {count} of them, which cannot be "
                    f"along axis {layout.axis} of it, where they are looked for",
                )
            )
        return layout.each(x, count)

    def _holds(self, length: int, place: Place, count: int) -> bool:
        """Return whether an axis of this length can have so many rows, each as long as when it was looked at."""
        batch = None if self.finder is None or torch.compiler.is_compiling() else self.finder.length
        if place.even and batch is not None:
            return length * self.size == batch * count
        return length > 0 and length % count == 0

    def joined(self, parts: Sequence[Part], base: tuple[Tensor, list[Any]] | None = None) -> Any:
        """Return the outputs of all rows; those of the base where a row has no adapter and that was not known."""
        order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
        leaves = []
        for i, place in enumerate(self.places):
            each = [leaves_of_part[i] for _, leaves_of_part in parts]
            if place is None:
                leaves.append(self._same(each))
                continue
            if len({x.shape[1:] for x in each}) > 1:
                shapes = sorted({tuple(x.shape[1:]) for x in each})
                raise ValueError(
                    cannot_route(self.path, f"its module returns tensors of shapes {shapes} for one row each")
                )
            y = torch.cat(each).index_select(0, order.to(each[0].device))
            if base is not None:
                active = base[0].to(y.device).view(-1, *(1,) * (y.ndim - 1))
                y = torch.where(active, y, base[1][i])
            leaves.append(_grown(place.layout).from_rows(y.flatten(0, 1), self.size))
        return pytree.tree_unflatten(leaves, self.spec)

    def _same(self, values: Sequence[Any]) -> Any:
        """Return an output that is no tensor, the same for every row."""
        if any(value != values[0] for value in values):
            raise UnsupportedCall(
                cannot_route(
                    self.path, f"its module returns {values[0]!r} for some of the rows and other values for others"
                )
            )
        return values[0]
