"""Parameter trees: nested dicts of tensors with sorted keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from ._method import Tree


def sort(tree: Mapping[str, Any]) -> Tree:
    """Sort the keys of nested dicts, so that optree and `torch.utils._pytree` agree on the order of leaves.

    >>> list(sort({"b": 1, "a": {"d": 2, "c": 3}}))
    ['a', 'b']
    """
    return {key: sort(tree[key]) if isinstance(tree[key], Mapping) else tree[key] for key in sorted(tree)}


def stack(trees: Sequence[Tree]) -> Tree:
    """Stack parameter trees of one structure along a new leading axis: the adapter.

    Args:
        trees: Trees with equal keys and equal shapes, `N` of them.

    Returns:
        One tree whose leaves have shape `"N ..."`; differentiable in every input.

    Raises:
        ValueError: No tree, or trees that differ; names the tree, the path and what differs.

    >>> many = stack([{"a": torch.zeros(2)}, {"a": torch.ones(2)}])
    >>> many["a"].shape
    torch.Size([2, 2])
    """
    trees = list(trees)
    if not trees:
        raise ValueError("stack: got no trees; give at least one parameter tree")
    flat = [flatten(tree) for tree in trees]
    for index, other in enumerate(flat[1:], start=1):
        for path in [*flat[0], *other]:
            if path not in other or path not in flat[0]:
                where, missing = (index, 0) if path in other else (0, index)
                raise ValueError(
                    f"stack: leaf {path} is in tree {where} and not in tree {missing}; stack adapters of one config"
                )
            if other[path].shape != flat[0][path].shape:
                raise ValueError(
                    f"stack: leaf {path} has shape {tuple(flat[0][path].shape)} in tree 0 and "
                    f"{tuple(other[path].shape)} in tree {index}; stack adapters of one rank and one base"
                )
    result: Tree = optree.tree_map(lambda *leaves: torch.stack(leaves), *map(sort, trees))
    return result


def unstack(tree: Tree) -> list[Tree]:
    """Split a stacked tree into its adapters; the inverse of `stack`.

    Where ranks differ (`bind(model, [config, ...])`) use `graft.unstack`, which knows what is padding.

    Args:
        tree: A tree whose leaves have shape `"N ..."`.

    Returns:
        `N` trees; their leaves are views of the stack (call `.contiguous()` on them before saving).

    Raises:
        ValueError: Leaves that disagree on `N`, or have no axis.

    >>> [t["a"].item() for t in unstack({"a": torch.tensor([1, 2])})]
    [1, 2]
    """
    count = adapters_in(tree, "unstack")
    return [optree.tree_map(lambda leaf, i=i: leaf[i], sort(tree)) for i in range(count)]


def adapters_in(tree: Any, what: str) -> int:
    """Return the number of adapters in a stacked tree.

    Raises:
        ValueError: Leaves that disagree on it, or have no axis; `what` is who asks.
    """
    flat = flatten(tree)
    if not flat:
        raise ValueError(f"{what}: the tree has no leaves; give a tree made by stack")
    first, leaf = next(iter(flat.items()))
    for path, other in flat.items():
        if other.ndim == 0 or other.shape[0] != leaf.shape[0]:
            raise ValueError(
                f"{what}: leaf {path} has shape {tuple(other.shape)} and leaf {first} has {tuple(leaf.shape)}; "
                "their leading axes must be equal: the number of adapters"
            )
    return int(leaf.shape[0])


def flatten(tree: Any, path: str = "") -> dict[str, Tensor]:
    """Return leaves by a readable path, `[layers.0.q_proj][lora_A]`; refuse anything but nested dicts of tensors."""
    if isinstance(tree, Tensor):
        return {path: tree}
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"leaf {path or '(the tree itself)'} is {_kind(tree)}, expected a tensor; "
            "a parameter tree is nested dicts of tensors"
        )
    return {name: leaf for key in tree for name, leaf in flatten(tree[key], f"{path}[{key}]").items()}


def check_tree(
    tree: Any, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], what: str = "params", stacked: int | None = None
) -> None:
    """Validate a tree against the shapes its graft expects.

    Args:
        tree: What the user passed.
        shapes: `{path: {leaf: shape}}`.
        what: How the message calls the tree.
        stacked: Number of adapters, for a stack of trees with these shapes.

    Raises:
        TypeError: A tree, a site or a leaf of the wrong type.
        KeyError: A site or a leaf that is missing or unknown.
        ValueError: A leaf of another shape.

    >>> check_tree({"a": {"w": torch.zeros(2)}}, {"a": {"w": (2,)}})
    """
    if type(tree) is not dict:
        raise TypeError(f"{what} is {_kind(tree)}, expected a dict of sites; graft.init(generator) makes one")
    if len(tree) != len(shapes):
        _name_difference(tree, shapes, what, "site")
    for path, expected in shapes.items():
        leaves = tree.get(path)
        if leaves is None:
            _name_difference(tree, shapes, what, "site")
        if type(leaves) is not dict:
            raise TypeError(f"{what}[{path!r}] is {_kind(leaves)}, expected a dict of {sorted(expected)}")
        if len(leaves) != len(expected):
            _name_difference(leaves, expected, f"{what}[{path!r}]", "leaf")
        for name, shape in expected.items():
            if stacked is not None:
                shape = (stacked, *shape)
            leaf = leaves.get(name)
            if not isinstance(leaf, Tensor):
                if name not in leaves:
                    _name_difference(leaves, expected, f"{what}[{path!r}]", "leaf")
                raise TypeError(f"{what}[{path!r}][{name!r}] is {_kind(leaf)}, expected a tensor of shape {shape}")
            if leaf.shape != shape:
                raise ValueError(
                    f"{what}[{path!r}][{name!r}] has shape {tuple(leaf.shape)}, expected {shape}"
                    + _hint(tuple(leaf.shape), shape)
                )


def _hint(given: tuple[int, ...], expected: tuple[int, ...]) -> str:
    if len(given) == len(expected) + 1 and given[1:] == expected:
        return f"; it looks like a stack of {given[0]} adapters: use route or torch.vmap, or unstack it"
    return "; was it made for another rank, layer or model?"


def _name_difference(given: Mapping[str, Any], expected: Mapping[str, Any], what: str, kind: str) -> None:
    unknown = [key for key in given if key not in expected]
    missing = [key for key in expected if key not in given]
    if unknown:
        raise KeyError(f"{what} has unknown {kind} {unknown[0]!r}{_more(unknown)}; expected {_list(sorted(expected))}")
    if missing:
        raise KeyError(f"{what} lacks {kind} {missing[0]!r}{_more(missing)}; given were {_list(sorted(given))}")
    raise TypeError(
        f"{what} has None for a {kind}: {[key for key in given if given[key] is None]!r}; give a dict, or leave the "
        "whole adapter out to switch it off"
    )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:6])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 6 else shown or "none"


def _kind(x: Any) -> str:
    return "None" if x is None else f"of type {type(x).__name__}"
