"""Linear layers with a weight that is made for a call, from the base's and an adapter's factors, and never kept.

Composed of torch's own functions, autograd keeps the made weight of each layer until the backward: as much memory as
the whole model again. Made anew in the backward it costs the product of its factors, little where tokens are many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import is_eager

Make = Callable[..., Tensor]
"""`(weight, *factors) -> weight`, all of one dtype; of torch's functions, so that autograd goes through it."""


def linear(make: Make, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
    """`F.linear(x, make(weight, *factors), bias)`, without keeping what is made.

    Under transforms and where a compiler decides what is kept, it is just that.

    Args:
        make: Makes the weight.
        x: `"... in"`.
        weight: The base's canonical weight, of any dtype, which is cast to that of `x`.
        bias: `"out"`, of the dtype of `x`.
        factors: The adapter's part, of the dtype of `x`.

    >>> x, weight, gain = torch.ones(1, 2), torch.ones(1, 2), torch.tensor(3.0)
    >>> linear(torch.mul, x, weight, None, gain)
    tensor([[6.]])
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and is_eager(x, weight):
        result: Tensor = _Linear.apply(make, x, weight, bias, *factors)  # type: ignore[no-untyped-call,unused-ignore]
        return result
    return F.linear(x, make(weight.to(x.dtype), *factors), bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Make, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(x, weight, *factors)
        y = F.linear(x.reshape(-1, x.shape[-1]), make(weight.to(x.dtype), *factors), bias)
        # In another shape, but no view to autograd: users may write to it.
        return y if x.ndim == 2 else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, *sources = ctx.saved_tensors
        _, for_x, for_weight, for_bias, *for_factors = ctx.needs_input_grad
        needs, twice = [for_weight, *for_factors], torch.is_grad_enabled()
        if not twice:
            sources = [tensor.detach().requires_grad_(need) for tensor, need in zip(sources, needs, strict=True)]
        with torch.enable_grad():
            made = ctx.make(sources[0].to(x.dtype), *sources[1:])
        flat = g.reshape(-1, g.shape[-1])
        gx = (flat @ made).view(x.shape) if for_x else None
        grads: list[Tensor | None] = [None] * len(needs)
        if any(needs):
            wanted = [i for i, need in enumerate(needs) if need]
            of_made = flat.mT @ x.reshape(-1, x.shape[-1])
            given = torch.autograd.grad(made, [sources[i] for i in wanted], of_made, create_graph=twice)
            for i, grad in zip(wanted, given, strict=True):
                grads[i] = grad
        return None, gx, grads[0], flat.sum(0) if for_bias else None, *grads[1:]
