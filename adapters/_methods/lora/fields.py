"""Fields of PEFT's LoRA configs that have no effect here: accepted at their defaults, so that files and calls fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torchgraft.functional import UnsupportedConfig

from ..._calibration.initial.configs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from ..._config.messages import require
from ..._config.replication import ReplicationFields
from .blocks import BdLoraConfig


@dataclasses.dataclass(kw_only=True)
class LoraFields(ReplicationFields):
    """What PEFT's `LoraConfig` and its `AdaLoraConfig` share.

    Any value but the default is an error when the config is made, unless the config's class acts on the field.
    """

    acted_on: ClassVar[frozenset[str]] = frozenset()
    """Fields of these that the class acts on."""

    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    loftq_config: LoftQConfig | dict[str, Any] = dataclasses.field(default_factory=dict)
    eva_config: EvaConfig | dict[str, Any] | None = None
    corda_config: CordaConfig | dict[str, Any] | None = None
    lora_ga_config: LoraGAConfig | dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None

    def _register_custom_module(self, mapping: Mapping[type, type]) -> None:
        """Refuse PEFT's classes of layers for modules of a user's; a type of layer is registered instead.

        Raises:
            UnsupportedConfig: Always; says what to write.
        """
        names = ", ".join(cls.__name__ for cls in mapping)
        raise UnsupportedConfig(
            f"{type(self).__name__}: _register_custom_module got layers for {names}, and layers are not made by "
            "classes of their own here; say what such modules compute, register_layer(cls, 'linear', weight=..., "
            "bias=...) of torchgraft.functional, and target them"
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        inherited = {field.name for field in dataclasses.fields(ReplicationFields)}
        for field in dataclasses.fields(LoraFields):
            if field.name in inherited | self.acted_on:
                continue
            default = {} if field.default is dataclasses.MISSING else field.default
            value = getattr(self, field.name)
            what = f"{field.name} is {value!r}, which is not supported here; leave it at {default!r}"
            if field.name == "arrow_config":
                what += "; create_arrow_model and arrow_experts make one adapter that routes among several"
            require(value == default, self, what, UnsupportedConfig)
