"""Stacking the parameters of injected adapters for each call: few large copies, through which gradients flow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional.extending import Blocks, Tree, pad_to, sort

Shape = tuple[int, ...]


class Stacking:
    """The leaves of some adapters, stacked as often as is asked for.

    Leaves of one shape are copied together, with those of all sites: a launch for each shape and not for each leaf.

    Args:
        trees: The tree of each adapter; its leaves are the parameters themselves.
        shapes: The shape that leaves have in the stack, by path and name; smaller ones are padded with zeros.
        blocks: The blocks of leaves, behind each of which there may be padding.
    """

    def __init__(self, trees: Sequence[Tree], shapes: Mapping[str, Mapping[str, Shape]], blocks: Blocks):
        self._blocks = blocks
        self._slots: dict[tuple[Shape, torch.device, torch.dtype], list[tuple[str, str]]] = {}
        self._leaves: dict[tuple[str, str], list[Tensor | None]] = {}
        for path, leaves in shapes.items():
            for name, shape in leaves.items():
                each = [tree.get(path, {}).get(name) for tree in trees]
                like = next(leaf for leaf in each if leaf is not None)
                self._slots.setdefault((shape, like.device, like.dtype), []).append((path, name))
                self._leaves[path, name] = each
        self._uneven = {
            slot
            for (shape, *_), slots in self._slots.items()
            for slot in slots
            if any(leaf is None or leaf.shape != shape for leaf in self._leaves[slot])
        }

    def stack(self, members: Sequence[int]) -> Tree:
        """Return the stack of some of the adapters, by number, leaves `"members ..."`; differentiable."""
        stacked: Tree = {}
        for key, slots in self._slots.items():
            parts = [leaf for slot in slots for leaf in self._parts(slot, members, *key)]
            together = torch.stack(parts).unflatten(0, (len(slots), len(members)))
            for (path, name), leaf in zip(slots, together.unbind(), strict=True):
                stacked.setdefault(path, {})[name] = leaf
        return sort(stacked)

    def _parts(
        self, slot: tuple[str, str], members: Sequence[int], shape: Shape, device: torch.device, dtype: torch.dtype
    ) -> Iterable[Any]:
        """Return one leaf of each of the adapters, padded to a shape; zeros where an adapter has none."""
        leaves = self._leaves[slot]
        if slot not in self._uneven:
            return [leaves[member] for member in members]
        zeros, blocks = torch.zeros(shape, device=device, dtype=dtype), self._blocks.get(slot[0], {}).get(slot[1], 1)
        given = [leaves[member] for member in members]
        return [zeros if leaf is None else pad_to(leaf, shape, blocks) for leaf in given]
