"""Placement: where the values of a tensor are: here in one piece, in shards of several processes, or offloaded.

Sharded tensors are torch's `DTensor` (`fully_shard`, `parallelize_module`). Reading one in one piece is a collective
operation: each process of its mesh has to take part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is spread over the processes of a mesh.

    >>> is_sharded(torch.zeros(2))
    False
    """
    return type(tensor) not in _PLAIN and hasattr(type(tensor), "full_tensor")


def whole(tensor: Any) -> Any:
    """Return a tensor in one piece, gathered from all processes where it is sharded; differentiable.

    >>> whole(torch.ones(1))
    tensor([1.])
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def replicated(value: Tensor, mesh: Any) -> Any:
    """Return a tensor that every process of a mesh has in one piece as a `DTensor`; differentiable."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def spread(value: Tensor, mesh: Any, placements: Any) -> Any:
    """Return a tensor that every process has in one piece as a sharded one; differentiable, without communication."""
    return replicated(value, mesh).redistribute(placements=placements)


def agreed(value: Tensor, like: Tensor) -> Tensor:
    """Return what the first process has drawn, for a model whose tensors are sharded like `like`.

    >>> agreed(torch.ones(1), torch.zeros(1))
    tensor([1.])
    """
    if not is_sharded(like) or value.is_meta:
        return value
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    value = value.detach().to(local_part(like).device).contiguous()
    for axis in range(mesh.ndim):
        group = mesh.get_group(axis)
        torch.distributed.broadcast(value, torch.distributed.get_global_rank(group, 0), group)
    return value


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process has, in the tensor's own memory.

    >>> local_part(torch.ones(1, requires_grad=True))
    tensor([1.])
    """
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def write(tensor: Tensor, value: Tensor) -> None:
    """Copy values into a tensor where it is; of a sharded one this process writes its own part.

    Args:
        tensor: The tensor to be written to.
        value: Values of its shape, in one piece or sharded.

    >>> tensor = torch.zeros(2)
    >>> write(tensor, torch.ones(2))
    >>> tensor
    tensor([1., 1.])
    """
    target: Any = tensor.detach()
    if is_sharded(target):
        device = target.to_local().device
        mesh, placements = target.device_mesh, target.placements
        if is_sharded(value):
            value = value.detach().redistribute(mesh, placements)  # type: ignore[attr-defined]
        else:
            value = spread(value.detach().to(device), mesh, placements)
    else:
        value = whole(value)
    local_part(target).copy_(local_part(value))


def offloading(module: Any) -> Iterator[Any]:
    """Yield the hooks of accelerate that keep a module's weights elsewhere between its calls."""
    hook = vars(module).get("_hf_hook")
    for part in getattr(hook, "hooks", (hook,)):
        if getattr(part, "offload", False) and getattr(part, "weights_map", None) is not None:
            yield part


def copied_hooks(module: Any) -> dict[int, Any]:
    """Copy these hooks for a copy of their module, by identity: each keeps what it knows of a call to itself."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return {}
    parts = getattr(hook, "hooks", (hook,))
    if not all(hasattr(part, "weights_map") for part in parts):
        return {}
    made = {id(part): copy.copy(part) for part in parts}
    for copied in made.values():
        if copied.tied_params_map is not None:
            copied.tied_params_map = {key: dict(held) for key, held in copied.tied_params_map.items()}
    if id(hook) not in made:
        made[id(hook)] = copy.copy(hook)
        made[id(hook)].hooks = tuple(made[id(part)] for part in parts)
    return made


def computed(module: Any, name: str) -> Any:
    """Return a module's tensor of this name as its next call has it.

    Torch's pruning and its older norms set a plain attribute before each call of the module, which until then is what
    the tensors were at the last one. Here it is computed from what they are now; the module stays as it is.

    >>> linear = torch.nn.utils.prune.l1_unstructured(torch.nn.Linear(2, 1), "weight", 1)
    >>> _ = linear.weight_orig.data.fill_(3)
    >>> computed(linear, "weight").sum()
    tensor(3., grad_fn=<SumBackward0>)
    """
    hook = _computing(module, name)
    if isinstance(hook, BasePruningMethod):
        return hook.apply_mask(module)
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(module, do_power_iteration=False)
    return getattr(module, name) if hook is None else hook.compute_weight(module)


def is_computed(module: Any, name: str) -> bool:
    """Return whether a parametrization, pruning or a norm computes a module's tensor of this name from others.

    >>> is_computed(torch.nn.utils.prune.identity(torch.nn.Linear(2, 1), "weight"), "weight")
    True
    """
    return name in vars(module)["_modules"].get("parametrizations", ()) or _computing(module, name) is not None


def _computing(module: Any, name: str) -> Any:
    for hook in vars(module)["_forward_pre_hooks"].values():
        if isinstance(hook, BasePruningMethod):
            if hook._tensor_name == name:
                return hook
        elif isinstance(hook, (SpectralNorm, WeightNorm)) and hook.name == name:
            return hook
    return None


def resting(module: Any, name: str) -> Any:
    """Return a module's tensor of this name with its values; of an offloaded one those that its hook would load.

    >>> resting(torch.nn.Linear(2, 1), "bias").shape
    torch.Size([1])
    """
    tensor = computed(module, name)
    if not isinstance(tensor, Tensor) or not tensor.is_meta:
        return tensor
    for hook in offloading(module):
        return hook.weights_map[name].to(hook.execution_device)
    return tensor


def store(module: Any, name: str, value: Tensor) -> None:
    """Replace an offloaded tensor; what is offloaded to a disk rests in memory from then on.

    Raises:
        ValueError: A tensor that is not offloaded, or in a way that is not accelerate's.
    """
    hook = next(offloading(module), None)
    places: Any = None if hook is None else hook.weights_map
    key = name
    while hasattr(places, "dataset") and hasattr(places, "prefix"):
        places, key = places.dataset, places.prefix + key
    places = getattr(places, "state_dict", places)
    if not hasattr(places, "__setitem__"):
        raise ValueError(
            f"{name} of a {type(module).__name__} is on the meta device, so there is no place to write values to; load "
            "the model's weights first, or take accelerate's hooks off (accelerate.hooks.remove_hook_from_submodules)"
        )
    old = resting(module, name)
    places[key] = value.detach().to(places[key].device if key in places else old.device, old.dtype)
