"""Small functions of `peft.utils` that other libraries import."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _inplace as inplace
from .._config.base import AdapterConfig
from .._config.matching import excluded, matches
from .._methods.lokr import split


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Return the parent of a module, the module, and its name there.

    Args:
        model: The model.
        key: The module's path.

    Raises:
        AttributeError: No such module.

    >>> parent, target, name = get_submodules(nn.Sequential(nn.Linear(2, 2)), "0")
    >>> type(parent).__name__, type(target).__name__, name
    ('Sequential', 'Linear', '0')
    """
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def infer_device() -> str:
    """Return the type of device that models run on here: `"cuda"` where there is one, else that of the accelerator."""
    if torch.cuda.is_available():
        return "cuda"
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """Return a weight, transposed if `fan_in_fan_out`; of a parameter a new one.

    >>> transpose(torch.zeros(2, 3), True).shape
    torch.Size([3, 2])
    """
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Return the two factors of the size of an axis, as LoKr chooses them.

    >>> factorization(256), factorization(128, 4)
    ((16, 16), (4, 32))
    """
    return split(dimension, factor)


def check_target_module_exists(config: AdapterConfig, key: str) -> bool:
    """Return whether a config means the module of a name, by `target_modules` and the fields that leave modules out.

    >>> from torchgraft.adapters import LoraConfig
    >>> check_target_module_exists(LoraConfig(target_modules=["q"], exclude_modules=["b.q"]), "a.q")
    True
    """
    return config.target_modules is not None and matches(config, key) and not excluded(config, key)


def inspect_matched_modules(tuner: nn.Module, adapter_name: str = "default") -> dict[str, list[str]]:
    """Return names of the modules that an adapter is on, `"matched"`, and of all others, `"unmatched"`.

    >>> from torchgraft.adapters import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), LoraConfig(target_modules=["0"]))
    >>> inspect_matched_modules(model)
    {'matched': ['0'], 'unmatched': ['', '1']}
    """
    model = inplace.unwrap(tuner)
    adapted = {name for name, layer in inplace.layers(model).items() if adapter_name in layer.carried_adapters}
    names = [*inplace.bare_modules(model)]
    return {
        "matched": [name for name in names if name in adapted],
        "unmatched": [name for name in names if name not in adapted],
    }


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """Return the policy that PEFT has for `FullyShardedDataParallel`: units of blocks, and of what is trained.

    Args:
        model: The model; the classes of its blocks are those in the variable `FSDP_TRANSFORMER_CLS_TO_WRAP`, by name,
            by default the models' `_no_split_modules`.

    Raises:
        TypeError: A class that no module of the model has.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    own = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    given = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    names = own if given is None else {name for name in given.split(",") if name}
    classes = {type(module).__name__: type(module) for module in model.modules()}
    if missing := sorted(names - classes.keys()):
        raise TypeError(
            f"the model has no module of class {missing[0]!r}, which is to be a unit; set FSDP_TRANSFORMER_CLS_TO_WRAP "
            "to the names of its blocks' classes"
        )
    trained = functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_trained_leaf)
    blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={classes[name] for name in names})
    return functools.partial(_or_policy, policies=[trained, blocks])


def _is_trained_leaf(module: nn.Module) -> bool:
    weight: Any = getattr(module, "weight", None)
    return weight is not None and not [*module.children()] and bool(weight.requires_grad)
