"""Goals where the library's own work is most of what it adds: launch-bound runs, calls, binding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Cases = Mapping[str, Mapping[str, float]]


def goals(
    hand: str, inference: Cases, training: Cases, call: Cases, bound: float, first: float
) -> dict[str, dict[str, Any]]:
    """Return each goal: what was measured, the limit, and whether it holds.

    Args:
        hand: The case that was written by hand with plain kernels.
        inference: Ratios of launch-bound inference.
        training: Those of a launch-bound training step.
        call: Those of a call to its view.
        bound: `bind` as a multiple of PEFT's injection.
        first: The same for the first of a process.
    """
    over = {name: row["ratio"] / inference[hand]["ratio"] for name, row in inference.items()}
    above = {name: 1e3 * (row["ratio"] - 1) * call["torchgraft, view"]["median_s"] for name, row in call.items()}
    steps = {name: row["ratio"] / training["PEFT"]["ratio"] for name, row in training.items()}
    measured = {
        "inference as a view, over plain kernels by hand": (over["torchgraft, view"], 1.03),
        "inference in place, over plain kernels by hand": (over["torchgraft, in place"], 1.03),
        "inference as a call, over plain kernels by hand": (over["torchgraft, functional"], 1.05),
        "training step, functional, over PEFT's": (steps["torchgraft, functional"], 1.0),
        "training step in place, over PEFT's": (steps["torchgraft, in place"], 1.0),
        "ms that a call takes above its view": (above["torchgraft, functional"], 0.3),
        "the same of an unchanging graft": (above["torchgraft, unchanging"], 0.1),
        "bind of 224 targets, over PEFT's injection": (bound, 0.15),
        "the same, the first of a process": (first, 0.25),
    }
    return {
        name: {"measured": round(value, 3), "limit": limit, "holds": value <= limit}
        for name, (value, limit) in measured.items()
    }


def shown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Goals as text."""
    width = max(map(len, found))
    return "\n".join(
        f"  {name:<{width}}  {goal['measured']:6.3f}  limit {goal['limit']:.2f}  {_word(goal)}"
        for name, goal in found.items()
    )


def _word(goal: Mapping[str, Any]) -> str:
    return "holds" if goal["holds"] else "MISSED"
