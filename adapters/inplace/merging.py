"""Merging injected adapters into the model's weights, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .biases import ATTRIBUTE, biases_of
from .layer import BaseTunerLayer
from .modules_to_save import ModulesToSaveWrapper
from .switch import adapter_names as names_in
from .switch import take_out
from .tokens import TrainableTokensWrapper
from .walk import bare_modules, layers, unwrap


def merge_adapter(model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    """Make adapters part of the weights: the model computes the same without the cost of an adapter.

    Sums are taken from the original weights, in float32 or wider, and rounded once. Either all layers are merged or,
    on an error, none.

    Args:
        model: A model with injected adapters.
        adapter_names: Names of the adapters; by default the active ones. What is merged already stays merged.
        safe_merge: Refuse weights that are not finite.

    Raises:
        ValueError: A name that the model does not have; a weight that is tied to another module's or computed; weights
            that are not finite; a method without merged form.
        RuntimeError: The adapters are disabled.

    >>> from torchgraft.adapters import IA3Config, inject_adapter_in_model
    >>> model = inject_adapter_in_model(IA3Config(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> merge_adapter(model)
    >>> model[0].merged_adapters
    ['default']
    """
    model = unwrap(model)
    found = layers(model)
    _check_names(model, adapter_names)
    if any(layer.disable_adapters for layer in found.values()):
        raise RuntimeError("the adapters are disabled, so merging them would switch them on; enable them first")
    new = {path: layer for path, layer in found.items() if layer.unmerged(adapter_names)}
    _check_tied(model, new)
    before = {path: list(layer.merged_adapters) for path, layer in new.items()}
    try:
        for layer in new.values():
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    except Exception:
        for path, layer in new.items():
            if layer.merged_adapters != before[path]:
                layer.remerge(before[path])
        raise


def unmerge_adapter(model: nn.Module, adapter_names: list[str] | None = None) -> None:
    """Take merged adapters, by default all, out of the weights again, bit for bit.

    Raises:
        ValueError: A name that the model does not have.
        RuntimeError: Something else wrote to the weights while adapters were merged.
    """
    model = unwrap(model)
    _check_names(model, adapter_names)
    take_out(layers(model).values(), adapter_names)


def unload(model: nn.Module) -> nn.Module:
    """Remove all adapters and their layers from a model, which is then what it was before the first was injected.

    Which tensors require gradients stays as it is: the base is frozen.

    Returns:
        `model`.
    """
    model = unwrap(model)
    take_out(layers(model).values())
    _strip(model, trained=False)
    return model


def merge_and_unload(model: nn.Module, safe_merge: bool = False, adapter_names: list[str] | None = None) -> nn.Module:
    """Make adapters, by default the active ones, part of the weights for good and remove all adapter layers.

    Modules to save of the active adapter take the place of the user's, and its biases stay.

    Returns:
        `model`.

    Raises:
        ValueError, RuntimeError: As `merge_adapter`.
    """
    model = unwrap(model)
    merge_adapter(model, adapter_names, safe_merge)
    _strip(model, trained=True)
    return model


def _strip(model: nn.Module, trained: bool) -> None:
    for module in set(bare_modules(model).values()):
        for name, child in module._modules.items():
            if isinstance(child, ModulesToSaveWrapper):
                child = child.current if trained else child.original_module
            if isinstance(child, TrainableTokensWrapper):
                if trained:
                    child.bake()
                child = child.token_adapter.base_layer
            if isinstance(child, BaseTunerLayer):
                child = child.get_base_layer()
            module._modules[name] = child
    biases = biases_of(model)
    if biases is not None and not trained:
        biases.activate([], False)
    vars(model).pop("peft_config", None)
    vars(model).pop(ATTRIBUTE, None)


def _check_names(model: nn.Module, names: Iterable[str] | None) -> None:
    known = names_in(model)
    if not known:
        raise ValueError("the model has no adapters; inject one first")
    missing = [name for name in names or () if name not in known]
    if missing:
        raise ValueError(f"the model has no adapter {missing[0]!r}; it has {known}")


def _check_tied(model: nn.Module, found: dict[str, BaseTunerLayer]) -> None:
    """Refuse to change a weight that another module uses too."""
    owners: dict[int, dict[int, str]] = {}
    for name, module in bare_modules(model).items():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), {})[id(module)] = f"{name}.{leaf}"
    for path, layer in found.items():
        site = next(iter(layer.entries.values())).site
        module = layer.get_base_layer()
        for leaf in site.names if site.has_bias else site.weight_names:
            tied = owners.get(id(module._parameters.get(leaf)), {})
            others = [name for key, name in tied.items() if key != id(module)]
            if others:
                raise ValueError(
                    f"{path}: its {leaf} is tied to {others[0]}, which would change with it; untie the two, or leave "
                    "the adapter unmerged"
                )
