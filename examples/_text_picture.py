"""The picture of ways to adapt one model: learning curves, what they learn beside LoRA and forget, what they write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from _panels import FAINT, INK, MUTED, PANEL, PAPER, finish
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

COLORS = ["#58b7ff", "#4fd6be", "#f2cc60", "#ff7b72", "#a592ff"]


def draw(
    path: Path, results: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Mapping[str, str]], seeds: int
) -> None:
    """Draw the base and the ways to adapt it.

    Args:
        results: By name, the base first: bits per character on `"code"` and `"prose"`, by seed; for a way also its
            `"curves"`, bits by step, by seed, and `"beside"`, what its bits on code differ from LoRA's by, by seed.
        samples: By prompt and name, how the prompt goes on; the first two prompts are shown.
        seeds: How often each way was trained.
    """
    colors = dict(zip([name for name in results if name != "base"], COLORS, strict=True))
    before, after = results["base"]["code"][0], [mean(results[name]["code"]) for name in colors]
    figure = Figure(figsize=(15, 10), facecolor=PAPER)
    title = f"{len(colors)} ways to another register: {before:.2f} bits become {min(after):.2f} to {max(after):.2f}"
    story = "A model of Python's language reference learns its source code; same base, rows and steps for all, "
    figure.text(0.03, 0.935, title, color=INK, fontsize=28, weight="bold")
    figure.text(0.03, 0.893, f"{story}{seeds} seeds.", color=MUTED, fontsize=16)
    _draw_curves(figure.add_axes((0.06, 0.42, 0.42, 0.40)), results, colors)
    _draw_beside(figure.add_axes((0.57, 0.42, 0.335, 0.40)), results, colors)
    for column, (prompt, lines) in enumerate(list(samples.items())[:2]):
        x = 0.03 + 0.485 * column
        figure.add_artist(Rectangle((x, 0.03), 0.46, 0.275, transform=figure.transFigure, color=PANEL, zorder=-1))
        heading = f"After “{prompt.strip()}” each writes"
        figure.text(x, 0.322, heading, color=INK, fontsize=16, weight="bold", parse_math=False)
        for row, (name, line) in enumerate(lines.items()):
            where: dict[str, Any] = {"y": 0.28 - 0.0435 * row, "va": "center", "color": colors.get(name, MUTED)}
            figure.text(x + 0.012, s=name, fontsize=14, weight="bold", **where)
            figure.text(x + 0.075, s=line[:46], fontsize=14, family="monospace", parse_math=False, **where)
    figure.savefig(path, dpi=90, facecolor=PAPER)


def _draw_curves(axes: Any, results: Mapping[str, Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    """Draw the mean over seeds of each way; how seeds differ is in the panel beside, where ways are compared."""
    for place, (name, color) in enumerate(colors.items()):
        curves = results[name]["curves"]
        axes.plot(list(curves[0]), [mean(c[step] for c in curves) for step in curves[0]], color=color, linewidth=2.6)
        where = {"fontsize": 14, "weight": "bold", "transform": axes.transAxes, "ha": "right"}
        axes.text(0.98, 0.92 - 0.075 * place, name, color=color, **where)
    axes.set_xlim(0, max(curves[0]))
    axes.grid(axis="y", color=FAINT)
    finish(axes, "Bits per character on held-out code, by step")


def _draw_beside(axes: Any, results: Mapping[str, Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    base = results["base"]["prose"][0]
    columns = axes.get_yaxis_transform()
    for row, (name, color) in enumerate(colors.items()):
        differences = results[name]["beside"]
        axes.plot([min(differences), max(differences)], [-row, -row], color=color, linewidth=2.6, alpha=0.5)
        axes.scatter(differences, [-row] * len(differences), s=90, color=color, edgecolors=PAPER, zorder=2)
        forgot = f"{mean(results[name]['prose']) - base:+.2f}"
        axes.text(
            1.15, -row, forgot, color=color, fontsize=17, weight="bold", ha="right", va="center", transform=columns
        )
    axes.axvline(0, color=MUTED, linestyle=(0, (4, 4)), linewidth=1, zorder=0)
    where = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 16, "ha": "right"}
    axes.annotate("forgotten on prose", (1.15, 1), xytext=(0, 12), color=INK, **where)
    axes.set_ylim(0.6 - len(colors), 0.6)
    axes.margins(x=0.1)
    axes.set_yticks([-row for row in range(len(colors))], list(colors))
    axes.grid(axis="x", color=FAINT)
    axes.set_xlabel("bits per character more than LoRA, a dot a seed; left is better", color=MUTED, fontsize=13)
    finish(axes, "Difference from LoRA")
    for label, color in zip(axes.get_yticklabels(), colors.values(), strict=True):
        label.set_color(color)
