"""A layer with one adapter on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .._abilities import Leaves, RunsInOneStep, Step
from .._method import SiteAdapter, Weighted
from .._sites.kernels import over_values
from .._sites.linear import LINEAR
from .._sites.tensors import check_leaves
from .base import Base


class Adapted(Weighted):
    """A layer with one adapter on it; layers nest, the first adapter innermost."""

    __slots__ = ("base", "entry", "leaves")

    def __init__(self, base: Base | Adapted, adapter: SiteAdapter, leaves: Leaves):
        adapter.check(leaves)
        self.base, self.entry, self.leaves = base, adapter, leaves

    def __call__(self, x: Tensor) -> Tensor:
        adapter = self.entry
        for leaf in self.leaves.values():
            if leaf.is_meta:
                check_leaves(adapter.site.path, self.leaves, x)
        if x.is_nested:
            return over_values(self, adapter.site, x)
        return adapter.config.method.apply(adapter.config, adapter.site, self.leaves, self.base, x)

    def over(self, base: Any) -> Adapted:
        """Return the same adapter on another layer."""
        return Adapted(base, self.entry, self.leaves)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Return canonical weight and bias with every adapter up to this one in, not yet rounded."""
        below: Any = self.base
        original = None if below.original is below else below.original.dense
        weight, bias = below.dense()
        return self.entry.merge(self.leaves, weight, bias, original)

    @property
    def original(self) -> Base:
        """The base without any adapter."""
        return self.base.original

    @property
    def training(self) -> bool:
        return self.base.training


def step_of(adapters: Iterable[SiteAdapter]) -> Step | None:
    """Return the one step that calls of a site can take instead of its layers: that of the only adapter there."""
    first, *others = adapters
    site = first.site
    ability = first.config.method.ability(RunsInOneStep)
    if others or type(first) is not SiteAdapter or site.shared or site.transposed or ability is None:
        return None
    return ability.decide(first.config, site) if site.kind == LINEAR.name else None
