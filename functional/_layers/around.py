"""A layer around another one, as methods see layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._method import Layer


class Around:
    """A layer with the weight, the bias and the mode of another one, and a call of its own.

    Attributes:
        base: The other layer.
    """

    __slots__ = ("base",)

    as_linear: tuple[Tensor, Tensor | None] | None = None

    def __init__(self, base: Layer):
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def original(self) -> Any:
        """The base without any adapter."""
        return self.base.original

    @property
    def training(self) -> bool:
        return self.base.training
