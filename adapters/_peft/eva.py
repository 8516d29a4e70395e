"""EVA in PEFT's way: an adapter that is in a model already starts again from data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _inplace as inplace
from .._calibration.initial.configs import EvaConfig
from .._calibration.observing import Forward, run
from .._calibration.redistributed import redistributed
from .._calibration.statistics import eva_directions, trained_tokens
from .._config.keys import PREFIX
from .._config.messages import names_of
from .._inplace.states.bare import bare_copy
from .._inplace.walk import bare_modules, is_wrapped, layers, unwrap
from .._methods.lora.lora import LoraConfig

_PASSES = 100
"""How often batches are gone through at most; PEFT never stops."""

PrepareLayer = Callable[[Any, Any, str], Tensor]
"""`(input, prepared batch, name of the module) -> "rows in"`."""


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Forward = run,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = None,
    prepare_layer_inputs_fn: PrepareLayer | Mapping[str, PrepareLayer] | None = None,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Return the main directions of the inputs of each targeted module, with the ranks that EVA gives them.

    `fit_eva` does the same, and returns a config to inject.

    Args:
        model: A model, with adapters or without; it stays as it is, and is run without them.
        dataloader: What `forward_fn` takes, batch by batch.
        peft_config: The config; by default that of the adapter.
        forward_fn: `(model, batch) -> output`.
        prepare_model_inputs_fn: `(batch, config) -> anything` that `prepare_layer_inputs_fn` gets in the batch's place;
            without that function, `"rows axes"` that index the rows that count.
        prepare_layer_inputs_fn: Chooses the rows that count, for all modules or by name; by default those of tokens
            that are neither padding nor without label.
        adapter_name: The adapter.
        gather_distributed_inputs: Has no effect: each process looks at the batches that it has.
        show_progress_bar: Whether to show a progress bar.

    Returns:
        `"rank in"` by the names of `model.named_modules()`; of a module that gets no rank, no rows.

    Raises:
        ValueError: No config, or one for another initialisation; no batches.
    """
    inner, prefix = unwrap(model), PREFIX if is_wrapped(model) else ""
    config = _config_of(inner, adapter_name) if peft_config is None else peft_config
    if config is None:
        raise ValueError(f"peft_config is None, and the model has no adapter {adapter_name!r}; give a LoraConfig")
    prepared: list[Any] = [None, None]  # the last batch, and what was made of it

    def rows(path: str, x: Tensor, batch: Any, how: EvaConfig) -> Tensor:
        prepare: Any = prepare_layer_inputs_fn
        prepare = prepare.get(f"{prefix}{path}") if isinstance(prepare, Mapping) else prepare
        if prepare is None and prepare_model_inputs_fn is None:
            return trained_tokens(x, batch, how)
        if prepared[0] is not batch:
            prepared[:] = [batch, prepare_model_inputs_fn(batch, config) if prepare_model_inputs_fn else batch]
        if prepare is None:
            return x[prepared[1].T.unbind()]
        result: Tensor = prepare(x, prepared[1], f"{prefix}{path}")
        return result

    looked = bare_copy(inner) if layers(inner) else inner
    passes = 1 if iter(dataloader) is dataloader else _PASSES
    _, found = eva_directions(looked, config, dataloader, forward_fn, rows, passes, show_progress_bar)
    return {f"{prefix}{path}": tensor for path, tensor in found.items()}


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Forward = run,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = None,
    prepare_layer_inputs_fn: PrepareLayer | Mapping[str, PrepareLayer] | None = None,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Initialise an adapter from data before it is trained, with the ranks that EVA gives its modules.

    Its parameters are new ones, so make the optimizer afterwards.

    Args:
        model: A model with the adapter, whose config has `init_lora_weights="eva"`.
        dataloader: Batches; see `get_eva_state_dict`, as for the other arguments.
        eva_state_dict: What `get_eva_state_dict` returned, instead of batches.

    Raises:
        ValueError: Neither batches nor a state dict, another initialisation, several active adapters, or names and
            shapes that are not the model's.
    """
    inner = unwrap(model)
    config = _config_of(inner, adapter_name)
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "eva":
        raise ValueError(
            f"adapter {adapter_name!r} of the model has no LoraConfig with init_lora_weights='eva'; inject one first"
        )
    if len(active := inplace.active_adapters(inner)) > 1:
        raise ValueError(f"several adapters are active, {active}; set one, EVA is for that")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader and eva_state_dict are both None; give batches, or what they said")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    parts = {key.removeprefix(PREFIX): tensor for key, tensor in eva_state_dict.items()}
    _start_again(inner, config, adapter_name, parts)


def _config_of(model: nn.Module, name: str) -> Any:
    """Return the config of an adapter of a model, `None` if it has none."""
    return getattr(model, "peft_config", {}).get(name)


def _start_again(model: nn.Module, config: LoraConfig, name: str, parts: Mapping[str, Tensor]) -> None:
    """Inject an adapter anew, where these directions say."""
    carriers = {path: layer for path, layer in layers(model).items() if name in layer.entries}
    sites = {path: layer.entries[name].site for path, layer in carriers.items()}
    for path, tensor in parts.items():
        if path not in sites or tensor.ndim != 2 or tensor.shape[1] != sites[path].in_features:
            raise ValueError(
                f"eva_state_dict has {path!r} of shape {tuple(tensor.shape)}, which fits no module of adapter "
                f"{name!r}; it is on {names_of(sites)}"
            )
    how: Any = config.eva_config
    fitted = redistributed(config, sites, bare_modules(model), how, parts)
    leaf = next(leaf for layer in carriers.values() for leaf in layer.tensors_of(name))
    others = [one for one in inplace.adapter_names(model) if one != name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that another adapter is active in between
        if others:
            inplace.delete_adapter(model, name)
        else:
            inplace.unload(model)
    inplace.inject_adapter_in_model(fitted, model, name)
    inplace.cast_adapter_dtype(model, name, leaf.dtype == torch.float32)
