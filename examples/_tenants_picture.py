"""The picture of a bank's tenants: slots over time, each one's losses with those of a run alone over them, speed."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from _panels import FAINT, INK, MUTED, PANEL, PAPER, finish
from matplotlib.figure import Figure

COLUMNS = 8


def draw(
    path: Path,
    tenants: Sequence[Any],
    spans: Mapping[str, Sequence[int]],
    log: Sequence[Sequence[str]],
    losses: Mapping[str, Sequence[float]],
    alone: Mapping[str, Sequence[float]],
    speed: Mapping[str, float],
    slots: int,
    difference: float,
) -> None:
    """Draw a run.

    Args:
        tenants: Who was there; each has a `name`, and a batch before which it `arrives`.
        spans: From which batch to which each one had a slot.
        log: The names in each batch.
        losses: Of each tenant, by step.
        alone: The same when it was trained alone.
        speed: Characters per second by way.
        slots: How many slots there are.
        difference: The largest of any two losses.
    """
    colors = {
        one.name: colorsys.hls_to_rgb(i * 5 % len(tenants) / len(tenants), 0.66, 0.7) for i, one in enumerate(tenants)
    }
    figure = Figure(figsize=(15, 11), facecolor=PAPER)
    figure.text(0.03, 0.945, f"{len(tenants)} tenants, {slots} slots, one base", color=INK, fontsize=28, weight="bold")
    story = (
        f"Each trains its own adapter, and what it computes is what it would alone: losses differ by {difference:.0e}."
    )
    figure.text(0.03, 0.91, story, color=MUTED, fontsize=16)
    _draw_slots(figure.add_axes((0.03, 0.56, 0.69, 0.28)), tenants, spans, log, colors, slots)
    _draw_speed(figure.add_axes((0.765, 0.56, 0.205, 0.28)), speed)
    title = "Loss by step, smoothed: in the bank (wide), alone (dashed)"
    figure.text(0.03, 0.475, title, color=INK, fontsize=16)
    lines = -(-len(tenants) // COLUMNS)
    for i, tenant in enumerate(tenants):
        row, column = divmod(i, COLUMNS)
        height = 0.42 / lines
        where = (0.03 + 0.118 * column, 0.455 - height * (row + 1) + 0.015, 0.112, height - 0.03)
        _draw_losses(figure.add_axes(where), tenant, losses[tenant.name], alone[tenant.name], colors[tenant.name])
    figure.savefig(path, dpi=90, facecolor=PAPER)


def place(spans: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Give each span the lowest line that is free when it begins."""
    lines: list[int] = []
    places: dict[str, int] = {}
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1][0]):
        free = next((i for i, until in enumerate(lines) if until <= start), len(lines))
        lines[free : free + 1] = [end]
        places[name] = free
    return places


def _draw_slots(
    axes: Any,
    tenants: Sequence[Any],
    spans: Mapping[str, Sequence[int]],
    log: Sequence[Sequence[str]],
    colors: Mapping[str, Any],
    slots: int,
) -> None:
    places = place(spans)
    for name, (start, end) in spans.items():
        axes.broken_barh([(start, end - start)], (places[name] - 0.4, 0.8), color=colors[name], alpha=0.4, linewidth=0)
        steps = [(batch, 1) for batch in range(start, end) if name in log[batch]]
        axes.broken_barh(steps, (places[name] - 0.4, 0.8), color=colors[name], linewidth=0)
        if end - start > 0.07 * len(log):
            where = {"fontsize": 10.5, "va": "center", "ha": "center", "weight": "bold", "clip_on": True}
            axes.text((start + end) / 2, places[name], name, color=PAPER, **where)
    axes.set_xlim(0, len(log))
    axes.set_ylim(max(slots, *(line + 1 for line in places.values())) - 0.5, -0.5)
    axes.set_yticks([])
    waited = sum(spans[one.name][0] > one.arrives for one in tenants)
    finish(axes, f"Slots by batch; pale: not in this batch; {waited} waited for a slot")


def _draw_speed(axes: Any, speed: Mapping[str, float]) -> None:
    for i, value in enumerate(speed.values()):
        axes.bar(i, value, color=("#4fd6be", FAINT)[i], width=0.65)
        axes.text(i, value, f"{value:,.0f}", color=INK, fontsize=14, ha="center", va="bottom", weight="bold")
    axes.set_xticks(range(len(speed)), [way.replace(" at ", "\nat ") for way in speed])
    axes.set_yticks([])
    axes.set_ylim(0, 1.15 * max(speed.values()))
    finish(axes, "Characters per second")


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and those just before it."""
    width = max(1, len(values) // 10)
    return [fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def _draw_losses(axes: Any, tenant: Any, own: Sequence[float], alone: Sequence[float], color: Any) -> None:
    axes.plot(smooth(own), color=color, linewidth=3.2, alpha=0.75)
    axes.plot(smooth(alone), color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.55 * (high - low))
    axes.set_facecolor(PANEL)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    label = {"transform": axes.transAxes, "ha": "right", "va": "top"}
    axes.text(0.96, 0.95, tenant.name, color=color, fontsize=11, weight="bold", **label)
    axes.text(0.96, 0.78, f"rank {tenant.rank}, {len(own)} steps", color=MUTED, fontsize=9, **label)
