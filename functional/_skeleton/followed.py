"""Modules of experts that run once for rows with adapters of their own, where each entry of a product can be followed.

The adapters' part is then computed in groups of one adapter and expert each (`row_weights`). What the forward does
tells whether that is possible: where it loses sight of whose the entries are, nothing of the run is used, and such
modules run once for each adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .context import CallContext
from .entries import Entries
from .row_weights import NotFollowed

_DEPENDENT = ("_runtime", "_parameter_runtimes", "_owner")
"""What modules have whose call or tensors may depend on the row."""


class Runtime(Protocol):
    """What an adapted parameter knows: where it is, the call in progress, whether its module lost sight of entries."""

    path: str
    context: CallContext
    followed: bool

    def by_rows(self, module: nn.Module, size: int, entries: Entries) -> Any:
        """Return the adapted weight where each of `size` rows has its own; `None` where there is no way to."""
        ...


def run_followed(
    runtimes: Sequence[Runtime],
    module: nn.Module,
    known: Iterable[tuple[Tensor, Tensor]],
    size: int,
    forward: Callable[[], Any],
) -> tuple[Any] | None:
    """Run a module once for all rows.

    Args:
        runtimes: The facts of its adapted parameters.
        module: The module.
        known: Its arguments that have an entry of one row each along the first axis, with these rows.
        size: Number of rows.
        forward: Runs it.

    Returns:
        Its output; `None` where it has to run once for each adapter.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return None
    if not all(runtime.followed for runtime in runtimes) or _depends_inside(module):
        return None
    entries, context = Entries(known), runtimes[0].context
    weights = {runtime.path: runtime.by_rows(module, size, entries) for runtime in runtimes}
    if any(weight is None for weight in weights.values()):
        return None
    before, context.weights = context.weights, weights
    try:
        with entries:
            y = forward()
    except NotFollowed:
        y = None
    finally:
        context.weights = before
    if not entries.lost:
        return (y,)
    for runtime in runtimes:
        runtime.followed = False
    return None


def _depends_inside(module: nn.Module) -> bool:
    """Return whether more of a module than its own adapted parameters depends on the row."""
    own, *inner = module.modules()
    return "_owner" in vars(own) or any(name in vars(part) for part in inner for name in _DEPENDENT)
