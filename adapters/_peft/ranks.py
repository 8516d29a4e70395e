"""Larger ranks for LoRA adapters in a model, whose parameters get zeros."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchgraft.functional import Site
from torchgraft.functional.extending import TiedAdapter, pad_to

from .._inplace.walk import layers
from .._methods.shared.scalings import of_patterns, ranks_of

_GROWING = ("linear", "conv1d", "conv2d", "conv3d", "embedding")
"""Kinds of sites whose rank can grow by zeros."""


def carriers(model: nn.Module, name: str) -> dict[str, Any]:
    """Return the layers that carry a LoRA adapter, by path."""
    found: dict[str, Any] = {path: layer for path, layer in layers(model).items() if name in layer.entries}
    return {path: layer for path, layer in found.items() if layer.entries[name].config.method.name == "LORA"}


def grow(name: str, at: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    """Give layers larger ranks, with zeros; those that have such a rank keep their parameters."""
    larger = {path: rank for path, rank in ranks.items() if rank > at[path].entries[name].site.constants.r}
    for path, rank in larger.items():
        layer, entry = at[path], at[path].entries[name]
        leaves = {
            leaf: nn.Parameter(grown(leaf, tensor.detach(), rank, entry.site), tensor.requires_grad)
            for leaf, tensor in layer.leaves(name).items()
        }
        site = dataclasses.replace(entry.site, constants=entry.site.constants.replace({"r": rank}))
        shapes = {leaf: tuple(parameter.shape) for leaf, parameter in leaves.items()}
        factor = layer.adjustable.get(name)
        layer.replace_adapter(name, dataclasses.replace(entry, site=site, expected=shapes), leaves)
        if factor is not None:
            layer.adjustable[name] = factor
    if larger:
        describe(name, at)


def describe(name: str, at: Mapping[str, Any]) -> None:
    """Have the adapter's config in the model say the ranks and the scaling factors that layers have."""
    sites = {path: layer.entries[name].site for path, layer in at.items()}
    ranks = {path: site.constants.r for path, site in sites.items()}
    config: Any = next(iter(at.values())).entries[name].config  # the model's own copy, one for all layers
    if len(set(ranks.values())) == 1:
        config.r, config.rank_pattern = next(iter(ranks.values())), {}
    for field, value in {**ranks_of(config, ranks), **of_patterns(config, sites)}.items():
        setattr(config, field, value)


def grown_shape(leaf: str, shape: Sequence[int], rank: int, site: Site) -> tuple[int, ...]:
    """Return the shape of a leaf with another rank."""
    rows, columns = rank * max(site.experts, 1), rank * max(site.experts, 1) // site.groups
    if leaf.endswith("_A"):
        return (rows, *shape[1:])
    return (shape[0], columns, *shape[2:]) if leaf.endswith("_B") else tuple(shape)


def grown(leaf: str, tensor: Tensor, rank: int, site: Site) -> Tensor:
    """Return a leaf with zeros in the place of what a larger rank has more, in each group of a convolution."""
    return pad_to(tensor, grown_shape(leaf, tensor.shape, rank, site), site.groups if leaf.endswith("_A") else 1)


def check_growth(name: str, at: Mapping[str, Any], ranks: Mapping[str, int], most: bool = False) -> None:
    """Refuse ranks that layers cannot have.

    Args:
        name: The adapter's name.
        at: Its layers, by path.
        ranks: The ranks that some of these are to have.
        most: Whether a layer may not have a larger one already.

    Raises:
        ValueError: Names the layer.
    """
    for path, rank in ranks.items():
        entry = at[path].entries[name]
        site = entry.site
        r = site.constants.r
        if most and r > rank:
            raise ValueError(f"{path}: target_rank is {rank}, and adapter {name!r} has rank {r}; give the largest rank")
        if rank % site.groups:
            raise ValueError(
                f"{path}: rank {rank} is no multiple of the {site.groups} groups of the convolution; give one that is"
            )
        what = f"is on a site of kind {site.kind}" if site.kind not in _GROWING else ""
        what = "has matrices of blocks" if site.constants.blocks is not None else what
        what = "is tied to another module's" if isinstance(entry, TiedAdapter) else what
        if rank != r and what:
            raise ValueError(
                f"{path}: adapter {name!r} {what} and has rank {r}, which cannot become {rank}; give all adapters the "
                "same rank there"
            )
