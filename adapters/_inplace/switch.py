"""Which injected adapters run and which are trained."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from torchgraft.functional.extending import did_you_mean

from .beside.biases import biases_of
from .bound_states import forget
from .layer.tuner_layer import BaseTunerLayer
from .placed import Placed
from .tensors.gathering import gathered, on_gathered
from .walk import layers, parts, refuse_others, unwrap

T = TypeVar("T")


def _swaps(model: nn.Module) -> bool:
    """Return whether switching adapters in a model writes to its tensors."""
    return biases_of(unwrap(model)) is not None or any(layer.merged for layer in layers(unwrap(model)).values())


def adapter_names(model: nn.Module) -> list[str]:
    """Return names of the adapters in a model, in the order they were added.

    >>> adapter_names(nn.Linear(2, 2))
    []
    """
    return list(dict.fromkeys(name for part in parts(unwrap(model)) for name in part.carried_adapters))


def active_adapters(model: nn.Module) -> list[str]:
    """Return names of the active adapters, in the order in which they run; none of a model without adapters.

    They stay the active ones while adapters are disabled or merged.

    Raises:
        ValueError: Layers whose active adapters are not the same: something has set them one by one.

    >>> active_adapters(nn.Linear(2, 2))
    []
    """
    every = parts(unwrap(model))
    found = {tuple(part.active_adapters) for part in every if part.is_layer}
    if not found:
        return list(dict.fromkeys(name for part in every for name in part.active_adapters))
    if len(found) > 1:
        raise ValueError(
            f"the model's layers have different active adapters: {sorted(map(list, found))}; call set_adapter(model, "
            "names) to have the same everywhere"
        )
    return [*next(iter(found))]


@on_gathered(writes=True, when=_swaps)
def set_adapter(
    model: nn.Module,
    adapter_name: str | list[str],
    inference_mode: bool = False,
    layer_cls: type[nn.Module] = BaseTunerLayer,
) -> None:
    """Make these adapters the active ones: they run, and they are trained unless `inference_mode`; others are frozen.

    A model with merged adapters is unmerged first.

    Args:
        model: A model with injected adapters.
        adapter_name: One name or several; an empty list for none.
        inference_mode: Freeze the active adapters too.
        layer_cls: Only layers of this class.

    Raises:
        ValueError: A name that the model does not have; several adapters with a copy of one of `modules_to_save`.
        RuntimeError: Something else wrote to the weights while adapters were merged.

    >>> from torchgraft.adapters import IA3Config, inject_adapter_in_model
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> for name in ("a", "b"):
    ...     model = inject_adapter_in_model(IA3Config(target_modules=["0"]), model, name)
    >>> set_adapter(model, ["a", "b"])
    >>> model[0].active_adapters
    ['a', 'b']
    """
    found = parts(unwrap(model))
    names = names_given(adapter_name)
    check_known(model, names)
    for part in found:
        part.check_active(names)
    chosen = _of_class(found, layer_cls)
    take_out(chosen)
    for part in chosen:
        part.set_adapter(names, inference_mode=inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
    """Freeze or unfreeze the parameters of these adapters, active or not.

    Raises:
        ValueError: A name that the model does not have.
    """
    names = names_given(adapter_names)
    check_known(model, names)
    for part in parts(unwrap(model)):
        part.set_requires_grad(names, requires_grad)


@on_gathered(writes=True, when=_swaps)
def disable_adapter_layers(model: nn.Module) -> None:
    """Switch all adapters off: the model computes what it did before any was injected. Merged ones are unmerged.

    Raises:
        RuntimeError: Something else wrote to the weights while adapters were merged.
    """
    found = parts(unwrap(model))
    if not found:
        refuse_others(model)
    take_out(found)
    for part in found:
        part.enable_adapters(False)


@on_gathered(writes=True, when=_swaps)
def enable_adapter_layers(model: nn.Module) -> None:
    """Switch adapters on again; the active ones are trainable then."""
    for part in parts(unwrap(model)):
        part.enable_adapters(True)


def take_out(found: Iterable[Placed], adapter_names: list[str] | None = None) -> None:
    """Unmerge these layers, and what adapters have beside them: all of them or, on an error, none.

    Raises:
        RuntimeError: Something else wrote to the weights while adapters were merged.
    """
    found = list(found)
    for part in found:
        part.check_unwritten()
    for part in found:
        part.unmerge(adapter_names)


def put_in(merged: Iterable[tuple[Placed, list[str]]]) -> None:
    """Merge these adapters into these parts of a model, of which nothing is merged: `[(part, names), ...]`."""
    for part, names in in_order_of_merging(merged):
        part.remerge(names)


def in_order_of_merging(merged: Iterable[tuple[Placed, T]]) -> list[tuple[Placed, T]]:
    """Parts of a model with layers last, for they merge the biases that are in their places."""
    return sorted(merged, key=lambda one: one[0].is_layer)


def _of_class(found: Iterable[Placed], layer_cls: type[nn.Module]) -> list[Placed]:
    """Return the layers of a class, and what adapters have beside their layers."""
    return [part for part in found if not part.is_layer or isinstance(part, layer_cls)]


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters, within a `with` block.

    Afterwards everything is as it was before, whatever happens inside: active, merged and disabled adapters and which
    parameters require gradients. Contexts nest.

    >>> from torchgraft.adapters import IA3Config, inject_adapter_in_model
    >>> model = inject_adapter_in_model(IA3Config(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> with disable_adapter(model):
    ...     print(model[0].disable_adapters)
    True
    """
    given, model = model, unwrap(model)
    before = {id(part): _state(part) for part in parts(model)}
    trained = [(parameter, parameter.requires_grad) for part in parts(model) for parameter in part.parameters()]
    try:
        disable_adapter_layers(given)
        yield
    finally:
        known = adapter_names(model)
        with gathered(given, writes=True):
            for part in parts(model):
                disabled, active, _ = before.get(id(part), (False, part.active_adapters, []))
                part.set_adapter([name for name in active if name in known])
                part.enable_adapters(not disabled)
            put_in((part, before[id(part)][2]) for part in parts(model) if id(part) in before)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _state(part: Placed) -> tuple[bool, list[str], list[str]]:
    return part.disable_adapters, list(part.active_adapters), list(part.merged_adapters)


@on_gathered(writes=True, when=_swaps)
def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str | None = None, layer_cls: type[nn.Module] = BaseTunerLayer
) -> list[str] | None:
    """Remove an adapter from a model, and from `model.peft_config`; the layers stay, see `unload`.

    If it was the only active one, the first of the others by name becomes active, with a warning.

    Args:
        model: A model with injected adapters.
        adapter_name: Name of the adapter.
        prefix: Has no effect; PEFT's argument.
        layer_cls: Only layers of this class.

    Returns:
        The names of the adapters that are active now, or `None`.

    Raises:
        ValueError: A name that the model does not have, or one that is merged.
    """
    model = unwrap(model)
    check_removable(model, [adapter_name])
    chosen = _of_class(parts(model), layer_cls)
    found = [part for part in chosen if part.is_layer] or chosen
    active = next((part.active_adapters for part in found if adapter_name in part.active_adapters), None)
    if active is not None:
        left = [name for name in active if name != adapter_name]
        rest = sorted(name for name in adapter_names(model) if name != adapter_name)
        if rest and not left:
            left = rest[:1]
            warnings.warn(f"adapter {adapter_name!r} was active; now {left[0]!r} is", UserWarning, stacklevel=2)
        for part in chosen:
            part.set_adapter(left)
    for part in chosen:
        part.delete_adapter(adapter_name)
    getattr(model, "peft_config", {}).pop(adapter_name, None)
    forget(model)
    now = next((part.active_adapters for part in found), [])
    return list(now) or None


def check_removable(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to remove adapters that the model does not have, or that are merged."""
    names = list(names)
    check_known(model, names)
    for path, layer in layers(model).items():
        if merged := [name for name in names if name in layer.merged_adapters]:
            raise ValueError(f"adapter {merged[0]!r} is merged ({path} and others); call unmerge_adapter(model) first")


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Give an adapter's parameters float32 where they have a lower precision; they become new parameters.

    Raises:
        ValueError: A name that the model does not have.
    """
    model = unwrap(model)
    check_known(model, [adapter_name])
    if not autocast_adapter_dtype:
        return
    for part in parts(model):
        part.widen_adapter(adapter_name)


def names_given(adapter_names: Any) -> list[str]:
    """Return one name, or several, as a list.

    Raises:
        TypeError: Something else, such as weights by name, which are not supported here.

    >>> names_given("a"), names_given(["a", "b"])
    (['a'], ['a', 'b'])
    """
    if isinstance(adapter_names, str):
        return [adapter_names]
    if isinstance(adapter_names, Mapping) or not isinstance(adapter_names, Iterable):
        raise TypeError(f"adapter_name is {adapter_names!r:.60}, expected the name of an adapter, or a list of names")
    return list(adapter_names)


def check_known(model: nn.Module, names: Iterable[Any]) -> None:
    """Refuse names of adapters that a model does not have.

    Raises:
        TypeError: No name; a model of which another library has made something.
        ValueError: A name that the model does not have.
    """
    known = adapter_names(model)
    for name in names:
        if not isinstance(name, str):
            has = known or "none"
            raise TypeError(f"adapter_name is {name!r:.60}, expected one name, a string; the model has {has}")
        if name not in known:
            if not known:
                refuse_others(model)
            raise ValueError(
                f"the model has no adapter {name!r}; it has {known or 'none, inject one first'}"
                + did_you_mean(name, known)
            )
