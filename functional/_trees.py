"""Parameter trees: nested dicts of tensors with sorted keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import optree
import torch
from torch import Tensor

from ._messages import did_you_mean, given_type
from ._method import Tree
from ._versions import count_writes, dict_version

_KNOWN = 64
"""Trees that a form knows again."""

_shape_of: Any = vars(torch._C.TensorBase)["shape"].__get__


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
    if isinstance(trees, Mapping):
        meant = "list(trees.values())" if _is_named(trees) else "[params]"
        raise TypeError(f"stack: got one dict, expected a list of parameter trees: stack({meant})")
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
            if other[path].device != flat[0][path].device:
                raise ValueError(
                    f"stack: leaf {path} is on {flat[0][path].device} in tree 0 and on {other[path].device} in tree "
                    f"{index}; move one of them, or make both with graft.init(device=...)"
                )
            if other[path].shape != flat[0][path].shape:
                raise ValueError(
                    f"stack: leaf {path} has shape {tuple(flat[0][path].shape)} in tree 0 and "
                    f"{tuple(other[path].shape)} in tree {index}; stack adapters of one rank and one base; "
                    "those of several ranks are a stack of bind(model, [config, ...])"
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
                "their leading axes must be equal: the number of adapters. The tree of one adapter is stacked by "
                "stack([params])"
            )
    return int(leaf.shape[0])


def flatten(tree: Any, path: str = "") -> dict[str, Tensor]:
    """Return leaves by a readable path, `[layers.0.q_proj][lora_A]`; refuse anything but nested dicts of tensors."""
    if isinstance(tree, Tensor):
        return {path: tree}
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"leaf {path or '(the tree itself)'} is {given_type(tree)}, expected a tensor; "
            "a parameter tree is nested dicts of tensors"
        )
    return {name: leaf for key in tree for name, leaf in flatten(tree[key], f"{path}[{key}]").items()}


class TreeForm:
    """The keys and shapes that a graft expects of a tree, laid out so that one that has them is known by few passes.

    Args:
        shapes: `{path: {leaf: shape}}`.

    >>> form, tree = TreeForm({"a": {"w": (2,)}}), {"a": {"w": torch.zeros(2)}}
    >>> form.knows(tree), form.fits(tree), form.knows(tree), form.fits({"a": {"w": torch.zeros(3)}})
    (False, True, True, False)
    """

    def __init__(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]):
        nodes = list(shapes.values())
        self._paths, self._counts = list(shapes), list(map(len, nodes))
        self._leaves = list(chain.from_iterable(nodes))
        self._shapes = [shape for node in nodes for shape in node.values()]
        self._known: dict[int, int] = {}

    def knows(self, tree: Any) -> bool:
        """Return whether the very same leaves stood in these dicts when `fits` accepted them; shapes may be others."""
        root, writes = _writes(tree)
        return bool(root) and self._known.get(root) == writes

    def fits(self, tree: Any) -> bool:
        """Return whether `check_tree` accepts a tree; also `False` for one with its keys in another order."""
        if type(tree) is not dict:
            return False
        (root, writes), nodes = _writes(tree), list(tree.values())
        if (
            list(tree) != self._paths
            or list(map(type, nodes)) != [dict] * len(nodes)
            or list(map(len, nodes)) != self._counts
        ):
            return False
        if list(chain.from_iterable(nodes)) != self._leaves:
            return False
        try:
            shapes = list(map(_shape_of, chain.from_iterable(map(dict.values, nodes))))
        except TypeError:  # not all are tensors
            return False
        if shapes == self._shapes and root:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[root] = writes
        return shapes == self._shapes

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_known": {}}  # another process counts its own writes


def _writes(tree: Any) -> tuple[int, int]:
    """Return the number of the last write to a tree, which no other dict has, and what counts writes to its nodes.

    Where the first is the same, the nodes are the same dicts.
    """
    try:
        return dict_version(tree), count_writes(tree.values())
    except RuntimeError:  # not all are dicts
        return 0, 0


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
        raise TypeError(
            f"{what} is {given_type(tree)}, expected a dict of sites; graft.init(generator) makes one{_instead(tree)}"
        )
    if len(tree) != len(shapes):
        _name_difference(tree, shapes, what, "site")
    for path, expected in shapes.items():
        leaves = tree.get(path)
        if leaves is None:
            _name_difference(tree, shapes, what, "site")
        if type(leaves) is not dict:
            raise TypeError(f"{what}[{path!r}] is {given_type(leaves)}, expected a dict of {sorted(expected)}")
        if len(leaves) != len(expected):
            _name_difference(leaves, expected, f"{what}[{path!r}]", "leaf")
        for name, shape in expected.items():
            if stacked is not None:
                shape = (stacked, *shape)
            leaf = leaves.get(name)
            if not isinstance(leaf, Tensor):
                if name not in leaves:
                    _name_difference(leaves, expected, f"{what}[{path!r}]", "leaf")
                raise TypeError(f"{what}[{path!r}][{name!r}] is {given_type(leaf)}, expected a tensor of shape {shape}")
            if leaf.shape != shape:
                raise ValueError(
                    f"{what}[{path!r}][{name!r}] has shape {tuple(leaf.shape)}, expected {shape}"
                    + _hint(tuple(leaf.shape), shape, stacked is not None)
                )


def _hint(given: tuple[int, ...], expected: tuple[int, ...], stacked: bool) -> str:
    if stacked and given == expected[1:]:
        return "; it looks like the tree of one adapter: stack([params]) makes a stack of it."
    if len(given) == len(expected) + 1 and given[1:] == expected:
        return (
            f"; it looks like a stack of {given[0]} adapters: use route or torch.vmap, or unstack it and give one, "
            "unstack(many)[i]."
        )
    if stacked and given[1:] == expected[1:]:
        return f"; the first leaf is of {expected[0]} adapters and this one of {given[0]}."
    if len(given) == len(expected) and all(a >= b for a, b in zip(given, expected, strict=True)):
        return (
            "; was it made for another rank, layer or model? Trees of a stack of several ranks are padded to the "
            "largest: graft.unstack(many), of the graft that the stack is of, gives each as it is alone."
        )
    return "; was it made for another rank, layer or model?"


def _instead(tree: Any) -> str:
    """Return what to write for what is no dict at all."""
    if isinstance(tree, Tensor):
        return ". Parameters come first, then the model's inputs: graft(params, x)"
    if isinstance(tree, (list, tuple)) and tree and all(isinstance(one, Mapping) for one in tree):
        return ". Several adapters are a stack, and each row of the inputs has one: graft(route(stack(trees), rows), x)"
    if hasattr(tree, "graft") and hasattr(tree, "params"):
        return ". Of a module around a graft, give the tree that it has: module.params"
    if isinstance(tree, Mapping) and type(tree) is not dict:
        return ". Trees are plain dicts: dict(params)"
    return ""


def _is_named(tree: Mapping[str, Any]) -> bool:
    """Return whether a tree is `{name: {path: {leaf: tensor}}}`."""
    return bool(tree) and all(
        isinstance(one, Mapping) and one and all(isinstance(leaves, Mapping) for leaves in one.values())
        for one in tree.values()
    )


def _name_difference(given: Mapping[str, Any], expected: Mapping[str, Any], what: str, kind: str) -> None:
    unknown = [key for key in given if key not in expected]
    missing = [key for key in expected if key not in given]
    if unknown:
        hint = _misnamed(given, unknown[0], expected, what)
        raise KeyError(
            f"{what} has unknown {kind} {unknown[0]!r}{_more(unknown)}; expected {_list(sorted(expected))}{hint}"
        )
    if missing:
        raise KeyError(f"{what} lacks {kind} {missing[0]!r}{_more(missing)}; given were {_list(sorted(given))}")
    raise TypeError(
        f"{what} has None for a {kind}: {[key for key in given if given[key] is None]!r}; give a dict, or leave the "
        "whole adapter out to switch it off"
    )


def _misnamed(given: Mapping[str, Any], name: str, expected: Mapping[str, Any], what: str) -> str:
    """Return what a dict with an unknown key looks like."""
    if _is_named(given):
        return (
            f"; it looks like adapters by name ({_list(list(given))}), and one unnamed adapter is expected: give "
            f"{what}[{name!r}]"
        )
    if isinstance(given[name], Tensor) and all(isinstance(one, Mapping) for one in expected.values()):
        return (
            "; it looks like a state dict, and a tree is nested, {path: {leaf: tensor}}: load_adapter(graft, folder) "
            "reads one from files"
        )
    return did_you_mean(name, expected)


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:6])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 6 else shown or "none"
