"""What a config's fields may hold: the types that they are declared with, and regular expressions that compile."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

REGULAR = ("target_modules", "exclude_modules", "feedforward_modules")
"""Fields whose strings are regular expressions."""
REGULAR_KEYS = ("rank_pattern", "alpha_pattern")
"""Fields whose keys are; AdaLoRA's `rank_pattern` is keyed by names, which are ones too."""


def check_fields(config: Any) -> None:
    """Hold a config's values against the types of its fields.

    Any collection of names does where a list is declared, and an integer where a float is.

    Raises:
        ValueError: A value of another type, or a string that is no regular expression where one is expected; names
            the field, the value and what was expected.

    >>> from torchgraft.adapters import LoraConfig
    >>> LoraConfig(r="8")
    Traceback (most recent call last):
    ValueError: LoraConfig: r is '8', expected int
    """
    what = type(config).__name__
    hints = typing.get_type_hints(type(config))
    for name, value in vars(config).items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(f"{what}: {name} is {value!r}, expected {_spell(hints[name])}")
        patterns = [value] if name in REGULAR and isinstance(value, str) else []
        for pattern in [*patterns, *(value if name in REGULAR_KEYS and value else ())]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{what}: {name} has {pattern!r}, which is no regular expression ({error}); escape its special "
                    "characters, or give a list of names"
                ) from None


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin in (list, set, tuple, Sequence):
        return (
            isinstance(value, Collection)
            and not isinstance(value, (str, Mapping))
            and all(_fits(item, args[0]) for item in value)
        )
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
