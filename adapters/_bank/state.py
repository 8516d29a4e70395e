"""The state of a bank as a pytree of tensors, and what is done to its rows.

As torch's optimizers do, these functions write to the tensors that they are given, to some rows and to no others; a
pure step is a step on a copy, `State.clone`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchgraft.functional.extending import Tree

from .layout import Layout, Shapes


class State(NamedTuple):
    """The numbers of all slots.

    Attributes:
        parameters: `"slots P"`.
        sums: Gradients added up since the last step, `"slots P"`; of an adapter without any, what was there last.
        moments: Buffers of the optimizers by name, `"slots ..."`.
        steps: Steps taken, `"slots"`, float32 as fused kernels want it.
        tokens: Tokens that gradients in `sums` are of, `"slots"`, float64.
        constants: Numbers of the method that may differ along a stack, by dtype, `"slots C"`.
    """

    parameters: Tensor
    sums: Tensor
    moments: dict[str, Tensor]
    steps: Tensor
    tokens: Tensor
    constants: dict[str, Tensor]

    @classmethod
    def empty(cls, slots: int, size: int, dtype: torch.dtype, device: torch.device) -> State:
        """Make the state of a bank without adapters: zeros, and neither moments nor constants yet.

        >>> State.empty(2, 8, torch.float32, torch.device("cpu")).parameters.shape
        torch.Size([2, 8])
        """
        return cls(
            torch.zeros(slots, size, dtype=dtype, device=device),
            torch.zeros(slots, size, dtype=dtype, device=device),
            {},
            torch.zeros(slots, device=device),
            torch.zeros(slots, dtype=torch.float64, device=device),
            {},
        )

    def buffers(self) -> dict[str, Tensor]:
        """Return every tensor that has a row for each slot, by name; constants are not among them."""
        moments = {f"moments.{name}": buffer for name, buffer in self.moments.items()}
        return {
            "parameters": self.parameters, "sums": self.sums, "steps": self.steps, "tokens": self.tokens, **moments
        }  # fmt: skip

    def clone(self) -> State:
        """Return a copy that shares no memory."""
        moments = {name: buffer.clone() for name, buffer in self.moments.items()}
        constants = {name: buffer.clone() for name, buffer in self.constants.items()}
        return State(
            self.parameters.clone(), self.sums.clone(), moments, self.steps.clone(), self.tokens.clone(), constants
        )


class Gathered(NamedTuple):
    """The parameters of some slots, to differentiate.

    Attributes:
        rows: A copy of them, `"n P"`; a leaf, whose `.grad` a backward fills.
        tree: The stacked tree of its views, leaves `"n ..."`.
        constants: Trees of constants, by dtype, leaves `"n ..."`.
    """

    rows: Tensor
    tree: Tree
    constants: Mapping[str, Tree]


def gather(
    state: State, slots: Sequence[int], layout: Layout, constants: Mapping[str, Layout], cut: Shapes, *, grad: bool
) -> Gathered:
    """Copy the parameters of some slots, as a stack that is cut to some shapes.

    Args:
        state: The state; only read.
        slots: The slots, in the order that the stack is to have.
        layout: Where leaves are in a row of parameters.
        constants: Where constants are in rows of theirs, by dtype.
        cut: Shapes that hold the leaves of each adapter there.
        grad: Whether to differentiate them.

    >>> layout = Layout.of({"0": {"a": (2,)}}, torch.float32)
    >>> state = State.empty(3, layout.size, torch.float32, torch.device("cpu"))
    >>> two = gather(state, [2, 0], layout, {}, layout.shapes, grad=True)
    >>> (two.tree["0"]["a"] * 5).sum().backward()
    >>> two.rows.grad
    tensor([[5., 5., 0., 0.],
            [5., 5., 0., 0.]])
    """
    index = torch.tensor(slots, device=state.parameters.device)
    with torch.no_grad():
        rows = state.parameters.index_select(0, index)
        held = {dtype: constants[dtype].views(all_.index_select(0, index)) for dtype, all_ in state.constants.items()}
    if not grad:
        return Gathered(rows, layout.views(rows, cut), held)
    leaves: Iterator[Tensor] = iter(_Views.apply(rows.requires_grad_(), layout, cut))  # type: ignore[no-untyped-call,unused-ignore]
    tree = {path: {name: next(leaves) for name in names} for path, names in layout.views(rows, cut).items()}
    return Gathered(rows, tree, held)


class _Views(torch.autograd.Function):
    """Views of rows, whose gradients are written into rows once; as slices, each would make rows of zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: Layout, cut: Shapes) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.cut, ctx.shape = layout, cut, rows.shape
        return tuple(leaf for leaves in layout.views(rows, cut).values() for leaf in leaves.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        like = next(gradient for gradient in gradients if gradient is not None)
        rows = like.new_zeros(ctx.shape)
        leaves = (leaf for leaves in ctx.layout.views(rows, ctx.cut).values() for leaf in leaves.values())
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                leaf.copy_(gradient)
        return rows, None, None


def accumulate(
    state: State, slots: Sequence[int], gradients: Tensor, tokens: Sequence[float] | None, fresh: Collection[int] = ()
) -> State:
    """Add gradients to the sums of some slots, and the tokens that they are of to the counts.

    Args:
        state: The state; `sums` and `tokens` are written to.
        slots: The slots, each once.
        gradients: `"n P"`.
        tokens: One count for each; `None` where losses are normalised already.
        fresh: The slots whose sums begin with these gradients, whatever was there.

    >>> state = State.empty(3, 2, torch.float32, torch.device("cpu"))
    >>> accumulate(state, [2], torch.ones(1, 2), [4.0]).sums[2], state.tokens
    (tensor([1., 1.]), tensor([0., 0., 4.], dtype=torch.float64))
    """
    with torch.no_grad():
        for slot, gradient in zip(slots, gradients, strict=True):
            if slot in fresh:
                state.sums[slot].copy_(gradient)
            else:
                state.sums[slot].add_(gradient)
        if tokens is not None:
            index = torch.tensor(slots, device=state.tokens.device)
            state.tokens.index_add_(0, index, torch.tensor(tokens, dtype=torch.float64, device=state.tokens.device))
    return state


def clear(state: State, slot: int) -> None:
    """Set every number of a slot to zero."""
    for buffer in (*state.buffers().values(), *state.constants.values()):
        buffer[slot].zero_()
