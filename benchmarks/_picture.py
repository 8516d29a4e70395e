"""Pictures of ratios: a bar for each case, with its spread, or a pair of dots; and a line where the reference is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from _results import folder

OURS, THEIRS, FLOOR = "#2a6fdb", "#c8553d", "#9aa3ad"


def colour(name: str) -> str:
    """One colour for torchgraft, one for peers, one for floors."""
    if name.startswith("torchgraft"):
        return OURS
    return FLOOR if "base" in name else THEIRS


def bars(
    name: str, title: str, panels: Mapping[str, Mapping[str, Mapping[str, Any]]], unit: str, what: str = "time"
) -> Path:
    """Draw one panel of bars for each setting into `results/<name>.png`.

    Args:
        name: Name of the picture.
        title: What it shows, in one sentence.
        panels: `{setting: {case: {"ratio", "quartile_1", "quartile_3"}}}`.
        unit: What a ratio of 1 is.
        what: What the ratios are of.
    """
    rows = [len(cases) for cases in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8.5, 0.34 * sum(rows) + 0.62 * len(rows) + 0.9), height_ratios=rows, squeeze=False
    )
    for axis, (setting, cases) in zip(axes[:, 0], panels.items(), strict=True):
        names = list(cases)[::-1]
        values = [cases[one]["ratio"] for one in names]
        low = [max(0, cases[one]["ratio"] - cases[one]["quartile_1"]) for one in names]
        high = [max(0, cases[one]["quartile_3"] - cases[one]["ratio"]) for one in names]
        axis.barh(names, values, xerr=[low, high], color=[colour(one) for one in names], height=0.68, ecolor="#333333")
        axis.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
        right = max(v + h for v, h in zip(values, high, strict=True))
        for index, (value, more) in enumerate(zip(values, high, strict=True)):
            axis.text(value + more + 0.012 * right, index, f"{value:.2f}", va="center", fontsize=8.5)
        axis.set_xlim(0, 1.12 * right)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.set_title(setting, loc="left", fontsize=9.5)
        axis.tick_params(length=0, labelsize=8.5)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1, 0].set_xlabel(f"{what}, as a multiple of {unit}", fontsize=9)
    _title(figure, title)
    return _save(figure, name)


def dots(name: str, title: str, panels: Mapping[str, Mapping[str, Mapping[str, Any]]], unit: str) -> Path:
    """Draw panels side by side, a line of dots for each row, one for each case, into `results/<name>.png`.

    Args:
        name: Name of the picture.
        title: What it shows, in one sentence.
        panels: `{setting: {row: {case: {"ratio"}}}}`, with the same rows everywhere, the topmost first.
        unit: What a ratio of 1 is.
    """
    rows = list(next(iter(panels.values())))
    figure, axes = plt.subplots(1, len(panels), figsize=(9.5, 0.17 * len(rows) + 1.1), sharey=True, squeeze=False)
    for axis, (setting, found) in zip(axes[0], panels.items(), strict=True):
        for index, row in enumerate(rows):
            ratios = [case["ratio"] for case in found[row].values()]
            axis.plot([min(ratios), max(ratios)], [index, index], color=FLOOR, linewidth=1.6, zorder=1)
        for case in found[rows[0]]:
            ratios = [found[row][case]["ratio"] for row in rows]
            axis.scatter(ratios, range(len(rows)), s=19, color=colour(case), label=case, zorder=2)
        axis.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
        axis.set_title(setting, loc="left", fontsize=8.5)
        axis.grid(color="#e8e8e8", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, labelsize=8)
        axis.spines[:].set_visible(False)
    axes[0, 0].set_yticks(range(len(rows)), rows)
    axes[0, 0].set_ylim(len(rows) - 0.4, -0.6)
    axes[0, 0].set_xlabel(f"time, as a multiple of {unit}", loc="left", fontsize=8.5)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper right", ncols=len(names), frameon=False, fontsize=9, handletextpad=0.1)
    _title(figure, title)
    return _save(figure, name)


def _title(figure: Any, title: str) -> None:
    """Set a title above all panels, in a strip of its own however high the figure is."""
    height = figure.get_size_inches()[1]
    figure.suptitle(title, x=0.02, y=1 - 0.1 / height, ha="left", va="top", fontsize=11.5, fontweight="bold")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / height))


def _save(figure: Any, name: str) -> Path:
    path = folder() / f"{name}.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def curves(name: str, title: str, lines: Mapping[str, list[tuple[int, float]]], label: str) -> Path:
    """Draw seconds against a number, both on logarithmic axes, into `results/<name>.png`."""
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    for case, points in lines.items():
        xs, ys = zip(*points, strict=True)
        axis.plot(xs, ys, marker="o", markersize=4, linewidth=1.8, color=colour(case))
        axis.annotate(case, (xs[-1], ys[-1]), (6, 0), textcoords="offset points", va="center", fontsize=8.5)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.set_xlabel(label, fontsize=9)
    axis.set_ylabel("seconds", fontsize=9)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5)
    axis.set_xlim(right=ticks[-1] * 5)
    _title(figure, title)
    return _save(figure, name)
