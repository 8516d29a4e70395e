"""Loading: from checked files into a tree for a graft."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional import Graft
from torchgraft.functional.extending import (
    Plan,
    Site,
    Tree,
    each,
    modules_of,
    sort,
    state_of,
    wide_dtype,
)

from .._config.base import AdapterConfig
from .._config.keys import SHARED
from .fit import fit
from .stored import Stored, base_of, fixed_leaves, other_base, other_fixed, other_shared


def load_into_graft(graft: Graft, stored: Stored, adapter_name: str) -> Tree:
    """Read the tree of one of a graft's adapters.

    Raises:
        ValueError: A config that means something else than the graft's; tensors of the base that are not the graft's.
        KeyError: Tensors that are missing, or that belong to nothing in the model.
    """
    name = adapter_name if graft.binding.named else ""
    if name not in graft.configs:
        raise ValueError(
            f"adapter_name is {name!r}; this graft was bound with {sorted(graft.configs)}, each of which is loaded by "
            f"its name: load_adapter(graft, path, {next(iter(graft.configs))!r})"
        )
    if graft.binding.members is not None:
        raise TypeError(
            f"the graft is of a stack of {len(graft.binding.members)} configs: load each adapter by itself, "
            "load_adapter(graft.member(i), path), then graft.stack(trees)"
        )
    modules = modules_of(graft.model)
    sites = graft.sites[name]
    config: Any = graft.configs[name]
    _check_method(stored.config, config)
    stored = dataclasses.replace(stored, config=stored.config.recall(config).for_model(graft.model, modules))
    meant, replaced = stored.bind(modules, graft.model), graft.binding.replaced[name]
    _check_same(stored, config, sites, meant.sites[""])
    _check_same_replaced(replaced, meant.replaced[""])
    parts = fit(
        stored.config, stored.weights, sites, replaced, graft.binding.tied[name], {}, lambda: state_of(graft.model)
    )
    tensors = stored.read()
    stored.check_tied(parts, tensors)
    for shared in other_shared(config, sites, parts, tensors):
        raise ValueError(
            f"{stored.weights.file}: {parts.shared[shared]!r} is not what this graft has made of its seed or of the "
            "base's weights; use load_adapter(model, path), which takes the file's"
        )
    for path, leaf in other_fixed(config, sites, parts, tensors):
        raise ValueError(
            f"{stored.weights.file}: {parts.leaves[path, leaf]!r} is not what this graft has made of the base's "
            "weights or of a seed (perhaps with other signs, on another device); load_adapter(model, path) takes the "
            "file's, and extract_graft(model) and extract_params(model) then give a graft and a tree with it"
        )
    for base in other_base(state_of(graft.model), parts, tensors):
        raise ValueError(
            f"{stored.weights.file}: {parts.base[base]!r} differs from {base!r} of the model, which a graft never "
            "changes; use load_adapter(model, path) on the model, or load this tensor into it first"
        )
    tree: Tree = {}
    for (path, leaf), key in parts.leaves.items():
        if path in sites and leaf in fixed_leaves(config, sites[path]):
            continue
        own = base_of(path, leaf, modules, sites, replaced)
        made = stored.leaf(key, tensors[key], own, wide_dtype(own))
        tree.setdefault(path, {})[leaf] = made
    return sort(tree)


def _check_same_replaced(own: Plan, given: Plan) -> None:
    """Refuse a config that trains less of the base, or in another way; what more it trains is held against the base."""
    mine, theirs = ({(path, leaf): one for path, leaf, one in each(plan)} for plan in (own, given))
    for where in sorted(mine):
        if mine[where] != theirs.get(where):
            raise ValueError(
                f"the config and the graft differ in what they replace: {where[1]!r} of {where[0]!r} is "
                f"{theirs.get(where)} in the file and {mine[where]} in the graft; bind the model with the file's "
                "config: AdapterConfig.from_pretrained(path)"
            )


def _check_method(config: AdapterConfig, own: Any) -> None:
    if config.method.name != own.method.name:
        raise ValueError(
            f"peft_type is {config.method.name}, and the graft was bound with {type(own).__name__}; bind the model "
            "with the file's config: AdapterConfig.from_pretrained(path)"
        )


def _ranges(config: Any) -> list[tuple[int, ...]]:
    return [tuple(one) for one in getattr(config, "layer_replication", None) or ()]


def _check_same(stored: Stored, own: Any, sites: Mapping[str, Site], planned: Mapping[str, Site]) -> None:
    """Refuse a config that computes something else with the same tensors."""
    remedy = "; bind the model with the file's config: AdapterConfig.from_pretrained(path)"
    given, expected = (_ranges(config) for config in (stored.config, own))
    if given != expected:
        raise ValueError(f"layer_replication is {given} in the file and {expected} in the graft{remedy}")
    if sites.keys() != planned.keys():
        only = sorted(sites.keys() ^ planned.keys())
        where = "graft" if only[0] in sites else "file"
        raise ValueError(f"the config adapts other modules than the graft: only the {where} has {only[0]!r}{remedy}")
    for path, site in sites.items():
        if site.shared != planned[path].shared:
            what = f"{dict(planned[path].shared)} in the file and {dict(site.shared)} in the graft"
            raise ValueError(f"{path} shares {what}{remedy}")
        names = own.form.shared_names(site)
        for constant, value in site.constants.items():
            other = getattr(planned[path].constants, constant)
            in_file = constant in names and f"{SHARED}{names[constant]}" in stored.weights.specs
            if in_file or _equal(value, other):
                continue
            what = f"is {other} in the file and {value} in the graft"
            raise ValueError(f"{constant} of {path} {'differs' if isinstance(value, Tensor) else what}{remedy}")
    for field in own.form.reads:
        given, expected = getattr(stored.config, field), getattr(own, field)
        if given != expected:
            raise ValueError(f"{field} is {given!r} in the file and {expected!r} in the graft{remedy}")


def _equal(a: Any, b: Any) -> bool:
    """Whether constants are the same; those made of weights may differ in their last bits from one time to another."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    if a.is_meta or b.is_meta:  # what the file alone knows
        return a.shape == b.shape
    return a.shape == b.shape and torch.allclose(a, b.to(a), rtol=1e-4, atol=1e-5 * float(a.abs().max()))
