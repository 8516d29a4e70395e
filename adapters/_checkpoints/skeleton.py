"""The modules of a model that an adapter is on, without values, told from names and shapes of files alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import register_layer

from .._config.base import AdapterConfig
from .folder import ModelFolder

Found = Mapping[str, Mapping[str, Tensor]]
"""The leaves of an adapter's file at each place, without values."""

_EMBEDDING = re.compile(r"embed|^(wte|wpe|shared)$")


class Transposed(nn.Module):
    """A linear layer whose weight is `"in out"`, as GPT-2's are."""

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs, device="meta"))
        self.bias = nn.Parameter(torch.empty(outputs, device="meta")) if bias else None


register_layer(Transposed, "linear", transposed=True)


def skeleton_of(base: ModelFolder, config: AdapterConfig, found: Found) -> tuple[nn.Module, AdapterConfig]:
    """Return a model of the adapted modules alone, and the config that means these by their whole names.

    Args:
        base: The model's files.
        config: The adapter's config.
        found: The places that the adapter's file has leaves for.

    Raises:
        KeyError: A place that the model's files do not have.
        ValueError: A weight that is no number of floating point.
    """
    root = nn.Module()
    modules, parameters = [], []
    for place in found:
        if f"{place}.weight" in base.shard_of:
            _put(root, place, _module(base, config, place, found[place]))
            modules.append(place)
    for name in _targeted_parameters(base, config):
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(torch.empty(base.spec(name).shape, dtype=_dtype(base, name), device="meta"))
        _put(root, owner, None).register_parameter(leaf, parameter)
        parameters.append(name)
    _check_places(base, found, modules, parameters)
    fields: dict[str, Any] = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    fields |= {"modules_to_save": None, "bias": "none", "target_modules": modules}
    known = {field.name for field in dataclasses.fields(config)}
    fields |= {"target_parameters": parameters or None, "trainable_token_indices": None}
    return root, dataclasses.replace(config, **{name: value for name, value in fields.items() if name in known})


def _targeted_parameters(base: ModelFolder, config: AdapterConfig) -> list[str]:
    targets = getattr(config, "target_parameters", None) or ()
    return [name for name in base.shard_of if any(name == one or name.endswith(f".{one}") for one in targets)]


def _check_places(base: ModelFolder, found: Found, modules: list[str], parameters: list[str]) -> None:
    """Refuse places that the base does not have."""
    owners = {name.rpartition(".")[0] for name in parameters}
    for place in found:
        owner = place
        while owner not in owners and owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
        if place != "*" and place not in modules and owner not in owners:
            base.spec(f"{place}.weight")  # raises, and names what is near


def _module(base: ModelFolder, config: AdapterConfig, place: str, leaves: Mapping[str, Tensor]) -> nn.Module:
    """Return a module like the base's at a place."""
    shape, dtype = base.spec(f"{place}.weight").shape, _dtype(base, f"{place}.weight")
    bias = f"{place}.bias" in base.shard_of
    how: dict[str, Any] = {"device": "meta", "dtype": dtype}
    if any("embedding" in leaf for leaf in leaves) or (_EMBEDDING.search(place.rpartition(".")[2]) and not bias):
        return nn.Embedding(*shape, **how)
    if len(shape) == 2:
        if _is_transposed(config, shape, leaves):
            return Transposed(*shape, bias).to(dtype)
        return nn.Linear(shape[1], shape[0], bias=bias, **how)
    if len(shape) in (3, 4, 5):
        groups = next((leaf.shape[1] // shape[1] for name, leaf in leaves.items() if name == "lora_A"), 1)
        conv = getattr(nn, f"Conv{len(shape) - 2}d")
        result: nn.Module = conv(shape[1] * groups, shape[0], shape[2:], groups=groups, bias=bias, **how)
        return result
    raise ValueError(f"{base.path}: {place}.weight has shape {shape}, which no adapted layer has")


def _is_transposed(config: AdapterConfig, shape: tuple[int, ...], leaves: Mapping[str, Tensor]) -> bool:
    """Tell from the size of `A` whether a weight is `"in out"`; from the config where that does not tell."""
    if "lora_A" in leaves and shape[0] != shape[1]:
        return leaves["lora_A"].shape[1] == shape[0]
    return config.fan_in_fan_out


def _dtype(base: ModelFolder, name: str) -> torch.dtype:
    dtype = base.spec(name).dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"{base.path}: {name!r} is of dtype {dtype}, quantised; merge into the model before quantisation, or "
            "dequantise it first"
        )
    return dtype


def _put(root: nn.Module, path: str, module: nn.Module | None) -> nn.Module:
    """Put a module at a path, with modules around it; without one, return the one that is there."""
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    if module is not None or not hasattr(root, last):
        root.add_module(last, module or nn.Module())
    result: nn.Module = getattr(root, last)
    return result
