"""Strict parsing of untrusted JSON, with errors that name the file."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

_DIGITS = 18
"""Integers with more digits are refused; they fit 64 bits, and no field means more."""


def parse_object(data: bytes, file: str | Path) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        data: The bytes, UTF-8.
        file: What the error messages call them.

    Raises:
        ValueError: No JSON, no object, a key given twice, a number that is not finite or far too large.

    >>> parse_object(b'{"r": 8}', "adapter_config.json")
    {'r': 8}
    >>> parse_object(b'{"r": 8, "r": 4}', "adapter_config.json")
    Traceback (most recent call last):
    ValueError: adapter_config.json: the key 'r' is given twice in one object
    """
    try:
        parsed = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_small,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: is no valid JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is no valid JSON: byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{file}: is nested too deeply, expected a flat object of fields") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{file}: holds a JSON {type(parsed).__name__}, expected an object, {{...}}")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key!r} is given twice in one object")
        made[key] = value
    return made


def _small(digits: str) -> int:
    if len(digits.lstrip("-")) > _DIGITS:
        raise ValueError(f"the number {reprlib.repr(digits)} is too large, expected at most {_DIGITS} digits")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"the number {reprlib.repr(number)} is not finite")
    return value
