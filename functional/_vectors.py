"""Parameter trees as vectors, for what works on vectors: solvers, Hessians, projections, evolution strategies."""

from __future__ import annotations

import optree
import torch
from torch import Tensor

from ._messages import given_type
from ._method import Tree
from ._trees import adapters_in, flatten


def ravel(tree: Tree, *, stacked: bool = False) -> Tensor:
    """Return all numbers of a tree in one vector, leaf after leaf by sorted keys; `unravel` is the inverse.

    Args:
        tree: A tree of `P` numbers; with `stacked`, a stack of `N` adapters of `P` numbers each.
        stacked: Whether the leading axis of leaves is the adapter, and stays one.

    Returns:
        `"P"`, with `stacked` `"N P"`, in the widest dtype that leaves have; differentiable.

    Raises:
        TypeError: Leaves of integers, or of complex numbers beside real ones.
        ValueError: No leaves, leaves on several devices, or with `stacked` leaves that disagree on `N`.

    >>> ravel({"b": torch.tensor([3.0]), "a": torch.tensor([[1.0, 2.0]])})
    tensor([1., 2., 3.])
    >>> ravel({"a": torch.tensor([[1.0, 2.0], [4.0, 5.0]]), "b": torch.tensor([3.0, 6.0])}, stacked=True)
    tensor([[1., 2., 3.],
            [4., 5., 6.]])
    """
    numbers_in(tree, "ravel")
    leaves = optree.tree_leaves(tree)
    if not stacked:
        return torch.cat([leaf.reshape(-1) for leaf in leaves])
    count = adapters_in(tree, "ravel")
    return torch.cat([leaf.reshape(count, leaf.shape[1:].numel()) for leaf in leaves], dim=1)


def unravel(vector: Tensor, like: Tree) -> Tree:
    """Return a tree with the numbers of a vector; the inverse of `ravel`.

    Args:
        vector: `"... P"`. More axes make stacks: `"N P"` is `N` adapters.
        like: The tree of one adapter, of `P` numbers, whose keys, shapes and dtypes the result has.

    Returns:
        A tree with leaves `"... shape"` on the vector's device; views of it where dtypes are equal. Differentiable.

    Raises:
        TypeError: Something else than a tensor; one of integers, or of complex numbers where `like` is real.
        ValueError: A vector of another length.

    >>> unravel(torch.tensor([1.0, 2.0, 3.0]), {"a": torch.zeros(1, 2), "b": torch.zeros(())})
    {'a': tensor([[1., 2.]]), 'b': tensor(3.)}
    >>> unravel(torch.ones(4, 3), {"a": torch.zeros(1, 2), "b": torch.zeros(())})["a"].shape
    torch.Size([4, 1, 2])
    """
    dtype, count = numbers_in(like, "unravel")
    if not isinstance(vector, Tensor):
        raise TypeError(
            f"unravel: vector is {given_type(vector)}, expected a tensor of {count} numbers, as ravel makes"
        )
    if not (vector.is_floating_point() or vector.is_complex()) or vector.is_complex() != dtype.is_complex:
        raise TypeError(f"unravel: vector has dtype {vector.dtype}, and the leaves of the tree {dtype}")
    if vector.ndim == 0 or vector.shape[-1] != count:
        raise ValueError(
            f"unravel: vector has shape {tuple(vector.shape)}, expected (..., {count}): the tree has {count} numbers. "
            "For a stack, give the tree of one adapter, unstack(many)[0]: more axes of the vector make the stack"
        )
    leaves, treedef = optree.tree_flatten(like)
    parts = vector.split([leaf.numel() for leaf in leaves], dim=-1)
    shaped = [
        part.reshape((*vector.shape[:-1], *leaf.shape)).to(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)
    ]
    tree: Tree = optree.tree_unflatten(treedef, shaped)
    return tree


def numbers_in(tree: Tree, what: str) -> tuple[torch.dtype, int]:
    """Return the widest dtype of a tree's leaves, and how many numbers they have.

    Raises:
        TypeError, ValueError: Leaves that are not of one kind, on one device; `what` is who asks.
    """
    leaves = flatten(tree)
    if not leaves:
        raise ValueError(f"{what}: the tree has no leaves; graft.init(generator) makes one")
    first, leaf = next(iter(leaves.items()))
    dtype = leaf.dtype
    for path, other in leaves.items():
        if not (other.is_floating_point() or other.is_complex()):
            raise TypeError(f"{what}: leaf {path} has dtype {other.dtype}, expected floating-point numbers")
        if other.is_complex() != leaf.is_complex():
            raise TypeError(
                f"{what}: leaf {path} has dtype {other.dtype} and leaf {first} has {leaf.dtype}; one vector holds real "
                "or complex numbers: torch.view_as_real makes two real numbers of each"
            )
        if other.device != leaf.device:
            raise ValueError(
                f"{what}: leaf {path} is on {other.device} and leaf {first} on {leaf.device}; move them to one device"
            )
        dtype = torch.promote_types(dtype, other.dtype)
    return dtype, sum(other.numel() for other in leaves.values())
