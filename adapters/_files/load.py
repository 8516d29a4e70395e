"""Adapters read from the files that `save_adapter` or PEFT wrote."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from torchgraft.functional import Graft

from .._config.base import AdapterConfig
from .._inplace.tensors.gathering import check_averaged, gathered
from .._inplace.walk import unwrap
from .disk.config_file import about, parse_fields
from .disk.folder import WEIGHTS, find_folder, open_pair
from .disk.headers import open_weights
from .into_graft import load_into_graft
from .into_model import load_into_model
from .packed import unpacked
from .stored import Stored, check_target


def load_adapter(
    target: nn.Module | Graft,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    check_finite: bool = False,
    is_trainable: bool = False,
    activate: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Read an adapter from a directory that `save_adapter` or PEFT wrote.

    A model gets the adapter injected, as its active one. For a graft, which has a config already, the files give the
    parameters, and their config has to mean the same as the graft's.

    Only JSON and safetensors are read, never a pickle, and nothing is downloaded. Config, keys, shapes and dtypes are
    held against the model before any tensor is read; on any error the model is what it was. Several threads can load
    into several models at once. Of a model that is sharded, all processes take part, and each reads the files.

    Args:
        target: A model, or a graft.
        path: The directory. If it has a subdirectory of the adapter's name with an adapter in it, that is read.
        adapter_name: Name for the adapter, which may have been saved under another one; of a graft with named adapters,
            the one to load.
        check_finite: Refuse NaN and infinite values.
        is_trainable: Whether the injected adapter is to be trained; of no effect for a graft.
        activate: Whether the injected adapter becomes the active one; if not, it is frozen; of no effect for a graft.
        dtype: Dtype of the parameters. By default that of the base in a model, as `inject_adapter_in_model` has it; for
            a graft float32, or the base's where that is wider, as `Graft.init` has it.
        device: Device of the parameters; by default each site's own.

    Returns:
        The model, or the adapter's tree for the graft.

    Raises:
        FileNotFoundError, NotADirectoryError: No such directory or file; a file in the place of the directory.
        ValueError: Files that are damaged, that contradict each other, the model or the graft, or that lead out of the
            directory; a name that is taken.
        KeyError: Tensors that are missing, or that belong to nothing in the model.
        TypeError: A target that is neither a model nor a graft, or a path that is none; the graft of a stack.

    >>> import tempfile
    >>> from torchgraft.adapters import LoraConfig, save_adapter
    >>> from torchgraft.functional import bind
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> graft = bind(model, LoraConfig(target_modules=["0"]))
    >>> params = graft.init()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_adapter(graft, folder, params=params)
    ...     loaded = load_adapter(graft, folder)
    ...     model = load_adapter(model, folder)
    >>> torch.equal(loaded["0"]["lora_A"], params["0"]["lora_A"]), model[0].active_adapters
    (True, ['default'])
    """
    check_target(target, path, "load_adapter(model, path)")
    model = target if isinstance(target, Graft) else unwrap(target)
    with open_pair(find_folder(path, adapter_name)) as (config_file, data, handle):
        fields = parse_fields(config_file, data)
        with about(config_file):
            config = AdapterConfig.from_dict(fields)
        weights_file = config_file.parent / WEIGHTS
        with about(weights_file):
            weights = unpacked(config, open_weights(handle, weights_file))
            stored = Stored(config, weights, check_finite, dtype, device)
        with about(config_file), gathered(target, writes=True):
            if isinstance(model, Graft):
                return load_into_graft(model, stored, adapter_name)
            check_averaged(target, is_trainable and activate)
            load_into_model(model, stored, adapter_name, is_trainable, activate)
            return target
