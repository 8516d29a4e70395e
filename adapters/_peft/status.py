"""What adapters do in a model, layer by layer and as a whole, as PEFT reports it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn

from .. import _inplace as inplace

Agreed = bool | Literal["irregular"]
"""What parts have in common, or `"irregular"` where they differ."""


@dataclasses.dataclass
class LayerStatus:
    """One layer with adapters, or module in whose place they have another; PEFT's `TunerLayerStatus`."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Agreed]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclasses.dataclass
class ModelStatus:
    """A model with adapters; PEFT's `TunerModelStatus`."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: Agreed
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, Agreed]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Literal["irregular"] | None


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """Describe each layer with adapters in a model, and each module that they train a copy or rows of.

    Raises:
        ValueError: A model without adapters.

    >>> from torchgraft.adapters import IA3Config, inject_adapter_in_model
    >>> model = inject_adapter_in_model(IA3Config(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> get_layer_status(model)[0].requires_grad
    {'default': True}
    """
    inner = _injected(model)
    within = "" if inner is model or not isinstance(model, inplace.ModelWrapper) else "model."
    found = [_of_part(f"{within}{path}", part) for path, part in inplace.placed_modules(inner)]
    if not found:
        raise ValueError("the model has no layers with adapters; inject one first")
    return found


def get_model_status(model: nn.Module) -> ModelStatus:
    """Describe a model with adapters: what its layers agree on, and where they do not.

    Raises:
        ValueError: A model without adapters.
    """
    inner: Any = _injected(model)
    rows = get_layer_status(model)
    names = inplace.adapter_names(inner)
    trained, count = count_parameters(model)
    return ModelStatus(
        base_model_type=type(inner).__name__,
        adapter_model_type=type(getattr(model, "base_model", None)).__name__ if inner is not model else "None",
        peft_types={name: config.method.name for name, config in inner.peft_config.items()},
        trainable_params=trained,
        total_params=count,
        num_adapter_layers=len(rows),
        enabled=_agreed(row.enabled for row in rows),
        active_adapters=_agreed(row.active_adapters for row in rows),
        merged_adapters=_merged_in(rows),
        requires_grad={
            name: _agreed(row.requires_grad[name] for row in rows if name in row.requires_grad) for name in names
        },
        available_adapters=sorted(names),
        devices={name: sorted({one for row in rows for one in row.devices.get(name, ())}) for name in names},
        quantization_backend=_agreed(row.quantization_backend for row in rows),
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many values the parameters of a model have that are trained, and how many all have.

    Those that bitsandbytes packs in pairs, and those that DeepSpeed has on other processes, count as what they are.

    >>> count_parameters(nn.Linear(2, 3).requires_grad_(False))
    (0, 9)
    """
    trained = count = 0
    for parameter in model.parameters():
        size = parameter.numel() or int(getattr(parameter, "ds_numel", 0))
        size *= 2 if type(parameter).__name__ == "Params4bit" else 1
        count += size
        trained += size if parameter.requires_grad else 0
    return trained, count


def _injected(model: nn.Module) -> nn.Module:
    """Return the user's model in a `PeftModel`, or the model itself."""
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else inplace.unwrap(model)


def _of_part(path: str, part: Any) -> LayerStatus:
    tensors = {name: _trainable_of(part, name) for name in part.carried_adapters}
    rows = getattr(part, "token_adapter", None)  # which PEFT takes for the layer
    return LayerStatus(
        name=path if rows is None else f"{path}.token_adapter",
        module_type=(part if rows is None else rows)._get_name(),
        enabled=not part.disable_adapters,
        active_adapters=[*part.active_adapters],
        merged_adapters=[*part.merged_adapters],
        requires_grad={name: _agreed(one.requires_grad for one in found) for name, found in tensors.items()},
        available_adapters=sorted(part.carried_adapters),
        devices={name: sorted({one.device.type for one in found}) for name, found in tensors.items()},
        quantization_backend=_packed_by(part.user_module),
    )


def _trainable_of(part: Any, name: str) -> list[Tensor]:
    """Return an adapter's tensors but for those that are never trained."""
    if not part.is_layer:
        return [*part.tensors_of(name)]
    fixed = part.fixed(name)
    found = part.leaves(name) if part.is_source(name) else {}
    return [tensor for leaf, tensor in found.items() if leaf not in fixed]


def _packed_by(module: nn.Module) -> str | None:
    """Return PEFT's name of what packs a module's weight, if its type says so."""
    kind = type(getattr(module, "weight", None))
    packed = "torchao" if kind.__module__.startswith("torchao.") else None
    return {"Params4bit": "bnb 4bit", "Int8Params": "bnb 8bit"}.get(kind.__name__, packed)


def _merged_in(rows: Iterable[LayerStatus]) -> list[str] | Literal["irregular"]:
    """Return names of the adapters that are merged wherever they are, `"irregular"` where one is so in a part alone."""
    rows = [*rows]
    merged = {name for row in rows for name in row.merged_adapters}
    everywhere = all(merged.intersection(row.available_adapters) <= {*row.merged_adapters} for row in rows)
    return sorted(merged) if everywhere else "irregular"


def _agreed(values: Iterable[Any]) -> Any:
    found = [*values]
    return found[0] if all(one == found[0] for one in found) else "irregular"
