"""PEFT's names of the methods."""

from __future__ import annotations

import enum


class PeftType(enum.StrEnum):
    """Names of the methods, as `peft_type` in `adapter_config.json`.

    >>> PeftType.LORA == "LORA", PeftType("IA3").value
    (True, 'IA3')
    """

    ADALORA = "ADALORA"
    IA3 = "IA3"
    LORA = "LORA"
    OFT = "OFT"
    VERA = "VERA"
