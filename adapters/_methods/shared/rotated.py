"""Rotations of inputs: `x + x D` with a block-diagonal `D` as one step of autograd, Cayley's blocks, and layouts.

Composed of torch's own functions, the product of the blocks is copied into the order of the coordinates, and the
gradients of the two terms are summed in a pass of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused import is_eager


def add_block_product(x: Tensor, blocks: Tensor) -> Tensor:
    """`x + x D`, exactly `x` where `D` is zero, whatever the precision of products.

    Args:
        x: `"... n*size"`.
        blocks: The blocks on the diagonal of `D`, `"n size size"`, or `"1 size size"` for the same `n` times; of the
            dtype of `x`.

    >>> add_block_product(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))
    tensor([1., 3., 3., 7.])
    """
    if torch.compiler.is_compiling() or not is_eager(x, blocks):
        parts = x.unflatten(-1, (-1, blocks.shape[-1]))
        product = parts @ blocks[0] if len(blocks) == 1 else torch.einsum("...nk,nkc->...nc", parts, blocks)
        return torch.add(x, product.flatten(-2))
    if not torch.is_grad_enabled():
        return _forward(x, blocks)
    result: Tensor = _Product.apply(x, blocks)  # type: ignore[no-untyped-call,unused-ignore]
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor) -> Tensor:
        ctx.save_for_backward(x, blocks)
        return _forward(x, blocks)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, blocks = ctx.saved_tensors
        for_x, for_blocks = ctx.needs_input_grad
        gx = _forward(g, blocks.mT) if for_x else None
        return gx, _parts(x, blocks).mT @ _parts(g, blocks) if for_blocks else None


def _forward(x: Tensor, blocks: Tensor) -> Tensor:
    parts = _parts(x, blocks)
    y = parts.transpose(0, 1) + torch.bmm(parts, blocks).transpose(0, 1)
    # In another shape, but no view to autograd: users may write to it.
    result: Tensor = torch.ops.aten._unsafe_view.default(y.contiguous(), x.shape)
    return result


def _parts(x: Tensor, blocks: Tensor) -> Tensor:
    """`"n tokens size"`."""
    return x.reshape(-1, *blocks.shape[:2]).transpose(0, 1)


def cayley(skew: Tensor) -> Tensor:
    """`(I - S) (I + S)^-1 - I` of skew-symmetric matrices, `"... size size"`, exactly zero for a zero `S`.

    >>> cayley(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([[-1., -1.],
            [ 1., -1.]])
    """
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    result: Tensor = torch.linalg.solve(identity + skew, -2 * skew, left=False)
    return result


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Return the same numbers with the strides of another tensor, by which torch chooses the base's kernel."""
    if x.stride() == like.stride() or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return x
    if torch._C._functorch.maybe_current_level() is not None:
        return x
    steps = like.stride()
    if 0 in steps and steps[-1] == 0:
        return x  # what repeats along the coordinates themselves does not when they are rotated
    once = x[tuple(slice(0, 1) if step == 0 else slice(None) for step in steps)]
    own = torch.empty_strided(once.shape, [max(step, 1) for step in steps], dtype=x.dtype, device=x.device)
    return own.copy_(once).expand(like.shape)
