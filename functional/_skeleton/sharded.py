"""Sharded modules in copies of a model: what `fully_shard` does for its units, for copies that never write to the base.

A unit of FSDP2 swaps its parameters by hooks that are bound to the user's modules. In a copy each unit gathers the
parameters that it has for the time of its forward instead: the user's units, their parameters and what they know of
a step stay as they are. What autograd keeps of the gathered ones lives until the backward.

A module of `parallelize_module` is called with sharded inputs by its hooks. Adapters on it see whole tensors: the
inputs and the outputs of the base are gathered, and its hooks lay out what comes out of the adapters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._tensors.placement import is_sharded, whole

_KEPT = "_torchgraft_shards"
"""Where a unit of a copy keeps its shards while it runs."""


_STATE = "__composable_api_state_key"
"""What the attributes begin with in which torch's composable functions keep their state."""


def is_unit(module: nn.Module) -> bool:
    """Return whether `fully_shard` was applied to a module itself."""
    return hasattr(type(module), "_orig_cls_mro_index") and hasattr(type(module), "reshard")


def unsharded_type(module: nn.Module) -> Any:
    """Return a module's class, without what `fully_shard` put in front of it.

    >>> unsharded_type(nn.Linear(2, 2)).__name__
    'Linear'
    """
    cls: Any = type(module)
    return cls.__mro__[cls._orig_cls_mro_index] if is_unit(module) else cls


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes, without what `fully_shard` keeps of its state among those of a unit."""
    attributes = vars(module)
    if not is_unit(module):
        return attributes
    return {key: value for key, value in attributes.items() if not key.startswith(_STATE)}


def hooks_of_unit(module: Any) -> dict[int, Any]:
    """Return the hooks of a copy of a unit, by the identity of the unit's own hooks that they replace."""
    loading = module._load_state_dict_post_hooks.values()
    new_hooks: dict[int, Any] = {
        id(hook): _nothing for hook in loading if "FSDPParam." in getattr(hook, "__qualname__", "")
    }
    if not is_unit(module):
        return new_hooks
    state = module._get_fsdp_state()
    policy = Policy(state._mp_policy.param_dtype, state._mp_policy.output_dtype, state._mp_policy.cast_forward_inputs)
    for handle, hooks, new in (
        (state._pre_forward_hook_handle, module._forward_pre_hooks, Gather(policy)),
        (state._post_forward_hook_handle, module._forward_hooks, Release(policy)),
    ):
        ids = {single.id for single in getattr(handle, "handles", (handle,))}
        new_hooks |= {id(hook): new for key, hook in hooks.items() if key in ids}
    return new_hooks


def _nothing(*_: Any) -> None:
    """Do nothing where `fully_shard` would look at the user's parameters after loading."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """The dtypes of a unit: of its parameters and inputs while it runs, and of its outputs."""

    param_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_inputs: bool = True


@dataclasses.dataclass(frozen=True)
class Gather:
    """A hook before a unit's forward: it gathers the parameters that the unit has."""

    policy: Policy

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        kept = vars(module).setdefault(_KEPT, [])
        for owner in list(_own_modules(module)):
            for name, tensor in owner._parameters.items():
                if is_sharded(tensor):
                    kept.append((owner._parameters, name, tensor))
        made: dict[int, Tensor] = {}
        for registry, name, tensor in kept:
            if id(tensor) not in made:
                made[id(tensor)] = _cast(whole(tensor), self.policy.param_dtype)
            registry[name] = made[id(tensor)]
        if self.policy.cast_inputs:
            args, kwargs = (_cast_all(arguments, self.policy.param_dtype) for arguments in (args, dict(kwargs)))
        return args, kwargs


@dataclasses.dataclass(frozen=True)
class Release:
    """A hook after a unit's forward: it puts the unit's shards back."""

    policy: Policy

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        for registry, name, tensor in vars(module).pop(_KEPT, ()):
            registry[name] = tensor
        return _cast_all(output, self.policy.output_dtype)


def adopt_unit(new: nn.Module, unit: nn.Module) -> None:
    """Have a copy of a module that a unit held gather what the unit would."""
    if is_gathering(new):
        return
    hooks = {type(hook): hook for hook in hooks_of_unit(unit).values()}
    new.register_forward_pre_hook(hooks[Gather], prepend=True, with_kwargs=True)
    new.register_forward_hook(hooks[Release])


def is_gathering(module: nn.Module) -> bool:
    """Return whether a module of a copy gathers parameters for its forward."""
    return any(isinstance(hook, Gather) for hook in module._forward_pre_hooks.values())


def _own_modules(unit: nn.Module) -> Iterator[nn.Module]:
    """Yield a unit and the modules within it that are in no other unit."""
    yield unit
    for child in unit._modules.values():
        if child is not None and not is_gathering(child):
            yield from _own_modules(child)


def _cast(tensor: Any, dtype: torch.dtype | None) -> Any:
    floats = isinstance(tensor, Tensor) and tensor.is_floating_point()
    return tensor.to(dtype) if dtype is not None and floats else tensor


def _cast_all(tree: Any, dtype: torch.dtype | None) -> Any:
    """Cast every tensor of a structure, whatever else is in it."""
    if dtype is None:
        return tree
    from torch.distributed.utils import _apply_to_tensors

    return _apply_to_tensors(lambda tensor: _cast(tensor, dtype), tree)
