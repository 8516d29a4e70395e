"""The state of a bank as a pytree of tensors, and what is done to its rows.

As torch's optimizers do, these functions write to the tensors that they are given, to some rows and to no others; a
pure step is a step on a copy, `State.clone`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchgraft.functional.extending import Tree, view_of_part

from .layout import Layout, Shapes


class State(NamedTuple):
    """The numbers of all slots.

    Attributes:
        parameters: `"slots P"`.
        sums: Gradients added up since the last step, `"slots P"`; of an adapter without any, what was there last.
        norms: Norms of these sums, `"slots"`. What writes to `sums` writes its norm here too, or one that is not
            finite: a step then takes it anew.
        moments: Buffers of the optimizers by name, `"slots ..."`.
        steps: Steps taken, `"slots"`, float32 as fused kernels want it.
        tokens: Tokens that gradients in `sums` are of, `"slots"`, float64.
        constants: Numbers of the method that may differ along a stack, by dtype, `"slots C"`.
    """

    parameters: Tensor
    sums: Tensor
    norms: Tensor
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
            torch.zeros(slots, dtype=torch.promote_types(dtype, torch.float32), device=device),
            {},
            torch.zeros(slots, device=device),
            torch.zeros(slots, dtype=torch.float64, device=device),
            {},
        )

    def buffers(self) -> dict[str, Tensor]:
        """Return the tensors that are an adapter's own, a row for each slot, by name: not norms, nor constants."""
        moments = {f"moments.{name}": buffer for name, buffer in self.moments.items()}
        return {
            "parameters": self.parameters, "sums": self.sums, "steps": self.steps, "tokens": self.tokens, **moments
        }  # fmt: skip

    def clone(self) -> State:
        """Return a copy that shares no memory."""
        moments = {name: buffer.clone() for name, buffer in self.moments.items()}
        constants = {name: buffer.clone() for name, buffer in self.constants.items()}
        parameters, sums, norms = self.parameters.clone(), self.sums.clone(), self.norms.clone()
        return State(parameters, sums, norms, moments, self.steps.clone(), self.tokens.clone(), constants)


class Gathered(NamedTuple):
    """The parameters of some slots, to differentiate.

    Attributes:
        tree: A copy of them as a stack, leaves `"n ..."`, whose `.grad` a backward fills.
        constants: Trees of constants, by dtype, leaves `"n ..."`.
    """

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
    >>> two.tree["0"]["a"].grad
    tensor([[5., 5.],
            [5., 5.]])
    """
    index = torch.tensor(slots, device=state.parameters.device)
    with torch.no_grad():
        tree = {
            path: {
                name: leaf.index_select(0, index).view(-1, *cut[path][name]).requires_grad_(grad)
                for name, leaf in leaves.items()
            }
            for path, leaves in layout.views(state.parameters, cut).items()
        }
        held = {dtype: constants[dtype].views(all_.index_select(0, index)) for dtype, all_ in state.constants.items()}
    return Gathered(tree, held)


def accumulate(
    state: State,
    slots: Sequence[int],
    gradients: Tree,
    layout: Layout,
    tokens: Sequence[float] | None,
    fresh: Collection[int] = (),
) -> State:
    """Add gradients to the sums of some slots, and the tokens that they are of to the counts.

    The norms are taken along, while the numbers are in the cache.

    Args:
        state: The state; `sums`, `norms` and `tokens` are written to.
        slots: The slots, each once.
        gradients: Leaves `"n ..."`, which may be cut to shapes that hold the leaves of each adapter there; zero where
            there is none.
        layout: Where leaves are in a row of sums.
        tokens: One count for each; `None` where losses are normalised already.
        fresh: The slots whose sums begin with these gradients, whatever was there.

    >>> layout = Layout.of({"0": {"a": (4,)}}, torch.float32)
    >>> state = State.empty(3, layout.size, torch.float32, torch.device("cpu"))
    >>> _ = accumulate(state, [2], {"0": {"a": torch.ones(1, 4)}}, layout, [5.0])
    >>> state.sums[2], state.norms, state.tokens
    (tensor([1., 1., 1., 1.]), tensor([0., 0., 2.]), tensor([0., 0., 5.], dtype=torch.float64))
    """
    device = state.sums.device
    index = torch.tensor(slots, device=device)
    again = torch.tensor([i for i, slot in enumerate(slots) if slot not in fresh], dtype=torch.int64, device=device)
    norms = []
    with torch.no_grad():
        for path, leaves in layout.views(state.sums).items():
            for name, sums in leaves.items():
                new = gradients.get(path, {}).get(name)
                new = sums.new_zeros(len(slots), *sums.shape[1:]) if new is None else new
                sums = view_of_part(sums, new.shape[1:], layout.blocks_of(path, name))
                new = new.reshape(-1, *sums.shape[1:])
                if len(again):
                    new = new.index_add(0, again, sums.index_select(0, index[again]))
                sums.index_copy_(0, index, new)
                norms.append(torch.linalg.vector_norm(new.reshape(len(slots), -1), dim=1, dtype=state.norms.dtype))
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        before = state.norms.index_select(0, index[again])  # beyond the cut there may be what is not finite
        norm.index_add_(0, again, before.masked_fill(before.isfinite(), 0))
        state.norms.index_copy_(0, index, norm)
        if tokens is not None:
            state.tokens.index_add_(0, index, torch.tensor(tokens, dtype=torch.float64, device=device))
    return state


def clear(state: State, slot: int) -> None:
    """Set every number of a slot to zero."""
    for buffer in (*state.buffers().values(), state.norms, *state.constants.values()):
        buffer[slot].zero_()
