"""Whether a forward runs to find out where rows are: with random adapters, which no user's call has."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_LOOKS = threading.local()


@contextlib.contextmanager
def looking() -> Iterator[None]:
    """Say so of this thread's forwards within the block."""
    before, _LOOKS.on = is_look(), True
    try:
        yield
    finally:
        _LOOKS.on = before


def is_look() -> bool:
    """Return whether this thread's forward is one that looks, so that what a call has to say is not asked for.

    >>> with looking():
    ...     inside = is_look()
    >>> inside, is_look()
    (True, False)
    """
    return getattr(_LOOKS, "on", False)
