"""The adapters of a stack in words: their names, and the numbers in which their configs differ."""

from __future__ import annotations

from collections.abc import Sequence

from .._method import Config


def check_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Return the names of adapters of a stack.

    Raises:
        TypeError, ValueError: No list of names, another number of them, or a name twice.

    >>> check_names(["poems", "code"], 2)
    ('poems', 'code')
    """
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"names is {names!r}, expected a list of names that are not empty")
    if len(names) != count:
        raise ValueError(f"names has {len(names)} names, expected one for each of the {count} adapters: {[*names]}")
    if twice := sorted({name for name in names if [*names].count(name) > 1}):
        raise ValueError(f"names has {twice[0]!r} twice; each adapter has another name")
    return tuple(names)


def ranges_of(members: Sequence[Config]) -> list[str]:
    """Return the numbers in which configs differ, as `r 1 to 16`."""
    found = []
    for name in sorted(members[0].method.varying):
        values = [getattr(config, name, None) for config in members]
        numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if len(numbers) == len(values) and len({*numbers}) > 1:
            found.append(f"{name} {min(numbers):g} to {max(numbers):g}")
    return found
