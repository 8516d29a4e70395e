"""The colours of the pictures, and how a panel looks."""

from __future__ import annotations

from typing import Any

PAPER, PANEL, FAINT, MUTED, INK = "#0d1117", "#161b22", "#30363d", "#9aa4b0", "#f0f6fc"


def finish(axes: Any, title: str) -> None:
    axes.set_facecolor(PANEL)
    axes.set_title(title, color=INK, fontsize=16, loc="left", pad=12)
    axes.tick_params(colors=MUTED, length=0, labelsize=13)
    axes.spines[:].set_visible(False)
