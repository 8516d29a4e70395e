"""What transformers' loader does to the keys of an adapter's file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torchgraft.functional.extending import SHARED as SHARED_LEAVES

from .._config.base import AdapterConfig, config_types
from .._config.keys import PREFIX, split_key


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

    >>> from torchgraft.adapters import LoraConfig
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
            attribute, _ = config.form.place(leaf)
            return f"{path}.{config.form.key(leaf).replace(attribute, f'{attribute}.{adapter_name}', 1)}"
    return key.removeprefix(PREFIX)
