"""Methods that adapt no module but train copies of tensors that the base has: norms, the rows of some tokens."""

from __future__ import annotations

from typing import Any, NoReturn

from torchgraft.functional import Method


def siteless(name: str, config: type) -> Method:
    """Return a method without sites: its config says what it replaces.

    Args:
        name: Name of the method.
        config: The class of its configs.
    """

    def never(*args: Any) -> NoReturn:
        raise AssertionError(f"{name} has no sites")

    def nothing(*args: Any) -> dict[str, Any]:
        return {}

    return Method(name, config, frozenset(), plan=nothing, shapes=nothing, init=nothing, apply=never, merge=never)
