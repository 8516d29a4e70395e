"""Which bare parameters a config targets: PEFT's `target_parameters`, whole names or ends of names after a dot."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from torchgraft.functional.extending import did_you_mean

from .patterns import match


def find_parameters(config: Any, modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the parameters that `config` targets, in the order of `modules`, each module's as it registered them.

    Args:
        config: An adapter's config; those without `target_parameters` target none.
        modules: The model's modules by name.

    Raises:
        ValueError: No parameter of any of the names, says what the model has; one within `modules_to_save`.

    >>> from torchgraft.adapters import LoraConfig
    >>> find_parameters(LoraConfig(target_parameters=["a.weight"]), {"a": nn.Linear(2, 2), "b.a": nn.Linear(2, 2)})
    ['a.weight', 'b.a.weight']
    """
    wanted = getattr(config, "target_parameters", None)
    if not wanted:
        return []
    names = parameter_names(modules)
    found = [name for name in names if any(_is(name, target) for target in wanted)]
    for name in found:
        for saved in getattr(config, "modules_to_save", None) or ():
            within = rf"(^|.*\.){saved}($|\..*)"
            if match(within, name.rpartition(".")[0], f"{type(config).__name__}: modules_to_save"):
                raise ValueError(
                    f"{type(config).__name__}: target_parameters names {name}, which is in one of modules_to_save, "
                    f"{saved!r}, and trained as a whole; leave out the one or the other"
                )
    missed = [target for target in sorted(wanted) if not any(_is(name, target) for name in names)]
    if not found:
        raise ValueError(
            f"{type(config).__name__}: target_parameters={sorted(wanted)!r} match no parameter of the model; a name "
            f"is a whole one or its end after a dot. Stacked weights, as of experts, are {_sample(modules, names)}"
            + did_you_mean(sorted(wanted)[0], names)
        )
    if missed:
        warnings.warn(
            f"{type(config).__name__}: target_parameters {missed} match no parameter of the model; the others do",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def parameter_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return names of all parameters, module by module."""
    return [
        f"{path}.{name}" if path else name
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _is(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _sample(modules: Mapping[str, nn.Module], names: Collection[str]) -> str:
    stacked = [name for name in names if _ndim(modules, name) == 3]
    shown = ", ".join(map(repr, stacked[:6])) or "none"
    return f"{shown}, ... ({len(stacked)} in all)" if len(stacked) > 6 else shown


def _ndim(modules: Mapping[str, nn.Module], name: str) -> int:
    owner, _, leaf = name.rpartition(".")
    parameter = modules[owner]._parameters[leaf]
    return 0 if parameter is None else parameter.ndim
