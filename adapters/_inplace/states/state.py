"""State dicts of injected adapters, under PEFT's keys."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional.extending import (
    bare_name,
    given_type,
    is_computed,
    is_sharded,
    offloading,
    resting,
    submodule,
)

from ..._config.keys import PREFIX, SHARED, held_at
from ..._config.messages import names_of
from ..layer.tuner_layer import BaseTunerLayer
from ..placed import Layout, Slot
from ..switch import put_in, take_out
from ..tensors.gathering import fill, kept, on_gathered
from ..walk import bare_modules, is_wrapped, layers, parts, unwrap
from .base_state import IncompatibleKeys
from .embeddings import BaseEmbedding, Choice, put_base, replaceable, saved_embeddings
from .layouts import layout_of, shared_keys, shared_tensors, slots_of


@on_gathered()
def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: Choice = "auto",
) -> dict[str, Tensor]:
    """Return the tensors of one adapter under PEFT's keys, without the adapter's name in them.

    The time does not grow with the number of adapters. Tensors share storage with the model's.

    Args:
        model: A model with injected adapters. Of a `PeftModel` keys begin with `base_model.model.`, as in PEFT.
        state_dict: The model's state dict, where the tensors are to be taken from there (gathered shards).
        adapter_name: Name of the adapter.
        unwrap_compiled: Has no effect: compiled models are always looked through.
        save_embedding_layers: Whether the base's input and output embeddings are among the tensors: `True`, `False` or,
            with a warning, `"auto"`, where the adapter is on one (`embed_tokens`, `lm_head`) or the vocabulary of a
            transformers' model was resized.

    Raises:
        ValueError: A name that the model does not have.
        KeyError: A tensor of the adapter that `state_dict` lacks.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> list(get_peft_model_state_dict(model))
    ['0.lora_A.weight', '0.lora_B.weight']
    """
    prefix, model = PREFIX if is_wrapped(model) else "", unwrap(model)
    layout = layout_of(model, adapter_name)
    slots = slots_of(model, layout)
    saved = saved_embeddings(model, layout, save_embedding_layers)
    if state_dict is None:
        base = {one.key: kept(one.values) for one in saved}
        state = {key: kept(_values(model, slot.key, slot.tensor)) for key, slot in slots.items()}
    else:
        given = {bare_name(key).removeprefix(prefix): tensor for key, tensor in state_dict.items()}
        state = {key: _given(given, slot, model).detach() for key, slot in slots.items()}
        base = {one.key: _given(given, Slot(one.key, one.own), model).detach() for one in saved}
    state = layout.config.form.pack(layout.config, state)
    shared = shared_keys(model, adapter_name) if prefix else ()
    named = {key if key in shared else f"{prefix}{key}": tensor for key, tensor in (base | state).items()}
    return named | shared_tensors(model, layout.config, adapter_name)


def _given(state_dict: Mapping[str, Tensor], slot: Slot, model: nn.Module) -> Tensor:
    found = state_dict.get(slot.key, state_dict.get(f"module.{slot.key}"))
    if found is None:  # what layers share may be there under one of its names
        names = (bare_name(name) for name, one in model.named_parameters(remove_duplicate=False) if one is slot.tensor)
        found = next((state_dict[name] for name in names if name in state_dict), None)
    if found is None:
        raise KeyError(
            f"state_dict lacks {slot.key!r}, expected the state dict of the whole model; it has {names_of(state_dict)}"
        )
    return found


def _values(model: nn.Module, key: str, tensor: Tensor) -> Tensor:
    """Return a tensor of the model's with the values that it has where it is offloaded."""
    path, _, name = key.rpartition(".")
    return resting(submodule(model, path), name) if tensor.is_meta else tensor


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
        ValueError: A name that the model does not have; shared tensors that are not those of the injected adapter;
            copies of a parameter that layers have in common which differ; a parameter that is computed from others.
        RuntimeError: Tensors of another shape; names the key and both shapes. Complex ones for real parameters. Or
            something else wrote to the weights while adapters were merged. Nothing has been loaded then.
        TypeError: A value that is no tensor.
    """
    model = unwrap(model)
    layout = layout_of(model, adapter_name)
    slots, constants = slots_of(model, layout), shared_tensors(model, layout.config, adapter_name)
    bases = {one.key: one for one in replaceable(model, layout)}
    given = layout.config.form.unpack(layout.config, _named_as_in_files(peft_model_state_dict))
    expected = {key: one.tensor for key, one in bases.items()} | {key: slot.tensor for key, slot in slots.items()}
    expected |= constants
    _check_numbers(given, expected, adapter_name)
    _check_copies(given, slots, adapter_name)
    _check_held(model, slots, given, adapter_name)
    wrong = _misshapen(given, expected)
    if wrong and not ignore_mismatched_sizes:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise RuntimeError(
            f"state dict does not fit adapter {adapter_name!r}: {next(iter(wrong.values()))}{more}; nothing was "
            "loaded. Inject the adapter with the config it was saved with, or pass ignore_mismatched_sizes=True"
        )
    if wrong:
        warnings.warn(f"tensors of another shape were left out: {'; '.join(wrong.values())}", UserWarning, stacklevel=2)
    merged = [(part, list(part.merged_adapters)) for part in parts(model)]
    take_out(part for part, _ in merged)
    fitting = {key: given[key] for key in expected if key in given and key not in wrong}
    _load(model, layout, slots, bases, fitting, low_cpu_mem_usage)
    put_in(merged)
    missing = [key for key in (*slots, *constants) if key not in given]
    unexpected = [key for key in given if key not in expected]
    _warn_of_biases(model, unexpected, layout)
    return IncompatibleKeys(missing, unexpected)


def _warn_of_biases(model: nn.Module, unexpected: list[str], layout: Layout) -> None:
    """Name biases of the base that the adapter's config does not train: PEFT would write them into the base."""
    bare = {f"{held_at(path, layout.places)}.bias" for path in bare_modules(model)}
    found = [key for key in unexpected if key.replace(".base_layer.", ".") in bare]
    if found:
        warnings.warn(
            f"the state dict has {found[:3]} ({len(found)} in all), biases of the base that came with the adapter it "
            f"was taken from, and adapter {layout.adapter!r} trains none, so they were left out, and outputs are "
            f"others than there; inject the adapter with that one's config (bias is {layout.config.bias!r} here)",
            UserWarning,
            stacklevel=4,
        )


def _named_as_in_files(state_dict: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict by the keys of files, without PEFT's prefix."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict is {given_type(state_dict)}, expected a dict of tensors by key; load_adapter(model, path) "
            "reads an adapter's files"
        )
    given = {bare_name(key).removeprefix(PREFIX): tensor for key, tensor in state_dict.items()}
    for key, tensor in given.items():
        if not isinstance(tensor, Tensor):
            hint = "; a tree is put in by inject_adapter_in_model(config, model, params=tree)"
            raise TypeError(
                f"state dict: {key!r} is {given_type(tensor)}, expected a tensor"
                + (hint if isinstance(tensor, Mapping) else "")
            )
    return given


def _check_numbers(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], adapter_name: str) -> None:
    """Refuse values that would lose their imaginary part."""
    for key, tensor in expected.items():
        if key in given and given[key].is_complex() and not tensor.is_complex():
            raise RuntimeError(
                f"state dict: {key!r} is complex, {given[key].dtype}, and its place in adapter {adapter_name!r} "
                f"is {tensor.dtype}, which has no imaginary part; nothing was loaded. Inject into a complex "
                "model, or give real tensors"
            )


def _check_copies(given: Mapping[str, Tensor], slots: Mapping[str, Slot], adapter_name: str) -> None:
    """Refuse different values for a parameter that has several keys."""
    first: dict[int, str] = {}
    for key in (key for key in slots if key in given):
        other = first.setdefault(id(slots[key].tensor), key)
        if other != key and not given[key].equal(given[other]):
            raise ValueError(
                f"state dict: {key!r} differs from {other!r}, and the two are one parameter of adapter "
                f"{adapter_name!r}, which these layers have in common; nothing was loaded. Inject the adapter with the "
                "config it was saved with"
            )


def _misshapen(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """Say of each tensor of another shape what it has and what was expected, by key."""
    return {
        key: f"{key!r} has shape {tuple(given[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in given and given[key].shape != tensor.shape
    }


def _check_held(model: nn.Module, slots: Mapping[str, Slot], given: Mapping[str, Any], adapter_name: str) -> None:
    """Refuse values for parameters that the model computes from others, in which they would be lost."""
    for key, slot in slots.items():
        path, _, name = slot.key.rpartition(".")
        if key in given and slot.put is None and is_computed(submodule(model, path), name):
            raise ValueError(
                f"{slot.key} of adapter {adapter_name!r} is computed (a parametrization, pruning or a norm), so no "
                "value can be loaded into it; nothing was loaded. Remove what computes it first "
                "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove), or leave its key out"
            )


def _load(
    model: nn.Module,
    layout: Layout,
    slots: Mapping[str, Slot],
    bases: Mapping[str, BaseEmbedding],
    values: Mapping[str, Tensor],
    assign: bool,
) -> None:
    """Load values, by their keys in files, into a model of which nothing is merged."""
    likes = {layer.place_in_model(path, layout.carriers): _like(layer) for path, layer in layers(model).items()}
    shared = shared_tensors(model, layout.config, layout.adapter)
    for key, value in values.items():
        slot = slots.get(key)
        if slot is None and key in shared:
            _put_shared(model, layout.adapter, key.removeprefix(SHARED), shared[key], value)
        elif slot is None:
            put_base(bases[key], value)
        elif slot.put is None:
            _put(model, slot.key, value, assign, likes)
        else:
            slot.put(value)


def _like(layer: BaseTunerLayer) -> Tensor:
    """Return a tensor of the device and dtype that adapters on a layer go by."""
    return next(iter(layer.entries.values())).site.like(layer.get_base_layer())


def _put(model: nn.Module, key: str, value: Tensor, assign: bool, likes: Mapping[str, Tensor]) -> None:
    """Copy into a tensor of the model, or take its place with the device and dtype of the base."""
    path, _, name = key.rpartition(".")
    owner = submodule(model, path)
    old: Any = getattr(owner, name)
    offloaded = old.is_meta and next(offloading(owner), None) is not None
    if offloaded or is_sharded(old) or not (assign or old.is_meta):
        fill(owner, name, value)
        return
    base = next((likes[at] for at in (path.rsplit(".", n)[0] for n in (1, 2)) if at in likes), None)
    like = old if base is None else base
    numbers = all(one.is_floating_point() or one.is_complex() for one in (like, old))
    new = value.detach().to(like.device, like.dtype if numbers else old.dtype)
    setattr(owner, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _put_shared(model: nn.Module, adapter_name: str, name: str, planned: Tensor, value: Tensor) -> None:
    """Use another shared constant than the planned one, in all layers that share it."""
    if torch.equal(planned.to(value), value):
        return
    shared = {name: value.detach()}  # one tensor, which the layers go on sharing
    for layer in layers(model).values():
        if adapter_name in layer.entries:
            layer.set_shared(adapter_name, shared)
