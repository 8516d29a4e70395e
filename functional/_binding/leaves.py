"""The leaves of one config's tree: their shapes, and fresh ones."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import nn

from .._abilities import SharesLeaves
from .._method import SHARED, Config, Tree
from .._sites.site import Site
from .._sites.tensors import wide_dtype
from .._tensors.placement import agreed
from .._tensors.wrappers import modules_of
from .._trees import sort
from .plan import weights_of
from .replaced import Plan, copies, each


def initialise(
    model: nn.Module,
    config: Config,
    sites: Mapping[str, Site],
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    replaced: Plan,
) -> Tree:
    """Make fresh parameters of one config, sorted."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"init: generator is {generator!r}, expected a torch.Generator; torch.Generator().manual_seed(0) makes one"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):
        raise TypeError(f"init: dtype is {dtype!r}, expected a floating-point dtype such as torch.float32")
    if device is not None and not isinstance(device, (torch.device, str, int)):
        raise TypeError(f"init: device is {device!r}, expected a device such as 'cpu' or 'cuda:0'")
    modules = modules_of(model)
    with contextlib.nullcontext() if generator is None else torch.device(generator.device):
        fresh = config.method.init(config, list(sites.values()), generator, weights_of(sites, modules))
    made: Tree = copies(modules, replaced, dtype, device)
    for path, site in sites.items():
        weight = site.like(modules[site.owner])
        for leaf, value in fresh.get(path, {}).items():
            value = agreed(value, weight)
            made.setdefault(path, {})[leaf] = value.to(device or weight.device, dtype or wide_dtype(weight))
        for name in site.shared.values():
            if name not in made.setdefault(SHARED, {}):
                value = agreed(fresh[SHARED][name], weight)
                made[SHARED][name] = value.to(device or weight.device, dtype or wide_dtype(weight))
    return sort(made)


def shapes_of(config: Config, sites: Mapping[str, Site], replaced: Plan) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of one config's leaves, by path and leaf, sorted; without sites that have none of their own."""
    shapes = {path: leaves for path, site in sites.items() if (leaves := dict(config.method.shapes(config, site)))}
    for path, leaf, replacement in each(replaced):
        shapes.setdefault(path, {})[leaf] = replacement.shape
    if config.method.ability(SharesLeaves) is not None:
        shapes[SHARED] = shared_shapes(config, sites)
    return dict(sorted(shapes.items()))


def shapes_at(shapes: Mapping[str, Mapping[str, tuple[int, ...]]], site: Site) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a site's leaves among those of a tree, with those that it shares by their names there.

    >>> site = Site("a", "linear", 2, 2, shared={"bank": "bank.0"})
    >>> shapes_at({"a": {"logits": (1,)}, "*": {"bank.0": (2, 2)}}, site)
    {'logits': (1,), 'bank': (2, 2)}
    """
    shared = {leaf: shapes[SHARED][name] for leaf, name in site.shared.items()}
    return {**shapes.get(site.path, {}), **shared}


def shared_shapes(config: Config, sites: Mapping[str, Site]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the leaves that several sites share, by the names that these have under `"*"`."""
    sharing = config.method.ability(SharesLeaves)
    return {} if sharing is None else dict(sharing.shapes(config, list(sites.values())))
