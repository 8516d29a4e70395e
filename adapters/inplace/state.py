"""State dicts of injected adapters and of the model beneath, and the way to the functional style and back."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchgraft.functional import Graft, bind
from torchgraft.functional.extending import (
    Follower,
    Site,
    Tree,
    bare_name,
    is_sharded,
    modules_of,
    offloading,
    resting,
    sort,
    spread,
    state_of,
    store,
    submodule,
    whole,
)

from ..config.base import AdapterConfig
from ..config.keys import PREFIX, SHARED, held_at, join, places, replaced_key
from ..config.messages import names_of
from ..config.targets import exact
from ..config.tokens import LEAF as TOKENS
from ..methods.shared.scalings import check_raw, expressed
from .biases import biases_of, put_bias
from .gathering import fill, is_flat, kept, on_gathered
from .layer import BaseTunerLayer
from .modules_to_save import ModulesToSaveWrapper
from .parameters import ParameterLayer
from .switch import put_in, take_out
from .tokens import TrainableTokensWrapper
from .walk import bare_copy, layers, named, parts, unwrap


class IncompatibleKeys(NamedTuple):
    """Keys that a state dict lacked, and keys that it had and nothing took."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@on_gathered()
def extract_params(model: nn.Module, adapter_name: str = "default") -> Tree:
    """An injected adapter as a parameter tree, which shares storage with the injected parameters.

    Its copies of `modules_to_save` are among the leaves.

    Raises:
        ValueError: A name that the model does not have.

    >>> from torchgraft.adapters import IA3Config, inject_adapter_in_model
    >>> model = inject_adapter_in_model(IA3Config(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> extract_params(model)["0"]["ia3_l"].shape
    torch.Size([2, 1])
    """
    model = unwrap(model)
    config_of(model, adapter_name)
    tree: Tree = {
        path: {
            leaf: kept(parameter)
            for leaf, parameter in layer.numbers(adapter_name).items()
            if leaf not in layer.fixed(adapter_name)
        }
        for path, layer in layers(model).items()
        if _is_source(layer, adapter_name)
    }
    for path, wrapper in named(model, ModulesToSaveWrapper).items():
        for inner, leaves in wrapper.leaves(adapter_name).items():
            tree[f"{path}.{inner}" if inner else path] = {leaf: kept(whole(tensor)) for leaf, tensor in leaves.items()}
    for path, tokens in named(model, TrainableTokensWrapper).items():
        if adapter_name in tokens.token_adapter.trainable_tokens_delta:
            tree.setdefault(path, {})[TOKENS] = kept(whole(tokens.token_adapter.trainable_tokens_delta[adapter_name]))
    for path, bias in _biases(model, adapter_name).items():
        tree.setdefault(path, {})["bias"] = kept(whole(bias))
    return sort(tree)


def _biases(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The base's biases as an adapter has them, by path."""
    biases = biases_of(model)
    if biases is None or biases.adapter != adapter_name:
        return {}
    found = layers(model) if biases.in_place else {}
    merged = {
        path: layer.originals.tensors["bias"] for path, layer in found.items() if "bias" in layer.originals.tensors
    }
    return {path: merged.get(path, tensor) for path, tensor in biases.tensors().items()}


@on_gathered()
def extract_graft(model: nn.Module, adapter_name: str = "default") -> Graft:
    """A graft of the model beneath the adapters, whose tensors it shares, for trees of `extract_params`.

    The buffers of the adapter's own copies of `modules_to_save` are part of that model.

    Raises:
        ValueError: A name that the model does not have; adapters that are merged into these tensors.
    """
    model = unwrap(model)
    config = config_of(model, adapter_name)
    merged = [path for path, layer in layers(model).items() if layer.merged]
    if merged:
        raise ValueError(f"{merged[0]}: adapters are merged into this weight; call unmerge_adapter(model) first")
    if is_flat():
        raise TypeError(
            "the model is wrapped by FullyShardedDataParallel, whose flat parameters no graft can gather; shard it "
            "with torch.distributed.fsdp.fully_shard instead, or call extract_graft before it is wrapped"
        )
    sites = source_sites(model, adapter_name)
    base = bare_copy(model, adapter_name)
    fixed = exact(expressed(config, sites), list(sites), modules_of(base))
    # What was planned may have changed since: scaling factors that were set, fixed tensors that were loaded.
    planned = {
        path: {**layer.entries[adapter_name].site.constants, **_fixed(layer, adapter_name)}
        for path, layer in layers(model).items()
        if path in sites
    }
    vars(fixed)["method"] = dataclasses.replace(config.method, plan=lambda config, sites, weights: planned)
    return bind(base, fixed, allow_unreached=True)


def extract_config(model: nn.Module, adapter_name: str = "default") -> AdapterConfig:
    """The config of an injected adapter as it is now: with the scaling factors that were written to its layers.

    A tree carries none, so this is the config that goes with `extract_params`, and the one that `save_adapter` writes.

    Raises:
        ValueError: A name that the model does not have; factors that no config of the method has.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> model[0].scaling["default"] *= 0.5
    >>> extract_config(model).lora_alpha
    4
    """
    model = unwrap(model)
    config, sites = copy.deepcopy(config_of(model, adapter_name)), source_sites(model, adapter_name)
    check_raw(config, sites)
    return expressed(config, sites)


def source_sites(model: nn.Module, adapter_name: str) -> dict[str, Site]:
    """The sites where an adapter has parameters of its own, by path.

    Raises:
        ValueError: A module that follows one of these with another scaling factor.
    """
    found = layers(model).items()
    entries = {path: layer.entries[adapter_name] for path, layer in found if adapter_name in layer.entries}
    sites = {path: entry.site for path, entry in entries.items() if not isinstance(entry, Follower)}
    for path, entry in entries.items():
        if not isinstance(entry, Follower):
            continue
        given, expected = (one.constants["scaling"] for one in (entry.site, sites[entry.follow.source]))
        if given != expected:
            raise ValueError(
                f"{path}: scaling of adapter {adapter_name!r} is {given}, and {expected} at {entry.follow.source}, to "
                "which it is tied and whose parameters it has; write the same to both"
            )
    return sites


def _is_source(layer: BaseTunerLayer, adapter_name: str) -> bool:
    """Whether an adapter has parameters of its own on a layer."""
    return adapter_name in layer.entries and not isinstance(layer.entries[adapter_name], Follower)


def _fixed(layer: BaseTunerLayer, adapter_name: str) -> dict[str, Tensor]:
    leaves = layer.numbers(adapter_name)
    return {leaf: kept(leaves[leaf]) for leaf in layer.fixed(adapter_name)}


def config_of(model: nn.Module, adapter_name: str) -> AdapterConfig:
    """The config of an injected adapter.

    Raises:
        ValueError: A name that the model does not have.
    """
    configs: Any = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(
            f"the model has no adapter {adapter_name!r}; it has {list(configs) or 'none, inject one first'}"
        )
    return configs[adapter_name]


@on_gathered()
def get_peft_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """The tensors of one adapter under PEFT's keys, without the adapter's name in them.

    The time does not grow with the number of adapters. Tensors share storage with the model's.

    Args:
        model: A model with injected adapters.
        state_dict: The model's state dict, where the tensors are to be taken from there (gathered shards).
        adapter_name: Name of the adapter.

    Raises:
        ValueError: A name that the model does not have.
        KeyError: A tensor of the adapter that `state_dict` lacks.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> list(get_peft_model_state_dict(model))
    ['0.lora_A.weight', '0.lora_B.weight']
    """
    model = unwrap(model)
    config = config_of(model, adapter_name)
    own = _tensors(model, config, adapter_name)
    if state_dict is None:
        state = {saved: kept(_values(model, key, tensor)) for saved, (key, tensor) in own.items()}
    else:
        given = {bare_name(key): tensor for key, tensor in state_dict.items()}
        state = {saved: _given(given, key).detach() for saved, (key, _) in own.items()}
    return state | shared_tensors(model, config, adapter_name)


def shared_tensors(model: nn.Module, config: AdapterConfig, adapter_name: str) -> dict[str, Tensor]:
    """Constants of an adapter that its files hold, by key."""
    if not config.form.saves_shared(config):
        return {}
    entries = (layer.entries[adapter_name] for layer in layers(model).values() if adapter_name in layer.entries)
    constants = next(entries).site.constants
    return {f"{SHARED}{name}": constants[name] for name in config.form.shared}


def _given(state_dict: Mapping[str, Tensor], key: str) -> Tensor:
    found = state_dict.get(key, state_dict.get(f"module.{key}"))
    if found is None:
        raise KeyError(
            f"state_dict lacks {key!r}, expected the state dict of the whole model; it has {names_of(state_dict)}"
        )
    return found


def _values(model: nn.Module, key: str, tensor: Tensor) -> Tensor:
    """A tensor of the model's with the values that it has where it is offloaded."""
    path, _, name = key.rpartition(".")
    return resting(submodule(model, path), name) if tensor.is_meta else tensor


def _tensors(model: nn.Module, config: AdapterConfig, adapter_name: str) -> dict[str, tuple[str, Tensor]]:
    """Each tensor of an adapter by its key in files, with its key in the model."""
    found: dict[str, tuple[str, Tensor]] = {}
    carriers = layers(model)
    mine = {path: layer for path, layer in carriers.items() if adapter_name in layer.entries}
    at = places({path: layer.entries[adapter_name].site for path, layer in mine.items()})
    for path, layer in mine.items():
        for leaf, parameter in layer.leaves(adapter_name).items():
            attribute, name = config.form.place(leaf)
            own = f"{_place(path, carriers)}.{attribute}.{adapter_name}"
            found[join(config, at[path], leaf)] = (own if name is None else f"{own}.{name}", parameter)
    for path, bias in _biases(model, adapter_name).items():
        key = replaced_key(held_at(path, carriers), "bias", path in carriers)
        found[replaced_key(held_at(path, mine), "bias", path in mine)] = (key, bias)
    for path, tokens in named(model, TrainableTokensWrapper).items():
        if adapter_name in tokens.token_adapter.trainable_tokens_delta:
            key = replaced_key(path, TOKENS)
            found[key] = (f"{key}.{adapter_name}", tokens.token_adapter.trainable_tokens_delta[adapter_name])
    for path, wrapper in named(model, ModulesToSaveWrapper).items():
        if adapter_name in wrapper.modules_to_save:
            for name, tensor in wrapper.modules_to_save[adapter_name].state_dict(keep_vars=True).items():
                found[f"{path}.{name}"] = (f"{path}.modules_to_save.{adapter_name}.{name}", tensor)
    return found


@on_gathered(writes=True)
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> IncompatibleKeys:
    """Load the tensors of one adapter, from keys with or without `base_model.model.`; the dict stays as it is.

    Where the adapter is merged, it is merged anew with what was loaded.

    Args:
        model: A model with the adapter injected.
        peft_model_state_dict: Tensors by key, as `get_peft_model_state_dict` gives them.
        adapter_name: Name of the adapter; it may be another than when the tensors were saved.
        ignore_mismatched_sizes: Leave out tensors of another shape, with a warning, instead of refusing all.
        low_cpu_mem_usage: Make the given tensors, cast to the base's device and dtype, the parameters instead of
            copying them; for parameters on the meta device, which are always treated so.

    Returns:
        `(missing_keys, unexpected_keys)`, of this adapter alone; PEFT counts every tensor of the base as missing.

    Raises:
        ValueError: A name that the model does not have; shared tensors that are not those of the injected adapter.
        RuntimeError: Tensors of another shape; names the key and both shapes. Complex ones for real parameters. Or
            something else wrote to the weights while adapters were merged. Nothing has been loaded then.
        TypeError: A value that is no tensor.
    """
    model = unwrap(model)
    config = config_of(model, adapter_name)
    own = _tensors(model, config, adapter_name)
    given = {bare_name(key).removeprefix(PREFIX): t for key, t in peft_model_state_dict.items()}
    for key, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state dict: {key!r} is of type {type(tensor).__name__}, expected a tensor")
    constants = shared_tensors(model, config, adapter_name)
    expected = {key: tensor for key, (_, tensor) in own.items()} | constants | _base_tensors(model, adapter_name)
    lost = [key for key, tensor in expected.items() if key in given and _is_cut(given[key], tensor)]
    if lost:
        raise RuntimeError(
            f"state dict: {lost[0]!r} is complex, {given[lost[0]].dtype}, and its place in adapter {adapter_name!r} "
            f"is {expected[lost[0]].dtype}, which has no imaginary part; nothing was loaded. Inject into a complex "
            "model, or give real tensors"
        )
    wrong = {
        key: f"{key!r} has shape {tuple(given[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in given and given[key].shape != tensor.shape
    }
    if wrong and not ignore_mismatched_sizes:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise RuntimeError(
            f"state dict does not fit adapter {adapter_name!r}: {next(iter(wrong.values()))}{more}; nothing was "
            "loaded. Inject the adapter with the config it was saved with, or pass ignore_mismatched_sizes=True"
        )
    if wrong:
        warnings.warn(f"tensors of another shape were left out: {'; '.join(wrong.values())}", UserWarning, stacklevel=2)
    found = layers(model)
    merged = [(part, list(part.merged_adapters)) for part in parts(model)]
    take_out(part for part, _ in merged)
    bases = {_place(path, found): _like(layer) for path, layer in found.items()}
    adapted = [path for path, layer in found.items() if adapter_name in layer.entries]
    biases = {
        replaced_key(held_at(path, adapted), "bias", path in adapted): path for path in _biases(model, adapter_name)
    }
    for key in [key for key in expected if key in given and key not in wrong]:
        if key in own:
            if key in biases:
                put_bias(model, biases[key], given[key])
            else:
                _put(model, own[key][0], given[key], low_cpu_mem_usage, bases)
        elif key in constants:
            _put_shared(model, adapter_name, key.removeprefix(SHARED), given[key])
        else:
            _put_base(model, key, given[key])
    put_in(merged)
    missing = [key for key in (*own, *constants) if key not in given]
    return IncompatibleKeys(missing, [key for key in given if key not in expected])


def _is_cut(value: Tensor, place: Tensor) -> bool:
    """Return whether a value would lose its imaginary part."""
    return value.is_complex() and not place.is_complex()


def _base_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Tensors of the base that PEFT's files may hold beside an adapter: those of targeted embeddings."""
    return {
        f"{path}.base_layer.{layer.entries[adapter_name].site.weight_names[0]}": _like(layer)
        for path, layer in layers(model).items()
        if adapter_name in layer.entries and layer.entries[adapter_name].site.kind == "embedding"
    }


def _like(layer: BaseTunerLayer) -> Tensor:
    """A tensor of the device and dtype that adapters on a layer go by."""
    return next(iter(layer.entries.values())).site.like(layer.get_base_layer())


def _place(path: str, carriers: Mapping[str, BaseTunerLayer]) -> str:
    """Where the layer of this name hangs in the model."""
    layer = carriers[path]
    return layer.place(path) if isinstance(layer, ParameterLayer) else held_at(path, carriers)


def _put(model: nn.Module, key: str, value: Tensor, assign: bool, bases: Mapping[str, Tensor]) -> None:
    """Copy into a tensor of the model, or take its place with the device and dtype of the base."""
    path, _, name = key.rpartition(".")
    owner = submodule(model, path)
    old: Any = getattr(owner, name)
    offloaded = old.is_meta and next(offloading(owner), None) is not None
    if offloaded or is_sharded(old) or not (assign or old.is_meta):
        fill(owner, name, value)
        return
    base = next((bases[at] for at in (path.rsplit(".", n)[0] for n in (1, 2)) if at in bases), None)
    like = old if base is None else base
    numbers = like.is_floating_point() or like.is_complex()
    new = value.detach().to(like.device, like.dtype if numbers else old.dtype)
    setattr(owner, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _laid_out(own: Any, value: Tensor) -> Tensor:
    """A tensor sharded as the model's own is."""
    if not is_sharded(own) or is_sharded(value) or own.shape != value.shape:
        return value
    return spread(value.to(own.device), own.device_mesh, own.placements)


def _put_shared(model: nn.Module, adapter_name: str, name: str, value: Tensor) -> None:
    """Use other shared constants than those that were drawn, in all layers."""
    mine = [layer for layer in layers(model).values() if adapter_name in layer.entries]
    if torch.equal(mine[0].entries[adapter_name].site.constants[name].to(value), value):
        return
    constants = {name: value.detach()}  # one tensor, which the layers go on sharing
    for layer in mine:
        layer.set_constants(adapter_name, constants)


def _put_base(model: nn.Module, key: str, value: Tensor) -> None:
    path, _, name = key.rpartition(".")
    owner = submodule(model, path)
    weight = whole(resting(owner, name))
    if not torch.equal(weight, whole(value).to(weight.device, weight.dtype)):
        warnings.warn(
            f"{key} of the base was replaced by the one that came with the adapter", UserWarning, stacklevel=3
        )
        fill(owner, name, value)


@on_gathered()
def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model as it is without adapters: its original keys and, also while merged, its own tensors.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> list(get_base_model_state_dict(model))
    ['0.weight', '0.bias']
    """
    model = unwrap(model)
    original = {
        f"{path}.{leaf}" if path else leaf: tensor
        for path, layer in ((_owner(path, layer), layer) for path, layer in layers(model).items())
        for leaf, tensor in layer.originals.tensors.items()
    }
    for path, tokens in named(model, TrainableTokensWrapper).items():
        original |= {f"{path}.{leaf}": tensor for leaf, tensor in tokens.originals.items()}
    if (biases := biases_of(model)) is not None and biases.in_place:
        original |= {f"{path}.bias": tensor for path, tensor in biases.originals().items()}
    return {name: kept(original.get(name, tensor)) for name, tensor in state_of(bare_copy(model)).items()}


def _owner(path: str, layer: BaseTunerLayer) -> str:
    """The name of the module that a layer wraps."""
    return path.rpartition(".")[0] if isinstance(layer, ParameterLayer) else path


@on_gathered(writes=True)
def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> IncompatibleKeys:
    """Load a state dict with the original keys into the model beneath the adapters.

    Args:
        model: A model with injected adapters.
        state_dict: Tensors by the keys that the model has without adapters.
        strict: Whether missing and unexpected keys are errors.

    Raises:
        RuntimeError: Keys or shapes that do not fit; adapters that are merged into the weights.
    """
    model = unwrap(model)
    merged = [path for path, layer in layers(model).items() if layer.merged]
    if merged:
        raise RuntimeError(f"{merged[0]}: adapters are merged into this weight; call unmerge_adapter(model) first")
    bare = bare_copy(model)
    own = bare.state_dict(keep_vars=True)
    given = {name: _laid_out(own.get(name), tensor) for name, tensor in state_dict.items()}
    result = bare.load_state_dict(given, strict=strict)
    modules = modules_of(bare)
    for name in (name for name, tensor in own.items() if tensor.is_meta and name in given):
        path, _, leaf = name.rpartition(".")
        if next(offloading(modules[path]), None) is not None:
            store(modules[path], leaf, given[name])
    return IncompatibleKeys(list(result.missing_keys), list(result.unexpected_keys))
