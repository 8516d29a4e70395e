"""All or nothing: a model is what it was before where something in between raised an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from torch import nn

from ..switch import put_in
from ..walk import parts


@contextlib.contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Take a model back to what it was if the context raises: its modules, adapters, flags, and what was merged.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> with contextlib.suppress(ValueError), restoring(model):
    ...     model.add_module("more", nn.Linear(2, 2))
    ...     raise ValueError
    >>> len(model)
    1
    """
    own = {id(module) for part in parts(model) for module in part.own_modules()}
    states = [(vars(module), _state(module, id(module) in own or module is model)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    merged = [(part, list(part.merged_adapters)) for part in parts(model)]
    active = [(part, list(part.active_adapters)) for part in parts(model)]
    try:
        yield
    except BaseException:
        for attributes, state in states:
            _restore(attributes, state)
        for part, names in active:
            part.recall_adapters(names)
        put_in((part, names) for part, names in merged if part.merged_adapters != names)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        raise


def _state(module: nn.Module, whole: bool) -> dict[str, Any]:
    """Return attributes of a module, with copies of those that can change where they are."""
    names = vars(module) if whole else ("_modules",)
    return {name: _copied(vars(module)[name]) for name in names if name != "merged_adapters"}


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set, WeakSet)) else value


def _restore(attributes: dict[str, Any], state: dict[str, Any]) -> None:
    """Give a module its attributes back; dicts stay the same objects, which others may have."""
    if len(state) > 1:
        for name in attributes.keys() - state.keys() - {"merged_adapters"}:
            del attributes[name]
    for name, value in state.items():
        now = attributes.get(name)
        if isinstance(now, dict) and isinstance(value, dict):
            now.clear()
            now.update(value)
        else:
            attributes[name] = value
