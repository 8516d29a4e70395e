"""What an adapter trains beside its sites, tensors of the base that it has copies of: whole modules, biases.

Fields, names and keys are those of PEFT's `tuners/tuners_utils.py` and `utils/other.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from torchgraft.functional.replaced import Replaced, replaced

from .fields import require

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)

Plan = dict[str, dict[str, Replaced]]


def find_replaced(config: Any, modules: Mapping[str, nn.Module], model: nn.Module, paths: Iterable[str]) -> Plan:
    """The tensors of a model that an adapter replaces.

    Args:
        config: An adapter's config.
        modules: The model's modules by name, also those under several names.
        model: The model, which may know its embeddings.
        paths: Names of the modules that the adapter targets.

    Raises:
        ValueError: A field that names nothing, or a tensor that cannot be trained.

    >>> from torchgraft.adapters import LoraConfig
    >>> model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 1, bias=False)})
    >>> config = LoraConfig(target_modules=["body"], modules_to_save=["head"])
    >>> find_replaced(config, dict(model.named_modules()), model, ["body"])
    {'head': {'weight': Replaced(names=('head.weight',), shape=(1, 2), rows=None)}}
    """
    plan: Plan = {}
    saved = saved_modules(config, modules)
    for path, module in saved.items():
        for names in _tensors_in(modules, path, module):
            _add(plan, replaced(modules, names))
    for names in _biases(config, modules, set(paths), saved):
        _add(plan, replaced(modules, names))
    return plan


def _add(plan: Plan, one: Replaced, leaf: str | None = None) -> None:
    path, _, name = one.names[0].rpartition(".")
    plan.setdefault(path, {})[leaf or name] = one


def _tensors_in(modules: Mapping[str, nn.Module], path: str, module: nn.Module) -> list[tuple[str, ...]]:
    """The names of each parameter of a module, also those under other names of the module, its own first."""
    inside = {id(one) for one in module.modules()}
    found: dict[int, list[str]] = {}
    for name, owner in modules.items():
        for leaf, tensor in owner._parameters.items() if id(owner) in inside else ():
            if tensor is not None:
                found.setdefault(id(tensor), []).append(f"{name}.{leaf}" if name else leaf)
    return [tuple(sorted(names, key=lambda name: not name.startswith(f"{path}."))) for names in found.values()]


def _biases(
    config: Any, modules: Mapping[str, nn.Module], paths: Collection[str], saved: Mapping[str, nn.Module]
) -> Iterable[tuple[str, ...]]:
    """The names of each bias that `config.bias` means, outside of modules that are trained as a whole."""
    if config.bias == "none":
        return []
    inside = {id(inner) for module in saved.values() for inner in module.modules()}
    wanted = {id(module) for path, module in modules.items() if config.bias == "all" or path in paths} - inside
    found: dict[int, list[str]] = {}
    for path, module in modules.items():
        bias = module._parameters.get("bias")
        if bias is not None and id(module) in wanted:
            found.setdefault(id(bias), []).append(f"{path}.bias" if path else "bias")
    require(
        bool(found),
        config,
        f"bias is {config.bias!r}, and none of the modules that it means has a bias; leave it at 'none'",
    )
    return map(tuple, found.values())


def saved_buffers(config: Any, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What files have of `modules_to_save` beside parameters: their buffers, by name in the model."""
    return {
        f"{path}.{name}": tensor
        for path, module in saved_modules(config, modules).items()
        for name, tensor in module.state_dict(keep_vars=True).items()
        if not isinstance(tensor, nn.Parameter)
    }


def saved_modules(config: Any, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that `config.modules_to_save` names, each under one of its names.

    A name is a whole name, or the end of one after a dot. (PEFT takes any end of a name, so that `"in0"` wraps `lin0`.)

    Args:
        config: An adapter's config.
        modules: The model's modules by name.

    Raises:
        ValueError: A name that matches nothing, or a container without a forward; a part of another one.

    >>> from torchgraft.adapters import LoraConfig
    >>> list(saved_modules(LoraConfig(modules_to_save=["head"]), {"model": nn.ReLU(), "model.head": nn.ReLU()}))
    ['model.head']
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for saved in config.modules_to_save or ():
        paths = [path for path in modules if path and (path == saved or path.endswith(f".{saved}"))]
        require(bool(paths), config, f"modules_to_save has {saved!r}, which is no module of the model")
        for path in paths:
            module = modules[path]
            require(
                not isinstance(module, _CONTAINERS),
                config,
                f"modules_to_save names {path}, a {type(module).__name__}, which has no forward; name what is in it",
            )
            found.setdefault(id(module), (path, module))
    names = {key: path for key, (path, _) in found.items()}
    for path, module in found.values():
        for inner in module.modules():
            if inner is not module and id(inner) in names:
                raise ValueError(
                    f"modules_to_save names {names[id(inner)]}, which is a part of {path}; name one of them"
                )
    return dict(found.values())
