"""Wrappers: modules that stand around another one and are no part of its model's names.

`DistributedDataParallel`, `FullyShardedDataParallel`, torch's activation checkpointing and `torch.compile` each put a
module around the user's. Names of sites and keys of files are those of the model without them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .placement import resting

_CHILDREN = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
"""What wrappers call the module that they are around; no other module has children of these names."""


_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def child_of_wrapper(module: nn.Module) -> str | None:
    """Return the name under which a wrapper holds what it wraps; `None` for a module that is no wrapper.

    >>> child_of_wrapper(nn.DataParallel(nn.Linear(2, 2))), child_of_wrapper(nn.Linear(2, 2))
    ('module', None)
    """
    if isinstance(module, _PARALLEL):
        return "module"
    held = module._modules
    return None if _CHILDREN.isdisjoint(held) else next(name for name in held if name in _CHILDREN)


def unwrapped(module: Any) -> Any:
    """Return the module within all wrappers around it; what is no module is returned as it is.

    >>> unwrapped(nn.DataParallel(nn.Linear(2, 2)))
    Linear(in_features=2, out_features=2, bias=True)
    """
    while isinstance(module, nn.Module) and (name := child_of_wrapper(module)) is not None:
        module = module._modules[name]
    return module


def submodule(model: nn.Module, path: str) -> Any:
    """Return the module of a name that does not speak of wrappers.

    Raises:
        AttributeError: There is none.

    >>> submodule(nn.Sequential(nn.DataParallel(nn.Sequential(nn.ReLU()))), "0.0")
    ReLU()
    """
    module = unwrapped(model)
    for part in path.split(".") if path else ():
        module = unwrapped(getattr(module, part))
    return module


def without_parallel(model: Any) -> Any:
    """Return the module within `DistributedDataParallel` or `DataParallel`, whose forwards do more than run it.

    >>> without_parallel(nn.DataParallel(nn.ReLU()))
    ReLU()
    """
    while isinstance(model, _PARALLEL):
        model = model.module
    return model


def bare_name(name: str) -> str:
    """Return the name of a module or a tensor without those of the wrappers on the way to it.

    >>> bare_name("layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    if "._" not in name and not name.startswith("_"):  # then no part is one of theirs
        return name
    return ".".join(part for part in name.split(".") if part not in _CHILDREN)


def around(paths: Iterable[str]) -> set[str]:
    """Return the names of modules and of all that they are in, the model's own name, `""`, among them.

    >>> sorted(around(["layers.0.q"]))
    ['', 'layers', 'layers.0', 'layers.0.q']
    """
    found = {""}
    for path in paths:
        while path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's modules by all their names, those within a wrapper in its place.

    >>> list(modules_of(nn.Sequential(nn.Linear(2, 2))))
    ['', '0']
    """
    return {bare_name(name): module for name, module in model.named_modules(remove_duplicate=False)}


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return a model's state dict, with the values of what is offloaded.

    >>> list(state_of(nn.Linear(2, 1)))
    ['weight', 'bias']
    """
    state = model.state_dict()
    away = [name for name, tensor in state.items() if isinstance(tensor, Tensor) and tensor.is_meta]
    modules = modules_of(model) if away else {}
    for name in away:
        path, _, leaf = name.rpartition(".")
        state[name] = resting(modules[path], leaf)
    return state


def check_flat(path: str, module: nn.Module) -> None:
    """Refuse a module whose parameters are parts of a flat one.

    Raises:
        TypeError: A module of FSDP1; says what to do.
    """
    parameters = module._parameters
    if (
        "_fsdp_wrapped_module" in module._modules
        or "_flat_param" in parameters
        or any(getattr(p, "_fsdp_flattened", False) for p in parameters.values())
    ):
        raise TypeError(
            f"{path}: its parameters are parts of a flat one of FullyShardedDataParallel, which no copy can gather. "
            "Shard the model with torch.distributed.fsdp.fully_shard, which a graft can be bound to, or inject the "
            "adapter before the model is wrapped: inject_adapter_in_model(config, model)"
        )
