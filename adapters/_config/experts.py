"""Names that layers of mixtures of experts had before transformers 5 fused them into bare parameters.

`gate_proj`, `up_proj` and `down_proj` (Mixtral's `w1`, `w3` and `w2`) of each expert are now `experts.gate_up_proj` and
`experts.down_proj`, one parameter for all experts, and the router is a module of its own kind. A LoRA config that
speaks of the old names, or of `"all-linear"`, means the new ones. Which models, and what for, is PEFT's
`utils/transformers_weight_conversion.py`.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from torch import nn

from torchgraft.functional import AddsProduct
from torchgraft.functional.extending import describe, is_linear

from .matching import excluded, linear_names, matches
from .messages import require, spelled
from .target_parameters import parameter_names

C = TypeVar("C", bound=Any)
Modules = Mapping[str, nn.Module]

QWEN = {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}

_QWENS = """
    afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe
    glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next qwen3_omni_moe
    qwen3_omni_moe_text qwen3_omni_moe_thinker sarvam_mla solar_open
"""

NEW_NAMES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("minimax", "minimax_m2", "mixtral"), MIXTRAL),
    **dict.fromkeys(_QWENS.split(), QWEN),
}
"""The parameter that each old name means, by the model's `config.model_type`."""


def with_new_names(config: C, kind: str | None, modules: Modules, model: nn.Module) -> C:
    """Return a copy of a LoRA config that names fused parameters where it named the layers that they were made of.

    The parameter of two layers gets twice the rank and `lora_alpha`, as in PEFT. Where a name means experts, linear
    layers of that name (of shared experts, of dense layers) are left out, as in PEFT; a warning names them. A regular
    expression that only means some of the layers keeps its meaning, where PEFT adapts all layers.

    Args:
        config: An adapter's config.
        kind: The model's type.
        modules: The model's modules by name.
        model: The model.

    Raises:
        ValueError: One of two layers that are one parameter now.
    """
    new_names = NEW_NAMES.get(kind or "", {})
    parameters = [name for name in parameter_names(modules) if _leaf(name) in new_names.values()]
    if config.method.name != "LORA" or not parameters:
        return config
    if config.target_modules is None:
        return dataclasses.replace(config, target_modules=[]) if config.target_parameters else config
    given = config.target_modules
    names = _old_names(config, new_names, modules, model) if isinstance(given, str) else sorted(given)
    old = {name: one for name in names if (one := _old_name(name, new_names)) is not None}
    if not old:
        return config
    patterns: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for new in dict.fromkeys(new_names[one] for one in old.values()):
        parts = [one for one in new_names if new_names[one] == new]
        present = [one for one in parts if one in old.values()]
        require(
            len(present) == len(parts),
            config,
            f"target_modules names {present} of the experts without {sorted(set(parts) - set(present))}, and they are "
            f"one parameter, {new}, in this model; name both",
        )
        if len(parts) > 1:
            pattern = rf".*\.{re.escape(new)}"
            patterns["rank_pattern"][pattern] = config.r * len(parts)
            patterns["alpha_pattern"][pattern] = config.lora_alpha * len(parts)
    fields: dict[str, Any] = {name: {**getattr(config, name), **new} for name, new in patterns.items()}
    wanted = [new_names[one] for one in old.values()]
    fields["target_parameters"] = sorted({*(config.target_parameters or ()), *wanted})
    fields["target_modules"] = [name for name in names if name not in old]
    converted = dataclasses.replace(config, **fields)
    if isinstance(given, str):
        converted = _kept_apart(config, converted, new_names, modules)
    _warn_of_linear(config, converted, set(old.values()), modules, model)
    return converted


def _old_names(config: Any, new_names: Mapping[str, str], modules: Modules, model: nn.Module) -> list[str]:
    """Return the last parts of all names that a string means, those that layers had before among them."""
    if config.target_modules.lower() == "all-linear":
        return sorted({_leaf(name) for name in linear_names(config, modules, model)} | set(new_names))
    keys = [*modules, *parameter_names(modules)]
    found = {_leaf(name) for name in keys if matches(config, name) and not excluded(config, name)}
    found |= {old for path in _containers(modules, new_names) for old in new_names if _means(config, path, old)}
    return sorted(found)


def _containers(modules: Modules, new_names: Mapping[str, str]) -> list[str]:
    """Return names of the modules that have fused parameters."""
    return [path for path, module in modules.items() if any(new in module._parameters for new in new_names.values())]


def _means(config: Any, container: str, old: str) -> bool:
    """Return whether a regular expression means what a layer of this name was in a module."""
    name = f"{container}.{old}" if container else old
    return matches(config, name) and not excluded(config, name)


def _kept_apart(config: Any, converted: Any, new_names: Mapping[str, str], modules: Modules) -> Any:
    """Whole names where the last parts would mean more than a regular expression does."""
    if config.target_modules.lower() == "all-linear":
        return converted
    given = [name for name in modules if matches(converted, name)]
    kept = [name for name in given if matches(config, name)]
    targets = converted.target_parameters
    fused = [name for name in parameter_names(modules) if any(name == t or name.endswith(f".{t}") for t in targets)]
    before = set(config.target_parameters or ())
    kept_fused = []
    for name in fused:
        container, new = name.rpartition(".")[0], _leaf(name)
        olds = [one for one, target in new_names.items() if target in (new, f"{_leaf(container)}.{new}")]
        own = any(name == target or name.endswith(f".{target}") for target in before)
        if (
            own
            or matches(config, name)
            or matches(config, container)
            or any(_means(config, container, o) for o in olds)
        ):
            kept_fused.append(name)
    if (kept, kept_fused) == (given, fused):
        return converted
    return dataclasses.replace(converted, target_modules=kept, target_parameters=kept_fused)


def _warn_of_linear(config: Any, converted: Any, old: Collection[str], modules: Modules, model: nn.Module) -> None:
    """Name the linear layers that a config would mean and that have the names of experts' layers."""
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        named = linear_names(config, modules, model)
    else:
        named = {name for name, module in modules.items() if is_linear(module) and matches(config, name)}
    named = {name for name in named if _leaf(name) in old and not matches(converted, name)}
    left = [name for name in modules if name in named and not excluded(config, name)]
    if left:
        warnings.warn(
            f"{type(config).__name__}: {sorted(old)} mean the experts of this model, as in PEFT, so linear layers of "
            f"these names are left out: {_some(left)}; to adapt them, name each as a whole in a config of its own",
            RuntimeWarning,
            stacklevel=2,
        )


def warn_of_experts(config: Any, found: Collection[str], modules: Modules) -> None:
    """Name the weights of experts that a config seems to mean and that stay as they are: no linear layer has them.

    Args:
        config: An adapter's config, with the names that the model has.
        found: What it targets.
        modules: The model's modules by name.
    """
    targets = config.target_modules
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    left = []
    for path, module in modules.items():
        for leaf, parameter in module._parameters.items():
            name = f"{path}.{leaf}"
            if parameter is None or name in found or not _is_of_experts(path, module, parameter):
                continue
            olds = [old for names in (QWEN, MIXTRAL) for old, new in names.items() if new == leaf]
            if everything or any(matches(config, f"{path}.{old}") for old in olds):
                left.append(name)
    if left:
        can = "target_parameters" in {field.name for field in dataclasses.fields(config)} and config.method.ability(
            AddsProduct
        )
        remedy = f"name them in target_parameters, such as {_leaf(left[0])!r}" if can else "use LoRA for these"
        warnings.warn(
            f"{type(config).__name__}: target_modules={spelled(targets)} leaves out the experts of this model, whose "
            f"weights are parameters and no linear layers: {_some(left)}; {remedy}",
            RuntimeWarning,
            stacklevel=2,
        )


def _is_of_experts(path: str, module: nn.Module, parameter: Any) -> bool:
    """Return whether a parameter is the weights of several experts."""
    stacked = parameter.ndim == 3 and parameter.shape[0] > 1
    return stacked and "expert" in path.lower() and describe(path, module) is None


def _old_name(name: str, new_names: Mapping[str, str]) -> str | None:
    return next((old for old in new_names if name == old or name.endswith(f".{old}")), None)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:6])
    return shown if len(names) <= 6 else f"{shown}, ... ({len(names)} in all)"
