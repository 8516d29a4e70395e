"""Tokens whose embeddings an adapter trains: PEFT's `trainable_token_indices`.

    W' = W with rows `trainable_tokens_delta` in the places of the indices

The rules are those of PEFT's `tuners/trainable_tokens` and `utils/other.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from torchgraft.functional.extending import Replaced, replaced

from .messages import require
from .ties import input_embeddings, names_by_tensor

LEAF = "trainable_tokens_delta"
"""Name of the leaf, and of PEFT's parameter."""

Modules = Mapping[str, nn.Module]


def find_tokens(config: Any, modules: Modules, model: nn.Module, taken: Mapping[int, str]) -> dict[str, Replaced]:
    """Return the rows that a config trains, by path of their module.

    Args:
        config: An adapter's config.
        modules: The model's modules by name.
        model: The model, which may know its input embeddings.
        taken: Modules that something else of the adapter is on, by identity, and what that is.

    Raises:
        ValueError: A name that is no module with an embedding; indices out of range, or different ones for tied modules
            where `ensure_weight_tying`; a module that is taken.

    >>> from torchgraft.adapters import LoraConfig
    >>> modules = {"": nn.Sequential(), "embed": nn.Embedding(5, 2)}
    >>> find_tokens(LoraConfig(trainable_token_indices={"embed": [1, 4]}), modules, modules[""], {})
    {'embed': Replaced(names=('embed.weight',), shape=(2, 2), rows=(1, 4))}
    """
    rows = _targets(config, modules, model)
    for path in rows:
        require(
            id(modules[path]) not in taken,
            config,
            f"trainable_token_indices names {path}, which {taken.get(id(modules[path]))} too; leave it out of one",
        )
    names = names_by_tensor(modules)
    groups: dict[int, dict[str, list[int]]] = {}
    for path, indices in rows.items():
        groups.setdefault(id(_weight(config, modules, path)), {})[path] = indices
    plan: dict[str, Replaced] = {}
    for key, group in groups.items():
        first = next((path for path in group if isinstance(modules[path], nn.Embedding)), next(iter(group)))
        if all(indices == group[first] for indices in group.values()):
            everywhere = isinstance(modules[first], nn.Embedding)
            shared = [name for name in names[key] if everywhere or _owner(name, modules) in _ids(group, modules)]
            plan[first] = replaced(modules, _led_by(f"{first}.weight", shared), group[first])
            continue
        require(
            not config.ensure_weight_tying,
            config,
            f"trainable_token_indices has different indices for tied modules, {group}, and ensure_weight_tying is "
            "True; give the same indices, or leave it at False",
        )
        for path, indices in group.items():
            own = [name for name in names[key] if _owner(name, modules) in _ids([path], modules)]
            plan[path] = replaced(modules, _led_by(f"{path}.weight", own), indices)
    if config.ensure_weight_tying and not any(len(names[key]) > 1 for key in groups):
        warnings.warn(
            f"{type(config).__name__}: ensure_weight_tying is True, and nothing is tied to {sorted(rows)}",
            UserWarning,
            stacklevel=2,
        )
    return plan


def _targets(config: Any, modules: Modules, model: nn.Module) -> dict[str, list[int]]:
    """Return indices by path, each module under one of its names."""
    given = config.token_rows(modules, model)
    if not isinstance(given, Mapping):
        path = input_embeddings(modules, model)
        require(
            path is not None,
            config,
            "trainable_token_indices is a list, and the model does not say which are its input embeddings; give "
            "{'name of the embedding': indices}",
        )
        given = {path: given}
    found: dict[int, tuple[str, list[int]]] = {}
    for name, indices in given.items():
        paths = [path for path in modules if path and (path == name or path.endswith(f".{name}"))]
        require(bool(paths), config, f"trainable_token_indices has {name!r}, which is no module of the model")
        for path in paths:
            other = found.setdefault(id(modules[path]), (path, list(indices)))
            require(
                other[1] == list(indices),
                config,
                f"trainable_token_indices has {list(indices)} and {other[1]} for {path}; give one",
            )
    return dict(found.values())


def _weight(config: Any, modules: Modules, path: str) -> Tensor:
    weight = modules[path]._parameters.get("weight")
    require(
        weight is not None and weight.ndim == 2,
        config,
        f"trainable_token_indices names {path}, a {type(modules[path]).__name__}, which has no matrix of embeddings",
    )
    assert weight is not None
    return weight


def _owner(name: str, modules: Modules) -> int:
    return id(modules[name.rpartition(".")[0]])


def _ids(paths: Collection[str] | Mapping[str, Any], modules: Modules) -> set[int]:
    return {id(modules[path]) for path in paths}


def _led_by(name: str, names: Collection[str]) -> list[str]:
    return [name, *(other for other in names if other != name)]
