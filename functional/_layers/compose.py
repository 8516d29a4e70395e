"""Composing: the base, then each adapter around what is beneath it; the one place where they become a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._abilities import SplitsProjection
from .._locating.finder import Finder
from .._method import ActiveTree, SiteAdapter, Tree
from .._sites.attention import ProjectionSlice
from .adapted import Adapted


def compose(
    base: Any,
    adapters: Mapping[str, SiteAdapter],
    trees: Mapping[str, Tree | ActiveTree],
    finder: Finder | None = None,
    part: ProjectionSlice | None = None,
) -> Any:
    """Put adapters around a base, `y = f_n(... f_1(base))`.

    Args:
        base: The layer at the bottom.
        adapters: Adapters of one site by name, the innermost first.
        trees: The trees that are active in the call, by adapter name.
        finder: Finds where the rows of a routed call are.
        part: The part of an attention's projection that the base is, if it is one.

    Returns:
        The outermost layer; `base` without any adapter.

    >>> import torch
    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind
    >>> from torchgraft.functional._layers.base import Base
    >>> graft = bind(torch.nn.Linear(4, 3), LoraConfig(r=2, target_modules="all-linear"))
    >>> adapter = graft.binding.adapters("")[""]
    >>> layer = compose(Base(graft.model, adapter.site), {"": adapter}, {"": graft.init()})
    >>> layer(torch.ones(1, 4)).shape, layer.weight.shape
    (torch.Size([1, 3]), torch.Size([3, 4]))
    """
    layer = base
    for name, adapter in adapters.items():
        tree = trees.get(name)
        if tree is None:
            continue
        if type(tree) is dict:
            layer = Adapted(layer, adapter, adapter.leaves(tree))
        else:
            layer = tree.layer(layer, adapter, finder)  # type: ignore[union-attr]
        if part is not None and not part.whole:
            ability = adapter.config.method.ability(SplitsProjection)
            assert ability is not None
            layer.leaves = ability.split(adapter.config, adapter.site, layer.leaves, part.rows, part.columns)
    return layer
