"""Timing: cases take turns in every round, and what counts is the median of the ratios within a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tqdm import tqdm

Cases = Mapping[str, Callable[[], object]]


def measure(
    cases: Cases,
    rounds: int,
    *,
    label: str,
    repeat: int = 1,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of each case in each round.

    The order rotates from round to round, so that a slow spell of the machine, or the cache that one case leaves to
    the next, hits all alike.

    Args:
        cases: Functions by name.
        rounds: Number of rounds.
        label: What the progress bar says.
        repeat: Calls per sample, for short functions.
        warmup: Rounds that are thrown away.
        clock: Seconds; `time.thread_time` for functions of one thread, which others on the machine then disturb less.
    """
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in tqdm(range(-warmup, rounds), desc=f"{label:<28.28}", unit="round"):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            _synchronise()
            start = clock()
            for _ in range(repeat):
                cases[name]()
            _synchronise()
            if index >= 0:
                seconds[name].append((clock() - start) / repeat)
    return seconds


def ratios(seconds: Mapping[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Each case's time as a multiple of the reference's in the same round: median and quartiles; and its seconds."""
    found = {}
    for name, samples in seconds.items():
        each = [a / b for a, b in zip(samples, seconds[reference], strict=True)]
        low, middle, high = spread(each)
        found[name] = {
            "ratio": round(middle, 4),
            "quartile_1": round(low, 4),
            "quartile_3": round(high, 4),
            "median_s": round(statistics.median(samples), 7),
        }
    return found


def spread(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def table(found: Mapping[str, Mapping[str, Any]], reference: str) -> str:
    """Ratios as text."""
    width = max(map(len, found))
    return "\n".join(
        f"  {name:<{width}}  {row['ratio']:6.3f}  [{row['quartile_1']:.3f}, {row['quartile_3']:.3f}]"
        f"  {1e3 * row['median_s']:10.3f} ms" + ("   = 1" if name == reference else "")
        for name, row in found.items()
    )


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
