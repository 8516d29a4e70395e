"""What the recipes share: a small frozen reader of digits, worlds that turn digits, a loop that goes on, a sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import digits
import torch
import torch.nn.functional as F
from _panels import INK, MUTED, PAPER
from _resume import load, save
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

BLUE, ORANGE, GREEN, RED, VIOLET = "#58b7ff", "#ffa657", "#8ddb8c", "#ff7b72", "#a592ff"
COLORS = [BLUE, GREEN, VIOLET, ORANGE, "#f2cc60", "#4fd6be", RED]
TARGETS = ["qkv", "out", "up", "down"]


class Digits(NamedTuple):
    """Images `"n 32 32"` and labels `"n"`, to train on and held out."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def frozen_reader(folder: Path, steps: int) -> tuple[nn.Module, Digits]:
    """A vision transformer of two blocks that reads upright digits, frozen; trained if it is not in the folder yet."""
    data = Digits(*digits.load_images(0))
    torch.manual_seed(0)
    model, file = digits.VisionTransformer(depth=2), folder / "base.safetensors"
    if not file.exists():
        digits.train_base(model, data.images, data.labels, steps, 0)
        save(model.state_dict(), file)
    model.load_state_dict(load_file(file))
    return model.requires_grad_(False).eval(), data


# -- worlds -----------------------------------------------------------------------------------------------------------


def some_worlds(count: int, source: torch.Generator) -> Tensor:
    """Draw worlds `"count 3"`: an angle in degrees, clockwise, and whether digits are mirrored and inverted.

    Of each 60 degrees the first 20 are left out, for `new_worlds`.
    """
    angles = 60 * torch.randint(6, (count, 1), generator=source) + 20 + 40 * torch.rand(count, 1, generator=source)
    return torch.cat([angles, torch.randint(2, (count, 2), generator=source).float()], 1)


def new_worlds() -> Tensor:
    """Return twelve worlds `"12 3"`, at least 10 degrees from all that `some_worlds` draws."""
    return torch.tensor([[60.0 * i + 10, j, (i + j) % 2] for i in range(6) for j in (0, 1)])


def turned_only(worlds: Tensor) -> Tensor:
    """Return the worlds without mirrors and inversion, each once and in order."""
    return F.pad(worlds[:, :1].unique(dim=0), (0, 2))


def called(world: Tensor) -> str:
    """A world's name."""
    angle, mirrored, inverted = world.int().tolist()
    return f"{angle}°" + ", mirrored" * mirrored + ", inverted" * inverted


def seen_in(worlds: Tensor, images: Tensor) -> Tensor:
    """Turn images `"world n 32 32"` as each world does; inverted ones are light around the digit too."""
    angle, mirrored, inverted = worlds.unbind(1)
    cos, sin = (angle * math.pi / 180).cos(), (angle * math.pi / 180).sin()
    side = 1 - 2 * mirrored
    rows = torch.stack([side * cos, side * sin, -sin, cos], 1).view(-1, 2, 2)
    grid = F.affine_grid(F.pad(rows, (0, 1)), list(images.shape), align_corners=False)
    turned = F.grid_sample(images, grid, align_corners=False)
    return torch.where(inverted.view(-1, 1, 1, 1) > 0, 1 - turned, turned)


def drawn(count: int, each: int, images: Tensor, labels: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images `"count each 32 32"` and their labels `"count each"`."""
    rows = torch.randint(len(images), (count, each), generator=source)
    return images[rows], labels[rows]


# -- training ---------------------------------------------------------------------------------------------------------


def minimise(
    loss: Callable[[int], Tensor],
    leaves: Sequence[Tensor],
    steps: int,
    rate: float,
    what: str,
    file: Path | None = None,
) -> None:
    """Minimise `loss(step)` over leaves, in place, by Adam with a rate that rises and falls.

    With a file it goes on from what that has, and writes there now and then.
    """
    for leaf in leaves:
        leaf.requires_grad_()
    optimizer = torch.optim.Adam(leaves, lr=rate)
    done = _restore(leaves, optimizer, file) if file and file.exists() else 0
    for step in tqdm(range(done, steps), initial=done, total=steps, desc=f"{what:<14}", unit="step"):
        optimizer.param_groups[0]["lr"] = rate * min(1, 10 * (step + 1) / steps) * (1 - step / steps)
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        if file and ((step + 1) % 200 == 0 or step + 1 == steps):
            save(_state(leaves, optimizer), file)
    for leaf in leaves:
        leaf.requires_grad_(False)


def _state(leaves: Sequence[Tensor], optimizer: torch.optim.Adam) -> dict[str, dict[str, Tensor]]:
    return {f"{i:04}": {"leaf": leaf.detach(), **optimizer.state[leaf]} for i, leaf in enumerate(leaves)}


def _restore(leaves: Sequence[Tensor], optimizer: torch.optim.Adam, file: Path) -> int:
    """Read leaves and moments; returns the number of steps that were taken."""
    one = dict.fromkeys(("exp_avg", "exp_avg_sq", "leaf", "step"), torch.zeros(()))
    stored = load({f"{i:04}": one for i in range(len(leaves))}, file)
    with torch.no_grad():
        for leaf, own in zip(leaves, stored.values(), strict=True):
            leaf.copy_(own.pop("leaf"))
            optimizer.state[leaf] = own
    return int(optimizer.state[leaves[0]]["step"])


# -- the picture ------------------------------------------------------------------------------------------------------


def sheet(title: str, story: str, height: float = 8.6) -> Figure:
    """A figure with a title and what it shows in a line."""
    figure = Figure(figsize=(16, height), facecolor=PAPER)
    figure.text(0.04, 0.93, title, color=INK, fontsize=26, weight="bold")
    figure.text(0.04, 0.885, story, color=MUTED, fontsize=14)
    return figure
