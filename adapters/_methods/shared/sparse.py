"""Numbers that are added to a few entries of a weight: `x (W + S)^T`, with `S` of values at places in the flat weight.

Of a linear layer in single precision or more it is one product with `W + S`, made for it and made again in the
backward. Elsewhere `S` is made, as large as the weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional import Layer, Site, widen
from torchgraft.functional.extending import add_scaled

from . import fused


def add_sparse(site: Site, base: Layer, x: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """`base(x) + S x`, the sum in the wider dtype and rounded once to the base's.

    Args:
        site: The site.
        base: The layer.
        x: Its input.
        values: What is added to entries of the weight, `"entries"`.
        places: Where in the flat weight, `"entries"`; of equal places, which padding has, each counts.
    """
    y = of_changed(base, x, values, places) if site.kind == "linear" else None
    if y is not None:
        return y
    y = base(x)
    x, values = widen(x, values)
    return add_scaled(y, site.call(x, dense(site, values, places)), 1.0)


def of_changed(base: Layer, x: Tensor, values: Tensor, places: Tensor) -> Tensor | None:
    """Return a linear layer's output with `W + S`, where one product gives it; `None` elsewhere."""
    linear = None if torch.compiler.is_compiling() else base.as_linear
    if (
        linear is None
        or values.itemsize <= 2
        or not linear[0].is_contiguous()
        or not fused.fits(x, linear[0], values, values)
    ):
        return None
    arguments = (x, *linear, values, places)
    if not torch.is_grad_enabled():
        return fused.shaped(_forward(*arguments), x)
    result: Tensor = _Linear.apply(*arguments)  # type: ignore[no-untyped-call,unused-ignore]
    return result


def dense(site: Site, values: Tensor, places: Tensor) -> Tensor:
    """Return `S` in the shape of the weight.

    >>> dense(Site("0", "linear", 2, 2), torch.tensor([3.0]), torch.tensor([1]))
    tensor([[0., 3.],
            [0., 0.]])
    """
    zeros = torch.zeros(math.prod(site.weight_shape), dtype=values.dtype, device=values.device)
    return zeros.scatter_add(0, places, values).view(site.weight_shape)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, places: Tensor) -> Tensor:
    """`x (W + S)^T + bias` as `"tokens out"`."""
    changed = weight.clone()
    changed.view(-1).scatter_add_(0, places, values)
    return fused.base_output(x, changed, bias)


class _Linear(torch.autograd.Function):
    """`x (W + S)^T + bias`, of which the backward makes the weight anew."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, _, values, places = args
        ctx.save_for_backward(x, weight, values, places)
        return fused.shaped(_forward(*args), x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, values, places = ctx.saved_tensors
        for_x, for_weight, for_bias, for_values, _ = ctx.needs_input_grad
        g = g.reshape(-1, g.shape[-1])
        gx = gw = gv = gb = None
        if for_x:
            gx = (g @ weight.flatten().scatter_add(0, places, values).view(weight.shape)).view(x.shape)
        if for_values or for_weight:
            gw = g.mT @ x.reshape(-1, x.shape[-1])
            gv = gw.flatten().index_select(0, places)
        if for_bias:
            gb = g.sum(0)
        return gx, gw if for_weight else None, gb, gv if for_values else None, None
