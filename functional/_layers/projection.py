"""A part of an attention's projection as a linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._method import Weighted
from .._sites.attention import ProjectionSlice, read_slice
from .._sites.kernels import folded, is_folded
from .._sites.site import Site
from .._sites.tensors import Dense, check_base


class Projection(Weighted):
    """A part of the input projection as a linear layer, without adapters."""

    __slots__ = ("module", "part", "site")

    def __init__(self, module: Any, site: Site, part: ProjectionSlice):
        self.module, self.site, self.part = module, site, part

    def __call__(self, x: Tensor) -> Tensor:
        if not (self.module.batch_first and x.ndim == 3):
            return self._linear(x)
        return self._linear(x.transpose(0, 1)).transpose(0, 1)  # as torch does, and its kernel goes by the layout

    def _linear(self, x: Tensor) -> Tensor:
        weight, bias = self.dense()
        check_base(self.site.path, weight, x)
        if not torch.compiler.is_compiling() and is_folded(x, self._stored, bias):
            return folded(x, weight, bias)
        return F.linear(x, weight, bias)

    @property
    def _stored(self) -> Tensor:
        weight: Tensor = getattr(self.module, self.part.name)
        return weight

    def dense(self) -> Dense:
        """Return the part's own weight and bias."""
        return read_slice(self.site, self.module, self.part)

    @property
    def training(self) -> bool:
        result: bool = self.module.training
        return result
