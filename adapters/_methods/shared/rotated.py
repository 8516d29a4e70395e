"""`x + x D` with a block-diagonal `D` as one step of autograd.

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
