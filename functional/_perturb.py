"""Gaussian noise on parameter trees, each adapter's from a generator of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from ._messages import given_type
from ._method import Tree
from ._trees import adapters_in
from ._vectors import numbers_in, unravel


def perturb(
    tree: Tree,
    generators: torch.Generator | Sequence[torch.Generator],
    std: float | Tensor | Tree = 1.0,
    *,
    stacked: bool = False,
) -> Tree:
    """Add Gaussian noise to a tree: `tree + std * z`, with each adapter's `z` from a generator of its own.

    A generator gives its adapter the same noise wherever that stands: `z` is `unravel` of `torch.randn(P)`, in float32
    or the widest dtype of the leaves, for the `P` numbers of one adapter. The sum is taken there, and rounded once.

    Args:
        tree: The tree of one adapter; with `stacked`, a stack of `N`.
        generators: One makes one tree; `N` make a stack of `N`.
        std: Standard deviation: a number; `"N"`, one for each generator; or a tree like that of one adapter.
        stacked: Whether the tree is a stack already, whose adapter `i` gets the noise of generator `i`.

    Returns:
        A tree like `tree`, stacked if there are several generators; differentiable in `tree` and `std`.

    Raises:
        TypeError: Something else than generators; leaves that are not real floating-point numbers.
        ValueError: No generators, or other numbers of them than of adapters or of `std`; one that is given twice,
            whose noise would differ from that of the next call; a negative `std`.

    >>> params = {"a": torch.zeros(2), "b": torch.ones(1)}
    >>> many = perturb(params, [torch.Generator().manual_seed(i) for i in range(3)], 0.1)
    >>> again = perturb(params, torch.Generator().manual_seed(2), 0.1)
    >>> many["a"].shape, torch.equal(many["a"][2], again["a"])
    (torch.Size([3, 2]), True)
    """
    single = isinstance(generators, torch.Generator)
    sources = _checked([generators] if single else generators)
    if stacked and (single or adapters_in(tree, "perturb") != len(sources)):
        given = "one generator" if single else f"{len(sources)} generators"
        raise ValueError(f"perturb: got {given} for a stack of {adapters_in(tree, 'perturb')}; give one for each")
    one = optree.tree_map(lambda leaf: leaf[0], tree) if stacked else tree
    dtype, count = numbers_in(one, "perturb")
    if dtype.is_complex:
        raise TypeError(f"perturb: the leaves have dtype {dtype}, expected real numbers")
    wide = torch.promote_types(dtype, torch.float32)
    drawn = [torch.randn(count, generator=source, device=source.device, dtype=wide) for source in sources]
    form = optree.tree_map(lambda leaf: torch.empty(leaf.shape, dtype=wide, device="meta"), one)
    device = optree.tree_leaves(tree)[0].device
    noise = unravel(drawn[0].to(device) if single else torch.stack(drawn).to(device), form)
    scales = _scales(std, one, len(sources), single)
    result: Tree = optree.tree_map(lambda leaf, z, s: (leaf + s * z).to(leaf.dtype), tree, noise, scales)
    return result


def _checked(generators: Any) -> list[torch.Generator]:
    if not isinstance(generators, Sequence) or not all(isinstance(one, torch.Generator) for one in generators):
        raise TypeError(
            f"perturb: generators is {given_type(generators)}, expected a torch.Generator or a list of them: "
            "[torch.Generator().manual_seed(i) for i in range(8)]"
        )
    if not generators:
        raise ValueError("perturb: got no generators; give one for each adapter")
    if len({id(one) for one in generators}) != len(generators):
        raise ValueError("perturb: a generator is given twice; each adapter has one of its own")
    return list(generators)


def _scales(std: Any, one: Tree, count: int, single: bool) -> Tree:
    """Return the standard deviation of each leaf, as it multiplies the noise."""
    if isinstance(std, dict):
        if optree.tree_structure(std) != optree.tree_structure(one):
            raise ValueError("perturb: std is a tree with other keys than those of the tree; make it of tree_map")
        return std
    if isinstance(std, Tensor) and std.ndim:
        if single or std.shape != (count,):
            raise ValueError(f"perturb: std has shape {tuple(std.shape)}, expected a number or one for each generator")
        return optree.tree_map(lambda leaf: std.view(-1, *(1,) * leaf.ndim), one)  # type: ignore[no-any-return]
    if not isinstance(std, Tensor) and not (isinstance(std, (int, float)) and 0 <= std < float("inf")):
        raise ValueError(f"perturb: std is {std!r}, expected a number from 0 on, a tensor or a tree")
    return optree.tree_map(lambda leaf: std, one)  # type: ignore[no-any-return]
