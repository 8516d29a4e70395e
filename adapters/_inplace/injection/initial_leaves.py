"""The parameters that an adapter starts with in a model: planted, empty, or drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchgraft.functional import Weights
from torchgraft.functional.extending import SHARED as SHARED_LEAVES
from torchgraft.functional.extending import (
    Site,
    Tree,
    agreed,
    shared_shapes,
    trainable_dtype,
)

from ..._config.base import AdapterConfig


def initial_leaves(
    config: AdapterConfig,
    sites: Mapping[str, Site],
    modules: Mapping[str, nn.Module],
    weights: Weights,
    meta: bool,
    params: Tree | None,
) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters of each site: planted, empty, or drawn and cast to what the base has.

    What sites share is one parameter in all of them.
    """
    values = params if params is not None else _values(config, sites, weights, meta)
    made: dict[str, dict[str, nn.Parameter]] = {}
    together: dict[str, nn.Parameter] = {}
    for path, site in sites.items():
        weight = site.like(modules[site.owner])

        def start(value: Tensor, weight: Tensor = weight) -> nn.Parameter:
            if params is not None:
                return nn.Parameter(value.detach())
            return nn.Parameter(agreed(value, weight).to("meta" if meta else weight.device, trainable_dtype(weight)))

        made[path] = {leaf: start(values[path][leaf]) for leaf in config.method.shapes(config, site)}
        for leaf, name in site.shared.items():
            if name not in together:
                together[name] = start(values[SHARED_LEAVES][name])
            made[path][leaf] = together[name]
        made[path] |= _fixed(config, site, made[path], modules, meta)
    return made


def _values(config: AdapterConfig, sites: Mapping[str, Site], weights: Weights, meta: bool) -> Tree:
    """Return a tree of fresh numbers, or of tensors without any."""
    if not meta:
        return config.method.init(config, list(sites.values()), None, weights)
    shapes = {path: config.method.shapes(config, site) for path, site in sites.items()}
    shapes[SHARED_LEAVES] = shared_shapes(config, sites)
    with torch.device("meta"):
        return {path: {leaf: torch.empty(shape) for leaf, shape in own.items()} for path, own in shapes.items()}


def _fixed(
    config: AdapterConfig, site: Site, made: Mapping[str, nn.Parameter], modules: Mapping[str, nn.Module], meta: bool
) -> dict[str, nn.Parameter]:
    """Return the leaves of a site that are not trained, in the dtype of those that are; integers stay integers."""
    weight = site.like(modules[site.owner])
    trained = next((leaf.dtype for leaf in made.values()), trainable_dtype(weight))

    def start(tensor: Tensor) -> nn.Parameter:
        dtype = trained if tensor.is_floating_point() or tensor.is_complex() else tensor.dtype
        device = "meta" if meta or tensor.is_meta else weight.device  # what has no values yet stays without
        return nn.Parameter(tensor.to(device, dtype, copy=True), False)

    return {leaf: start(tensor) for leaf, tensor in config.form.fixed_tensors(config, site).items()}


def started(config: AdapterConfig, site: Site, leaves: Mapping[str, Tensor]) -> Site:
    """Return the site with the values that leaves started with as their dtype has them."""
    names = {name: leaf for leaf, name in config.form.starts.items() if getattr(site.constants, name, None) is not None}
    rounded = {name: getattr(site.constants, name).to(leaves[leaf].dtype) for name, leaf in names.items()}
    return dataclasses.replace(site, constants=site.constants.replace(rounded)) if rounded else site
