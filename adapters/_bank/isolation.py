"""Looks whether adapters that share batches are joined by what is computed of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional import StackedGraft

from .batch import Batch
from .resident import Resident
from .slots import Slots

_SIZE = 0.3
"""Standard deviation of what is added to the parameters of one adapter."""


def check_isolated(
    graft: StackedGraft,
    slots: Slots,
    present: Sequence[Resident],
    given: Sequence[str | None],
    packed: int | None,
    compute: Callable[[Batch], Tensor],
) -> None:
    """Change each adapter in turn, and refuse gradients of others that change with it, as `Bank.check` does."""
    before = [resident.generator.get_state() for resident in present]

    def gradients(changed: int | None) -> Tensor:
        state = slots.state
        if changed is not None:
            state = state._replace(parameters=_changed(slots, present[changed]))
        with torch.enable_grad():
            stack, gathered = slots.gather(present, given, packed, True, state)
            batch = Batch(graft, stack, gathered)
            with torch.random.fork_rng([] if slots.device.type == "cpu" else [slots.device]):
                torch.manual_seed(0)
                compute(batch).backward()
        for resident, generator_state in zip(present, before, strict=True):
            resident.generator.set_state(generator_state)
        leaves = [leaf for own in gathered.tree.values() for leaf in own.values()]
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return torch.cat([gradient.flatten(1) for gradient in found], 1)

    alone = gradients(None)
    tolerance = 1e4 * torch.finfo(alone.dtype).eps
    for i, resident in enumerate(present):
        off = (gradients(i) - alone).abs().amax(1) > tolerance * alone.abs().amax(1)
        moved = [other.name for j, other in enumerate(present) if j != i and bool(off[j])]
        if moved:
            raise ValueError(
                f"check: the gradients of {', '.join(map(repr, moved))} change with the parameters of "
                f"{resident.name!r}; something joins their rows: negatives, statistics or an auxiliary term of the "
                "whole batch, or attention across packed documents. Each row's loss has to be its own"
            )


def _changed(slots: Slots, resident: Resident) -> Tensor:
    """Return the parameters of all slots with one adapter's changed, where they are no padding."""
    parameters: Any = slots.state.parameters.clone()
    noise = torch.randn(parameters.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index = resident.kind.index(slots.layout, slots.device)
    own = torch.arange(parameters.shape[1], device=slots.device) if index is None else index
    parameters[resident.place, own] += _SIZE * noise.to(parameters)[own]
    return parameters  # type: ignore[no-any-return,unused-ignore]
