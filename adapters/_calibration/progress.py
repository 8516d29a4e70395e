"""A progress bar for passes over data, where tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def shown(items: Iterable[T], what: str, progress: bool) -> Iterable[T]:
    """Return the items, with a bar of tqdm's that goes with them.

    Args:
        items: What is gone through.
        what: What the bar says.
        progress: Whether there is one.

    >>> list(shown([1, 2], "counting", progress=False))
    [1, 2]
    """
    if not progress:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc=what, leave=False)
    return bar
