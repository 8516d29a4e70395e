"""The picture of a sweep: a learning curve for each rate, the loss by rank and rate, and what two models write."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from _panels import FAINT, INK, MUTED, PANEL, PAPER, finish
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

COLORS = ["#58b7ff", "#4fd6be", "#f2cc60", "#ff7b72"]
BEST = "#4fd6be"


def draw(
    path: Path,
    title: str,
    story: str,
    ranks: Sequence[int],
    rates: Sequence[float],
    curves: dict[int, Tensor],
    after: Sequence[float],
    texts: dict[str, list[str]],
    prompts: list[str],
) -> None:
    """Draw a sweep of `N` adapters.

    Args:
        ranks: Rank of each adapter.
        rates: Learning rate of each adapter.
        curves: Bits per character of all adapters, by step.
        after: Bits per character of each adapter at the end.
        texts: How the base and the best adapter go on after each prompt, by heading.
        prompts: The beginnings of lines that they were given.
    """
    figure = Figure(figsize=(15, 10), facecolor=PAPER)
    figure.text(0.03, 0.935, title, color=INK, fontsize=28, weight="bold")
    figure.text(0.03, 0.893, story, color=MUTED, fontsize=16)
    _draw_curves(figure.add_axes((0.06, 0.40, 0.44, 0.42)), rates, curves, after)
    _draw_table(figure.add_axes((0.655, 0.40, 0.32, 0.42)), ranks, rates, float(next(iter(curves.values()))[0]), after)
    for column, (heading, lines) in enumerate(texts.items()):
        x, ink = 0.03 + 0.485 * column, (MUTED, BEST)[column]
        figure.add_artist(Rectangle((x, 0.03), 0.46, 0.275, transform=figure.transFigure, color=PANEL, zorder=-1))
        figure.text(x, 0.322, heading, color=ink, fontsize=16, weight="bold")
        for row, (prompt, line) in enumerate(zip(prompts, lines, strict=True)):
            where: dict[str, Any] = {"x": x + 0.012, "y": 0.28 - 0.0375 * row, "va": "center"}
            where |= {"fontsize": 14, "family": "monospace", "parse_math": False}
            figure.text(s=prompt, color=INK, **where)
            figure.text(s=" " * len(prompt) + line, color=ink, **where)
    figure.savefig(path, dpi=90, facecolor=PAPER)


def _color(rate: float, rates: Sequence[float]) -> str:
    return COLORS[sorted(set(rates)).index(rate) % len(COLORS)]


def _draw_curves(axes: Any, rates: Sequence[float], curves: dict[int, Tensor], after: Sequence[float]) -> None:
    """Draw the median of each learning rate and the best adapter, each with its name at its end."""
    steps, best = list(curves), min(range(len(after)), key=lambda i: after[i])
    lines = {}
    for rate in sorted(set(rates)):
        own = [i for i, other in enumerate(rates) if other == rate]
        lines[f"rate {rate:g}"] = _color(rate, rates), [median(float(bits[i]) for i in own) for bits in curves.values()]
    lines["the best"] = INK, [float(bits[best]) for bits in curves.values()]
    first = lines["the best"][1][0]
    span = first - min(values[-1] for _, values in lines.values())
    low, high = first - 1.12 * span, first + 0.12 * span
    for name, (color, values) in lines.items():
        axes.plot(steps, values, color=color, linewidth=3.5 if name == "the best" else 2.6)
    axes.set_xlim(0, steps[-1])
    axes.set_ylim(low, high)
    axes.grid(axis="y", color=FAINT)
    inside = [name for name, (_, values) in lines.items() if low < values[-1] < high]
    for name, height in zip(inside, _apart([lines[name][1][-1] for name in inside], 0.06 * (high - low)), strict=True):
        where = {"fontsize": 13, "weight": "bold", "va": "center", "clip_on": False}
        axes.text(steps[-1] * 1.01, height, name, color=lines[name][0], **where)
    for place, name in enumerate(name for name in lines if name not in inside):
        where = {"fontsize": 13, "ha": "right", "transform": axes.transAxes}
        axes.text(0.98, 0.93 - 0.07 * place, f"{name}: worse than the base", color=lines[name][0], **where)
    finish(axes, "Held-out bits per character: the best, and medians")


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Move heights of labels up until they are this far apart."""
    moved = [*heights]
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    for lower, upper in itertools.pairwise(order):
        moved[upper] = max(moved[upper], moved[lower] + least)
    return moved


def _draw_table(axes: Any, ranks: Sequence[int], rates: Sequence[float], base: float, after: Sequence[float]) -> None:
    rows, columns = sorted(set(ranks)), sorted(set(rates))
    cells = torch.full((len(rows), len(columns)), math.nan)
    for (i, rank), (j, rate) in itertools.product(enumerate(rows), enumerate(columns)):
        found = [bits for bits, *own in zip(after, ranks, rates, strict=True) if own == [rank, rate]]
        cells[i, j] = mean(found) if found else math.nan
    low, high = min(after), min(base, max(after))
    shades = LinearSegmentedColormap.from_list("bits", [BEST, "#1f4f7d", PANEL])
    axes.imshow(cells.numpy(), cmap=shades, vmin=low, vmax=high, aspect="auto")
    for i, j in itertools.product(range(len(rows)), range(len(columns))):
        color = PAPER if cells[i, j] < low + 0.35 * (high - low) else INK
        label = "" if cells[i, j].isnan() else f"{cells[i, j]:.2f}"
        axes.text(j, i, label, color=color, fontsize=17, weight="bold", ha="center", va="center")
    axes.set_yticks(range(len(rows)), [f"rank {rank}" for rank in rows])
    axes.set_xticks(range(len(columns)), [f"{rate:g}" for rate in columns])
    finish(axes, "Mean at the end, by rank and learning rate")
    for label, rate in zip(axes.get_xticklabels(), columns, strict=True):
        label.set_color(_color(rate, rates))
