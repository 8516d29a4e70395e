"""The dense meaning of adapters: each adapted layer's weight and bias, for merging and for conversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ._binding.binding import Binding
from ._binding.tied import TiedAdapter
from ._graft import Graft
from ._layers.base import BaseWithTensors
from ._layers.compose import compose
from ._method import SiteAdapter, Tree
from ._sites.parameters import Key
from ._sites.site import Site
from ._tensors.wrappers import modules_of


def active_trees(graft: Graft, params: Tree, what: str) -> dict[str, Tree]:
    """Return validated trees by adapter name, each of one adapter.

    Args:
        graft: The graft.
        params: A parameter tree, as for a call.
        what: How errors call the function.

    Raises:
        KeyError, TypeError, ValueError: A tree that does not fit; a routed stack.
    """
    active = graft.binding.active(params)
    if not all(isinstance(tree, dict) for tree in active.values()):
        raise TypeError(
            f"{what}: got a routed stack, expected the tree of one adapter: {what}(graft, unstack(many)[i])"
        )
    return active


def adapted_layers(
    binding: Binding,
    active: Mapping[str, Tree],
    given: Mapping[str, Tensor],
    base: type[BaseWithTensors] = BaseWithTensors,
) -> Iterator[tuple[Site, Any]]:
    """Yield each site that has adapters of its own, and its layer, whose `dense()` is weight and bias with these in.

    Args:
        binding: Configs bound to a model.
        active: Trees by adapter name.
        given: Tensors of the base that adapters replace, by name.
        base: How a module's original weight is read.
    """
    modules = modules_of(binding.model)
    for adapters in _carriers(binding, active)[0].values():
        site = next(iter(adapters.values())).site
        replaced = {leaf: given[name] for leaf in site.names if (name := f"{site.owner}.{leaf}".lstrip(".")) in given}
        yield site, compose(base(modules[site.owner], site, replaced), adapters, active)


def followers(binding: Binding, active: Mapping[str, Tree]) -> dict[str, set[int]]:
    """Return the ids of modules that have the parameters of a site and no adapter of their own, by the site's path."""
    carriers, tied = _carriers(binding, active)
    carrying = {module for module, _ in carriers}
    return {path: modules - carrying for path, modules in tied.items()}


def _carriers(
    binding: Binding, active: Mapping[str, Tree]
) -> tuple[dict[Key, dict[str, SiteAdapter]], dict[str, set[int]]]:
    """Return the adapters of each module or parameter, and the ids of modules that follow a site."""
    carriers: dict[Key, dict[str, SiteAdapter]] = {}
    tied: dict[str, set[int]] = {}
    for key, adapters in binding.adapters_by_key(active)[0].items():
        for name, adapter in adapters.items():
            if isinstance(adapter, TiedAdapter):
                tied.setdefault(adapter.tied.source, set()).add(key[0])
            else:
                carriers.setdefault(key, {})[name] = adapter
    return carriers, tied
