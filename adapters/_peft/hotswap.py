"""Hot swapping: another adapter's numbers in the place of one that runs, without a new compilation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchgraft.functional.extending import bare_name

from .. import _inplace as inplace
from .._calibration.initial import REMOVING, kind_of
from .._config.base import AdapterConfig
from .._config.keys import PREFIX, join
from .._config.matching import by_pattern
from .._config.messages import names_of
from .._files.disk.hub import local_folder
from .._inplace.states.layouts import layout_of, slots_of
from .._inplace.tensors.gathering import gathered
from .._inplace.walk import unwrap
from .._methods.lora.lora import LoraConfig
from .._methods.shared.scalings import alpha_at, scaling_of
from .ranks import carriers, check_growth, describe, grow, grown, grown_shape
from .weights import load_peft_weights

_SAME = ("alora_invocation_tokens", "use_bdlora", "use_dora", "lora_bias", "lora_dropout")
"""Fields in which both adapters have to agree, for what a layer runs depends on them."""


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Prepare a model so that its LoRA adapters can be swapped for others, of other ranks, without recompiling.

    Scaling factors become tensors that are written in place, and `A` and `B` get rows and columns of zeros up to a
    rank. The model computes what it did, and the configs in `model.peft_config` say the new rank, so that files are
    right. Call it after the first adapter is there, before `torch.compile` and before an optimizer is made.

    Args:
        model: A model with injected LoRA adapters; others stay as they are.
        target_rank: The largest rank of all adapters to come; by default ranks stay as they are.
        config: Has no effect; PEFT's argument, for the configs that the model has anyway.
        check_compiled: Whether a model that is compiled already is an error, a warning or neither.

    Raises:
        ValueError: No LoRA adapter, or a rank above `target_rank`; one that is merged, or tied to another module's; a
            compiled model, or a word for `check_compiled` that is none of the three.

    >>> model = inplace.inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 3)))
    >>> prepare_model_for_compiled_hotswap(model, target_rank=5)
    >>> tuple(model[0].lora_A["default"].weight.shape), model[0].scaling["default"]
    ((5, 4), tensor(4., dtype=torch.float64))
    """
    _check_compiled(model, check_compiled)
    inner = unwrap(model)
    found = {name: carriers(inner, name) for name in inplace.adapter_names(inner)}
    found = {name: at for name, at in found.items() if at}
    if not found:
        raise ValueError("the model has no LoRA adapter; inject or load the first one before, then compile")
    ranks = {name: {} if target_rank is None else dict.fromkeys(at, target_rank) for name, at in found.items()}
    for name, at in found.items():
        check_growth(name, at, ranks[name], most=True)
    for name, at in found.items():
        grow(name, at, ranks[name])
        for layer in at.values():
            layer.make_adjustable(name)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: torch.device | str | None = None,
    *,
    key_mapping: Mapping[str, str] | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> None:
    """Replace the numbers of a model's adapter by those of an adapter on disk; its name stays.

    Of a model that `prepare_model_for_compiled_hotswap` has seen, compiled calls stay.

    Args:
        model: A model with the adapter injected.
        model_name_or_path: The directory, or the name of a repository in the Hub's local cache.
        adapter_name: The adapter whose numbers are replaced.
        torch_device: Where tensors are read to; by default the CPU, and copied to where the adapter's are.
        key_mapping: Regular expressions and what to put in the place of what they match in keys.
        subfolder: The directory's subdirectory.
        revision: The repository's branch or commit.
        cache_dir: The Hub's cache.
        token: Has no effect; nothing is downloaded.

    Raises:
        FileNotFoundError: No such directory.
        ValueError, RuntimeError: As `hotswap_adapter_from_state_dict`.
    """
    folder = local_folder(model_name_or_path, subfolder, revision, cache_dir)
    given = load_peft_weights(folder, torch_device, key_mapping)
    swap = _Swap(model, adapter_name, AdapterConfig.from_pretrained(folder))
    swap.run({key.removeprefix(PREFIX): tensor for key, tensor in given.items()})


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: AdapterConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Replace the numbers and the scaling factors of a model's adapter in place, from a state dict.

    Smaller ranks are filled up with zeros, and modules that the new adapter lacks get zeros. A larger rank makes new
    parameters, and so a compiled model is compiled again. `model.peft_config` says what is there now, so that saving
    writes the new adapter; its `r` is the rank that the parameters have.

    Args:
        model: A model with the adapter injected.
        state_dict: Tensors by their keys in the model, `layers.0.lora_A.default.weight`.
        adapter_name: The adapter whose numbers are replaced.
        config: The config of the new numbers.
        parameter_prefix: Has no effect; PEFT's argument.

    Raises:
        RuntimeError: Keys that the adapter has no place for, or tensors that are lacking or of another shape.
        ValueError: Other methods than LoRA; configs that do not go together; an adapter that is merged. Nothing has
            been swapped then.
    """
    swap = _Swap(model, adapter_name, config)
    keys = {slot.key: key for key, slot in swap.slots.items()}
    given = {bare_name(key).removeprefix(PREFIX): tensor for key, tensor in state_dict.items()}
    swap.run({keys.get(key, key): tensor for key, tensor in given.items()})


def check_hotswap_configs_compatible(config0: AdapterConfig, config1: AdapterConfig) -> None:
    """Refuse configs of adapters that cannot be swapped for each other; swapping checks that too.

    Raises:
        ValueError: Says in which field they differ.

    >>> check_hotswap_configs_compatible(LoraConfig(r=2), LoraConfig(r=4))
    """
    _check_configs(config0, config1, "one adapter")


class _Swap:
    """Another adapter's numbers on their way into an adapter of a model.

    Args:
        model: The model.
        name: The adapter's name.
        config: The config of the new numbers.

    Raises:
        ValueError: Configs that do not go together, or an adapter that is merged.
    """

    def __init__(self, model: nn.Module, name: str, config: Any):
        self.given, self.name, self.config = model, name, config
        self.model = unwrap(model)
        self.layout = layout_of(self.model, name)
        _check_configs(self.layout.config, config, f"adapter {name!r}")
        self.slots = slots_of(self.model, self.layout)
        self.at = carriers(self.model, name)
        if merged := [path for path, layer in self.at.items() if name in layer.merged_adapters]:
            raise ValueError(
                f"adapter {name!r} is merged ({merged[0]} and others); call unmerge_adapter(model) before swapping"
            )

    def run(self, given: Mapping[str, Tensor]) -> None:
        """Swap; tensors go by their keys in files.

        Raises:
            RuntimeError: Tensors that do not fit; nothing has been swapped then.
            ValueError: A rank that is not the config's, or that a layer cannot have.
        """
        if unexpected := [key for key in given if key not in self.slots]:
            raise RuntimeError(
                f"adapter {self.name!r} has no place for {names_of(unexpected)}; the new adapter has to be on the same "
                "modules, or on fewer of them. Load it beside the other: load_adapter(model, path, name)"
            )
        values, ranks = dict(given), dict[str, int]()
        for path in self.at:
            values |= self._values(path, given, ranks)
        if lacking := [key for key in self.slots if key not in values]:
            raise RuntimeError(
                f"the new adapter lacks {names_of(lacking)}, which would stay from the old one; swap adapters with the "
                "same modules_to_save, tokens and biases"
            )
        check_growth(self.name, self.at, ranks)
        with gathered(self.given, writes=True):
            self._write(values, ranks)

    def _values(self, path: str, given: Mapping[str, Tensor], ranks: dict[str, int]) -> dict[str, Tensor]:
        """Return what a layer is to have, by key; `ranks` gets the rank of what is new."""
        layer = self.at[path]
        site, present = layer.entries[self.name].site, layer.leaves(self.name)
        keys = {leaf: join(self.layout.config, self.layout.places[path], leaf) for leaf in present}
        own = {leaf: given[key] for leaf, key in keys.items() if key in given}
        if not own:
            self._check_removable(path)
            return {keys[leaf]: torch.zeros_like(tensor) for leaf, tensor in present.items()}
        if lacking := [keys[leaf] for leaf in present if leaf not in own]:
            raise RuntimeError(f"{path}: the new adapter lacks {names_of(lacking)}, and has {names_of(own)}")
        ranks[path] = self._rank(path, own)
        rank = max(ranks[path], site.constants.r)
        for leaf, tensor in own.items():
            new, old = (grown_shape(leaf, one.shape, rank, site) for one in (tensor, present[leaf]))
            if new != old:
                raise RuntimeError(f"{path}: {leaf} has shape {tuple(tensor.shape)}, which does not fit {old}")
        return {keys[leaf]: grown(leaf, tensor, rank, site) for leaf, tensor in own.items()}

    def _rank(self, path: str, own: Mapping[str, Tensor]) -> int:
        """Return the rank of a layer's new tensors, which has to be the config's."""
        site = self.at[path].entries[self.name].site
        rank: int = next(len(tensor) for leaf, tensor in own.items() if leaf.endswith("_A")) // max(site.experts, 1)
        planned: int = self.config.r
        for one in filter(None, (site.within, site.path)):
            planned = by_pattern(self.config.rank_pattern, one, planned)
        if rank != planned:
            raise ValueError(f"{path}: the new tensors have rank {rank}, and their config says {planned}; give theirs")
        return rank

    def _check_removable(self, path: str) -> None:
        """Refuse zeros that would not mean that there is no adapter."""
        if self.layout.config.use_dora:  # type: ignore[attr-defined]
            raise RuntimeError(
                f"{path}: the new adapter has nothing here, and magnitudes of zero would be no output (use_dora); swap "
                "adapters on the same modules"
            )

    def _write(self, values: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
        grow(self.name, self.at, ranks)
        inplace.set_peft_model_state_dict(self.model, values, self.name)
        for path, rank in ranks.items():
            alpha = alpha_at(self.config, self.at[path].entries[self.name].site)
            self.at[path].write_scaling(self.name, scaling_of(self.config, rank, alpha))
        describe(self.name, self.at)


def _check_compiled(model: nn.Module, check: str) -> None:
    if check not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled is {check!r}, expected 'error', 'warn' or 'ignore'")
    if not (hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None)) or check == "ignore":
        return
    message = (
        "the model is compiled already and would be compiled again; call prepare_model_for_compiled_hotswap before"
    )
    if check == "error":
        raise ValueError(message)
    warnings.warn(message, UserWarning, stacklevel=3)


def _check_configs(old: Any, new: Any, whose: str) -> None:
    """Refuse adapters that cannot be swapped.

    Raises:
        ValueError: Says in which field they differ.
    """
    for config in (old, new):
        if not isinstance(config, LoraConfig):
            raise ValueError(f"hot swapping is for LoRA, and one of the adapters has a {type(config).__name__}")
        kind = kind_of(config.init_lora_weights)
        if kind in (*REMOVING, "loftq", "mica"):
            raise ValueError(
                f"init_lora_weights is {config.init_lora_weights!r}, whose parameters mean nothing without what the "
                "base loses or what stays fixed; save the adapter with plain=True first"
            )
    for field in _SAME:
        if getattr(old, field) != getattr(new, field):
            raise ValueError(
                f"{whose} has {field}={getattr(old, field)!r}, and the new one {getattr(new, field)!r}, and "
                "layers run differently with these; give both the same"
            )
