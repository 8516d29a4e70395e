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

Pull = Callable[..., tuple[Tensor, ...]]
"""`(g, x, weight, *factors) -> gradients of the factors`, for `g`, `"tokens out"`, and `x`, `"tokens in"`."""


def linear(
    make: Make, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor, pull: Pull | None = None
) -> Tensor:
    """`F.linear(x, make(weight, *factors), bias)`, without keeping what is made.

    Under transforms and where a compiler decides what is kept, it is just that.

    Args:
        make: Makes the weight.
        x: `"... in"`.
        weight: The base's canonical weight, of any dtype, which is cast to that of `x`.
        bias: `"out"`, of the dtype of `x`.
        factors: The adapter's part, of the dtype of `x`.
        pull: A faster way to the first derivative of the factors than through `make`.

    >>> x, weight, gain = torch.ones(1, 2), torch.ones(1, 2), torch.tensor(3.0)
    >>> linear(torch.mul, x, weight, None, gain)
    tensor([[6.]])
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and is_eager(x, weight):
        result: Tensor = _Linear.apply(make, pull, x, weight, bias, *factors)  # type: ignore[no-untyped-call,unused-ignore]
        return result
    return F.linear(x, make(weight.to(x.dtype), *factors), bias)


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows weight`, without keeping a copy of the weight in the dtype of the rows.

    Args:
        rows: `"r out"`.
        weight: `"out in"`, the base's canonical weight, of any dtype.

    >>> product(torch.ones(1, 2), torch.ones(2, 3))
    tensor([[2., 2., 2.]])
    """
    return linear(_turned, rows, weight, None)


def _turned(weight: Tensor) -> Tensor:
    return weight.mT


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, make: Make, pull: Pull | None, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor
    ) -> Tensor:
        ctx.make, ctx.pull = make, pull
        ctx.save_for_backward(x, weight, *factors)
        y = F.linear(x.reshape(-1, x.shape[-1]), make(weight.to(x.dtype), *factors), bias)
        # In another shape, but no view to autograd: users may write to it.
        return y if x.ndim == 2 else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, *factors = ctx.saved_tensors
        _, _, for_x, for_weight, for_bias, *for_factors = ctx.needs_input_grad
        rows, flat = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        made: Tensor | None = None
        if ctx.pull is None or for_weight or torch.is_grad_enabled():
            made, grads = _through(ctx.make, flat, rows, [weight, *factors], [for_weight, *for_factors])
        else:
            if for_x:
                made = ctx.make(weight.to(x.dtype), *factors)
            given = ctx.pull(flat, rows, weight, *factors) if any(for_factors) else for_factors
            grads = [None, *(grad if need else None for grad, need in zip(given, for_factors, strict=True))]
        gx = (flat @ made).view(x.shape) if made is not None and for_x else None
        return None, None, gx, grads[0], flat.sum(0) if for_bias else None, *grads[1:]


def _through(
    make: Make, g: Tensor, x: Tensor, sources: list[Tensor], needs: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Make the weight anew; return it and, where they are needed, the gradients of what it is made of."""
    twice = torch.is_grad_enabled()
    if not twice:
        sources = [tensor.detach().requires_grad_(need) for tensor, need in zip(sources, needs, strict=True)]
    with torch.enable_grad():
        made = make(sources[0].to(x.dtype), *sources[1:])
    wanted = [i for i, need in enumerate(needs) if need]
    grads: list[Tensor | None] = [None] * len(needs)
    if wanted:
        given = torch.autograd.grad(made, [sources[i] for i in wanted], g.mT @ x, create_graph=twice)
        for i, grad in zip(wanted, given, strict=True):
            grads[i] = grad
    return made, grads
