"""Leaves of adapters of several sizes in one size: zeros stand behind what an adapter has.

The first axis of a leaf may be made of blocks, one for each expert or group; then zeros stand behind each block, for
behind all of them they would move the ranks of one expert to another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._abilities import PadsInBlocks
from .._method import Config, Tree
from .._rows import is_readable
from .._sites.site import Site
from .binding import Shapes

Blocks = Mapping[str, Mapping[str, int]]
"""How many blocks the first axis of a leaf has, by path and name; leaves that are not named have one."""


def blocks_of(config: Config, sites: Mapping[str, Site]) -> Blocks:
    """Return the blocks of the leaves of a method at some sites."""
    ability = config.method.ability(PadsInBlocks)
    found = {} if ability is None else {path: ability.blocks(config, site) for path, site in sites.items()}
    return {path: leaves for path, leaves in found.items() if leaves}


def whole_by(config: Config, site: Site | None) -> str | None:
    """Return in words why leaves at a site cannot be padded; `None` where they can."""
    return None if site is None or config.method.ability(PadsInBlocks) is not None else site.pieces


def pad_to(tensor: Tensor, shape: tuple[int, ...], blocks: int = 1) -> Tensor:
    """Return a tensor with zeros behind it along each axis, up to a shape.

    Args:
        tensor: A leaf.
        shape: As many axes.
        blocks: How many blocks the first axis has; zeros stand behind each.

    >>> pad_to(torch.tensor([[1], [2]]), (4, 1), blocks=2).flatten()
    tensor([1, 0, 2, 0])
    """
    if blocks > 1:
        return pad_to(tensor.unflatten(0, (blocks, -1)), _apart(shape, blocks)).flatten(0, 1)
    missing = [size - length for size, length in zip(shape, tensor.shape, strict=True)]
    if not any(missing):
        return tensor
    return F.pad(tensor, [edge for size in reversed(missing) for edge in (0, size)])


def cut_to(leaf: Tensor, shape: Sequence[int], blocks: int = 1) -> Tensor:
    """Return the part of a padded leaf that has numbers; the inverse of `pad_to`.

    It is a view, but for blocks that are cut.

    Args:
        leaf: A leaf, or a stack of them: a shape says of the last axes.
        shape: The shape of the part.
        blocks: How many blocks the first of these axes has.

    >>> cut_to(torch.arange(8).view(1, 4, 2), (2, 1), blocks=2)
    tensor([[[0],
             [4]]])
    """
    part = view_of_part(leaf, shape, blocks)
    return part if part.ndim == leaf.ndim else part.flatten(leaf.ndim - len(shape), leaf.ndim - len(shape) + 1)


def view_of_part(leaf: Tensor, shape: Sequence[int], blocks: int = 1) -> Tensor:
    """Return `cut_to` as a view in any case: where blocks are cut, they have an axis of their own.

    >>> view_of_part(torch.arange(8).view(4, 2), (2, 1), blocks=2).shape
    torch.Size([2, 1, 1])
    """
    first = leaf.ndim - len(shape)
    if blocks > 1 and leaf.shape[first] != shape[0]:
        return view_of_part(leaf.unflatten(first, (blocks, -1)), _apart(shape, blocks))
    for axis, length in enumerate(shape, start=first):
        if leaf.shape[axis] != length:
            leaf = leaf.narrow(axis, 0, length)
    return leaf


def _apart(shape: Sequence[int], blocks: int) -> tuple[int, ...]:
    return blocks, shape[0] // blocks, *shape[1:]


def check_padding(stacked: Tree, shapes: Shapes, own: Sequence[Shapes], blocks: Blocks) -> None:
    """Refuse a stack whose padding has numbers: they take part in its outputs, and no member would have them.

    Args:
        stacked: The stack; one that `torch.compile` or `torch.vmap` traces is not looked at.
        shapes: The room that each adapter has for each leaf.
        own: What each adapter has of it.
        blocks: The blocks of leaves.
    """
    for path, leaves in shapes.items():
        for name, room in leaves.items():
            none, leaf = (0,) * len(room), stacked[path][name].detach()
            parts: list[tuple[int, ...]] = [one[path].get(name, none) if path in one else none for one in own]
            if torch.compiler.is_compiling() or not is_readable(leaf) or all(part == room for part in parts):
                continue
            padding: Any = torch.ones_like(leaf, dtype=torch.bool)
            for i, part in enumerate(parts):
                view_of_part(padding[i], part, blocks.get(path, {}).get(name, 1)).fill_(False)
            found = (padding & (leaf != 0)).flatten(1).any(1).tolist()
            if True in found:
                i = found.index(True)
                raise ValueError(
                    f"unstack: {name} of {path!r} has numbers in the padding of adapter {i}, which has {parts[i]} of "
                    f"{tuple(room)}; they take part in the stack's outputs, and would be lost. Add noise and the like "
                    "to adapters one by one, graft.stack([tree, ...])"
                )
