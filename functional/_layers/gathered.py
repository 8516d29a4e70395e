"""Layers that take and give sharded tensors, under adapters that take and give whole ones."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from .._method import Weighted
from .._tensors.placement import replicated, spread, whole


class Gathered(Weighted):
    """A layer that takes and gives sharded tensors, for adapters that take and give whole ones."""

    __slots__ = ("base", "mesh", "placements")

    def __init__(self, base: Any, mesh: Any, placements: Any):
        self.base, self.mesh, self.placements = base, mesh, placements

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = whole(self.base(spread(x, self.mesh, self.placements)))
        return result

    def dense(self) -> tuple[Tensor, Tensor | None]:
        result: tuple[Tensor, Tensor | None] = self.base.dense()
        return result

    @property
    def training(self) -> bool:
        result: bool = self.base.training
        return result


def run_on_shards(layer: Any, x: Any) -> Any:
    """Run an adapted layer on a sharded input: its adapters on whole tensors, its base on shards."""
    if not hasattr(layer, "entry"):
        return layer(x)
    y = _over_gathered(layer, x)(whole(x))
    return replicated(y, x.device_mesh)


def _over_gathered(layer: Any, x: Any) -> Any:
    if not hasattr(layer, "entry"):
        return Gathered(layer, x.device_mesh, x.placements)
    layer = copy.copy(layer)
    layer.base = _over_gathered(layer.base, x)
    return layer
