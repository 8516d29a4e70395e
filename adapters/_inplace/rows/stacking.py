"""Stacking the parameters of injected adapters for each call: few large copies, through which gradients flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchgraft.functional.extending import Tree, pad_to, sort

Shape = tuple[int, ...]


class Stacking:
    """The leaves of some adapters, stacked as often as is asked for.

    Leaves of one shape are copied together, with those of all sites: a launch for each shape and not for each leaf.

    Args:
        trees: The tree of each adapter; its leaves are the parameters themselves.
        shapes: The shape that leaves have in the stack, by path and name; smaller ones are padded with zeros.
    """

    def __init__(self, trees: Sequence[Tree], shapes: Mapping[str, Mapping[str, Shape]]):
        self._slots: dict[tuple[Shape, torch.device, torch.dtype], list[tuple[str, str]]] = {}
        self._leaves: dict[tuple[str, str], list[Tensor | None]] = {}
        for path, leaves in shapes.items():
            for name, shape in leaves.items():
                each = [tree.get(path, {}).get(name) for tree in trees]
                like = next(leaf for leaf in each if leaf is not None)
                self._slots.setdefault((shape, like.device, like.dtype), []).append((path, name))
                self._leaves[path, name] = each

    def stack(self, members: Sequence[int]) -> Tree:
        """Return the stack of some of the adapters, by number, leaves `"members ..."`; differentiable."""
        stacked: Tree = {}
        for (shape, device, dtype), slots in self._slots.items():
            parts = [
                torch.zeros(shape, device=device, dtype=dtype) if leaf is None else pad_to(leaf, shape)
                for slot in slots
                for leaf in map(self._leaves[slot].__getitem__, members)
            ]
            together = torch.stack(parts).unflatten(0, (len(slots), len(members)))
            for (path, name), leaf in zip(slots, together.unbind(), strict=True):
                stacked.setdefault(path, {})[name] = leaf
        return sort(stacked)
