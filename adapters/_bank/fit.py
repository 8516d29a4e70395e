"""Whether a config fits the slots of a bank, and what to do if not, in words of its own fields."""

from __future__ import annotations

import dataclasses
from typing import Any

from torchgraft.functional import Places, StackedGraft
from torchgraft.functional.extending import NoRoomError, SharedFieldError

from .._config.base import AdapterConfig


def check_method(graft: StackedGraft, config: Any) -> None:
    """Refuse what is no config of the bank's method.

    Raises:
        TypeError: Something else.
    """
    bound, given = graft.binding.members[0], type(config).__name__
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"it is of type {given}, expected a {type(bound).__name__}")
    if config.method is not bound.method:
        raise TypeError(
            f"it is of type {given}, and this bank has adapters of {type(bound).__name__}; make another bank for it, "
            f"of bind(model, {given}(...))"
        )


def places_of(graft: StackedGraft, config: AdapterConfig) -> Places:
    """Return the constants and sites of one slot with an adapter of this config.

    Raises:
        ValueError: Fields that the adapters of a bank share, or that ask for more than a slot has.
    """
    bound = graft.binding.members[0]
    try:
        return graft.places([config])
    except SharedFieldError as error:
        raise ValueError(
            f"{error.field} is {error.given!r}, and all adapters of this bank share {error.shared!r}, which it was "
            f"bound with; set {error.field}={error.shared!r}, or make another bank for it"
        ) from error
    except NoRoomError as error:
        raise ValueError(_no_room(error, config, bound)) from error


def _no_room(error: NoRoomError, config: AdapterConfig, bound: Any) -> str:
    where = f"it has {error.leaf} of shape {error.shape} at {error.path!r}"
    if error.pieces and error.room:
        return (
            f"{where}, and every adapter of this bank has {error.room} there, for {error.pieces}; give it the rank "
            f"that the bank was bound with{_differing(config, bound)}"
        )
    if not error.room:
        return (
            f"{where}, where the slots of this bank have none; leave that out of its config, or make the bank with a "
            f"config that has it{_differing(config, bound)}"
        )
    return (
        f"{where}, and a slot has room for {error.room}; make it smaller, or the bank with a config that is as large"
        f"{_differing(config, bound)}"
    )


def _differing(config: AdapterConfig, bound: Any) -> str:
    """Return which fields are other than what the bank was bound with."""
    fields = [field.name for field in dataclasses.fields(config)]
    other = [name for name in fields if getattr(config, name) != getattr(bound, name)]
    found = ", ".join(f"{name} is {_shown(config, name)}, there {_shown(bound, name)}" for name in other)
    return f" ({found})" if found else ""


def _shown(config: Any, name: str) -> str:
    value = getattr(config, name)
    return repr(sorted(value) if isinstance(value, (set, frozenset)) else value)[:80]
