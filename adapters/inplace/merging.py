"""Merging injected adapters into the model's weights, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from torchgraft.functional.extending import child_of_wrapper, is_unit, unwrapped

from . import root
from .biases import ATTRIBUTE, biases_of
from .gathering import hand_over, on_gathered
from .layer import BaseTunerLayer
from .modules_to_save import ModulesToSaveWrapper
from .parameters import ParameterLayer
from .switch import adapter_names as names_in
from .switch import take_out
from .tokens import TrainableTokensWrapper
from .walk import bare_modules, layers, parts, unwrap


@on_gathered(writes=True)
def merge_adapter(model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    """Make adapters part of the weights: the model computes the same without the cost of an adapter.

    So do the rows of their tokens (`trainable_token_indices`); their copies of `modules_to_save` and their biases run
    from then on, also where another adapter is active. Sums are taken from the original weights, in float32 or wider,
    and rounded once. Either all layers are merged or, on an error, none.

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
    _merge(unwrap(model), adapter_names, safe_merge, False)


def _merge(model: nn.Module, adapter_names: list[str] | None, safe: bool, alone: bool) -> None:
    """Merge adapters into all layers and all that adapters have beside them or, on an error, into none.

    Args:
        model: The model.
        adapter_names: Names of the adapters; by default the active ones.
        safe: Refuse weights that are not finite.
        alone: Whether active adapters that are not merged go, and so are not in the way of what is merged.
    """
    _check_names(model, adapter_names)
    found = layers(model)
    if any(layer.disable_adapters for layer in found.values()):
        raise RuntimeError("the adapters are disabled, so merging them would switch them on; enable them first")
    new = {path: layer for path, layer in found.items() if layer.unmerged(adapter_names)}
    _check_tied(model, new)
    beside = {part: _union(part, adapter_names) for part in parts(model) if not isinstance(part, BaseTunerLayer)}
    for part, names in beside.items():
        part.check_merge(names if alone else dict.fromkeys((*names, *part.active_adapters)))
    _check_tied_tokens(model, beside)
    changed = [*new.values(), *beside]
    before = {part: list(part.merged_adapters) for part in changed}
    try:
        for part, names in beside.items():  # first, for layers merge the biases that are in their places
            part.remerge(names, safe)
        for layer in new.values():
            layer.merge(safe_merge=safe, adapter_names=adapter_names)
    except Exception:
        for part in changed:
            if part.merged_adapters != before[part]:
                part.remerge(before[part])
        raise


def _union(part: Any, adapter_names: list[str] | None) -> list[str]:
    """What is merged into a part then: what is already, and these adapters."""
    return list(
        dict.fromkeys((*part.merged_adapters, *(part.active_adapters if adapter_names is None else adapter_names)))
    )


@on_gathered(writes=True)
def unmerge_adapter(model: nn.Module, adapter_names: list[str] | None = None) -> None:
    """Take merged adapters, by default all, out of the weights again, bit for bit.

    Raises:
        ValueError: A name that the model does not have.
        RuntimeError: Something else wrote to the weights while adapters were merged.
    """
    model = unwrap(model)
    _check_names(model, adapter_names)
    take_out(parts(model), adapter_names)


@on_gathered(writes=True)
def unload(model: nn.Module) -> nn.Module:
    """Remove all adapters and their layers from a model, which is then what it was before the first was injected.

    Which tensors require gradients stays as it is: the base is frozen.

    Returns:
        `model`.
    """
    model = unwrap(model)
    take_out(parts(model))
    _strip(model)
    return model


@on_gathered(writes=True)
def merge_and_unload(model: nn.Module, safe_merge: bool = False, adapter_names: list[str] | None = None) -> nn.Module:
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
            if isinstance(child, ModulesToSaveWrapper):
                child = child.merged_module
            if isinstance(child, TrainableTokensWrapper):
                child = _without_tokens(child)
            if isinstance(child, ParameterLayer):
                child = child.get_base_layer()
            elif isinstance(child, BaseTunerLayer):
                child = child.base_layer
            parent._modules[name] = child
            if child is not None and child is not unit and is_unit(unit):
                hand_over(unit, child)
    if (biases := biases_of(model)) is not None:
        biases.activate([], False)
    vars(model).pop("peft_config", None)
    vars(model).pop(ATTRIBUTE, None)
    root.detach(model)


def _without_tokens(wrapper: TrainableTokensWrapper) -> Any:
    """The module that tokens were trained of, within what torch wrapped around it and its tokens."""
    held: Any = wrapper._modules["token_adapter"]
    inner = child_of_wrapper(held)
    if inner is None:
        return held.base_layer
    held._modules[inner] = unwrapped(held).base_layer
    return held


def _check_names(model: nn.Module, names: Iterable[str] | None) -> None:
    known = names_in(model)
    if not known:
        raise ValueError("the model has no adapters; inject one first")
    missing = [name for name in names or () if name not in known]
    if missing:
        raise ValueError(f"the model has no adapter {missing[0]!r}; it has {known}")


def _check_tied(model: nn.Module, found: dict[str, BaseTunerLayer]) -> None:
    """Refuse to change a weight that another module uses too."""
    owners = _owners(model)
    for path, layer in found.items():
        site = next(iter(layer.entries.values())).site
        module = layer.get_base_layer()
        for leaf in site.names if site.has_bias else site.weight_names:
            tied = owners.get(id(module._parameters.get(leaf)), {})
            _refuse_tied(path, leaf, "adapter", [name for key, name in tied.items() if key != id(module)])


def _check_tied_tokens(model: nn.Module, beside: Mapping[Any, list[str]]) -> None:
    """Refuse to change rows of a weight that another module uses too without having the same rows."""
    wrappers = {id(one.token_adapter.base_layer): one for one in beside if isinstance(one, TrainableTokensWrapper)}
    owners = _owners(model) if wrappers else {}
    for key, wrapper in wrappers.items():
        for name in [name for name in beside[wrapper] if name in wrapper.adapters]:
            tied = owners.get(id(wrapper.token_adapter.base_layer._parameters.get("weight")), {})
            rows = wrapper.rows(name)[0]
            others = [
                path
                for other, path in tied.items()
                if other != key
                and not (
                    other in wrappers and name in wrappers[other].adapters and wrappers[other].rows(name)[0] is rows
                )
            ]
            _refuse_tied(wrapper.path, "weight", "rows", others)


def _has_rows(wrapper: TrainableTokensWrapper | None, name: str, rows: Tensor) -> bool:
    """Whether a module has these very rows for an adapter."""
    return wrapper is not None and name in wrapper.adapters and wrapper.rows(name)[0] is rows


def _owners(model: nn.Module) -> dict[int, dict[int, str]]:
    """The modules that have each parameter, with its name in each, all by identity."""
    owners: dict[int, dict[int, str]] = {}
    for name, module in bare_modules(model).items():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), {})[id(module)] = f"{name}.{leaf}"
    return owners


def _refuse_tied(path: str, leaf: str, what: str, others: list[str]) -> None:
    if others:
        raise ValueError(
            f"{path}: its {leaf} is tied to {others[0]}, which would change with it; untie the two, or leave the "
            f"{what} unmerged"
        )
