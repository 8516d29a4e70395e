"""Marking: another class in front of a module's own, and what it knows, in a copy of a model.

Such a class has no name to be found by, so copies and pickles make it anew from what the module knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Known(Protocol):
    """What a marked module knows beyond its class.

    Attributes:
        cls: The class of the module before it was marked.
    """

    cls: Any


def mark(module: Any, attribute: str, known: Known, in_front_of: Callable[[Any], Any]) -> None:
    """Put a class in front of a module's own.

    Args:
        module: The module.
        attribute: The name under which it has what it knows.
        known: What it knows.
        in_front_of: Makes the class from the module's own.
    """
    module.__class__ = in_front_of(type(module))
    module.__dict__[attribute] = known


def reduce_marked(module: Any, attribute: str, reduced: Any, marked: Callable[[Any, Any], None]) -> tuple[Any, ...]:
    """Return what `__reduce_ex__` of a marked module returns.

    Args:
        module: The module.
        attribute: The name under which it has what it knows.
        reduced: What `__reduce_ex__` of the class behind returns.
        marked: `(module, known) -> None`, marks the new module.
    """
    known: Known = module.__dict__[attribute]
    make, args, state, *rest = reduced
    state = {key: value for key, value in state.items() if key != attribute}
    args = tuple(known.cls if arg is type(module) else arg for arg in args)
    return _revive, (marked, make, args, known), state, *rest


def _revive(marked: Callable[[Any, Any], None], make: Any, args: tuple[Any, ...], known: Known) -> Any:
    module = make(*args)
    known.cls = type(module)
    marked(module, known)
    return module
