"""State dicts of the model beneath the adapters, under its original keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchgraft.functional.extending import (
    is_sharded,
    modules_of,
    offloading,
    spread,
    state_of,
    store,
)

from ..beside.biases import biases_of
from ..tensors.gathering import kept, on_gathered
from ..walk import layers, unwrap
from .bare import bare_copy
from .layouts import unmerged_tensors


class IncompatibleKeys(NamedTuple):
    """Keys that a state dict lacked, and keys that it had and nothing took."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@on_gathered()
def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model as it is without adapters: its original keys and, also while merged, its own tensors.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> list(get_base_model_state_dict(model))
    ['0.weight', '0.bias']
    """
    model = unwrap(model)
    original = unmerged_tensors(model)
    if (biases := biases_of(model)) is not None and biases.in_place:
        original |= {f"{path}.bias": tensor for path, tensor in biases.originals().items()}
    return {name: kept(original.get(name, tensor)) for name, tensor in state_of(bare_copy(model)).items()}


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


def _laid_out(own: Any, value: Tensor) -> Tensor:
    """Return a tensor sharded as the model's own is."""
    if not is_sharded(own) or is_sharded(value) or own.shape != value.shape:
        return value
    result: Tensor = spread(value.to(own.device), own.device_mesh, own.placements)
    return result
