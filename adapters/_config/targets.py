"""Which modules a config targets: PEFT's matching rules (its `tuners/tuners_utils.py`), as functions of names."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from torchgraft.functional.extending import closest, did_you_mean

from .errors import NoMatchingPeftModuleError
from .experts import warn_of_experts
from .matching import excluded, linear_names, matches
from .messages import spelled
from .target_parameters import find_parameters
from .ties import embedding_for

C = TypeVar("C", bound=Any)


def find_targets(config: Any, modules: Mapping[str, nn.Module], model: nn.Module) -> list[str]:
    """Return names of the modules that `config` targets, in the order of `modules`, and of the parameters after them.

    A string is a regular expression for the whole name (`"all-linear"` means every linear layer but the output
    layer); names in a list match a whole name or its end after a dot. `exclude_modules` goes first, then
    `target_modules`, then `layers_to_transform` with `layers_pattern`, which do not apply to whole names.
    Whatever is inside of `modules_to_save` is left out as well. A method without kinds of sites adapts none.

    Args:
        config: An adapter's config.
        modules: The model's modules by name.
        model: The model, which may know its output layer (`get_output_embeddings`).

    Raises:
        ValueError: No target given, or nothing matched (`NoMatchingPeftModuleError`); says what the model has.

    >>> from torchgraft.adapters import LoraConfig
    >>> model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    >>> find_targets(LoraConfig(target_modules=["b"]), dict(model.named_modules()), model)
    ['b']
    >>> find_targets(LoraConfig(target_parameters=["a.weight"]), dict(model.named_modules()), model)
    ['a.weight']
    """
    if not config.method.kinds:
        return []
    parameters = find_parameters(config, modules)
    if parameters and not config.target_modules:
        return parameters
    found = find_modules(config, modules, model) + parameters
    warn_of_experts(config, found, modules)
    return found


def find_modules(config: Any, modules: Mapping[str, nn.Module], model: nn.Module) -> list[str]:
    """Return names of the modules that `target_modules` and `exclude_modules` mean, as `find_targets` does."""
    targets = config.target_modules
    if targets is None or (not isinstance(targets, str) and not targets):
        raise NoMatchingPeftModuleError(
            f"{type(config).__name__}: target_modules is {spelled(targets)}; name the modules to adapt, as a list of "
            f"names or a regular expression, or use 'all-linear'. The model has {_sample(modules)}"
        )
    names = list(modules)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        linear = linear_names(config, modules, model)
        matched = [name for name in names if name in linear]
    else:
        matched = [name for name in names if matches(config, name)]
    found = [name for name in matched if not excluded(config, name)]
    if getattr(config, "ensure_weight_tying", False):
        sources = {embedding_for(name, modules) for name in found}
        found = [name for name in names if name in sources]
    if not isinstance(targets, str):
        _warn_partial_miss(config, names, found)
    if not found:
        raise NoMatchingPeftModuleError(_nothing(config, matched, modules))
    if config.exclude_modules and len(found) == len(matched):
        warnings.warn(
            f"{type(config).__name__}: exclude_modules={spelled(config.exclude_modules)} excludes none of the targets",
            UserWarning,
            stacklevel=2,
        )
    return found


def exact(config: C, paths: Collection[str], modules: Collection[str]) -> C:
    """Return a copy of a config that targets just these modules and parameters, whatever else their names may end.

    One whose layers share leaves by the names that it has stays as it is where it targets these anyway.

    >>> from torchgraft.adapters import LoraConfig
    >>> exact(LoraConfig(), ["q"], ["q", "k"]).target_modules, exact(LoraConfig(), ["q"], ["q", "a.q"]).target_modules
    ({'q'}, 'q')
    """
    if config.form.repeated and _selects(config, paths, modules):
        return config
    if parameters := [path for path in paths if path not in modules]:
        config = dataclasses.replace(config, target_parameters=parameters)
        paths = [path for path in paths if path in modules]
    endings = tuple(f".{path}" for path in paths)
    unclear = any(name.endswith(endings) for name in modules if name not in set(paths))
    targets = "|".join(map(re.escape, paths)) if unclear else list(paths)
    unused = dict.fromkeys(("exclude_modules", "layers_pattern", "layers_to_transform"))
    return dataclasses.replace(config, target_modules=targets, **unused)


def _selects(config: Any, paths: Collection[str], modules: Collection[str]) -> bool:
    """Return whether a config targets just these modules; of "all-linear" they are what it has targeted."""
    if str(config.target_modules).lower() == "all-linear":
        return True
    return {name for name in modules if matches(config, name) and not excluded(config, name)} == set(paths)


def _warn_partial_miss(config: Any, names: Collection[str], found: Collection[str]) -> None:
    """One target of several that matches nothing is a warning that names it, as in PEFT."""
    if not found:
        return
    missed = [
        target
        for target in sorted(config.target_modules)
        if target not in names and not any(name.endswith(f".{target}") for name in names)
    ]
    if missed:
        warnings.warn(
            f"{type(config).__name__}: target_modules {missed} match no module of the model; the others do"
            + meant_module(missed[0], names),
            RuntimeWarning,
            stacklevel=2,
        )


def _nothing(config: Any, matched: Collection[str], modules: Mapping[str, nn.Module]) -> str:
    what = f"{type(config).__name__}: target_modules={spelled(config.target_modules)} "
    if matched:
        return (
            what
            + f"matches {len(matched)} modules, and exclude_modules={spelled(config.exclude_modules)} excludes them all"
            + (f", with modules_to_save={config.modules_to_save!r}" if config.modules_to_save else "")
        )
    if config.layers_to_transform not in (None, []):
        return (
            what + f"with layers_to_transform={config.layers_to_transform!r} and layers_pattern="
            f"{config.layers_pattern!r} matches no module; the model has {_sample(modules)}"
        )
    return (
        f"{what}matches no module; a string has to match a whole name. The model has {_sample(modules)}"
        f"{_meant(config.target_modules, modules)}"
    )


def _meant(targets: Any, modules: Collection[str]) -> str:
    """Return what was perhaps meant by targets that match nothing."""
    if isinstance(targets, str):
        if closest(targets, ["all-linear"]):
            return "; did you mean 'all-linear'?"
        names = [part for part in re.split(r"[\s,;|]+", targets) if part]
        if names and all(any(f".{name}".endswith(f".{part}") for name in modules) for part in names):
            return f"; did you mean the list {names!r}?"
        return meant_module(targets, modules)
    for target in sorted(targets):
        if closest(target, ["all-linear"]):
            return "; did you mean the string 'all-linear', not in a list?"
        if re.search(r"[*\\|^$+()]", target):
            return f"; names in a list are no patterns, a single string is one: target_modules={_pattern(target)!r}"
    return next((hint for target in sorted(targets) if (hint := meant_module(target, modules))), "")


def _pattern(target: str) -> str:
    """Return a shell's pattern as a regular expression for a whole name; one that is a regular expression stays."""
    return re.sub(r"(?<!\.)\*", ".*", target)


def meant_module(name: str, modules: Iterable[str]) -> str:
    """Return the end of a message about a name that no module has or ends in.

    >>> meant_module("q_porj", ["layers.0.q_proj", "layers.0.k_proj"])
    "; did you mean 'q_proj'?"
    """
    ends = [part for one in modules for part in (one.rpartition(".")[2],) if not part.isdigit()]
    return did_you_mean(name, [*modules, *dict.fromkeys(ends)] if "." in name else dict.fromkeys(ends))


def _sample(modules: Mapping[str, nn.Module]) -> str:
    names = [name for name, module in modules.items() if name and not list(module.children())]
    return ", ".join(map(repr, names[:6])) + (f", ... ({len(names)} in all)" if len(names) > 6 else "")
