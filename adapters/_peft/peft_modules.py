"""What `peft` and its submodules offer while torchgraft stands in for them: the names that clients import."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from torchgraft.functional.extending import SHARED as SHARED_LEAVES

from .. import _inplace as inplace
from .._calibration.initial import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from .._config.base import AdapterConfig, config_types
from .._config.errors import NoMatchingPeftModuleError, PeftError, PeftWarning
from .._config.keys import PREFIX, split_key
from .._config.peft_type import PeftType, TaskType
from .._inplace import BaseTunerLayer, ModulesToSaveWrapper
from .._methods.lora.lora import LoraConfig
from .auto import AUTO_MODELS
from .configs import get_peft_config
from .peft_model import PeftModel
from .status import LayerStatus, ModelStatus, get_layer_status, get_model_status
from .tasks import PeftMixedModel, get_peft_model
from .tuners import BaseTuner, tuner_class
from .weights import load_peft_weights


class _OfMethod(type):
    """Layers that carry an adapter of one method, as far as `isinstance` goes."""

    method: str

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, BaseTunerLayer) and any(
            entry.config.method.name == cls.method for entry in instance.entries.values()
        )


def _layer_class(config: type[AdapterConfig]) -> type:
    """Make the class that PEFT has for layers with an adapter of a method: `LoraLayer` beside `LoraConfig`."""
    method, name = config.method.name, config.__name__.replace("Config", "Layer")
    return _OfMethod(name, (), {"method": method, "__doc__": f"Layers with an adapter of type {method}."})


def build_peft_weight_mapping(
    weight_conversions: Iterable[Any] | None, adapter_name: str, peft_config: AdapterConfig | None = None
) -> list[Any]:
    """Return what transformers' loader needs to do to the keys of a file to have those of the model.

    The file's prefix goes, the adapter's name comes after the leaf's, and then the model's own renamings apply. Its
    conversions of tensors concern the base's and are left out.

    Raises:
        ImportError: transformers is not there; only its loader calls this.
    """
    loading: Any = sys.modules.get("transformers.core_model_loading")
    if loading is None:
        raise ImportError("transformers.core_model_loading is not imported; only transformers' loader needs this")
    configs = [peft_config] if peft_config is not None else list(config_types().values())
    given = weight_conversions or ()
    renamings = [one for one in given if isinstance(one, loading.WeightRenaming)]
    return [_adapter_keys(loading.WeightRenaming, adapter_name, configs), *renamings]


def _adapter_keys(renaming: Any, adapter_name: str, configs: list[Any]) -> Any:
    """A renaming of transformers' kind that does exactly this, where a pattern could hit other parts of a name."""

    class AdapterKeys(renaming):  # type: ignore[misc,unused-ignore]
        __slots__ = ()

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            return insert_name(source_key, adapter_name, configs), None

        def was_used(self) -> bool:
            """Not to be undone when the base is saved."""
            return False

    return AdapterKeys(PREFIX, "")


def insert_name(key: str, adapter_name: str, configs: Iterable[Any]) -> str:
    """Return the key in a model of a key in a file.

    >>> insert_name("base_model.model.layers.0.lora_A.weight", "style", [LoraConfig])
    'layers.0.lora_A.style.weight'
    >>> insert_name("base_model.model.classifier.weight", "style", [LoraConfig])
    'classifier.weight'
    """
    for config in configs:
        if (split := split_key(config, key)) is not None:
            path, leaf = split
            if path == SHARED_LEAVES:
                return key
            return f"{path}.{config.form.key(leaf).replace(leaf, f'{leaf}.{adapter_name}', 1)}"
    return key.removeprefix(PREFIX)


_METHODS = config_types()
"""Every method of this package: `adapters/__init__.py` imports them before this module."""
_CONFIGS = {cls.__name__: cls for cls in _METHODS.values()}
_TUNERS: dict[str, dict[str, Any]] = {
    f"peft.tuners.{name.lower()}": {one.__name__: one for one in (cls, _layer_class(cls), tuner_class(cls))}
    for name, cls in _METHODS.items()
}
_LORA = _TUNERS["peft.tuners.lora"]
_STARTS = {"EvaConfig": EvaConfig, "LoftQConfig": LoftQConfig, "LoraGAConfig": LoraGAConfig}
_TASKS: list[type] = [PeftModel, *PeftModel.of_task.values()]
_MODELS = {cls.__name__: cls for cls in _TASKS}
_TUNER_MODELS: dict[str, type] = {tuner_class(cls).__name__: tuner_class(cls) for cls in _METHODS.values()}
_AUTO = {cls.__name__: cls for cls in AUTO_MODELS}
_ERRORS = {"NoMatchingPeftModuleError": NoMatchingPeftModuleError, "PeftError": PeftError}
_STATUS = {
    "TunerLayerStatus": LayerStatus,
    "TunerModelStatus": ModelStatus,
    "get_layer_status": get_layer_status,
    "get_model_status": get_model_status,
}
_STATE = {
    "get_peft_model_state_dict": inplace.get_peft_model_state_dict,
    "set_peft_model_state_dict": inplace.set_peft_model_state_dict,
}
_CALLS = {
    "cast_adapter_dtype": inplace.cast_adapter_dtype,
    "delete_adapter": inplace.delete_adapter,
    "inject_adapter_in_model": inplace.inject_adapter_in_model,
    "set_adapter": inplace.set_adapter,
    "set_requires_grad": inplace.set_requires_grad,
    **_STATE,
}
_TYPES = {"PeftType": PeftType, "TaskType": TaskType}
_WRAPPERS = {"AuxiliaryTrainingWrapper": ModulesToSaveWrapper, "ModulesToSaveWrapper": ModulesToSaveWrapper}
_FILES = {
    "CONFIG_NAME": "adapter_config.json",
    "SAFETENSORS_WEIGHTS_NAME": "adapter_model.safetensors",
    "WEIGHTS_NAME": "adapter_model.bin",
}
_TABLES = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": _METHODS,
    "PEFT_TYPE_TO_PREFIX_MAPPING": {name: cls.form.prefix for name, cls in _METHODS.items()},
}

MODULES: Mapping[str, Mapping[str, Any]] = {
    "peft": {
        **_CONFIGS,
        **_STARTS,
        **_MODELS,
        **_AUTO,
        **_ERRORS,
        "PeftWarning": PeftWarning,
        **_TUNER_MODELS,
        "get_layer_status": get_layer_status,
        "get_model_status": get_model_status,
        **_TYPES,
        **_STATE,
        "PEFT_TYPE_TO_CONFIG_MAPPING": _TABLES["PEFT_TYPE_TO_CONFIG_MAPPING"],
        "PeftConfig": AdapterConfig,
        "PeftMixedModel": PeftMixedModel,
        "get_peft_config": get_peft_config,
        "get_peft_model": get_peft_model,
        "inject_adapter_in_model": inplace.inject_adapter_in_model,
        "load_peft_weights": load_peft_weights,
    },
    "peft.auto": {**_AUTO, "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": PeftModel.of_task},
    "peft.config": {"PeftConfig": AdapterConfig},
    "peft.functional": _CALLS,
    "peft.mapping_func": {"get_peft_model": get_peft_model},
    "peft.mapping": {
        **_TABLES,
        "get_peft_config": get_peft_config,
        "inject_adapter_in_model": inplace.inject_adapter_in_model,
    },
    "peft.mixed_model": {"PeftMixedModel": PeftMixedModel},
    "peft.peft_model": {**_MODELS, **_STATUS},
    "peft.tuners": {**_CONFIGS, **_STARTS, **_TUNER_MODELS},
    **_TUNERS,
    "peft.tuners.lora": {**_LORA, **_STARTS},
    "peft.tuners.lora.config": {**_STARTS, "CordaConfig": CordaConfig, "LoraConfig": LoraConfig},
    "peft.tuners.lora.layer": {"LoraLayer": _LORA["LoraLayer"]},
    "peft.tuners.tuners_utils": {"BaseTuner": BaseTuner, "BaseTunerLayer": BaseTunerLayer},
    "peft.utils": {**_ERRORS, **_FILES, **_STATE, **_TYPES, **_WRAPPERS},
    "peft.utils.error": _ERRORS,
    "peft.utils.warning": {"PeftWarning": PeftWarning},
    "peft.utils.other": {**_FILES, **_WRAPPERS},
    "peft.utils.peft_types": _TYPES,
    "peft.utils.save_and_load": {**_STATE, "load_peft_weights": load_peft_weights},
    "peft.utils.transformers_weight_conversion": {"build_peft_weight_mapping": build_peft_weight_mapping},
}
"""The names of each module."""


def make_modules(version: str) -> dict[str, ModuleType]:
    """Return the modules by name, ready for `sys.modules`; each knows its submodules."""
    made = {name: ModuleType(name, f"torchgraft, standing in for {name}.") for name in MODULES}
    for name, module in made.items():
        vars(module).update(MODULES[name], __path__=[], __getattr__=_refuse(name))
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    vars(made["peft"])["__version__"] = version
    return made


def _refuse(name: str) -> Any:
    def __getattr__(attribute: str) -> Any:
        raise AttributeError(missing(f"{name}.{attribute}"))

    return __getattr__


def missing(name: str) -> str:
    """Return what to say when somebody asks for a name that is not here."""
    module, _, attribute = name.rpartition(".")
    nested = {other.removeprefix(f"{module}.") for other in MODULES if other.startswith(f"{module}.")}
    offered = sorted({*MODULES.get(module, ()), *(other for other in nested if "." not in other)})
    return (
        f"torchgraft stands in for peft here (as_peft()) and has no {attribute!r} in {module}; it offers "
        f"{', '.join(offered) or 'nothing there'}. Leave as_peft() to have PEFT's own"
    )
