"""The stack of the adapters that are present in a batch, over its rows."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from torchgraft.functional import Places, Routed, Rows
from torchgraft.functional.extending import SiteAdapter

from .state import Gathered


class GatheredStack(Routed):
    """A routed stack whose leaves are cut to the largest that is present; who made it knows that they fit."""

    __slots__ = ()

    def check(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], what: str) -> None:
        pass

    def along(self, adapter: SiteAdapter, rows: Rows) -> tuple[SiteAdapter, Rows]:
        adapter, rows = super().along(adapter, rows)
        return dataclasses.replace(adapter, expected={}), rows

    def now(self) -> Routed:
        """Return the stack of a call; in one that is compiled, its rows are values that may be others next time."""
        if not torch.compiler.is_compiling():
            return self
        assert self.places is not None  # `stack_of` gives it some
        count = next(iter(self.places.present.values())).shape[0]  # of a tensor, for it may be another next time
        return self._with(self.tree, Rows(self.rows.index, count, None, self.rows.tokens, self.rows.noise))


def stack_of(gathered: Gathered, rows: Rows, sites: Sequence[str], present: Sequence[frozenset[str]]) -> GatheredStack:
    """Make the stack of the adapters that are present, over the rows of a batch.

    Args:
        gathered: Their leaves and constants.
        rows: Which of them each row has.
        sites: The paths of all sites.
        present: The sites that each of them has.
    """
    constants: dict[str, dict[str, Tensor]] = {path: {} for path in sites}
    for tree in gathered.constants.values():
        for path, values in tree.items():
            constants[path].update(values)
    known = {path: tuple(path in own for own in present) for path in sites}
    device = None if rows.index is None else rows.index.device
    masks = dict(zip(sites, torch.tensor([*known.values()], device=device).unbind(), strict=True))
    if "torch._dynamo" in sys.modules:  # else nothing is compiled
        masks, constants = _apart(masks), {path: _apart(values) for path, values in constants.items()}
        _mark_dynamic(_tensors(gathered.tree, rows, masks, constants))
    return GatheredStack(gathered.tree, rows, places=Places(constants, masks, known))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, for compiled calls remember where in memory a view begins."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _mark_dynamic(tensors: Iterator[Tensor]) -> None:
    """Have compiled calls meet other numbers of rows and adapters without compiling anew."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _tensors(
    tree: Mapping[str, Mapping[str, Tensor]],
    rows: Rows,
    masks: Mapping[str, Tensor],
    constants: Mapping[str, Mapping[str, Tensor]],
) -> Iterator[Tensor]:
    for values in (*tree.values(), *constants.values(), masks):
        yield from values.values()
    if rows.index is not None:
        yield rows.index
