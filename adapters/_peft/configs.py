"""PEFT's names for configs of any method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._config.base import AdapterConfig

PeftConfig = AdapterConfig
"""PEFT's name of what all configs share."""


def get_peft_config(config_dict: Mapping[str, Any]) -> AdapterConfig:
    """Make a config of its fields: PEFT's name of `AdapterConfig.from_dict`.

    Raises:
        ValueError, TypeError: As `AdapterConfig.from_dict`.

    >>> from torchgraft.adapters import LoraConfig
    >>> get_peft_config({"peft_type": "LORA", "r": 4}).r
    4
    """
    return AdapterConfig.from_dict(config_dict)
