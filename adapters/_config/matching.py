"""PEFT's rules for names of modules (its `tuners/tuners_utils.py`), as functions of a config and a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from torchgraft.functional.extending import is_linear

from . import patterns

T = TypeVar("T")


def matches(config: Any, name: str) -> bool:
    """Return whether `target_modules` and the fields for layers mean a name, whatever is excluded."""
    targets = config.target_modules
    if isinstance(targets, str):
        return patterns.fullmatch(targets, name, f"{type(config).__name__}: target_modules")
    if name in targets:
        return True
    if not any(name.endswith(f".{target}") for target in targets):
        return False
    return _in_layers(config.layers_to_transform, config.layers_pattern, name, type(config).__name__)


def _in_layers(layers: list[int] | int | None, lists: list[str] | str | None, name: str, what: str) -> bool:
    if layers is None or layers == []:
        return True
    wanted = [layers] if isinstance(layers, int) else layers
    if not lists:
        expressions = [r".*?\.[^.]*\.(\d+)\."]
    else:
        lists = [lists] if isinstance(lists, str) else lists
        expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in lists]
    for expression in expressions:
        if (index := patterns.first_group(expression, name, f"{what}: layers_pattern")) is not None:
            return int(index) in wanted
    return False


def excluded(config: Any, name: str) -> bool:
    """Return whether `exclude_modules` means a name, or `modules_to_save` does."""
    within, what = r"(^|.*\.){}($|\..*)", type(config).__name__
    saved = config.modules_to_save or ()
    if any(patterns.match(within.replace("{}", one), name, f"{what}: modules_to_save") for one in saved):
        return True
    exclude = config.exclude_modules
    if not exclude:
        return False
    if isinstance(exclude, str):
        return patterns.fullmatch(exclude, name, f"{what}: exclude_modules")
    return name in exclude or any(name.endswith(f".{one}") for one in exclude)


def linear_names(config: Any, modules: Mapping[str, nn.Module], model: nn.Module) -> set[str]:
    """List every linear layer but the output layer: that of `get_output_embeddings`, or a classifier's head.

    As in PEFT, a head is left out where the config's `task_type` is `"SEQ_CLS"`, and the model is one of transformers.
    """
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    output = getattr(output, "base_layer", output)
    if output is None and callable(get_output) and config.task_type == "SEQ_CLS":
        output = next((modules[name] for name in ("score", "classifier") if name in modules), None)
    return {name for name, module in modules.items() if is_linear(module) and module is not output}


def by_pattern(by_name: Mapping[str, T], path: str, default: T) -> T:
    """Return the value of the first pattern that matches the end of a path, as PEFT's `rank_pattern` has it.

    >>> by_pattern({"q_proj": 4, "^head": 2}, "layers.0.q_proj", 8)
    4
    >>> by_pattern({"q_proj": 4, "^head": 2}, "lm.head", 8)
    8
    """
    for pattern, value in by_name.items():
        if patterns.match(rf"(.*\.)?({pattern})$", path, "a field of patterns"):
            return value
    return default
