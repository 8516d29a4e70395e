"""The modules of a model that an adapter is on, without values, told from names and shapes of files alone."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import register_layer
from torchgraft.functional.extending import SHARED

from .._config.base import AdapterConfig
from .._config.patterns import fullmatch
from .folder import ModelFolder

Found = Mapping[str, Mapping[str, Tensor]]
"""The leaves of an adapter's file at each place, without values."""

Orientations = Mapping[str, set[bool]]

_USUAL = ["gate_up_proj", "down_proj"]
"""The order of the parameters of transformers' experts."""

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
        ValueError: A weight that is no number of floating point, or of which names and shapes do not tell enough.
    """
    root = nn.Module()
    parameters = _targeted_parameters(base, config, found)
    for name in parameters:
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(torch.empty(base.spec(name).shape, dtype=_dtype(base, name), device="meta"))
        _put(root, owner, None).register_parameter(leaf, parameter)
    owners = {name.rpartition(".")[0] for name in parameters}
    modules = [place for place in found if place != SHARED and _outside(place) not in owners]
    orientation = _orientations(base, found, modules)
    for place in modules:
        _put(root, place, _module(base, config, place, found[place], orientation))
    return root, _renamed(config, modules, parameters)


def _outside(place: str) -> str:
    """Return the module that layers around its parameters are around."""
    return re.sub(r"(\.base_layer)+$", "", place)


def _renamed(config: AdapterConfig, modules: list[str], parameters: list[str]) -> AdapterConfig:
    """Return a config that means these modules and parameters by their whole names, and nothing else."""
    fields: dict[str, Any] = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    fields |= {"modules_to_save": None, "bias": "none", "trainable_token_indices": None}
    fields |= {"target_modules": modules, "target_parameters": parameters or None}
    inputs = getattr(config, "feedforward_modules", None)
    if inputs is not None:
        fields["feedforward_modules"] = [path for path in modules if _means(inputs, path)]
    known = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: value for name, value in fields.items() if name in known})


def _means(names: Any, path: str) -> bool:
    if isinstance(names, str):
        return fullmatch(names, path)
    return any(path == name or path.endswith(f".{name}") for name in names)


def _targeted_parameters(base: ModelFolder, config: AdapterConfig, found: Found) -> list[str]:
    """Return the parameters that an adapter is on, those of a module in the order in which the module has them.

    Their places say it: the layers around a module's parameters are nested, the last parameter's outermost, and each
    fits a parameter by its sizes.

    Raises:
        ValueError: Parameters of a module that can be told apart in more than one way, or in none.
    """
    targets = getattr(config, "target_parameters", None) or ()
    names = [name for name in base.tensors.specs if any(name == one or name.endswith(f".{one}") for one in targets)]
    ordered: list[str] = []
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        own = sorted(name for name in names if name.rpartition(".")[0] == owner)
        places = [owner + ".base_layer" * depth for depth in reversed(range(len(own)))]
        fits = [
            one
            for one in itertools.permutations(own)
            if all(map(_fits, [base] * len(own), one, map(found.get, places)))
        ]
        usual = [one for one in fits if [name.rpartition(".")[2] for name in one] == _USUAL]
        if len(fits) != 1 and len(usual) != 1:
            raise ValueError(
                f"{owner}: the sizes of its adapted parameters {own} fit the file in {len(fits)} orders, so which "
                "factors are whose is not told; load the model, and use merge(graft, params)"
            )
        ordered += (usual or fits)[0]
    return ordered


def _fits(base: ModelFolder, name: str, leaves: Mapping[str, Tensor] | None) -> bool:
    """Return whether factors have the sizes of a parameter, either way round."""
    if leaves is None or not {"lora_A", "lora_B"} <= leaves.keys():
        return False
    return sorted((leaves["lora_A"].shape[1], leaves["lora_B"].shape[0])) == sorted(base.spec(name).shape[-2:])


def _module(
    base: ModelFolder, config: AdapterConfig, place: str, leaves: Mapping[str, Tensor], orientation: Orientations
) -> nn.Module:
    """Return a module like the base's at a place."""
    shape, dtype = base.spec(f"{place}.weight").shape, _dtype(base, f"{place}.weight")
    bias = f"{place}.bias" in base
    how: dict[str, Any] = {"device": "meta", "dtype": dtype}
    if any("embedding" in leaf for leaf in leaves) or (is_embedding(f"{place}.weight") and not bias):
        return nn.Embedding(shape[0], shape[1], **how)
    if len(shape) == 2:
        if _is_transposed(config, place, shape, leaves, orientation):
            return Transposed(*shape, bias).to(dtype)
        return nn.Linear(shape[1], shape[0], bias=bias, **how)
    if len(shape) in (3, 4, 5):
        groups = next((leaf.shape[1] // shape[1] for name, leaf in leaves.items() if name == "lora_A"), 1)
        conv = getattr(nn, f"Conv{len(shape) - 2}d")
        result: nn.Module = conv(shape[1] * groups, shape[0], shape[2:], groups=groups, bias=bias, **how)
        return result
    raise ValueError(f"{base.path}: {place}.weight has shape {shape}, which no adapted layer has")


def is_embedding(name: str) -> bool:
    """Return whether a weight is an embedding's, by the name of its module.

    >>> is_embedding("model.embed_tokens.weight"), is_embedding("model.layers.0.mlp.up_proj.weight")
    (True, False)
    """
    return name.endswith(".weight") and bool(_EMBEDDING.search(_last(name.removesuffix(".weight"))))


def _last(place: str) -> str:
    return place.rpartition(".")[2]


def _orientations(base: ModelFolder, found: Found, modules: list[str]) -> Orientations:
    """Return how weights that are not square are stored, by the last name of their modules: `True` for `"in out"`."""
    known: dict[str, set[bool]] = {}
    for place in modules:
        shape = base.spec(f"{place}.weight").shape
        if "lora_A" in found[place] and len(shape) == 2 and shape[0] != shape[1]:
            known.setdefault(_last(place), set()).add(found[place]["lora_A"].shape[1] == shape[0])
    return known


def _is_transposed(
    config: AdapterConfig, place: str, shape: tuple[int, ...], leaves: Mapping[str, Tensor], orientation: Orientations
) -> bool:
    """Tell how a weight is stored: by the size of `A`, of a square one as others of the name, or all others, are.

    Raises:
        ValueError: A square weight of which nothing tells.
    """
    if "lora_A" in leaves and shape[0] != shape[1]:
        return leaves["lora_A"].shape[1] == shape[0]
    seen = orientation.get(_last(place)) or set().union(*orientation.values()) or {config.fan_in_fan_out}
    if len(seen) > 1:
        raise ValueError(
            f"{place}: its weight is square, and the adapter is on layers that store 'out in' and on layers that store "
            "'in out' (GPT-2's), so its orientation is not told; load the model, and use merge(graft, params)"
        )
    return next(iter(seen))


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
