"""What errors are made of: the type of what was given, the name that was perhaps meant, advice on known classes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

_SYNONYMS = {"rank": "r"}
"""Names that people use for fields whose names are unlike them."""

_ADVICE: list[tuple[str, type, Callable[[Any], str]]] = []


def given_type(value: Any) -> str:
    """Return how a message calls a value of a wrong type.

    >>> given_type(None), given_type(3), given_type(int)
    ('None', 'of type int', 'the class int')
    """
    if value is None:
        return "None"
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


def closest(name: Any, known: Iterable[str]) -> str | None:
    """Return the known name that was perhaps meant, `None` where none is like it.

    >>> closest("q_porj", ["k_proj", "q_proj"]), closest("alpha", ["alpha_pattern", "lora_alpha"]), closest("x", ["q"])
    ('q_proj', 'lora_alpha', None)
    """
    names = [one for one in known if one]
    if not isinstance(name, str) or not name:
        return None
    if _SYNONYMS.get(name) in names:
        return _SYNONYMS[name]
    folded = {_folded(one): one for one in reversed(names)}
    if _folded(name) in folded:
        return folded[_folded(name)]
    ends = [one for one in names if one.endswith((f"_{name}", f".{name}")) or name.endswith((f"_{one}", f".{one}"))]
    found = difflib.get_close_matches(_folded(name), folded, n=1)
    begun = [one for one in names if len(name) > 3 and one.startswith(name.rstrip("s"))]
    return next(iter([*ends, *(folded[one] for one in found), *begun]), None)


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Return the end of a message that proposes a known name, empty where none is like the given one.

    >>> did_you_mean("0.wieght", ["0.weight", "0.bias"])
    "; did you mean '0.weight'?"
    """
    close = closest(name, known)
    return f"; did you mean {close!r}?" if close is not None else ""


def _folded(name: str) -> str:
    return name.lower().replace("_", "-")


def register_advice(package: str, cls: type, advice: Callable[[Any], str]) -> None:
    """Have errors say what to do with objects that a Python package defines, without importing it.

    Args:
        package: Name of the package; its modules' names begin with it.
        cls: Objects of this type; what was registered first counts.
        advice: `(object) -> text`, which follows the name of the object's class.
    """
    _ADVICE.append((package, cls, advice))


def advice_on(value: Any) -> str:
    """Return what to do with an object, by the package of its class, and an empty text for any other object."""
    packages = [f"{cls.__module__}." for cls in type(value).__mro__[:-1]]
    for package, cls, advice in _ADVICE:
        if isinstance(value, cls) and any(one.startswith(f"{package}.") for one in packages):
            return advice(value)
    return ""
