"""An adapter's tensors from its file, by key, and adapters made of them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .._config.base import AdapterConfig
from .._files.disk.folder import WEIGHTS, find_folder, open_pair
from .._files.disk.headers import open_weights
from .._files.load import load_adapter
from .._inplace import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from .._inplace.injection.restoring import restoring
from .._inplace.states.base_state import IncompatibleKeys
from .._inplace.walk import unwrap
from .hub import local_folder


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: torch.device | str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Tensor]:
    """Read an adapter's tensors; safetensors only, never a pickle.

    Args:
        model_id: The directory, or the name of a repository in the Hub's local cache.
        device: Where the tensors go; by default the CPU.
        key_mapping: Regular expressions and what to put in the place of what they match in keys.
        subfolder: The directory's subdirectory.
        revision: The repository's branch or commit.
        cache_dir: The Hub's cache.

    Returns:
        Tensors by key, as the file has them: `base_model.model.layers.0.lora_A.weight`.

    Raises:
        FileNotFoundError: No such directory, or one without weights.
        ValueError: A damaged file; a pattern that is no regular expression, or two keys that `key_mapping` makes one.
    """
    patterns = {_compiled(pattern): replacement for pattern, replacement in (key_mapping or {}).items()}
    with open_pair(find_folder(local_folder(model_id, subfolder, revision, cache_dir), "default")) as (file, _, handle):
        tensors = open_weights(handle, file.parent / WEIGHTS).read()
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        renamed = key
        for pattern, replacement in patterns.items():
            renamed, count = pattern.subn(replacement, renamed)
            if count:
                break
        if renamed in found:
            raise ValueError(f"{model_id}: key_mapping makes two keys one, {renamed!r}, of which {key!r} is the second")
        found[renamed] = tensor if device is None else tensor.to(device)
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"key_mapping has {pattern!r}, which is no regular expression: {error}") from error


def load_values(
    model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str, source: str | os.PathLike[str]
) -> IncompatibleKeys:
    """Load tensors into an adapter of a model; on an error it is what it was.

    Raises:
        KeyError: Tensors of the adapter that are not among these, or the reverse.
    """
    before = {
        key: tensor.clone() for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items()
    }
    result = set_peft_model_state_dict(model, tensors, adapter_name)
    for what, keys in (("lacks", result.missing_keys), ("has what fits nothing,", result.unexpected_keys)):
        if keys:
            set_peft_model_state_dict(model, before, adapter_name)
            raise KeyError(f"{source}: for adapter {adapter_name!r} it {what} {sorted(keys)[:3]}; is it of this model?")
    return result


def put_adapter(
    model: nn.Module,
    folder: Path,
    adapter_name: str,
    is_trainable: bool,
    device: torch.device | str | None,
    key_mapping: Mapping[str, str] | None,
    config: AdapterConfig | None = None,
    *,
    activate: bool = True,
) -> None:
    """Inject an adapter with the values of its file; with keys renamed or another config if these are given."""
    if config is None and not key_mapping:
        load_adapter(model, folder, adapter_name, is_trainable=is_trainable, device=device, activate=activate)
        return
    given = dataclasses.replace(config or AdapterConfig.from_pretrained(folder), inference_mode=not is_trainable)
    tensors = load_peft_weights(folder, device, key_mapping)
    with restoring(unwrap(model)):
        inject_adapter_in_model(given, model, adapter_name, activate=activate)
        load_values(model, tensors, adapter_name, folder)
