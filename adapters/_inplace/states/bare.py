"""The model beneath the adapters, as a copy that shares its tensors."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from torchgraft.functional.extending import (
    Reach,
    adopt_unit,
    attributes_of,
    copied_hooks,
    hooks_of_unit,
    is_unit,
    unsharded_type,
    unwrapped,
)

from ..beside.biases import ATTRIBUTE, biases_of
from ..walk import placed_in, placed_modules

_INTERNAL = frozenset(vars(nn.Module()))


def bare_copy(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """Return a copy of a model's structure without adapters, which shares every parameter and buffer with it.

    What hangs in its modules and leads to none of them (`model.config`) is shared too: what is written there counts.

    Args:
        model: A model with injected adapters.
        adapter_name: The adapter whose copies of `modules_to_save` are to be in it, instead of the user's modules.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    units = _empty_units(model, memo)
    reach = Reach(model)
    for module in model.modules():
        memo.update(copied_hooks(module))
        attributes = (value for name, value in vars(module).items() if name not in _INTERNAL)
        memo.update((id(value), value) for value in attributes if id(value) not in memo and not reach.holds(value))
    for _, part in reversed(placed_modules(model)):  # those within others first
        memo[id(part)] = _gathering(part, copy.deepcopy(part.copied_module(adapter_name or ""), memo))
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
    units = [module for module in model.modules() if is_unit(module)]
    for unit in units:
        memo.update(hooks_of_unit(unit))
    found = [(unit, object.__new__(unsharded_type(unit))) for unit in units if placed_in(unit) is None]
    memo.update({id(unit): new for unit, new in found})
    return found


def _gathering(part: Any, bare: Any) -> Any:
    """Return the bare copy of what a part of an adapter held, which gathers what the part did."""
    if is_unit(part):
        adopt_unit(bare, part)
    return bare
