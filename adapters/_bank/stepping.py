"""The steps of adapters that have slots: their gradients looked at, divided, clipped, and taken by their optimizers.

Norms are known since the gradients were added up, so nothing reads gradients before the optimizers do, and a device is
waited for once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from .resident import Resident, Stepped
from .state import State

Hyper = tuple[Mapping[str, Any], float | None]
"""All of an optimizer's hyper-parameters, and the norm to clip the gradient to."""


def take_steps(state: State, residents: Sequence[Resident], values: Sequence[Hyper]) -> dict[str, Stepped]:
    """Step adapters, except those whose gradients are not finite, and drop all these gradients.

    Those of one optimizer are stepped together. If it fails, gradients of these are dropped, and the adapters of the
    optimizers after it keep theirs.

    Args:
        state: The numbers of all slots.
        residents: The adapters, each in a slot and once.
        values: The hyper-parameters of each.

    Returns:
        What happened to each, by name.
    """
    norms, tokens = torch.stack([state.norms.double(), state.tokens]).tolist()
    report: dict[str, Stepped] = {}
    due: dict[Hashable, tuple[list[Resident], list[Mapping[str, Any]]]] = {}
    for one, (hyper, most) in zip(residents, values, strict=True):
        report[one.name] = _look(one, most, norms[one.place], tokens[one.place] if one.by_tokens else 1.0)
        if not report[one.name].skipped:
            together, hypers = due.setdefault(one.optimizer.family, ([], []))
            together.append(one)
            hypers.append(hyper)
    counted = [one.place for one in residents if one.by_tokens]
    failed = True
    _write_counts(state, [one for together, _ in due.values() for one in together], 1)
    try:
        for together, hypers in due.values():
            for one in together:
                one.pending = False  # also where the optimizer fails, for the gradient may be divided then
            together[0].optimizer.update([one.row for one in together if one.row is not None], hypers)
            for one in together:
                one.steps += 1
        failed = False
    finally:
        if failed:
            _write_counts(state, residents, 0)
        if counted:
            done = [one.place for one in residents if one.by_tokens and not one.pending]
            state.tokens[torch.tensor(done, dtype=torch.int64, device=state.tokens.device)] = 0
    return report


def _look(resident: Resident, most: float | None, norm: float, tokens: float) -> Stepped:
    """Return what a step does to an adapter, and say in its row what its gradient is to be multiplied with.

    Args:
        resident: The adapter; if it is skipped, its gradients are dropped.
        most: The norm to clip to.
        norm: The norm of the sum of its gradients.
        tokens: What to divide this sum by.
    """
    row = resident.row
    assert row is not None
    if not math.isfinite(norm):  # squares may have been too large for the dtype
        norm = float(torch.linalg.vector_norm(row.gradient, dtype=torch.float64))
    reason = ""
    if tokens <= 0:
        reason = "its batches have no tokens"
    elif not math.isfinite(norm / tokens):
        reason = "its gradients are not finite"
    if reason:
        row.gradient.zero_()  # also beyond what the next batch writes
        resident.pending = False
        return Stepped(resident.steps, norm / tokens if tokens > 0 else norm, reason)
    norm, row.factor, row.first = norm / tokens, 1 / tokens, resident.steps == 0
    if most is not None:
        row.factor *= min(1.0, most / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
    return Stepped(resident.steps + 1, norm)


def _write_counts(state: State, residents: Sequence[Resident], more: int) -> None:
    """Write how many steps adapters have taken into the state, with so many more."""
    places = torch.tensor([one.place for one in residents], dtype=torch.int64, device=state.steps.device)
    counts = torch.tensor([one.steps + more for one in residents], dtype=state.steps.dtype, device=state.steps.device)
    state.steps[places] = counts
