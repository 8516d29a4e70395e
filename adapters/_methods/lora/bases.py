"""Bases that are not the model's own: LoftQ's with a quantised weight, and PiSSA's without its principal part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchgraft.functional import Layer, Site, widen
from torchgraft.functional.extending import Around, add_scaled

from ..shared.low_rank import add_product


class Quantised(Around):
    """A layer whose weight differs from its base's by a constant.

    Attributes:
        base: The layer.
        site: Its site, with the difference, `"out in"`, as the constant `rounding`.
    """

    __slots__ = ("site",)

    def __init__(self, base: Layer, site: Site):
        super().__init__(base)
        self.site = site

    def __call__(self, x: Tensor) -> Tensor:
        y = self.base(x)
        x, rounding = widen(x, self._rounding)
        wide, more = widen(y, self.site.call(x, rounding))
        return torch.add(wide, more).to(y.dtype)

    @property
    def _rounding(self) -> Any:
        return self.site.constants.rounding

    @property
    def weight(self) -> Tensor:
        result: Tensor = self.base.weight + self._rounding
        return result

    @property
    def original(self) -> Layer:
        below = self.base.original
        return self if below is self.base else Quantised(below, self.site)


class BaseMinusInitial(Around):
    """A layer that lost `s B0 A0`.

    Attributes:
        base: The layer.
        site: Its site, with the constants `initial_A`, `initial_B` and `scaling`.
    """

    __slots__ = ("site",)

    def __init__(self, base: Layer, site: Site):
        super().__init__(base)
        self.site = site

    def __call__(self, x: Tensor) -> Tensor:
        y = self.base(x)
        x, a, b = widen(x, *self._factors)
        return add_product(y, torch.nn.functional.linear(x, a), -b, self.site.constants.scaling)

    @property
    def _factors(self) -> tuple[Any, Any]:
        return self.site.constants.initial_A, self.site.constants.initial_B

    @property
    def weight(self) -> Tensor:
        a, b = self._factors
        return add_scaled(self.base.weight, -(b @ a), self.site.constants.scaling)

    @property
    def original(self) -> Layer:
        below = self.base.original
        return self if below is self.base else BaseMinusInitial(below, self.site)


def base_of(site: Site, base: Layer) -> Layer:
    """Return the layer that a site's adapter is for: the base, or the base with its weight quantised.

    >>> from torchgraft.adapters._methods.lora.constants import LoraConstants
    >>> linear = torch.nn.Linear(2, 2)
    >>> base_of(Site("head", "linear", 2, 2, constants=LoraConstants(4, 8.0, 2.0)), linear) is linear
    True
    """
    return Quantised(base, site) if site.constants.rounding is not None else base
