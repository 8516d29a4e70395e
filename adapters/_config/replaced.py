"""What an adapter trains beside its sites, tensors of the base that it has copies of: whole modules, biases, tokens.

Fields, names and keys are those of PEFT's `tuners/tuners_utils.py` and `utils/other.py`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from torchgraft.functional.extending import Replaced, each, replaced

from .messages import require
from .targets import meant_module
from .ties import names_by_tensor, others_tied_to, source
from .tokens import LEAF, find_tokens

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)

Plan = dict[str, dict[str, Replaced]]
C = TypeVar("C", bound=Any)


def find_replaced(config: Any, modules: Mapping[str, nn.Module], model: nn.Module, paths: Iterable[str]) -> Plan:
    """Return the tensors of a model that an adapter replaces.

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
    paths = list(paths)
    _warn_of_heads(config, modules, paths)
    plan: Plan = {}
    tying = getattr(config, "ensure_weight_tying", False)
    saved = saved_modules(config, modules)
    if tying and saved and not any(others_tied_to(path, modules) for path in [*saved, *paths] if path in modules):
        warnings.warn(
            f"{type(config).__name__}: ensure_weight_tying is True, and nothing is tied to modules_to_save",
            UserWarning,
            stacklevel=2,
        )
    inside = {id(inner): path for path, module in saved.items() for inner in module.modules()}
    for names in names_by_tensor(modules).values():
        for path in saved:
            own = [name for name in names if inside.get(id(modules[name.rpartition(".")[0]])) == path]
            if own:
                _add(plan, replaced(modules, [own[0], *(name for name in names if name != own[0])] if tying else own))
    for bias in _biases(config, modules, set(paths), inside):
        _add(plan, replaced(modules, bias))
    if config.token_rows(modules, model) is not None:
        taken = {id(modules[path]): "target_modules does" for path in paths}
        taken |= dict.fromkeys(inside, "modules_to_save does")
        for one in find_tokens(config, modules, model, taken).values():
            _add(plan, one, LEAF)
    return plan


HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The modules that PEFT's `get_peft_model` trains as a whole, by `task_type`."""


def heads_of(config: Any) -> tuple[str, ...]:
    """Return names of the new heads that models of a config's task have."""
    return HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ())


def with_heads(config: C, names: Iterable[str], heads: Sequence[str]) -> C:
    """Return a config whose `modules_to_save` has the new heads of a task, if one of them is among these names.

    >>> from torchgraft.adapters import LoraConfig
    >>> with_heads(LoraConfig(), ["model.score"], ["classifier", "score"]).modules_to_save
    ['classifier', 'score']
    """
    if not {name.rpartition(".")[2] for name in names}.intersection(heads):
        return config
    return dataclasses.replace(config, modules_to_save=list(dict.fromkeys([*(config.modules_to_save or ()), *heads])))


def _warn_of_heads(config: Any, modules: Mapping[str, nn.Module], paths: Iterable[str]) -> None:
    """Say which new heads stay frozen, that a config's task has and its `modules_to_save` leave out."""
    heads = heads_of(config)
    if not heads or config.inference_mode:
        return
    given = set(config.modules_to_save or ()) | set(paths)
    named = [name for name in heads if name in modules and next(modules[name].parameters(), None) is not None]
    frozen = [name for name in named if not any(one == name or one.startswith(f"{name}.") for one in given)]
    if frozen:
        warnings.warn(
            f"{type(config).__name__}: task_type is {config.task_type!r}, and {', '.join(frozen)} of the model stays "
            f"frozen, as it is no adapter; if it is new, set modules_to_save={list(heads)!r} (those of them that the "
            f"model has: {frozen!r}), which PEFT's get_peft_model does by itself",
            UserWarning,
            stacklevel=2,
        )


def other_names(plan: Mapping[str, Mapping[str, Replaced]]) -> dict[str, tuple[str, str]]:
    """The further names of tied tensors that are replaced as a whole, with path and leaf; files have them too."""
    return {name: (path, leaf) for path, leaf, one in each(plan) if one.rows is None for name in one.names[1:]}


def _add(plan: Plan, one: Replaced, leaf: str | None = None) -> None:
    path, _, name = one.names[0].rpartition(".")
    plan.setdefault(path, {})[leaf or name] = one


def _biases(
    config: Any, modules: Mapping[str, nn.Module], paths: Collection[str], inside: Collection[int]
) -> Iterable[tuple[str, ...]]:
    """Return the names of each bias that `config.bias` means, outside of modules that are trained as a whole."""
    if config.bias == "none":
        return []
    wanted = {id(module) for path, module in modules.items() if config.bias == "all" or path in paths} - set(inside)
    found: dict[int, list[str]] = {}
    for path, module in modules.items():
        bias = module._parameters.get("bias")
        if bias is not None and id(module) in wanted:
            found.setdefault(id(bias), []).append(f"{path}.bias" if path else "bias")
    if not found:
        warnings.warn(
            f"{type(config).__name__}: bias is {config.bias!r}, and none of the modules that it means has a bias, so "
            "none is trained; it is the same as 'none' here",
            UserWarning,
            stacklevel=2,
        )
    return map(tuple, found.values())


def saved_buffers(config: Any, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return what files have of `modules_to_save` beside parameters: their buffers, by name in the model."""
    return {
        f"{path}.{name}": tensor
        for path, module in saved_modules(config, modules).items()
        for name, tensor in module.state_dict(keep_vars=True).items()
        if not isinstance(tensor, nn.Parameter)
    }


def saved_modules(config: Any, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules that `config.modules_to_save` names, each under one of its names.

    A name is a whole name, or the end of one after a dot. (PEFT takes any end of a name, so that `"in0"` wraps `lin0`.)
    Of a task's heads, all of which PEFT writes into its configs, one has to be there.

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
    wanted = config.modules_to_save or ()
    ends = {path.rpartition(".")[2] for path in modules}
    heads = {head for one in HEADS.values() if ends.intersection(one) and set(one) <= set(wanted) for head in one}
    for saved in wanted:
        paths = [path for path in modules if path and (path == saved or path.endswith(f".{saved}"))]
        if not paths and saved not in heads:
            hint = meant_module(saved, modules)
            require(False, config, f"modules_to_save has {saved!r}, which is no module of the model{hint}")
        for path in paths:
            module = modules[path]
            require(
                not isinstance(module, _CONTAINERS),
                config,
                f"modules_to_save names {path}, a {type(module).__name__}, which has no forward; name what is in it",
                TypeError,
            )
            found.setdefault(id(module), (path, module))
    for path in config.whole_modules(modules):
        found.setdefault(id(modules[path]), (path, modules[path]))
    if getattr(config, "ensure_weight_tying", False):
        found = _tied_to_sources(found, modules)
    names = {key: path for key, (path, _) in found.items()}
    for path, module in found.values():
        for inner in module.modules():
            if inner is not module and id(inner) in names:
                raise ValueError(
                    f"modules_to_save names {names[id(inner)]}, which is a part of {path}; name one of them"
                )
    return dict(found.values())


def _tied_to_sources(
    found: Mapping[int, tuple[str, nn.Module]], modules: Mapping[str, nn.Module]
) -> dict[int, tuple[str, nn.Module]]:
    """Return these modules, each that is tied to an embedding replaced by the embedding, which is trained for both."""
    names = names_by_tensor(modules)
    out: dict[int, tuple[str, nn.Module]] = {}
    for path, module in found.values():
        shared = names.get(id(module._parameters.get("weight")), [])
        if len({id(modules[name.rpartition(".")[0]]) for name in shared}) > 1:
            path = source(shared, modules).rpartition(".")[0]
        out[id(modules[path])] = path, modules[path]
    return out
