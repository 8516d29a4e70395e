"""Walking through a model with injected adapters as if there were none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

from torchgraft.functional import Site
from torchgraft.functional.extending import (
    Base,
    adopt_unit,
    attributes_of,
    copied_hooks,
    hooks_of_unit,
    is_unit,
    plain_type,
    unwrapped,
)

from .biases import ATTRIBUTE, biases_of
from .layer import BaseTunerLayer
from .modules_to_save import ModulesToSaveWrapper
from .parameters import ParameterLayer, key_of
from .tokens import TrainableTokensWrapper

M = TypeVar("M", bound=nn.Module)


def unwrap(model: Any) -> nn.Module:
    """The model behind `torch.compile`, `DistributedDataParallel`, FSDP1 and torch's activation checkpointing.

    Raises:
        TypeError: Something else than a module.
    """
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}, expected a torch.nn.Module")
    return model


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by the names that they have without adapters; the time does not grow with these.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> [(name, type(module).__name__) for name, module in bare_modules(model).items()]
    [('', 'Sequential'), ('0', 'Linear')]
    """
    return {name: bare for name, bare, module in _walk(model, "") if not isinstance(module, ParameterLayer)}


def named(model: nn.Module, kind: type[M]) -> dict[str, M]:
    """Tuner layers, or wrappers of modules to save, by their names in the model; one of several names is enough.

    A layer of a parameter has the parameter's name.
    """
    found = {
        id(module): (name, module) for name, _, module in reversed(list(_walk(model, ""))) if isinstance(module, kind)
    }
    return dict(reversed(list(found.values())))


def layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The tuner layers of a model by name."""
    return named(model, BaseTunerLayer)


def parts(model: nn.Module) -> Iterator[Any]:
    """The tuner layers, the wrappers of modules to save and of embeddings, and trained biases."""
    yield from layers(model).values()
    yield from named(model, ModulesToSaveWrapper).values()
    yield from named(model, TrainableTokensWrapper).values()
    if (biases := biases_of(model)) is not None:
        yield biases


def outermost(model: nn.Module) -> dict[int, nn.Module]:
    """The outermost layer around each module with adapted parameters, by the module's id."""
    found = (layer for layer in layers(model).values() if isinstance(layer, ParameterLayer))
    return {id(layer.get_base_layer()): layer for layer in found if layer.depth == 0}


def original_base(model: nn.Module) -> Callable[[nn.Module, Site], Base]:
    """How methods see the bare modules of a model: with the weights that they have without merged adapters."""
    merged = {key_of(layer): layer.originals for layer in layers(model).values() if layer.merged}

    def base(module: nn.Module, site: Site) -> Base:
        originals = merged.get((id(module), site.leaf))
        return Base(module, site) if originals is None else originals.base(module, site)

    return base


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Name, bare module, and what stands in its place; nothing of wrappers around either."""
    bare = module = unwrapped(module)
    if isinstance(module, ParameterLayer):
        bare = module.get_base_layer()
        for layer in module.chain():
            yield f"{name}.{layer.parameter_name}", bare, layer
        module = bare
    elif isinstance(module, BaseTunerLayer):
        bare = unwrapped(module.base_layer)
    elif isinstance(module, ModulesToSaveWrapper):
        bare = unwrapped(module.original_module)
    elif isinstance(module, TrainableTokensWrapper):
        bare = unwrapped(unwrapped(module.token_adapter).base_layer)
    yield name, bare, module
    for child_name, child in bare._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name)


def bare_copy(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """A copy of a model's structure without adapters, which shares every parameter and buffer with it.

    Args:
        model: A model with injected adapters.
        adapter_name: The adapter whose copies of `modules_to_save` are to be in it, instead of the user's modules.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    units = _empty_units(model, memo)
    for module in model.modules():
        memo.update(copied_hooks(module))
    for layer in reversed(layers(model).values()):  # those within others first
        memo[id(layer)] = _gathering(layer, copy.deepcopy(layer.get_base_layer(), memo))
    for wrapper in named(model, ModulesToSaveWrapper).values():
        saved = wrapper.modules_to_save._modules.get(adapter_name or "", wrapper.original_module)
        memo[id(wrapper)] = _gathering(wrapper, copy.deepcopy(saved, memo))
    for tokens in named(model, TrainableTokensWrapper).values():
        memo[id(tokens)] = _gathering(tokens, copy.deepcopy(tokens.token_adapter.base_layer, memo))
    for module in reversed([module for module in model.modules() if "_fsdp_wrapped_module" in module._modules]):
        memo[id(module)] = copy.deepcopy(unwrapped(module), memo)
    for unit, new in units:
        vars(new).update({key: copy.deepcopy(value, memo) for key, value in attributes_of(unit).items()})
    bare = copy.deepcopy(model, memo)
    vars(bare).pop("peft_config", None)
    vars(bare).pop(ATTRIBUTE, None)
    biases = biases_of(model)
    if biases is not None and biases.adapter != adapter_name:
        own = {id(p): nn.Parameter(biases.originals()[path], False) for path, p in biases.named_parameters()}
        for module in bare.modules():
            if id(bias := module._parameters.get("bias")) in own:
                module._parameters["bias"] = own[id(bias)]
    return bare


def _empty_units(model: nn.Module, memo: dict[int, Any]) -> list[tuple[nn.Module, Any]]:
    """The units of FSDP2 in a model that are no parts of adapters, each with the module that is to be its copy."""
    ours = (BaseTunerLayer, ModulesToSaveWrapper, TrainableTokensWrapper)
    units = [module for module in model.modules() if is_unit(module)]
    for unit in units:
        memo.update(hooks_of_unit(unit))
    found = [(unit, object.__new__(plain_type(unit))) for unit in units if not isinstance(unit, ours)]
    memo.update({id(unit): new for unit, new in found})
    return found


def _gathering(part: nn.Module, bare: Any) -> Any:
    """The bare copy of what a part of an adapter held, which gathers what the part did."""
    if is_unit(part):
        adopt_unit(bare, part)
    return bare
