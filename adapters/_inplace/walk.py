"""Walking through a model with injected adapters as if there were none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

from torchgraft.functional import Site
from torchgraft.functional.extending import Base, advice_on, check_module, check_no_view, unwrapped

from .beside.biases import biases_of
from .beside.modules_to_save import ModulesToSaveWrapper
from .beside.tokens import TrainableTokensWrapper
from .layer.leaves import key_of
from .layer.parameters import ParameterLayer
from .layer.tuner_layer import BaseTunerLayer
from .placed import Placed, PlacedModule

M = TypeVar("M", bound=nn.Module)

KINDS = (BaseTunerLayer, ModulesToSaveWrapper, TrainableTokensWrapper)
"""The kinds of modules that adapters place in a model."""


class ModelWrapper(nn.Module):
    """A module around a model with injected adapters (`PeftModel`): functions of the model look through it."""

    def get_base_model(self) -> Any:
        """Return the model."""
        raise NotImplementedError


def unwrap(model: Any) -> nn.Module:
    """Return the model behind `torch.compile`, `DistributedDataParallel`, FSDP1, activation checkpointing, `PeftModel`.

    Raises:
        TypeError: Something else than a module, or a model that PEFT has wrapped.
    """
    inner: nn.Module = unwrapped(model)
    while isinstance(inner, ModelWrapper):
        inner = unwrapped(inner.get_base_model())
    check_module(inner)
    if placed_in(inner) is None and (advice := advice_on(inner)):
        raise TypeError(f"the model: {type(inner).__name__} {advice}")
    return inner


def is_wrapped(model: nn.Module) -> bool:
    """Return whether a model is a wrapper around the user's, in whose state dict keys begin with PEFT's prefix.

    >>> is_wrapped(nn.Linear(2, 2))
    False
    """
    return isinstance(unwrapped(model), ModelWrapper)


def refuse_others(model: nn.Module) -> None:
    """Refuse a model without adapters in place that has others: a view of a graft, or a model with PEFT's.

    Raises:
        TypeError: It has; names the first.
    """
    instead = "Its adapter is a tree, for functions of the graft: save_adapter(graft, path, params=params)"
    check_no_view(model, "in place", instead)
    for path, module in model.named_modules():
        if advice := advice_on(module):
            raise TypeError(f"{path}: {type(module).__name__} {advice}")


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by the names that they have without adapters; the time does not grow with these.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> [(name, type(module).__name__) for name, module in bare_modules(model).items()]
    [('', 'Sequential'), ('0', 'Linear')]
    """
    return {name: bare for name, bare, _ in _walk(model, "")}


def named(model: nn.Module, kind: type[M]) -> dict[str, M]:
    """Tuner layers, or wrappers of modules to save, by their names in the model; one of several names is enough.

    A layer of a parameter has the parameter's name.
    """
    found: list[tuple[str, Any]] = [*placed_modules(model)]
    return {name: part for name, part in found if isinstance(part, kind)}


def layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Return the tuner layers of a model by name."""
    return named(model, BaseTunerLayer)


def adapted_modules(model: nn.Module, adapter_name: str) -> list[str]:
    """Return names of the modules that an adapter is on, or has a copy of.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> adapted_modules(model, "default")
    ['0']
    """
    found = placed_modules(unwrap(model))
    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    return [name for name, part in found if isinstance(part, kinds) and adapter_name in part.carried_adapters]


def placed_modules(model: nn.Module) -> list[tuple[str, PlacedModule]]:
    """Return what adapters have in the places of a model's modules, each with one of its names, outer ones first."""
    found: dict[int, tuple[str, PlacedModule]] = {}
    for *_, around in _walk(model, ""):
        for name, part in around:
            found.setdefault(id(part), (name, part))
    return list(found.values())


def named_parts(model: nn.Module) -> list[tuple[str, Placed]]:
    """All that adapters have in a model, by name: layers, wrappers of modules and of embeddings, and trained biases."""
    inside = placed_modules(model)
    found: list[tuple[str, Placed]] = [one for kind in KINDS for one in inside if isinstance(one[1], kind)]
    if (biases := biases_of(model)) is not None:
        found.append(("", biases))
    return found


def parts(model: nn.Module) -> list[Placed]:
    """Return all that adapters have in a model."""
    return [part for _, part in named_parts(model)]


def placed_in(module: nn.Module | None) -> PlacedModule | None:
    """Return a module of a model as what adapters have there, `None` for one of the user's."""
    return module if isinstance(module, KINDS) else None


def outermost(model: nn.Module) -> dict[int, nn.Module]:
    """Return the outermost layer around each module with adapted parameters, by the module's id."""
    found = named(model, ParameterLayer).values()
    return {id(layer.get_base_layer()): layer for layer in found if layer.depth == 0}


def original_base(model: nn.Module) -> Callable[[nn.Module, Site], Base]:
    """Return how methods see the bare modules of a model: with the weights that they have without merged adapters."""
    merged = {key_of(layer): layer.originals for layer in layers(model).values() if layer.merged}

    def base(module: nn.Module, site: Site) -> Base:
        originals = merged.get((id(module), site.leaf))
        return Base(module, site) if originals is None else originals.base(module, site)

    return base


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, list[tuple[str, PlacedModule]]]]:
    """Name and module without adapters, and what they have in its place by name; nothing of wrappers around either."""
    waiting: list[tuple[str, nn.Module]] = [(name, module)]
    while waiting:
        name, module = waiting.pop()
        module = unwrapped(module)
        part = placed_in(module)
        bare = module if part is None else part.user_module
        yield name, bare, [] if part is None else list(part.under_names(name))
        start = f"{name}." if name else ""
        children = [(start + own, child) for own, child in bare._modules.items() if child is not None]
        waiting += reversed(children)
