"""Adapters of a sweep trained one by one, as it is written without a stack, in turns with all of them at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median

import optree
import torch
from _writer import draw_rows, loss_by_row
from torch import Tensor
from tqdm import tqdm

from torchgraft.functional import Graft


def warm(step: int, steps: int) -> float:
    """The part of its learning rate that every adapter has in a step: a short rise, then a cosine."""
    return min(1.0, (step + 1) / (0.05 * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def train_alone(graft: Graft, rate: float, seed: int, text: Tensor, steps: int) -> Iterator[float]:
    """The same training of one adapter by itself; yields the loss of each step."""
    choose = torch.Generator().manual_seed(seed)
    adapter = graft.init(choose)
    leaves = [leaf.requires_grad_() for leaf in optree.tree_leaves(adapter)]
    optimizer = torch.optim.AdamW(leaves, weight_decay=0.01)
    for step in range(steps):
        rows = draw_rows(text, 1, choose)
        loss = loss_by_row(graft(adapter, rows[:, :-1]), rows).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.param_groups[0]["lr"] = rate * warm(step, steps)
        optimizer.step()
        yield loss.item()


def in_turns(
    singles: Mapping[int, Iterator[float]], advance_all: Callable[[], None], losses: Tensor, rounds: int
) -> tuple[float, float, float]:
    """Train some adapters alone, in turns with the whole stack.

    Args:
        singles: The training of each, by its place in the stack.
        advance_all: Takes a step of the stack.
        losses: What the losses of the stack were, `"steps N"`.
        rounds: How many steps to take.

    Returns:
        Median seconds of a step of one adapter and of the stack; largest difference of the losses.
    """
    alone, together, difference = [], [], 0.0
    for turn in tqdm(range(rounds), desc="one by one   ", unit="step"):
        for i, single in singles.items():
            began = time.perf_counter()
            difference = max(difference, abs(next(single) - float(losses[turn, i])))
            alone.append(time.perf_counter() - began)
        began = time.perf_counter()
        advance_all()
        together.append(time.perf_counter() - began)
    return median(alone[len(singles) :]), median(together[1:]), difference
