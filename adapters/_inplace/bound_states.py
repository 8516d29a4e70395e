"""What is bound of a model for calls by rows, kept while the model lives, until adapters are removed from it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

_STATES: Any = WeakIdKeyDictionary()
_NOTHING: tuple[Any, ...] = ()


def kept(model: nn.Module) -> tuple[Any, ...]:
    """Return what is kept for the states that a model was in, the last one first.

    >>> model = nn.Linear(2, 2)
    >>> keep(model, ("state",))
    >>> kept(model)
    ('state',)
    >>> forget(model)
    >>> kept(model)
    ()
    """
    result: tuple[Any, ...] = _STATES.get(model, _NOTHING)
    return result


def keep(model: nn.Module, states: tuple[Any, ...]) -> None:
    """Keep these in the place of what is kept."""
    _STATES[model] = states


def forget(model: nn.Module) -> None:
    """Keep nothing any longer: it has the parameters of adapters that are removed."""
    _STATES.pop(model, None)
