"""Plain LoRA from one that started in another way, so that it fits the untouched base, here and in PEFT.

    s (B A - B0 A0) = s [B, -B0] [A; A0]

as PEFT has it in `subtract_mutated_init`, where `A0` and `B0` are what the adapter started with and what the base lost.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchgraft.functional import Graft
from torchgraft.functional.extending import Site, Tree, sort

from ..._calibration.initial import FROM_DATA, REMOVING, kind_of
from ..._calibration.initial.configs import PLAIN
from ..._config.base import AdapterConfig
from ..shared.scalings import check_raw, expressed
from .blocks import of_leaves
from .forward import names
from .lora import LoraConfig

C = TypeVar("C", bound=AdapterConfig)


def to_plain(graft: Graft, params: Tree, adapter_name: str = "default") -> tuple[LoraConfig, Tree]:
    """Return a plain LoRA that computes what one that started as PiSSA, OLoRA, CorDA, LoRA-GA, MiCA or EVA computes.

    Of BD-LoRA, whose matrices have blocks, it has the whole matrices.

    For those that take their initial product out of the base, it has twice the rank; the scaling factors stay.

    Args:
        graft: A graft bound with a `LoraConfig`.
        params: The adapter's tree.
        adapter_name: Of a graft with named adapters, the one that the tree is of.

    Returns:
        A config with `init_lora_weights=True`, and a tree for `bind(model, config)`.

    Raises:
        ValueError: An adapter of another method or name; LoftQ, whose base is another one.
        KeyError, TypeError: A tree that does not fit the graft.

    >>> from torchgraft.functional import bind
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> graft = bind(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    >>> config, params = to_plain(graft, graft.init())
    >>> config.r, config.lora_alpha, tuple(params["0"]["lora_A"].shape)
    (4, 16, (4, 4))
    """
    name = adapter_name if graft.binding.named else ""
    if name not in graft.configs:
        raise ValueError(f"adapter_name is {name!r}; this graft was bound with {sorted(graft.configs)}")
    graft.binding.active({name: params} if graft.binding.named else params)
    config: Any = graft.configs[name]
    return plain(config, graft.sites[name], params)


def plain(config: AdapterConfig, sites: Mapping[str, Site], tree: Tree) -> tuple[LoraConfig, Tree]:
    """Return the plain config and tree of an adapter.

    Args:
        config: Its config.
        sites: Its sites, by path.
        tree: Its tree, with or without leaves that are not trained.

    Raises:
        ValueError: An adapter that has no plain form.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"the adapter is {config.method.name}, which has no plain form; only LoRA's are converted")
    if any(getattr(site.constants, "rounding", None) is not None for site in sites.values()):
        raise ValueError(
            "the adapter started with init_lora_weights='loftq', so it is for the quantised base and has no plain form "
            "for the original one; save it as it is, or merge it"
        )
    config, removing = expressed(config, sites), _removes(sites)
    converted = {path: _joined(site, tree[path], removing) for path, site in sites.items()}
    return _config(config, removing), sort({**tree, **converted})


def _removes(sites: Mapping[str, Site]) -> bool:
    """Return whether the adapter's initial product was taken out of the base, whatever its config says since then."""
    return any(getattr(site.constants, "initial_A", None) is not None for site in sites.values())


def _joined(site: Site, leaves: Mapping[str, Tensor], removing: bool) -> dict[str, Tensor]:
    a_name, b_name = names(site)
    a = leaves[a_name]
    b = leaves[b_name] if b_name in leaves else getattr(site.constants, b_name).to(a)
    if site.constants.blocks is not None:
        a, b = of_leaves(a, b, site.constants.blocks)
    if removing:
        a0, b0 = (
            like.new_zeros(()) if start is None else start
            for start, like in ((site.constants.initial_A, a), (site.constants.initial_B, b))
        )
        a = torch.cat([a, a0.to(a).expand_as(a)], -2)
        b = torch.cat([b, -b0.to(b).expand_as(b)], -1)
    return {**leaves, a_name: a, b_name: b}


def _config(config: LoraConfig, removing: bool) -> LoraConfig:
    fields: dict[str, Any] = {**PLAIN, "use_bdlora": None}
    if removing:
        factor = math.sqrt(2) if config.use_rslora else 2
        fields |= {
            "r": 2 * config.r,
            "lora_alpha": factor * config.lora_alpha,
            "rank_pattern": {pattern: 2 * rank for pattern, rank in config.rank_pattern.items()},
            "alpha_pattern": {pattern: factor * alpha for pattern, alpha in config.alpha_pattern.items()},
        }
    return dataclasses.replace(config, **fields)


def raw(config: C, sites: Mapping[str, Site]) -> C:
    """Return the config for files of an adapter's leaves as they are; warns where these alone do not fit the base.

    Raises:
        ValueError: Scaling factors that were written and that files of these leaves cannot have.
    """
    check_raw(config, sites)
    kind = config.init_lora_weights if isinstance(config, LoraConfig) else None
    if kind_of(str(kind)) not in REMOVING and _removes(sites):
        warnings.warn(
            f"init_lora_weights was set to {kind!r} after the adapter took its initial product out of the base, so "
            "this file is for a base that lost s B0 A0; pass plain=True (path_initial_model_for_weight_conversion of "
            "save_pretrained) for files that fit the original base",
            UserWarning,
            stacklevel=4,
        )
    elif kind in REMOVING and kind in FROM_DATA:
        warnings.warn(
            f"init_lora_weights is {kind!r}, and files hold neither the data nor what it chose, so this one is for a "
            "base that lost s B0 A0; pass plain=True for files that fit the original base",
            UserWarning,
            stacklevel=4,
        )
    return expressed(config, sites)
