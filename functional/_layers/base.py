"""The layer at the bottom of every site: the user's module under its own class, with a canonical weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._method import Weighted
from .._sites.kernels import folded, is_folded
from .._sites.kinds import has_linear_forward
from .._sites.linear import LINEAR
from .._sites.site import Site
from .._sites.tensors import check_base


class Base(Weighted):
    """The base module under its own class: no hooks, no adapter, canonical weight."""

    __slots__ = ("args", "kwargs", "module", "site")

    def __init__(self, module: Any, site: Site, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None):
        self.module, self.site, self.args, self.kwargs = module, site, args, kwargs or {}

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x) if self.site.weight_names else self._packed(x)

    def run(self, x: Tensor) -> Tensor:
        """Call the module itself."""
        module = self.module
        cls: Any = type(module)
        linear = self.site.kind == LINEAR.name and not self.site.transposed
        if linear and not torch.compiler.is_compiling() and has_linear_forward(cls):
            weight, bias = held_tensors(module)
            check_base(self.site.path, weight, x)
            if is_folded(x, weight, bias):
                return folded(x, weight, bias)
        result: Tensor = cls.forward(module, x, *self.args, **self.kwargs)
        return result

    def _packed(self, x: Tensor) -> Tensor:
        """Call a module with a packed weight, with the gradient of the dequantised one where its kernel has none."""
        y = self.run(x.detach())
        if not x.requires_grad:
            return y
        linear = F.linear(x, self.module.weight().dequantize())
        return y + (linear - linear.detach())

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Return canonical weight and bias."""
        return self.site.read(self.module)

    @property
    def as_linear(self) -> tuple[Tensor, Tensor | None] | None:  # type: ignore[override]
        """Weight and bias where a call is just `F.linear` of them, else `None`."""
        return self.linear_tensors()

    def linear_tensors(self) -> tuple[Tensor, Tensor | None] | None:
        """Return what `as_linear` is."""
        tensors = None if self.args or self.kwargs else linear_tensors(self.module)
        return tensors if tensors is None or not self.site.transposed else (tensors[0].mT, tensors[1])

    @property
    def training(self) -> bool:
        result: bool = self.module.training
        return result


def linear_tensors(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias as a module has them whose forward is just `F.linear` of these; `None` for others."""
    cls: Any = type(module)
    return held_tensors(module) if has_linear_forward(cls) else None


def held_tensors(module: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias as a module has them, where these are their names."""
    held = module._parameters  # without nn.Module.__getattr__, which takes longer than all else here
    try:
        return held["weight"], held["bias"]
    except KeyError:
        return module.weight, module.bias


class BaseWithTensors(Base):
    """A base module with other tensors than it holds, by name."""

    __slots__ = ("tensors",)

    def __init__(self, module: Any, site: Site, tensors: Mapping[str, Tensor]):
        super().__init__(module, site)
        self.tensors = tensors

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.site.read(self.module, self.tensors)
