"""PEFT's names of methods that are not here: clients import them for `isinstance`, and using one is an error."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NoReturn

from torchgraft.functional import UnsupportedCall

_NAMES = {
    "ADAPTION_PROMPT": "AdaptionPromptConfig AdaptionPromptModel",
    "CARTRIDGE": "CartridgeConfig CartridgeEncoder",
    "CPT": "CPTConfig CPTEmbedding",
    "MULTITASK_PROMPT_TUNING": "MultitaskPromptTuningConfig MultitaskPromptTuningInit MultitaskPromptEmbedding",
    "PREFIX_TUNING": "PrefixTuningConfig PrefixEncoder",
    "PROMPT_TUNING": "PromptTuningConfig PromptTuningInit PromptEmbedding",
    "P_TUNING": "PromptEncoderConfig PromptEncoder PromptEncoderReparameterizationType",
    "SHADOW": "ShadowConfig ShadowLayer ShadowModel",
    "XLORA": "XLoraConfig XLoraModel",
}
_VARIANTS = {
    "KaSA": "KasaConfig",
    "MonteCLoRA": "MontecloraConfig",
    "VeLoRA": "VeloraConfig",
    "offloading for the time of a step": "LoraRuntimeConfig",
}
"""Names of what LoRA has in PEFT and not here."""
_FUNCTIONS = {
    "compose_cartridge_adapters": "the method CARTRIDGE",
    "find_kappa_target_modules": "choosing targets by the condition of their weights",
    "initialize_kv_prefix_from_past_key_values": "the method CARTRIDGE",
    "initialize_kv_prefix_from_text": "the method CARTRIDGE",
    "prompt_embeddings_from_past_key_values": "the method CARTRIDGE",
    "replace_lora_weights_loftq": "LoftQ on a base that is quantised already",
}
_INNER = ("Layer", "MultitaskPromptEmbedding")
"""Ends of names that only the submodules of PEFT have."""


class Absent(type):
    """Classes that have no instances: making one is an error, and so are their attributes.

    >>> cls = Absent("PrefixTuningConfig", (), {"about": "the method PREFIX_TUNING"})
    >>> isinstance(object(), cls)
    False
    """

    about: str

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise `UnsupportedCall`."""
        raise UnsupportedCall(cls._words())

    def __getattr__(cls, name: str) -> NoReturn:
        raise AttributeError(name if name.startswith("__") else f"{cls.__name__}.{name}: {cls._words()}")

    def _words(cls) -> str:
        return f"peft.{cls.__name__} is of {cls.about}. Leave as_peft() to have PEFT's own"


def absent_names(present: Container[str]) -> dict[str, dict[str, Any]]:
    """Return names by module of PEFT's, for the methods that are not among those that are present.

    >>> sorted(absent_names(["LORA"])["peft.tuners.prefix_tuning"])
    ['PrefixEncoder', 'PrefixTuningConfig']
    """
    learning = _class("PromptLearningConfig", "prompt learning, of which torchgraft has no method")
    variants = {
        name: _class(name, f"{what}, a form of LoRA that torchgraft does not have")
        for what, names in _VARIANTS.items()
        for name in names.split()
    }
    functions = {name: _class(name, f"{what}, which torchgraft does not have") for name, what in _FUNCTIONS.items()}
    configs = {name: cls for name, cls in variants.items() if name.endswith("Config")}
    modules: dict[str, dict[str, Any]] = {
        "peft": {learning.__name__: learning, **variants, **functions},
        "peft.config": {learning.__name__: learning},
        "peft.tuners": {**variants},
        "peft.tuners.lora": variants,
        "peft.tuners.lora.config": configs,
    }
    for method, names in _NAMES.items():
        if method in present:
            continue
        made = {name: _class(name, f"the method {method}, which torchgraft does not have") for name in names.split()}
        outer = {name: cls for name, cls in made.items() if not name.endswith(_INNER)}
        modules["peft"].update(outer)
        modules["peft.tuners"].update(outer)
        modules[f"peft.tuners.{method.lower()}"] = made
    return modules


def _class(name: str, about: str) -> type:
    return Absent(name, (), {"about": about, "__doc__": f"A name of {about}."})
