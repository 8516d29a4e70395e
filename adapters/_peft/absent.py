"""PEFT's names of methods that are not here: clients import them for `isinstance`, and using one is an error."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NoReturn

from torchgraft.functional import UnsupportedCall

_NAMES = {
    "ADAMSS": "AdamssConfig AdamssLayer AdamssModel",
    "ADAPTION_PROMPT": "AdaptionPromptConfig AdaptionPromptModel",
    "BOFT": "BOFTConfig BOFTLayer BOFTModel",
    "CARTRIDGE": "CartridgeConfig CartridgeEncoder",
    "CPT": "CPTConfig CPTEmbedding",
    "FOURIERFT": "FourierFTConfig FourierFTLayer FourierFTModel",
    "FROD": "FrodConfig FrodLayer FrodModel",
    "HRA": "HRAConfig HRALayer HRAModel",
    "LILY": "LilyConfig LilyLayer LilyModel",
    "MULTITASK_PROMPT_TUNING": "MultitaskPromptTuningConfig MultitaskPromptTuningInit MultitaskPromptEmbedding",
    "OSF": "OSFConfig OSFLayer OSFModel",
    "POLY": "PolyConfig PolyLayer PolyModel",
    "PREFIX_TUNING": "PrefixTuningConfig PrefixEncoder",
    "PROMPT_TUNING": "PromptTuningConfig PromptTuningInit PromptEmbedding",
    "PVERA": "PveraConfig PveraLayer PveraModel",
    "P_TUNING": "PromptEncoderConfig PromptEncoder PromptEncoderReparameterizationType",
    "RANDLORA": "RandLoraConfig RandLoraLayer RandLoraModel",
    "ROAD": "RoadConfig RoadLayer RoadModel",
    "SHADOW": "ShadowConfig ShadowLayer ShadowModel",
    "SUPERTUNING": "SupertuningConfig SupertuningLayer SupertuningModel",
    "UNILORA": "UniLoraConfig UniLoraLayer UniLoraModel",
    "WAVEFT": "WaveFTConfig WaveFTLayer WaveFTModel",
    "XLORA": "XLoraConfig XLoraModel",
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
    modules: dict[str, dict[str, Any]] = {"peft": {}, "peft.tuners": {}, "peft.config": {}}
    for module in ("peft", "peft.config"):
        modules[module][learning.__name__] = learning
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
