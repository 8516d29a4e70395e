"""Merging injected adapters into the model's weights, and taking them out again."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from torchgraft.functional.extending import child_of_wrapper, is_unit

from . import root
from .beside.biases import ATTRIBUTE, biases_of
from .bound_states import forget
from .placed import Owners
from .switch import adapter_names as names_in
from .switch import check_known, in_order_of_merging, names_given, take_out
from .tensors.gathering import hand_over, on_gathered
from .walk import bare_modules, layers, named_parts, parts, placed_in, placed_modules, refuse_others, unwrap


@on_gathered(writes=True)
def merge_adapter(model: nn.Module, adapter_names: str | list[str] | None = None, safe_merge: bool = False) -> None:
    """Make adapters part of the weights: the model computes the same without the cost of an adapter.

    So do the rows of their tokens (`trainable_token_indices`); their copies of `modules_to_save` and their biases run
    from then on, also where another adapter is active. Sums are taken from the original weights, in float32 or wider,
    and rounded once. Either all layers are merged or, on an error, none.

    Args:
        model: A model with injected adapters.
        adapter_names: Names of the adapters; by default the active ones. What is merged already stays merged; a
            warning where nothing else is.
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
    before = _merged_in(model)
    _merge(model, adapter_names, safe_merge, False)
    if before and before == _merged_in(model):
        warnings.warn(f"adapters {before} are merged already, so nothing is left to do", UserWarning, stacklevel=3)


def _merged_in(model: nn.Module) -> list[str]:
    """Return names of the adapters that are merged."""
    return list(dict.fromkeys(name for part in parts(model) for name in part.merged_adapters))


def _merge(model: nn.Module, chosen: str | list[str] | None, safe: bool, alone: bool) -> None:
    """Merge adapters into all layers and all that adapters have beside them or, on an error, into none.

    Args:
        model: The model.
        chosen: Names of the adapters; by default the active ones.
        safe: Refuse weights that are not finite.
        alone: Whether active adapters that are not merged go, and so are not in the way of what is merged.
    """
    adapter_names = _check_names(model, chosen)
    if any(layer.disable_adapters for layer in layers(model).values()):
        raise RuntimeError("the adapters are disabled, so merging them would switch them on; enable them first")
    found = named_parts(model)
    owners = Owners(bare_modules(model))
    placed = {id(part.user_module): part for _, part in placed_modules(model)}
    for path, part in found:
        names = part.merged_with(adapter_names)
        part.check_merge(names if alone else [*names, *part.active_adapters])
        part.check_tied(path, names, owners, placed)
    before = [(part, list(part.merged_adapters)) for _, part in found]
    try:
        for part, _ in in_order_of_merging(before):
            part.merge_adapters(adapter_names, safe)
    except Exception:
        for part, merged in before:
            if part.merged_adapters != merged:
                part.remerge(merged)
        raise


@on_gathered(writes=True)
def unmerge_adapter(model: nn.Module, adapter_names: str | list[str] | None = None) -> None:
    """Take merged adapters, by default all, out of the weights again, bit for bit; a warning where none is merged.

    Raises:
        ValueError: A name that the model does not have.
        RuntimeError: Something else wrote to the weights while adapters were merged.
    """
    model = unwrap(model)
    names = _check_names(model, adapter_names)
    if not _merged_in(model):
        warnings.warn("no adapter is merged, so there is nothing to take out", UserWarning, stacklevel=3)
    take_out(parts(model), names)


@on_gathered(writes=True)
def unload(model: nn.Module) -> nn.Module:
    """Remove all adapters and their layers from a model, which is then what it was before the first was injected.

    Which tensors require gradients stays as it is: the base is frozen.

    Returns:
        `model`.
    """
    model = unwrap(model)
    if not (found := parts(model)):
        refuse_others(model)
    take_out(found)
    _strip(model)
    return model


@on_gathered(writes=True)
def merge_and_unload(
    model: nn.Module, safe_merge: bool = False, adapter_names: str | list[str] | None = None
) -> nn.Module:
    """Make adapters, by default the active ones, part of the weights for good and remove all adapter layers.

    What these adapters have beside their layers goes with them: their copies of `modules_to_save` take the place of the
    user's, the rows of their tokens are part of the embeddings, and their biases stay. Other adapters leave nothing,
    even the active ones.

    Returns:
        `model`.

    Raises:
        ValueError, RuntimeError: As `merge_adapter`.
    """
    model = unwrap(model)
    _merge(model, adapter_names, safe_merge, True)
    _strip(model)
    return model


def _strip(model: nn.Module) -> None:
    """Remove all layers and wrappers; what is merged stays."""
    for module in set(bare_modules(model).values()):
        for name, child in module._modules.items():
            parent: Any = module
            while child is not None and (inner := child_of_wrapper(child)) is not None:
                parent, name, child = child, inner, child._modules[inner]
            unit: Any = child
            if (part := placed_in(child)) is not None:
                child = part.without_adapters()
            parent._modules[name] = child
            if child is not None and child is not unit and is_unit(unit):
                hand_over(unit, child)
    if (biases := biases_of(model)) is not None:
        biases.activate([], False)
    vars(model).pop("peft_config", None)
    vars(model).pop(ATTRIBUTE, None)
    root.detach(model)
    forget(model)


def _check_names(model: nn.Module, names: str | list[str] | None) -> list[str] | None:
    """Return names of adapters as a list, which the model has; `None` for the active ones."""
    if not names_in(model):
        refuse_others(model)
        raise ValueError("the model has no adapters; inject one first")
    if names is None:
        return None
    given = names_given(names)
    check_known(model, given)
    return given
