"""`PeftModel` for each task, and the function that makes one."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from torch import nn

from torchgraft.functional.extending import check_config

from .. import _inplace as inplace
from .._config.base import AdapterConfig
from .peft_model import PeftModel
from .tuner_classes import MixedModel
from .tuners import BaseTuner


class PeftMixedModel(PeftModel):
    """A `PeftModel` made with `mixed=True`; here every `PeftModel` takes adapters of several methods.

    >>> from torchgraft.adapters import IA3Config, LoraConfig
    >>> model = PeftMixedModel(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]), "lora")
    >>> model.add_adapter("ia3", IA3Config(target_modules=["0"]))
    >>> model.set_adapter(["lora", "ia3"])
    >>> model.active_adapters
    ['lora', 'ia3']
    """

    @classmethod
    def class_for(cls, config: AdapterConfig) -> type[PeftModel]:
        """Return this class, of whatever task the config is."""
        return cls

    @classmethod
    def tuner_of(cls, config: AdapterConfig) -> type[BaseTuner]:
        """Return the class of `base_model`."""
        return MixedModel

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove one adapter or several; all of them can be removed, or none is."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        inplace.check_removable(self.get_base_model(), names)
        for name in names:
            super().delete_adapter(name)


class PeftModelForCausalLM(PeftModel, task="CAUSAL_LM"):
    """A `PeftModel` for `task_type="CAUSAL_LM"`."""


class PeftModelForSeq2SeqLM(PeftModel, task="SEQ_2_SEQ_LM"):
    """A `PeftModel` for `task_type="SEQ_2_SEQ_LM"`."""


class PeftModelForFeatureExtraction(PeftModel, task="FEATURE_EXTRACTION"):
    """A `PeftModel` for `task_type="FEATURE_EXTRACTION"`."""


class PeftModelForSequenceClassification(PeftModel, task="SEQ_CLS"):
    """A `PeftModel` for `task_type="SEQ_CLS"`, whose new head is trained as a whole."""


class PeftModelForTokenClassification(PeftModel, task="TOKEN_CLS"):
    """A `PeftModel` for `task_type="TOKEN_CLS"`, whose new head is trained as a whole."""


class PeftModelForQuestionAnswering(PeftModel, task="QUESTION_ANS"):
    """A `PeftModel` for `task_type="QUESTION_ANS"`, whose new head is trained as a whole."""


def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Inject an adapter into a model and wrap it under PEFT's names, by the config's `task_type`.

    Args:
        model: The model; changed in place.
        peft_config: The adapter's config; it is copied.
        adapter_name: Name of the adapter.
        mixed: Return a `PeftMixedModel`, which is no other: adapters of several methods may stand in any model.
        autocast_adapter_dtype: Give its parameters float32 where they would have float16 or bfloat16.
        revision: The base model's revision, for files.
        low_cpu_mem_usage: Make its parameters on the meta device.

    >>> from torchgraft.adapters import LoraConfig
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['base_model.model.0.lora_A.default.weight', 'base_model.model.0.lora_B.default.weight']
    """
    if isinstance(model, PeftModel):
        raise TypeError(f"model is a {type(model).__name__} already; call its add_adapter(name, config)")
    check_config(peft_config, "peft_config", isinstance(peft_config, AdapterConfig))
    cls = PeftMixedModel if mixed else PeftModel.class_for(peft_config)
    config = dataclasses.replace(peft_config, **_base_fields(peft_config, model, revision))
    if present := inplace.adapter_names(model):
        warnings.warn(
            f"the model has adapters already, {present}, and {adapter_name!r} is added to them; call unload(model) "
            "first if it was to be the only one",
            UserWarning,
            stacklevel=2,
        )
    return cls(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def _base_fields(config: AdapterConfig, model: nn.Module, revision: str | None) -> dict[str, Any]:
    """Return what a config says of the base model, as it is; a config of another one is a warning."""
    name = vars(model).get("name_or_path") or None
    given = {"base_model_name_or_path": name if isinstance(name, str) else None, "revision": revision}
    fields = {field: value for field, value in given.items() if value is not None}
    for field, value in fields.items():
        if getattr(config, field) not in (None, value):
            warnings.warn(
                f"the config's {field} is {getattr(config, field)!r} and the model's {value!r}, which is what files "
                "will have",
                UserWarning,
                stacklevel=3,
            )
    return fields
