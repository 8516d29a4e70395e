"""`PeftModel` for each task, and the function that makes one."""

from __future__ import annotations

import dataclasses

from torch import nn

from torchgraft.functional.extending import check_config

from .._config.base import AdapterConfig
from .peft_model import PeftModel


class PeftMixedModel(PeftModel):
    """A `PeftModel` made with `mixed=True`; here any may have adapters of several methods."""


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
    config = peft_config if revision is None else dataclasses.replace(peft_config, revision=revision)
    cls = PeftMixedModel if mixed else PeftModel.of_task.get(str(config.task_type), PeftModel)
    return cls(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
