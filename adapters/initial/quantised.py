"""The base of LoftQ: a layer with its weight rounded to what a quantised one can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchgraft.functional import Layer, Site, widen


class Quantised:
    """A layer whose weight differs from its base's by a constant.

    Attributes:
        base: The layer.
        site: Its site, with the difference, `"out in"`, as the constant `rounding`.
    """

    __slots__ = ("base", "site")

    def __init__(self, base: Layer, site: Site):
        self.base, self.site = base, site

    def __call__(self, x: Tensor) -> Tensor:
        y = self.base(x)
        x, rounding = widen(x, self._rounding)
        wide, more = widen(y, self.site.call(x, rounding))
        return torch.add(wide, more).to(y.dtype)

    @property
    def _rounding(self) -> Any:
        return self.site.constants["rounding"]

    @property
    def weight(self) -> Tensor:
        return self.base.weight + self._rounding

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def plain(self) -> None:
        return None

    @property
    def training(self) -> bool:
        return self.base.training


def base_of(site: Site, base: Layer) -> Layer:
    """The layer that a site's adapter is for: the base, or the base with its weight quantised.

    >>> from torchgraft.functional.layers import describe
    >>> linear = torch.nn.Linear(2, 2)
    >>> base_of(describe("head", linear), linear) is linear
    True
    """
    return Quantised(base, site) if "rounding" in site.constants else base
