"""What `peft` and its submodules offer while torchgraft stands in for them: the names that clients import."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torchgraft.functional.extending import did_you_mean

from .. import _inplace as inplace
from .._calibration.initial import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from .._config.architectures import IA3, targets_by_type
from .._config.base import AdapterConfig, config_types
from .._config.errors import NoMatchingPeftModuleError, PeftError, PeftWarning
from .._config.peft_type import PeftType, TaskType
from .._inplace import BaseTunerLayer, ModulesToSaveWrapper
from .._inplace.beside.tokens import TrainableTokensWrapper
from .._methods.lora.blocks import BdLoraConfig
from .._methods.lora.lora import LoraConfig
from . import arrow, conversion, eva, helpers, hotswap, lookups, optimizers, packages, precision, preprocess
from .absent import Absent, absent_names
from .auto import AUTO_MODELS
from .configs import get_peft_config
from .layer_classes import classes_in_package, layer_classes
from .lookups import factorization
from .peft_model import PeftModel
from .renamed_keys import build_peft_weight_mapping
from .status import LayerStatus, ModelStatus, get_layer_status, get_model_status
from .tasks import PeftMixedModel, get_peft_model
from .tuner_classes import AdamssAsaCallback, MixedModel, tuner_class
from .tuners import BaseTuner
from .weights import load_peft_weights


class _Wrappers(type):
    """What adapters have in the place of modules that are trained otherwise, as far as `isinstance` goes."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, (ModulesToSaveWrapper, TrainableTokensWrapper))


class AuxiliaryTrainingWrapper(metaclass=_Wrappers):
    """Wrappers of `modules_to_save`, and of embeddings of which adapters train rows."""


_METHODS = {name: config for name, config in config_types().items() if name in PeftType.__members__}
"""PEFT's methods that this package has: `adapters/__init__.py` imports them before this module."""
_CONFIGS = {cls.__name__: cls for cls in _METHODS.values()}
_LAYERS = {name: layer_classes(cls) for name, cls in _METHODS.items()}
_CONFIG_MODULES = {f"peft.tuners.{name.lower()}.config": {cls.__name__: cls} for name, cls in _METHODS.items()}
_MODEL_MODULES = {
    f"peft.tuners.{name.lower()}.model": {tuner_class(cls).__name__: tuner_class(cls)} for name, cls in _METHODS.items()
}
_TUNERS: dict[str, dict[str, Any]] = {
    f"peft.tuners.{name.lower()}": {
        **{one.__name__: one for one in (cls, tuner_class(cls))},
        **classes_in_package(cls, _LAYERS[name]),
    }
    for name, cls in _METHODS.items()
}
_LAYER_MODULES = {f"peft.tuners.{name.lower()}.layer": classes for name, classes in _LAYERS.items()}
_LORA = _TUNERS["peft.tuners.lora"]
_STARTS = {
    "ArrowConfig": arrow.ArrowConfig,
    "BdLoraConfig": BdLoraConfig,
    "EvaConfig": EvaConfig,
    "LoftQConfig": LoftQConfig,
    "LoraGAConfig": LoraGAConfig,
}
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
_WRAPPERS = {
    "AuxiliaryTrainingWrapper": AuxiliaryTrainingWrapper,
    "ModulesToSaveWrapper": ModulesToSaveWrapper,
    "TrainableTokensWrapper": TrainableTokensWrapper,
}
_UTILS = {
    "_get_submodules": lookups.get_submodules,
    "cast_mixed_precision_params": precision.cast_mixed_precision_params,
    "infer_device": lookups.infer_device,
    "prepare_model_for_kbit_training": precision.prepare_model_for_kbit_training,
    "transpose": lookups.transpose,
}
_BASE_STATE = {
    "get_base_model_state_dict": inplace.get_base_model_state_dict,
    "set_base_model_state_dict": inplace.set_base_model_state_dict,
}
_DATA = {
    "create_arrow_model": arrow.create_arrow_model,
    "get_eva_state_dict": eva.get_eva_state_dict,
    "initialize_lora_eva_weights": eva.initialize_lora_eva_weights,
    "preprocess_loraga": preprocess.preprocess_loraga,
}
_OPTIMIZERS = {
    "create_lorafa_optimizer": optimizers.create_lorafa_optimizer,
    "create_loraplus_optimizer": optimizers.create_loraplus_optimizer,
}
_HOTSWAP = {
    one.__name__: one
    for one in (
        hotswap.check_hotswap_configs_compatible,
        hotswap.hotswap_adapter,
        hotswap.hotswap_adapter_from_state_dict,
        hotswap.prepare_model_for_compiled_hotswap,
    )
}
_HELPERS = {
    one.__name__: one
    for one in (
        helpers.check_if_peft_model,
        helpers.disable_input_dtype_casting,
        helpers.rescale_adapter_scale,
        helpers.update_forward_signature,
        helpers.update_generate_signature,
        helpers.update_signature,
    )
}
_CONVERSION = {"convert_to_lora": conversion.convert_to_lora, "save_as_lora": conversion.save_as_lora}
_FILES = {
    "CONFIG_NAME": "adapter_config.json",
    "SAFETENSORS_WEIGHTS_NAME": "adapter_model.safetensors",
    "WEIGHTS_NAME": "adapter_model.bin",
}
_ABSENT = absent_names(_METHODS)
_TARGETS = {
    **{
        f"TRANSFORMERS_MODELS_TO_{name.replace('LN_', 'LN')}_TARGET_MODULES_MAPPING": targets
        for name in _METHODS
        if (targets := targets_by_type(name))
    },
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING": {kind: list(one[1]) for kind, one in IA3.items()},
}
_NAMES = {
    "EMBEDDING_LAYER_NAMES": ["embed_tokens", "lm_head"],
    "INCLUDE_LINEAR_LAYERS_SHORTHAND": "all-linear",
    "SEQ_CLS_HEAD_NAMES": ["score", "classifier"],
}
_TABLES = {
    "PEFT_TYPE_TO_TUNER_MAPPING": {name: tuner_class(cls) for name, cls in _METHODS.items()},
    "PEFT_TYPE_TO_CONFIG_MAPPING": _METHODS,
    "PEFT_TYPE_TO_PREFIX_MAPPING": {name: tuner_class(cls).prefix for name, cls in _METHODS.items()},
}

MODULES: Mapping[str, Mapping[str, Any]] = {
    **_ABSENT,
    "peft": {
        **_ABSENT["peft"],
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
        **_BASE_STATE,
        **_DATA,
        **_CONVERSION,
        "cast_mixed_precision_params": precision.cast_mixed_precision_params,
        "prepare_model_for_kbit_training": precision.prepare_model_for_kbit_training,
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": PeftModel.of_task,
        "PEFT_TYPE_TO_CONFIG_MAPPING": _TABLES["PEFT_TYPE_TO_CONFIG_MAPPING"],
        "PEFT_TYPE_TO_TUNER_MAPPING": _TABLES["PEFT_TYPE_TO_TUNER_MAPPING"],
        "PeftConfig": AdapterConfig,
        "PeftMixedModel": PeftMixedModel,
        "get_peft_config": get_peft_config,
        "get_peft_model": get_peft_model,
        "inject_adapter_in_model": inplace.inject_adapter_in_model,
        "load_peft_weights": load_peft_weights,
    },
    "peft.auto": {**_AUTO, "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": PeftModel.of_task},
    "peft.config": {**_ABSENT["peft.config"], "PeftConfig": AdapterConfig},
    "peft.functional": _CALLS,
    "peft.helpers": _HELPERS,
    "peft.import_utils": packages.QUESTIONS,
    "peft.mapping_func": {"get_peft_model": get_peft_model},
    "peft.mapping": {
        **_TABLES,
        "get_peft_config": get_peft_config,
        "inject_adapter_in_model": inplace.inject_adapter_in_model,
    },
    "peft.optimizers": _OPTIMIZERS,
    "peft.optimizers.lorafa": {"create_lorafa_optimizer": optimizers.create_lorafa_optimizer},
    "peft.optimizers.loraplus": {"create_loraplus_optimizer": optimizers.create_loraplus_optimizer},
    "peft.mixed_model": {"PeftMixedModel": PeftMixedModel},
    "peft.peft_model": {**_MODELS, **_STATUS},
    "peft.tuners": {
        **_ABSENT["peft.tuners"],
        **_CONFIGS,
        **_STARTS,
        **_TUNER_MODELS,
        **_DATA,
        **_CONVERSION,
        "MixedModel": MixedModel,
    },
    **_TUNERS,
    **_CONFIG_MODULES,
    **_MODEL_MODULES,
    "peft.tuners.mixed": {"MixedModel": MixedModel},
    "peft.tuners.adamss.asa_callback": {"AdamssAsaCallback": AdamssAsaCallback},
    "peft.tuners.lora": {**_ABSENT["peft.tuners.lora"], **_LORA, **_STARTS, **_DATA, **_CONVERSION},
    "peft.tuners.lora.conversion": _CONVERSION,
    "peft.tuners.lora.corda": {"preprocess_corda": preprocess.preprocess_corda},
    "peft.tuners.lora.eva": {name: one for name, one in _DATA.items() if "eva" in name},
    "peft.tuners.lora.loraga": {"preprocess_loraga": preprocess.preprocess_loraga},
    "peft.tuners.lora.config": {
        **_ABSENT["peft.tuners.lora.config"],
        **_STARTS,
        "CordaConfig": CordaConfig,
        "LoraConfig": LoraConfig,
    },
    **_LAYER_MODULES,
    "peft.tuners.lokr.layer": {**_LAYERS["LOKR"], "factorization": factorization},
    "peft.tuners.tuners_utils": {
        "BaseTuner": BaseTuner,
        "BaseTunerLayer": BaseTunerLayer,
        **{name: _CALLS[name] for name in ("cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad")},
        "check_target_module_exists": lookups.check_target_module_exists,
        "inspect_matched_modules": lookups.inspect_matched_modules,
    },
    "peft.utils.error": _ERRORS,
    "peft.utils.warning": {"PeftWarning": PeftWarning},
    "peft.utils": {
        **_ERRORS,
        "PeftWarning": PeftWarning,
        **_FILES,
        **{name: one for name, one in _TARGETS.items() if "HIRA" not in name and "OSF" not in name},  # not exported
        "INCLUDE_LINEAR_LAYERS_SHORTHAND": _NAMES["INCLUDE_LINEAR_LAYERS_SHORTHAND"],
        **_STATE,
        **_BASE_STATE,
        **_TYPES,
        **_WRAPPERS,
        **_UTILS,
        "load_peft_weights": load_peft_weights,
    },
    "peft.utils.constants": {**_FILES, **_TARGETS, **_NAMES},
    "peft.utils.hotswap": _HOTSWAP,
    "peft.utils.other": {
        **_FILES,
        **_WRAPPERS,
        **_UTILS,
        **{name: one for name, one in _NAMES.items() if name != "SEQ_CLS_HEAD_NAMES"},
        "fsdp_auto_wrap_policy": lookups.fsdp_auto_wrap_policy,
    },
    "peft.utils.peft_types": _TYPES,
    "peft.utils.save_and_load": {**_STATE, **_BASE_STATE, "load_peft_weights": load_peft_weights},
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
    """Return the error's words for a name that is not here."""
    module, _, attribute = name.rpartition(".")
    nested = {other.removeprefix(f"{module}.") for other in MODULES if other.startswith(f"{module}.")}
    names = {**MODULES.get(module, {}), **dict.fromkeys(other for other in nested if "." not in other)}
    offered = sorted(other for other, value in names.items() if not isinstance(value, Absent))
    hint = did_you_mean(attribute, names)
    if not hint:
        listed = len(offered) < 40  # no one reads more
        hint = f"; it offers {', '.join(offered) or 'nothing'}." if listed else f"; dir({module}) has its names."
    return (
        f"torchgraft stands in for peft here (as_peft()) and has no {attribute!r} in {module}{hint} Leave as_peft() to "
        "have PEFT's own"
    )
