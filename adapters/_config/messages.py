"""What errors are made of: the config that they are about, and some of many names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def require(condition: bool, config: Any, message: str, error: type[ValueError] | type[TypeError] = ValueError) -> None:
    """Raise a `ValueError`, or one of this class, that starts with the config's name, unless the condition holds."""
    if not condition:
        raise error(f"{type(config).__name__}: {message}")


def spelled(names: Any) -> str:
    """Return names as a message shows them: a set in the order of the alphabet, and all else as it is.

    >>> spelled({"b", "a"}), spelled("a|b")
    ("['a', 'b']", "'a|b'")
    """
    return repr(sorted(names) if isinstance(names, (set, frozenset)) else names)


def names_of(keys: Iterable[str], most: int = 4) -> str:
    """Return some of these keys, and how many there are.

    >>> names_of(["a", "b", "c"], most=2)
    "'a', 'b', ... (3 in all)"
    """
    keys = list(keys)
    shown = ", ".join(map(repr, keys[:most]))
    return f"{shown}, ... ({len(keys)} in all)" if len(keys) > most else shown
