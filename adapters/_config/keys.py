"""Keys of PEFT's state dicts and files, and trees made from them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from torchgraft.functional.extending import SHARED as SHARED_LEAVES
from torchgraft.functional.extending import Site, Tree

from .base import AdapterConfig
from .tokens import LEAF as TOKENS

PREFIX = "base_model.model."
"""What PEFT's files put before the name of a module."""

SHARED = "base_model."
"""What they put before the name of a tensor that all modules share."""


def places(sites: Mapping[str, Site]) -> dict[str, str]:
    """Where PEFT's keys have each site: a module by its name, a parameter by that of the layer around its module.

    Layers of several parameters of a module are nested, the last parameter's outermost.

    Args:
        sites: By path; parameters of one module as it registered them.

    >>> expert = Site("mlp.up", "experts", 2, 2, experts=4), Site("mlp.down", "experts", 2, 2, experts=4)
    >>> places({site.path: site for site in expert})
    {'mlp.up': 'mlp.base_layer', 'mlp.down': 'mlp'}
    """
    found, outer = {}, dict[str, str]()
    for path, site in reversed(list(sites.items())):
        found[path] = outer.get(site.owner, site.owner) if site.is_parameter else held_at(path, sites)
        outer[site.owner] = f"{found[path]}.base_layer"
    return {path: found[path] for path in sites}


def to_keys(
    config: AdapterConfig, tree: Tree, prefix: str = "", at: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Return the leaves of a tree under PEFT's keys, with each site `at` its place, by default its path.

    Those that several sites share have no `prefix`.

    >>> from torchgraft.adapters import LoraConfig
    >>> list(to_keys(LoraConfig(), {"head": {"weight": None}, "layers.0": {"lora_A": None, "lora_B": None}}))
    ['head.weight', 'layers.0.lora_A.weight', 'layers.0.lora_B.weight']
    """
    at = at or {}
    adapted = [path for path, leaves in tree.items() if any(map(config.form.is_leaf, leaves))]
    keys: dict[str, Tensor] = {}
    for path, leaves in tree.items():
        if path == SHARED_LEAVES:
            keys |= {f"{SHARED}{name}": tensor for name, tensor in leaves.items()}
            continue
        place = held_at(path, adapted)
        for leaf, tensor in leaves.items():
            own = config.form.is_leaf(leaf)
            key = join(config, at.get(path, place), leaf) if own else replaced_key(place, leaf, path in adapted)
            keys[prefix + key] = tensor
    return keys


def with_repeated(config: AdapterConfig, tree: Tree, sites: Mapping[str, Site]) -> Tree:
    """Return a tree that has leaves which files repeat for each layer at each of their sites.

    >>> from torchgraft.adapters import LilyConfig
    >>> site = Site("0", "linear", 2, 2, shared={"lily_A": "lily_A.0"})
    >>> with_repeated(LilyConfig(), {"*": {"lily_A.0": 1}, "0": {"lily_router": 2}}, {"0": site})
    {'0': {'lily_router': 2, 'lily_A': 1}}
    """
    if not config.form.repeated:
        return tree
    own = {path: leaves for path, leaves in tree.items() if path != SHARED_LEAVES}
    for path, site in sites.items():
        found = {leaf: tree[SHARED_LEAVES][name] for leaf, name in config.form.repeats(site).items()}
        own[path] = own.get(path, {}) | found
    return own


def replaced_key(path: str, leaf: str, adapted: bool = False) -> str:
    """PEFT's key of a tensor of the base that an adapter replaces; `adapted` where its module is targeted too.

    >>> replaced_key("head", "weight"), replaced_key("layers.0", "bias", adapted=True)
    ('head.weight', 'layers.0.base_layer.bias')
    """
    if leaf == TOKENS:
        return f"{path}.token_adapter.{leaf}"
    return f"{path}.base_layer.{leaf}" if adapted else f"{path}.{leaf}"


def held_at(path: str, paths: Collection[str]) -> str:
    """Where an adapted module hangs in a model with injected adapters: beneath a layer around a module that it is in.

    Args:
        path: Name of the module in the model without adapters.
        paths: Names of all adapted modules.

    >>> held_at("attn.out_proj", ["attn", "attn.out_proj"])
    'attn.base_layer.out_proj'
    """
    parent = path.rpartition(".")[0]
    return f"{parent}.base_layer{path.removeprefix(parent)}" if parent and parent in paths else path


def join(config: AdapterConfig, path: str, leaf: str, prefix: str = "") -> str:
    """PEFT's key of one leaf of a site at a place."""
    return f"{prefix}{path}.{config.form.key(leaf)}"


def split_key(config: AdapterConfig, key: str) -> tuple[str, str] | None:
    """Return place and leaf that a key speaks of, with or without PEFT's prefix; `None` for other keys.

    Leaves that several sites share are at `"*"`, by their names there.

    >>> from torchgraft.adapters import LoraConfig
    >>> split_key(LoraConfig(), "base_model.model.layers.0.lora_A.weight")
    ('layers.0', 'lora_A')
    """
    key = key.removeprefix("_orig_mod.")
    if config.form.shared_name(name := key.removeprefix(SHARED)) is not None and name != key:
        return SHARED_LEAVES, name
    key = key.removeprefix(PREFIX)
    last = ".".join(key.rsplit(".", 2)[-2:])
    for leaf in (*config.form.leaves, *([last] if config.form.is_numbered(last) else [])):
        if key.endswith(suffix := f".{config.form.key(leaf)}"):
            return re.sub(r"\.base_layer(?=\.out_proj$)", "", key.removesuffix(suffix)), leaf
    return None


def from_keys(config: AdapterConfig, state_dict: Mapping[str, Tensor]) -> tuple[Tree, list[str]]:
    """Return the tree made from a state dict's keys, and the keys that are no leaf's."""
    tree: Tree = {}
    rest = []
    for key, tensor in state_dict.items():
        split = split_key(config, key)
        if split is None:
            rest.append(key)
        else:
            tree.setdefault(split[0], {})[split[1]] = tensor
    return tree, rest
