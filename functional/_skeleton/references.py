"""Modules that a forward reaches behind the module tree's back, where no copy can follow."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any

from torch import nn

from .._tensors.wrappers import around

_CONTAINERS = (list, tuple, set, frozenset)
_HOLDERS = (nn.Module, dict, *_CONTAINERS)


def check_references(model: nn.Module, sites: Collection[str]) -> None:
    """Refuse a model whose methods name a targeted module, or a parent of one, as a global or in a class's closure.

    Args:
        model: The user's model.
        sites: Paths of the targeted modules.

    Raises:
        ValueError: Names the method, the variable and the site.
    """
    parents = around(sites)
    named = list(model.named_modules())
    watched = {id(module): name for name, module in named if name in parents}
    done: set[Any] = set()
    for where, module in named:
        functions = []
        if types.FunctionType in map(type, vars(module).values()):
            functions = [(value, False) for value in vars(module).values() if isinstance(value, types.FunctionType)]
        for cls in type(module).__mro__:
            if cls in done or cls.__module__.startswith("torch."):
                continue
            done.add(cls)
            methods = (_function(value) for name, value in vars(cls).items() if name != "__init__")
            functions += [(method, True) for method in methods if method is not None]
        for function, from_class in functions:
            for name, value in _named(function, from_class):
                for reached in (watched[id(target)] for target in _modules(value) if id(target) in watched):
                    raise ValueError(
                        f"{reached or 'the model'}: {function.__qualname__} (used at {where or 'the root'}) "
                        f"reaches this module through the variable {name!r} instead of an attribute, so it would run "
                        "without its adapter; store it on the module that uses it, or do not target it"
                    )


def _function(value: Any) -> types.FunctionType | None:
    """Return the plain function behind a class attribute."""
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    return value if isinstance(value, types.FunctionType) else None


def _named(function: types.FunctionType, from_class: bool) -> Iterator[tuple[str, Any]]:
    """Yield variables from outside of a function. The skeleton rebuilds the closures of an instance's own functions."""
    held = function.__globals__
    for code, name in _global_names(function.__code__):
        value = held.get(name)
        if isinstance(value, _HOLDERS) and _modules(value) and _reads(code, name):
            yield name, value
    if from_class and function.__closure__:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:
                continue


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[tuple[types.CodeType, str], ...]:
    """Return what may be names of globals in code, and in the functions that it defines."""
    within = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return (*((code, name) for name in code.co_names), *chain.from_iterable(map(_global_names, within)))


def _reads(code: types.CodeType, name: str) -> bool:
    """Return whether code reads a global of this name, and not just an attribute."""
    return any(each.argval == name and each.opname == "LOAD_GLOBAL" for each in dis.get_instructions(code))


def _modules(value: Any) -> list[nn.Module]:
    """Return a module, or those in a plain container."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, _CONTAINERS) else (value,)
    return [item for item in items if isinstance(item, nn.Module)]
