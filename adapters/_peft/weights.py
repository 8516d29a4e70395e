"""An adapter's tensors from its file, by key, and adapters made of them."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import UnsupportedCall
from torchgraft.functional.extending import did_you_mean

from .._config.base import AdapterConfig
from .._config.keys import PREFIX, SHARED, split_key
from .._config.replaced import heads_of, with_heads
from .._files.disk.folder import WEIGHTS, find_folder, open_pair
from .._files.disk.headers import open_weights
from .._files.disk.hub import local_folder
from .._files.load import load_adapter
from .._inplace import (
    IncompatibleKeys,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    restoring,
    set_peft_model_state_dict,
    unwrap,
)


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
        key_mapping: Regular expressions and what to put in the place of what they match in keys, which they see
            without `base_model.model.`; of several the first that matches counts.
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
        renamed = _renamed(key, patterns)
        if renamed in found:
            raise ValueError(f"{model_id}: key_mapping makes two keys one, {renamed!r}, of which {key!r} is the second")
        found[renamed] = tensor if device is None else tensor.to(device)
    return found


def _renamed(key: str, patterns: Mapping[re.Pattern[str], str]) -> str:
    """Return a key as the first pattern that is in it has it; patterns see it without PEFT's prefix."""
    prefix = next((one for one in (PREFIX, SHARED) if key.startswith(one)), "")
    for pattern, replacement in patterns.items():
        renamed, count = pattern.subn(replacement, key.removeprefix(prefix))
        if count:
            return prefix + renamed
    return key


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"key_mapping has {pattern!r}, which is no regular expression: {error}") from error


@dataclasses.dataclass(frozen=True)
class Loading:
    """How an adapter is loaded.

    Attributes:
        name: The adapter's name.
        is_trainable: Whether it is to be trained.
        device: Device of its parameters; `None` for each layer's own.
        key_mapping: What keys are renamed by.
        strict: Whether tensors that are missing, or that belong to nothing, are an error.
        ignore_mismatched_sizes: Whether tensors of another shape are left out.
    """

    name: str
    is_trainable: bool
    device: torch.device | str | None
    key_mapping: Mapping[str, str] | None
    strict: bool = True
    ignore_mismatched_sizes: bool = False


def load_values(
    model: nn.Module, tensors: Mapping[str, Tensor], loading: Loading, source: str | os.PathLike[str]
) -> IncompatibleKeys:
    """Load tensors into an adapter of a model; on an error it is what it was.

    Returns:
        The keys of its tensors that are not among these, and those of these that are not its.

    Raises:
        KeyError: There are such, and `loading.strict`.
    """
    name = loading.name
    before = {
        key: tensor.clone()
        for key, tensor in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items()
    }
    result = set_peft_model_state_dict(model, tensors, name, loading.ignore_mismatched_sizes)
    for what, keys in (("lacks", result.missing_keys), ("has what fits nothing,", result.unexpected_keys)):
        if keys and loading.strict:
            set_peft_model_state_dict(model, before, name)
            raise KeyError(
                f"{source}: for adapter {name!r} it {what} {sorted(keys)[:3]}; is it of this model? strict=False loads "
                "the rest"
            )
        if keys:
            warnings.warn(f"{source}: for adapter {name!r} it {what} {sorted(keys)}", UserWarning, stacklevel=4)
    return result


def put_adapter(
    model: nn.Module, folder: Path, loading: Loading, config: AdapterConfig | None = None, *, activate: bool = True
) -> IncompatibleKeys:
    """Inject an adapter with the values of its file; with keys renamed or another config if these are given.

    Returns:
        The keys that the file lacks, and those that fit nothing.
    """
    name, trained = loading.name, loading.is_trainable
    if config is None and not loading.key_mapping and loading.strict and not loading.ignore_mismatched_sizes:
        load_adapter(model, folder, name, is_trainable=trained, device=loading.device, activate=activate)
        return IncompatibleKeys([], [])
    given = dataclasses.replace(config or AdapterConfig.from_pretrained(folder), inference_mode=not trained)
    tensors = load_peft_weights(folder, loading.device, loading.key_mapping)
    whole = [key for key in tensors if split_key(given, key) is None]
    given = with_heads(given, {part for key in whole for part in key.split(".")}, heads_of(given))
    with restoring(unwrap(model)):
        inject_adapter_in_model(given, model, name, activate=activate)
        return load_values(model, tensors, loading, folder)


WITHOUT_EFFECT = frozenset(
    {"token", "use_auth_token", "local_files_only", "force_download", "proxies", "etag_timeout", "user_agent"}
    | {"repo_type", "device_map", "max_memory", "offload_dir", "offload_folder", "offload_index", "push_to_hub"}
)
"""Arguments of PEFT's about downloads, uploads and offloading, of which there is nothing to do here."""


def check_without_effect(what: str, given: Mapping[str, Any]) -> None:
    """Refuse arguments that are none of PEFT's, and an upload.

    Raises:
        TypeError: Another name.
        UnsupportedCall: `push_to_hub`.
    """
    for name in given:
        if name not in WITHOUT_EFFECT:
            raise TypeError(f"{what} has no argument {name!r}{did_you_mean(name, WITHOUT_EFFECT)}")
    if given.get("push_to_hub"):
        raise UnsupportedCall(f"{what}: push_to_hub is true; nothing is uploaded here: hf upload NAME folder")
