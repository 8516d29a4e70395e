"""The parameters that an adapter starts with in a model: planted, empty, or drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchgraft.functional import Weights
from torchgraft.functional.extending import (
    Site,
    Tree,
    agreed,
    trainable_dtype,
)

from ...config.base import AdapterConfig


def initial_leaves(
    config: AdapterConfig,
    sites: Mapping[str, Site],
    modules: Mapping[str, nn.Module],
    weights: Weights,
    meta: bool,
    params: Tree | None,
) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each site: planted, empty, or drawn and cast to what the base has."""
    shapes = {path: config.method.shapes(config, site) for path, site in sites.items()}
    if params is not None:
        planted = {path: {leaf: nn.Parameter(params[path][leaf].detach()) for leaf in shapes[path]} for path in sites}
        return {path: planted[path] | _fixed(config, site, modules, meta) for path, site in sites.items()}
    if meta:
        with torch.device("meta"):
            drawn = {path: {leaf: torch.empty(shape) for leaf, shape in shapes[path].items()} for path in sites}
    else:
        drawn = config.method.init(config, list(sites.values()), None, weights)
    made = {}
    for path in sites:
        weight = sites[path].like(modules[sites[path].owner])
        dtype = trainable_dtype(weight)
        device = "meta" if meta else weight.device
        made[path] = {
            leaf: nn.Parameter(agreed(tensor, weight).to(device, dtype)) for leaf, tensor in drawn[path].items()
        }
        made[path] |= _fixed(config, sites[path], modules, meta)
    return made


def _fixed(config: AdapterConfig, site: Site, modules: Mapping[str, nn.Module], meta: bool) -> dict[str, nn.Parameter]:
    """The leaves of a site that are not trained."""
    weight = site.like(modules[site.owner])
    dtype = trainable_dtype(weight)
    device = "meta" if meta else weight.device
    tensors = config.form.fixed_tensors(config, site)
    return {leaf: nn.Parameter(tensor.to(device, dtype, copy=True), False) for leaf, tensor in tensors.items()}


def started(config: AdapterConfig, site: Site, leaves: Mapping[str, Tensor]) -> Site:
    """The site with the values that leaves started with as their dtype has them."""
    names = {name: leaf for leaf, name in config.form.starts.items() if getattr(site.constants, name, None) is not None}
    rounded = {name: getattr(site.constants, name).to(leaves[leaf].dtype) for name, leaf in names.items()}
    return dataclasses.replace(site, constants=site.constants.replace(rounded)) if rounded else site
