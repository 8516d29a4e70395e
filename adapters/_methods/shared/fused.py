"""The adapted linear layer as one step of autograd: what training and inference outside of transforms run.

    y = x W^T + bias + s ((m * x) A^T) B^T

Composed of torch's own functions, the same sum costs passes over fresh memory: a second output, a second gradient of
the input, and with dropout a copy of the input and a mask in floating point, both kept for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from torchgraft.functional.extending import has_rows

_MANY = 2**15
"""Elements from which the mask of a dropout is worth a way of its own to draw it."""

_LARGE = 2**14
"""Elements of an input from which passes over memory cost more than a step of autograd in Python."""

_unsafe_view = torch.ops.aten._unsafe_view.default
_level_of_transforms = torch._C._functorch.maybe_current_level
_tracing_state = torch._C._get_tracing_state
_is_autocast = torch._C._is_any_autocast_enabled
_PLAIN = (Tensor, torch.nn.Parameter)
_WIDE = (torch.float32, torch.float64)


def fits(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Return whether the adapted layer may run as one step.

    So it may where `is_eager` says so, of one dtype, but for inputs in other layouts than those in which the kernel of
    the base's own call is known to be the one taken here: another one may round in another way, and a product of zero
    has to leave the base's output as it is.
    """
    dtype, axes = x.dtype, x.ndim
    return (
        axes > 1
        and dtype is weight.dtype
        and dtype is a.dtype
        and dtype is b.dtype
        and (axes == 2 or (x.is_contiguous() and has_rows(x)))
        and is_eager(x, weight)
    )


def pays(x: Tensor) -> bool:
    """Return whether one step, which saves passes over memory, is faster than torch's own functions composed.

    Those of half precision take it in any case: composed, they would round what is added before the sum. So does what
    is compiled, whatever the size.

    >>> pays(torch.ones(512, 256)), pays(torch.ones(8, 256, dtype=torch.bfloat16))
    (True, True)
    """
    return torch.compiler.is_compiling() or x.numel() >= _LARGE or x.itemsize < 4


def composes(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Return whether the adapted layer is torch's own functions composed, which give what `apply` gives there.

    So it is for small inputs of any layout, in and out of transforms, where plain tensors of one dtype with values meet
    that no precision is chosen for. Each call of a layer asks, so the questions are few and in one place.

    >>> x, w = torch.ones(2, 3), torch.ones(4, 3)
    >>> composes(x.half(), w, w, w), composes(x, w.double(), w, w)
    (False, False)
    """
    dtype = x.dtype
    return (
        dtype in _WIDE
        and weight.dtype is dtype
        and a.dtype is dtype
        and b.dtype is dtype
        and x.numel() < _LARGE
        and type(x) is Tensor
        and type(weight) in _PLAIN
        and not (weight.is_meta or a.is_meta or b.is_meta or x.is_nested or _is_autocast())
    )


def composed(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`x W^T + bias + s x A^T B^T` in torch's own functions, whose first is the base's own call."""
    return torch.add(F.linear(x, weight, bias), F.linear(F.linear(x, a), b), alpha=scaling)


def is_eager(x: Tensor, weight: Tensor) -> bool:
    """Return whether plain tensors meet outside of transforms, autocast, forward gradients and tracing.

    Elsewhere, and where numbers are complex, torch's own functions have to be seen instead of a step of autograd.

    >>> is_eager(torch.ones(1), torch.ones(1)), is_eager(torch.ones(1), torch.ones(1, device="meta"))
    (True, False)
    """
    return (
        x.is_floating_point()
        and type(weight) in _PLAIN
        and not weight.is_meta
        and type(x) is Tensor
        and _level_of_transforms() is None
        and forward_ad._current_level < 0
        and _tracing_state() is None
        and not _is_autocast()
    )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, p: float = 0.0
) -> Tensor:
    """`x W^T + bias + s B A dropout(x)`, also with an `A` and a `B` for each of several equal parts of the batch.

    Args:
        x: `"... in"`.
        weight: `"out in"`.
        bias: `"out"`.
        a: `"r in"`, or `"parts r in"`.
        b: `"out r"`, or `"parts out r"`.
        scaling: `s`.
        p: Probability of dropout.

    >>> x, w = torch.ones(1, 2), torch.ones(1, 2)
    >>> linear(x, w, None, torch.ones(1, 2), torch.ones(1, 1), 0.5)
    tensor([[3.]])
    """
    if not p and a.ndim == 2 and not pays(x):
        return composed(x, weight, bias, a, b, scaling)
    keep = None
    if p:
        keep, kept = draw(x, p)
        scaling = scaling / kept
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, _down(x, a, keep), b, scaling)
    # Where nothing else needs the input it is not kept; a second derivative finds it behind what comes out of `a`.
    down = None if a.requires_grad or weight.requires_grad else _down(x, a, keep)
    arguments = (x, weight, bias, a, b, scaling, keep, down)
    result: Tensor = _Linear.apply(*arguments)  # type: ignore[no-untyped-call,unused-ignore]
    return result


def draw(x: Tensor, p: float, generator: torch.Generator | None = None) -> tuple[Tensor, float]:
    """Return which elements of an input dropout keeps, 0 or 1 like `x`, and the probability of that.

    Large inputs on a CPU take 16 random bits for each, five times as fast as torch's own dropout, so there `p` is
    rounded to a multiple of 2^-16. For the others the mask is the one of `F.dropout`, of the same random numbers.

    >>> keep, kept = draw(torch.ones(1000), 0.25)
    >>> keep.dtype, kept
    (torch.uint8, 0.75)
    """
    if not x.is_cpu or x.numel() < _MANY:
        return torch.empty(x.shape, dtype=torch.uint8, device=x.device).bernoulli_(1 - p, generator=generator), 1 - p
    dropped = min(round(p * 2**16), 2**16 - 1)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    keep = bits.view(torch.int16)[: x.numel()] >= dropped - 2**15
    return keep.view(torch.uint8).view(x.shape), 1 - dropped / 2**16


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        keep: Tensor | None,
        down: Tensor | None,
    ) -> Tensor:
        kept = x if down is None else None
        down = _down(x, a, keep) if down is None else down
        ctx.save_for_backward(kept, weight, a, b, down, keep)
        ctx.scaling = scaling
        return _forward(x, weight, bias, down, b, scaling)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, a, b, down, keep = ctx.saved_tensors
        for_x, for_weight, for_bias, for_a, for_b, *_ = ctx.needs_input_grad
        shape, flat = g.shape, g.flatten(0, -2)
        gx = gw = gb = ga = g_bias = None
        g, down = _parts(flat, b), _parts(down, a)
        up = (g @ b).mul_(ctx.scaling)
        if for_a:
            ga = up.mT @ _parts(x if keep is None else x * keep, a)
        if for_b:
            if torch.is_grad_enabled() and x is not None:
                down = _parts(
                    _down(x, a, keep), a
                )  # what was kept is no function of `x` and `a` to a second derivative
            gb = (down.mT @ g).mul_(ctx.scaling).mT
        if for_x:
            gx = flat @ weight
            if keep is None:
                _add_product_(gx, up, a, 1.0)
            else:
                gx.add_((up @ a).view(gx.shape).mul_(keep.view(gx.shape)))
            gx = gx.view(*shape[:-1], gx.shape[-1])
        if for_weight:
            gw = flat.mT @ x.flatten(0, -2)
        if for_bias:
            g_bias = flat.sum(0)
        return gx, gw, g_bias, ga, gb, None, None, None


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return the output, of an input and of what comes out of `a`."""
    if bias is None and x.is_contiguous():  # torch's output is no view then
        y = F.linear(x, weight)
        flat = y.view(-1, weight.size(0))
    else:
        flat = base_output(x, weight, bias)
        y = shaped(flat, x)
    if b.ndim == 2:
        flat.addmm_(down, b.t(), alpha=scaling)
    else:
        _add_product_(flat, down, b.mT, scaling)
    return y


def _down(x: Tensor, a: Tensor, keep: Tensor | None) -> Tensor:
    """Return the input on `r` coordinates, `"tokens r"` or `"parts tokens r"`."""
    x = x if keep is None else x * keep
    if a.ndim != 2:
        return _parts(x, a) @ a.mT
    return F.linear(x.view(-1, a.size(1)), a) if x.is_contiguous() else F.linear(x, a).flatten(0, -2)


def base_output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` as `"tokens out"`, by the kernel that the base's own call takes."""
    return F.linear(x.flatten(0, -2), weight, bias)


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """Return `"tokens out"` in the shape of the output for an input, no view to autograd: users may write to it."""
    return _unsafe_view(y, (*x.shape[:-1], y.shape[-1])) if x.ndim > 2 else y


def _parts(x: Tensor, like: Tensor) -> Tensor:
    """`"tokens n"`, or `"parts tokens n"` where there is a matrix for each part."""
    return x.flatten(0, -2) if like.ndim == 2 else x.reshape(len(like), -1, x.shape[-1])


def _add_product_(y: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """Add `s left right` to `"tokens n"` where it is."""
    if left.ndim == 2:
        y.addmm_(left, right, alpha=scaling)
    else:
        y.view(len(left), -1, y.shape[-1]).baddbmm_(left, right, alpha=scaling)
