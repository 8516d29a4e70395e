"""Noise of each adapter's own: what methods draw in a batch of several adapters, from generators of theirs.

A method draws as torch does, from torch's generator, in the order of a batch. Where rows have generators of their own
these modes, which hold for one thread and one layer, draw from them instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._rows import Rows

_DRAWING = frozenset(
    {
        torch.rand, torch.randn, torch.randint, torch.randperm, torch.bernoulli, torch.rand_like, torch.randn_like,
        Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.random_, Tensor.exponential_,
        torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    }
)  # fmt: skip


class OtherDraw(Exception):
    """Something else than dropout of rows was about to be drawn."""


class RowNoise(TorchFunctionMode):
    """Dropout of a batch, in which each row's noise is that of its adapter; anything else that draws is `OtherDraw`."""

    def __init__(self, rows: Rows):
        super().__init__()
        self._rows = rows

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            x, p, training = _dropout_of(*args, **kwargs)
            if x.ndim == 0 or len(x) % self._rows.size:
                raise OtherDraw
            return self._rows.dropout(x, p) if p and training else x
        if func in _DRAWING and kwargs.get("generator") is None:
            raise OtherDraw
        return func(*args, **kwargs)


class OwnNoise(TorchFunctionMode):
    """Everything that is drawn comes from one generator, as it would from torch's."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self._generator = generator

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            x, p, training = _dropout_of(*args, **kwargs)
            if not (p and training):
                return x
            return x * torch.empty_like(x).bernoulli_(1 - p, generator=self._generator).div_(1 - p)
        if func in _DRAWING and kwargs.get("generator") is None:
            kwargs = {**kwargs, "generator": self._generator}
        return func(*args, **kwargs)


def _dropout_of(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, float, bool]:
    return input, p, training
