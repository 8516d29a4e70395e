"""What a config's fields may hold: the types that they are declared with, and regular expressions that compile."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from torchgraft.functional.extending import advice_on, closest, did_you_mean, given_type

from .messages import names_of, require
from .patterns import check
from .peft_type import PeftType, TaskType

NAMES = ("target_modules", "exclude_modules", "feedforward_modules")
"""Fields whose strings are regular expressions for a whole name."""
PARTS = {
    "layers_pattern": r"(?:^|.*?\.){}\.(\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "block_size_pattern": r"(.*\.)?({})$",
    "lambda_pattern": r"(.*\.)?({})$",
}
"""Fields whose strings, or keys, become a part of such an expression, in the place of `{}`."""


def check_call(cls: Any, args: tuple[Any, ...], fields: Mapping[str, Any]) -> None:
    """Refuse what a class of configs is called with, where it is no field by its name.

    Raises:
        TypeError: An unknown field, a value without a name, or a class that is of no method.

    >>> from torchgraft.adapters import LoraConfig
    >>> LoraConfig(rank=4, alpha=8)
    Traceback (most recent call last):
    TypeError: LoraConfig has no field 'rank' (did you mean 'r'?), 'alpha' (did you mean 'lora_alpha'?)
    """
    if not hasattr(cls, "method"):
        raise TypeError(f"{cls.__name__} is what all configs share, of no method; use LoraConfig or another of them")
    known = cls.__dataclass_fields__
    if not args and fields.keys() <= known.keys():
        return
    try:
        inspect.signature(cls.__init__).bind(None, *args, **fields)
    except TypeError:
        if args:
            raise TypeError(
                f"{cls.__name__}: {args[0]!r:.60} is given without a name, and fields are given by name: "
                f"{cls.__name__}(target_modules=[...])"
            ) from None
        names = [field.name for field in dataclasses.fields(cls) if field.name != "unknown_fields"]
        unknown = {name: closest(name, names) for name in fields if name not in known}
        words = (f"{name!r}{f' (did you mean {close!r}?)' if close else ''}" for name, close in unknown.items())
        hint = "" if all(unknown.values()) else f"; it has {names_of(sorted(names), most=40)}"
        raise TypeError(f"{cls.__name__} has no field {', '.join(words)}{hint}") from None


def check_given(fields: Any, what: str) -> None:
    """Refuse what is no dict of fields.

    Raises:
        TypeError: Something else, a config among them.
    """
    if not isinstance(fields, Mapping):
        advice = advice_on(fields) or "a dict of fields is expected, as config.to_dict() has them"
        raise TypeError(f"{what}: fields is {given_type(fields)}, and {advice}")


def check_attribute(cls: Any, name: str) -> None:
    """Refuse to write to what is no field: it would have no effect.

    Raises:
        AttributeError: No field of this name; private names and those of the class pass.
    """
    if name not in cls.__dataclass_fields__ and not name.startswith("_") and not hasattr(cls, name):
        hint = did_you_mean(name, [field.name for field in dataclasses.fields(cls)])
        raise AttributeError(f"{cls.__name__} has no field {name!r}{hint}")


def own_type(cls: Any, given: Any) -> PeftType | str:
    """Return the name of a class's method, and refuse another that is given.

    Raises:
        ValueError: Another one.

    >>> from torchgraft.adapters import LoraConfig
    >>> own_type(LoraConfig, None).value
    'LORA'
    """
    name = cls.method.name
    if given not in (None, name):
        raise ValueError(
            f"{cls.__name__}: peft_type is {getattr(given, 'value', given)!r}, expected {name!r}; "
            "AdapterConfig.from_dict(fields) makes a config of the class that peft_type names"
        )
    return PeftType(name) if name in PeftType.__members__ else name


def check_own_fields(cls: Any, fields: Mapping[str, Any]) -> None:
    """Refuse a file that does not say its method and has what the class has no field for: it is no adapter's.

    Raises:
        TypeError: As PEFT's.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(fields.keys() - known - {"runtime_config"}):
        raise TypeError(
            f"has no peft_type, and {names_of(unknown)}, which {cls.__name__} has no field for; expected the config of "
            "an adapter, such as LORA"
        )


def check_task(config: Any) -> None:
    """Refuse a task that PEFT does not know.

    Raises:
        ValueError: Says which there are.
    """
    given, tasks = config.task_type, [*TaskType.__members__]
    require(
        given is None or given in tasks,
        config,
        f"task_type is {given!r}, expected one of {tasks}, or None{did_you_mean(given, tasks)}",
    )


def check_biases_and_layers(config: Any) -> None:
    """Refuse an unknown choice of biases, and fields for layers that have no effect.

    Raises:
        ValueError: Says what to give.
    """
    only = f"{config.method.name.lower()}_only"
    require(
        config.bias in ("none", "all") or config.bias.endswith("_only"),
        config,
        f"bias is {config.bias!r}, expected 'none', 'all' or {only!r}",
    )
    given = config.layers_to_transform is not None
    require(
        given or not config.layers_pattern,
        config,
        f"layers_pattern is {config.layers_pattern!r} without layers_to_transform, so it has no effect; give both",
    )
    require(
        not (given and isinstance(config.target_modules, str)),
        config,
        f"layers_to_transform is {config.layers_to_transform!r}, which applies to names in a list, and "
        f"target_modules is the string {config.target_modules!r}; give a list, or put the layers into the expression",
    )


def check_fields(config: Any) -> None:
    """Hold a config's values against the types of its fields, and its regular expressions against `re`.

    Any collection of names does where a list is declared, and an integer where a float is.

    Raises:
        ValueError: A value of another type, or a string that is no regular expression where one is expected; names
            the field, the value and what was expected.

    >>> from torchgraft.adapters import LoraConfig
    >>> LoraConfig(r="8")
    Traceback (most recent call last):
    ValueError: LoraConfig: r is '8', expected int
    """
    what, hints = type(config).__name__, _hints(type(config))
    for name, value in vars(config).items():
        if not fits(value, hints.get(name, Any)):
            hint = f"; one of them is a list too: [{value!r}]" if fits([value], hints[name]) else ""
            raise ValueError(f"{what}: {name} is {value!r:.200}, expected {_spell(hints[name])}{hint}")
        for pattern in _patterns(name, value):
            check(PARTS.get(name, "{}").replace("{}", pattern), f"{what}: {name}", pattern)


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of an annotated type, with any collection for a list, and integers for floats.

    >>> fits(8, int), fits("8", int), fits(True, int), fits(["a"], list[str] | None), fits({"a": "b"}, dict[str, int])
    (True, False, False, True, False)
    """
    if hint is Any:
        return True
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in args)
    if origin in (None, types.NoneType):
        return value is None
    if origin in (int, float):
        return isinstance(value, int if origin is int else (int, float)) and not isinstance(value, bool)
    if not isinstance(origin, type):
        return True
    if issubclass(origin, Mapping):
        key, item = args or (Any, Any)
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if origin is tuple and args and args[-1] is not Ellipsis:
        return isinstance(value, (list, tuple)) and len(value) == len(args) and all(map(fits, value, args))
    if issubclass(origin, (Sequence, Set)) and origin is not str:
        return isinstance(value, (list, tuple, set, frozenset)) and all(fits(one, (args or (Any,))[0]) for one in value)
    return isinstance(value, origin)


def _patterns(name: str, value: Any) -> Iterable[str]:
    if name in PARTS and value:
        return [value] if isinstance(value, str) else value
    return [value] if name in NAMES and isinstance(value, str) else []


def _hints(cls: type) -> dict[str, Any]:
    """Return types of a config's fields; none for a user's class whose annotations cannot be resolved."""
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return {}


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def as_json(value: Any) -> Any:
    """Return a value as JSON has it; sets become sorted lists, configs within a config become objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [as_json(one) for one in value]
    return getattr(value, "value", value)
