"""Injection: adapters in the user's own model, as PEFT's low-level API puts them there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torchgraft.functional.extending import Tree, check_config, check_module, check_no_view, given_type

from .._config.base import AdapterConfig
from .._config.replication import replicating
from . import root
from .injection.bound import Injection, bind_injection, check_injection
from .injection.placing import place
from .injection.positions import Positions
from .injection.restoring import restoring
from .switch import active_adapters, adapter_names, set_requires_grad
from .tensors.gathering import check_averaged, gathered
from .walk import layers, outermost, parts, unwrap


def inject_adapter_in_model(
    peft_config: AdapterConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    params: Tree | None = None,
    activate: bool = True,
) -> nn.Module:
    """Put an adapter into a model, in place, and make it the active and trainable one.

    PEFT's `inject_adapter_in_model`: the same modules, names, initial numbers and frozen tensors. Either everything
    happens or, on an error, nothing. Targeted modules are replaced by layers that hold them as `base_layer`; all else
    about the model stays: its class, its methods, its modes. Merged adapters are unmerged first. If all adapters are
    disabled, so is the new one.

    What is different from PEFT: a layer is in evaluation mode where its module is; a module under two names is adapted
    under both; a name that is taken is an error; methods with shared tensors (VeRA) work too; a second adapter's copies
    of `modules_to_save` are active and trained like the rest of it; adapters of different methods share a layer, but
    for LoRA and AdaLoRA, whose parameters have the same names.

    Args:
        peft_config: The adapter's config. It is copied, into `model.peft_config[adapter_name]`. Without
            `target_modules`, a model with a known `config.model_type` has PEFT's defaults.
        model: The model; changed in place.
        adapter_name: Name of the adapter, without dots.
        low_cpu_mem_usage: Make the parameters on the meta device, for `set_peft_model_state_dict(...,
            low_cpu_mem_usage=True)`.
        state_dict: Keys of an adapter: the modules and ranks are taken from there, not from the config. The values are
            not loaded.
        params: A tree as `bind(model, peft_config).init()` makes it, whose tensors become the parameters, sharing their
            memory where they have the dtype and the device of what they are in.
        activate: Whether the adapter becomes the active one. If not, it is frozen, and what is active stays so.

    Of a model that is sharded, all processes take part, and what is drawn is what the first one draws.

    Returns:
        `model`.

    Raises:
        TypeError: No module, no config.
        ValueError: A name that is taken or unfit, a config that matches nothing or a module that its method does not
            support, a `state_dict` that does not fit the model; an adapter on what is one of `modules_to_save`;
            one to be trained in a model that several processes train already, as its gradients would not be averaged.
        RuntimeError: Something else wrote to the weights while adapters were merged.
        KeyError: `params` that do not fit.

    >>> from torchgraft.adapters import LoraConfig
    >>> model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 3)))
    >>> sorted(name for name, p in model.named_parameters() if p.requires_grad)
    ['0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    check_module(model, other=peft_config)
    given, model = model, unwrap(model)
    _check_arguments(peft_config, model, adapter_name, state_dict, params)
    check_averaged(given, trained=activate and not peft_config.inference_mode)
    with gathered(given, writes=True), replicating(model, peft_config, adapter_names(model)), restoring(model):
        injection = bind_injection(peft_config, model, adapter_name, low_cpu_mem_usage, state_dict, params)
        check_injection(injection, model)
        wanted = injection.targets | injection.embeddings | injection.copied
        positions = Positions(injection.modules, wanted, outermost(model))
        first, before = not layers(model), active_adapters(model)
        place(injection, model, positions)
        _register(injection, model)
        if first:
            model.requires_grad_(False)
        if activate:
            for part in parts(model):
                part.activate([adapter_name], not injection.config.inference_mode)
        else:
            _keep_active(model, before, adapter_name)
    root.attach(model)
    return given


def _register(injection: Injection, model: nn.Module) -> None:
    """Let the model's `peft_config` have an adapter's config."""
    if not hasattr(model, "peft_config"):
        vars(model)["peft_config"] = {}
    configs: Any = model.peft_config
    configs[injection.name] = injection.config


def _keep_active(model: nn.Module, active: list[str], name: str) -> None:
    """Let a new adapter rest, frozen, with the active ones active also where only it has something."""
    for part in parts(model):
        if [*part.carried_adapters] == [name]:
            part.activate(active, False)
    set_requires_grad(model, name, False)


def _check_arguments(config: Any, model: nn.Module, name: Any, state_dict: Any, params: Any) -> None:
    several = list(config.values()) if isinstance(config, Mapping) else config
    if isinstance(several, (list, tuple)) and any(isinstance(one, AdapterConfig) for one in several):
        raise TypeError(
            f"peft_config is {given_type(config)}, expected one config: call inject_adapter_in_model(config, model, "
            "adapter_name) once for each"
        )
    check_config(config, "peft_config", isinstance(config, AdapterConfig))
    check_no_view(model, "inject_adapter_in_model", "Give the original model, graft.model, and the tree as params=...")
    if not isinstance(name, str) or not re.fullmatch(r"[^.\s/\\]+", name) or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter_name is {name!r}, expected a name without dots, slashes and spaces that is no attribute of "
            "nn.ModuleDict"
        )
    taken = adapter_names(model)
    if name in taken:
        raise ValueError(
            f"the model has an adapter {name!r} already (it has {taken}); choose another adapter_name, or call "
            "delete_adapter first"
        )
    if state_dict is not None and params is not None:
        raise ValueError("state_dict and params are both given, expected one: keys to infer targets from, or a tree")
