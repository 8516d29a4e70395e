"""How good the predictions of an ensemble are, and how well they know it; a picture of several."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import _recipes as recipes
import torch
import torch.nn.functional as F
from _panels import FAINT, INK, MUTED, PAPER, finish
from torch import Tensor

BINS = 10
"""Bins of confidence, for the calibration."""


class Score(NamedTuple):
    """What predictions are worth.

    Attributes:
        accuracy: How often the likeliest class is the right one.
        nll: Mean negative log likelihood of the right class.
        ece: Expected calibration error: the mean distance of confidence and accuracy over bins of confidence.
        curve: Confidence, accuracy and share of each bin that has predictions.
    """

    accuracy: float
    nll: float
    ece: float
    curve: list[tuple[float, float, float]]


def score(log_probs: Tensor, labels: Tensor) -> Score:
    """Score the mean of an ensemble's predictions, `"adapter n 10"`."""
    log_p = log_probs.logsumexp(0) - torch.tensor(len(log_probs)).log()
    confidence, chosen = log_p.exp().max(-1)
    right = (chosen == labels).float()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    curve = []
    for own in (bins == i for i in range(BINS)):
        if own.any():
            curve.append((float(confidence[own].mean()), float(right[own].mean()), float(own.float().mean())))
    ece = sum(share * abs(sure - true) for sure, true, share in curve)
    return Score(float(right.mean()), float(F.nll_loss(log_p, labels)), ece, curve)


def draw(path: Path, scores: dict[str, Score], examples: int) -> None:
    """Draw log likelihood and calibration error of each way, and curves of reliability."""
    alone, best = scores["one adapter"], min(scores, key=lambda name: scores[name].nll)
    story = (
        f"An adapter trained on {examples} turned digits is right {alone.accuracy:.0%} of the time; "
        f"its negative log likelihood is {alone.nll:.2f}, and the best here {scores[best].nll:.2f}: {best}."
    )
    figure = recipes.sheet("How sure may an adapter be?", story)
    colors = dict(zip(scores, [recipes.RED, MUTED, *recipes.COLORS], strict=False))
    for i, (title, key) in enumerate([("negative log likelihood", "nll"), ("calibration error", "ece")]):
        axes = figure.add_axes((0.16 + 0.215 * i, 0.08, 0.19, 0.73))
        finish(axes, title)
        values = [getattr(one, key) for one in scores.values()]
        axes.barh(range(len(scores)), values, color=colors.values(), height=0.6)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(values))
        for y, value in enumerate(values):
            axes.text(value, y, f" {value:.3f}", color=INK, fontsize=13, va="center")
        names = [f"{name}\n{one.accuracy:.1%} right" for name, one in scores.items()]
        axes.set_yticks(range(len(scores)), names if i == 0 else [])
        axes.set_xticks([])
    axes = figure.add_axes((0.63, 0.08, 0.34, 0.73), xlim=(0, 1.01), ylim=(0, 1.01))
    finish(axes, "accuracy by confidence")
    axes.plot([0, 1], [0, 1], color=FAINT, linestyle=(0, (4, 4)))
    for name, one in scores.items():
        sure, right, shares = zip(*one.curve, strict=True)
        width = 3 if name in (best, "one adapter") else 1
        axes.plot(sure, right, color=colors[name], linewidth=width, alpha=1 if width > 1 else 0.6)
        axes.scatter(sure, right, [300 * share for share in shares], color=colors[name])
    figure.savefig(path, dpi=90, facecolor=PAPER)
