"""The steps of adapters that have slots: their gradients looked at, divided, clipped, and taken by their optimizers.

A row of gradients is read twice, for its norm and by its optimizer. On a CPU the second comes right after the first,
while the row is in the cache, and with little Python between; elsewhere all norms come first, for each look at one
waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .resident import Resident, Stepped
from .state import State

Hyper = tuple[Mapping[str, Any], float | None]
"""All of an optimizer's hyper-parameters, and the norm to clip the gradient to."""


def take_steps(state: State, residents: Sequence[Resident], values: Sequence[Hyper]) -> dict[str, Stepped]:
    """Step adapters, except those whose gradients are not finite, and drop all these gradients.

    Args:
        state: The numbers of all slots.
        residents: The adapters, each in a slot and once.
        values: The hyper-parameters of each.

    Returns:
        What happened to each, by name.
    """
    counted = [one.place for one in residents if one.by_tokens]
    tokens = state.tokens.tolist() if counted else []
    report: dict[str, Stepped] = {}
    _write_counts(state, residents, 1)
    try:
        for one, (hyper, most), norm in zip(residents, values, _norms(residents, state.sums), strict=True):
            report[one.name] = _step(one, hyper, most, norm, tokens[one.place] if one.by_tokens else 1.0)
    finally:
        if len(report) < len(residents) or any(stepped.skipped for stepped in report.values()):
            _write_counts(state, residents, 0)
        if counted:
            done = [one.place for one in residents if one.by_tokens and not one.pending]
            state.tokens[torch.tensor(done, dtype=torch.int64, device=state.tokens.device)] = 0
    return report


def _step(resident: Resident, hyper: Mapping[str, Any], most: float | None, norm: float, tokens: float) -> Stepped:
    """Step one adapter, whose count in the state is that of this step already.

    Args:
        resident: The adapter.
        hyper: All of its optimizer's hyper-parameters.
        most: The norm to clip to.
        norm: The norm of the sum of its gradients.
        tokens: What to divide this sum by.
    """
    row = resident.row
    assert row is not None
    resident.pending = False  # also where the optimizer fails, for the gradient may be divided then
    if tokens <= 0:
        return Stepped(resident.steps, norm, "its batches have no tokens")
    norm /= tokens
    if not math.isfinite(norm):
        return Stepped(resident.steps, norm, "its gradients are not finite")
    factor = 1 / tokens
    if most is not None:
        factor *= min(1.0, most / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
    if factor != 1:
        row.gradient.mul_(factor)
    row.first = resident.steps == 0
    resident.optimizer.update(row, hyper)
    resident.steps += 1
    return Stepped(resident.steps, norm)


def _norms(residents: Sequence[Resident], sums: Tensor) -> Iterator[float]:
    """Yield the norm of each adapter's gradients."""
    rows = [one.row.gradient for one in residents if one.row is not None]
    if sums.is_cpu:
        squares: Iterator[float] = (torch.dot(row, row).item() for row in rows)
    else:
        squares = iter(torch.stack([torch.dot(row, row) for row in rows]).tolist() if rows else [])
    for square, row in zip(squares, rows, strict=True):
        if math.isfinite(square):
            yield math.sqrt(square)
        else:  # squares may have been too large for the dtype
            yield float(torch.linalg.vector_norm(row, dtype=torch.float64))


def _write_counts(state: State, residents: Sequence[Resident], more: int) -> None:
    """Write how many steps adapters have taken into the state, with so many more."""
    places = torch.tensor([one.place for one in residents], dtype=torch.int64, device=state.steps.device)
    counts = torch.tensor([one.steps + more for one in residents], dtype=state.steps.dtype, device=state.steps.device)
    state.steps[places] = counts
