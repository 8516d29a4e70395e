"""Modules that a forward reaches behind the module tree's back, where no copy can follow."""

from __future__ import annotations

import dis
import types
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

_CONTAINERS = (list, tuple, set, frozenset)


def check_references(model: nn.Module, sites: Collection[str]) -> None:
    """Refuse a model whose methods name a targeted module, or a parent of one, as a global or in a class's closure.

    Args:
        model: The user's model.
        sites: Paths of the targeted modules.

    Raises:
        ValueError: Names the method, the variable and the site.
    """
    parents = {path.rsplit(".", depth)[0] if depth else path for path in sites for depth in range(path.count(".") + 1)}
    named = list(model.named_modules())
    watched = {id(module): name for name, module in named if name in parents or name in sites}
    done: set[Any] = set()
    for where, module in named:
        instance_functions = [value for value in vars(module).values() if isinstance(value, types.FunctionType)]
        functions = [(function, False) for function in instance_functions]
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
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        for name in code.co_names:
            value = function.__globals__.get(name)
            if value is not None and _modules(value) and _reads(code, name):
                yield name, value
        codes.extend(const for const in code.co_consts if isinstance(const, types.CodeType))
    if from_class and function.__closure__:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:
                continue


def _reads(code: types.CodeType, name: str) -> bool:
    """Return whether code reads a global of this name, and not just an attribute."""
    return any(each.argval == name and each.opname == "LOAD_GLOBAL" for each in dis.get_instructions(code))


def _modules(value: Any) -> list[nn.Module]:
    """Return a module, or those in a plain container."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, _CONTAINERS) else (value,)
    return [item for item in items if isinstance(item, nn.Module)]
