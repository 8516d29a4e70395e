"""Tensors of models that are sharded or offloaded: read whole, and written to where they rest.

Of a model under FSDP2 and tensor parallelism, what is read is gathered and what is written goes to each process's own
part. The parameters of FSDP1 are parts of a flat one, which is gathered as a whole for the time of an operation, and
those that accelerate has offloaded are exchanged in the map that its hooks load from. All processes take part.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchgraft.functional.extending import (
    attributes_of,
    copied_hooks,
    is_sharded,
    is_unit,
    local_part,
    offloading,
    own_tensor,
    resting,
    store,
    write,
)

P = ParamSpec("P")
R = TypeVar("R")

_IN_FLAT = contextvars.ContextVar("_IN_FLAT", default=False)
"""Whether parameters are, for now, views of a gathered flat one, which has to be written to in place."""


@contextlib.contextmanager
def gathered(model: Any, writes: bool = False) -> Iterator[None]:
    """Have a model's tensors be such that they can be read whole, and written to if `writes`.

    Raises:
        ValueError: A part of a model whose parameters are shards that only the whole model can gather.
    """
    if is_flat() or not isinstance(model, nn.Module) or not dist.is_available() or not dist.is_initialized():
        yield
        return
    for module in model.modules():
        if is_unit(module):
            module.reshard()  # type: ignore[operator]
    flat = [module for module in model.modules() if "_fsdp_wrapped_module" in module._modules]
    _check_gatherable(model, flat)
    if not flat:
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    handles: list[Any] = [module._handle for module in flat if module._handle is not None]
    token = _IN_FLAT.set(True)
    try:
        if any(handle._training_state.name == "SUMMON_FULL_PARAMS" for handle in handles):
            yield
        else:
            with FullyShardedDataParallel.summon_full_params(model, writeback=writes):
                yield
    finally:
        _IN_FLAT.reset(token)


def _check_gatherable(model: nn.Module, flat: list[nn.Module]) -> None:
    inside = {id(parameter) for module in flat for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_fsdp_flattened", False) and id(parameter) not in inside and dist.get_world_size() > 1:
            raise ValueError(
                f"{name}: is a shard of a flat parameter of FullyShardedDataParallel, which only the wrapped model can "
                "gather; give the wrapped model instead of its module"
            )


def check_averaged(model: Any, trained: bool) -> None:
    """Refuse new parameters that are to be trained in a model whose gradients torch averages among processes already.

    Raises:
        ValueError: A model in `DistributedDataParallel`, or one that several processes have sharded.
    """
    if not trained or not isinstance(model, nn.Module) or not dist.is_available() or not dist.is_initialized():
        return
    for name, module in model.named_modules():
        sharded = is_unit(module) or "_fsdp_wrapped_module" in module._modules
        if isinstance(module, nn.parallel.DistributedDataParallel) or (sharded and dist.get_world_size() > 1):
            what = "sharded by fully_shard" if is_unit(module) else f"wrapped by {type(module).__name__}"
            raise ValueError(
                f"{name or 'the model'} is {what} already, so the gradients of parameters that are added now would "
                "not be averaged; inject the adapter before that, or give a config with inference_mode=True for one "
                "that is not trained"
            )


def on_gathered(
    writes: bool = False, when: Callable[[nn.Module], bool] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have a function of a model, its first argument, find the model's tensors whole, always or for some models."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            model: Any = args[0] if args else kwargs.get("model")
            if when is not None and not (dist.is_available() and dist.is_initialized() and when(model)):
                return function(*args, **kwargs)
            with gathered(model, writes):
                return function(*args, **kwargs)

        return run

    return decorate


def is_flat() -> bool:
    """Return whether parameters are views of a gathered flat one for now, and others afterwards."""
    return _IN_FLAT.get()


def moves(tensor: Any) -> bool:
    """Return whether a tensor's memory may become another without anybody's writing to it."""
    return is_flat() or is_sharded(tensor)


def kept(tensor: Tensor) -> Tensor:
    """Return a tensor's values for later: a copy of those that are there for now only."""
    return tensor.detach().clone() if is_flat() else tensor.detach()


def put(module: Any, leaf: str, value: Tensor) -> Tensor:
    """Have a module's own tensor be another one, its parameter staying the same object; returns what it was.

    What is sharded is written to in place, as the memory that is gathered from is not the parameter's to exchange.
    """
    own = own_tensor(module, leaf)
    assert own is not None
    if own.is_meta and next(offloading(module), None) is not None:
        before = resting(module, leaf)
        store(module, leaf, value)
        result: Tensor = before
        return result
    if moves(own):
        before = own.detach().clone()
        write(own, value)
        return before
    before, own.data = own.data, value.to(own.device, own.dtype)
    return before


def loaded_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module with all its tensors in memory, without the hooks that load what is offloaded."""
    hooks = {key: hook for one in module.modules() for key, hook in copied_hooks(one).items()}
    copied = copy.deepcopy(module, hooks)
    for theirs, own in zip(module.modules(), copied.modules(), strict=True):
        if next(offloading(theirs), None) is None:
            continue
        for registry in (own._parameters, own._buffers):
            for name, tensor in registry.items():
                if tensor is not None and tensor.is_meta:
                    loaded = resting(theirs, name).clone()
                    parameter = isinstance(tensor, nn.Parameter)
                    registry[name] = nn.Parameter(loaded, tensor.requires_grad) if parameter else loaded
        for attribute in ("_hf_hook", "_old_forward", "forward"):
            vars(own).pop(attribute, None)
    return copied


def hand_over(unit: Any, module: nn.Module) -> None:
    """Have a module be the unit of FSDP2 that was around it, with those of its parameters that are the module's."""
    from torch.distributed._composable_state import _insert_module_state

    state, cls = unit._get_fsdp_state(), type(module)
    ids = {one.id for one in (state._pre_forward_hook_handle, state._post_forward_hook_handle) if hasattr(one, "id")}
    if len(ids) != 2 or is_unit(module):
        raise ValueError(
            f"a {cls.__name__} with an adapter was sharded in one group with other modules, which no module without "
            "the adapter can take the place of; call merge_adapter(model), which leaves the layers where they are"
        )
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    state._pre_forward_hook_handle = module.register_forward_pre_hook(
        state._pre_forward, prepend=True, with_kwargs=True
    )
    state._post_forward_hook_handle = module.register_forward_hook(state._post_forward)
    state._modules = (module,)
    _insert_module_state(module, state)
    vars(module).update({key: value for key, value in vars(unit).items() if key not in attributes_of(unit)})
    bases = (type(unit).__mro__[unit._orig_cls_mro_index - 1], cls)
    module.__class__ = type(f"FSDP{cls.__name__}", bases, {"__deepcopy__": type(unit).__deepcopy__})
    own = set(module.modules())
    for group in state._fsdp_param_groups:
        group.modules = (module,)
        group.fsdp_params = [one for one in group.fsdp_params if one._module_info.module in own]


def fill(module: Any, name: str, value: Tensor) -> None:
    """Copy values into a module's tensor, wherever it rests."""
    own: Tensor = getattr(module, name)
    if own.is_meta:
        store(module, name, value)
    else:
        with torch.no_grad():
            write(own, value)


def groups_of(target: Any, tensors: Iterable[Tensor]) -> list[tuple[Any, torch.device]]:
    """Return the groups of processes that have a part of the tensors each, and the device that they exchange on."""
    for tensor in tensors:
        if is_sharded(tensor):
            mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
            return [(mesh.get_group(axis), local_part(tensor).device) for axis in range(mesh.ndim)]
    for module in target.modules() if isinstance(target, nn.Module) else ():
        if "_fsdp_wrapped_module" in module._modules:
            flat: Any = module
            return [(flat.process_group, flat.compute_device)]
    return []


def once(groups: list[tuple[Any, torch.device]], write_files: Callable[[], None], what: Any) -> None:
    """Have the first process of some groups write, and all go on when it has.

    Raises:
        OSError: The first process could not write.
    """
    done = torch.ones(1)
    try:
        if all(dist.get_rank(group) == 0 for group, _ in groups):
            write_files()
    except BaseException:
        done.zero_()
        raise
    finally:
        for group, device in groups:
            done = done.to(device)
            dist.broadcast(done, dist.get_global_rank(group, 0), group)
    if not done:
        raise OSError(f"{what}: the first process could not write to it; see what it says")
