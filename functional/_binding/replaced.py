"""Replaced tensors: leaves of a tree that take the place of the base's own tensors, or of some of their rows.

An adapter may train, beside its sites, what the base has already: a head as a whole, biases, the rows of a few tokens.
Such a leaf begins as a copy of the base's tensor. A call exchanges tensors in its skeleton, so the module that owns
one runs its own forward, whatever that is, and a tree that is not there leaves the base's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .._method import Config, Tree
from .._sites.tensors import check_leaves
from .._tensors.placement import resting, whole


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A leaf that replaces a tensor of the base.

    Attributes:
        names: Names of the tensor in the model; those of a tied one that get the leaf, and no others.
        shape: Shape of the leaf, `"..."` or `"rows ..."`.
        rows: Which rows of the tensor the leaf has, in its order; `None` for all of it.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: tuple[int, ...] | None = None

    def meets(self, other: Replaced) -> str | None:
        """Return the name of a tensor of which both replace the same rows, `None` where there is none."""
        shared = [name for name in self.names if name in other.names]
        apart = self.rows is not None and other.rows is not None and not set(self.rows) & set(other.rows)
        return None if apart or not shared else shared[0]


Plan = Mapping[str, Mapping[str, Replaced]]
"""What one adapter replaces: `{path: {leaf: replaced}}`."""


Modules = Mapping[str, nn.Module]
"""A model's modules by name, also those under several names."""


def replaced(modules: Modules, names: Iterable[str], rows: Sequence[int] | None = None) -> Replaced:
    """Describe the tensor that a leaf replaces.

    Args:
        modules: The model's modules by name.
        names: Names of one tensor of the model: all under which it is to be replaced.
        rows: Rows of the tensor that the leaf has; by default all of it.

    Raises:
        ValueError: A tensor that cannot be trained: no floating point, or one that its module's forward rewrites; rows
            that the tensor does not have.

    >>> replaced({"": nn.Embedding(5, 2)}, ["weight"], [1, 3])
    Replaced(names=('weight',), shape=(2, 2), rows=(1, 3))
    """
    names = tuple(names)
    tensor = tensor_at(modules, names[0])
    path = names[0].rpartition(".")[0]
    if not tensor.is_floating_point():
        raise ValueError(f"{names[0]}: has dtype {tensor.dtype}, which cannot be trained; expected floating point")
    if isinstance(tensor, UninitializedParameter):
        raise ValueError(f"{names[0]}: has no shape yet; run the model once before bind")
    if getattr(modules[path], "max_norm", None) is not None:
        raise ValueError(
            f"{path}: an Embedding with max_norm rewrites its weight in each forward, so nothing can replace it; set "
            "max_norm=None"
        )
    if rows is None:
        return Replaced(names, tuple(tensor.shape))
    count = tensor.shape[0]
    wrong = [row for row in rows if not 0 <= row < count]
    if wrong or not rows:
        raise ValueError(f"{names[0]}: rows are {wrong or list(rows)}, expected indices from 0 to {count - 1}")
    twice = sorted({row for row in rows if rows.count(row) > 1})
    if twice:
        raise ValueError(f"{names[0]}: rows {twice} are given twice; give each row once")
    return Replaced(names, (len(rows), *tensor.shape[1:]), tuple(rows))


def tensor_at(modules: Modules, name: str) -> Tensor:
    """Return the parameter of this name.

    Raises:
        ValueError: There is none.
    """
    path, _, leaf = name.rpartition(".")
    tensor = modules[path]._parameters.get(leaf) if path in modules else None
    if tensor is None:
        raise ValueError(f"{name}: the model has no such parameter any more; bind the model again")
    return tensor


def plan_replaced(config: Config, modules: Modules, model: nn.Module, paths: Iterable[str]) -> Plan:
    """Return the tensors that a config replaces beside its sites; none, for configs without `replaces`.

    Raises:
        ValueError: Two leaves that replace the same tensor.
    """
    plan: Plan = config.replaces(modules, model, list(paths))
    leaves = list(each(plan))
    for i, (path, leaf, replacement) in enumerate(leaves):
        for other_path, other_leaf, other in leaves[:i]:
            if name := replacement.meets(other):
                raise ValueError(
                    f"{name}: both {other_leaf!r} of {other_path!r} and {leaf!r} of {path!r} would replace it; name "
                    "one of them"
                )
    return plan


def each(plan: Plan) -> Iterator[tuple[str, str, Replaced]]:
    """Yield path, leaf and the tensor that it replaces."""
    for path, leaves in plan.items():
        for leaf, replacement in leaves.items():
            yield path, leaf, replacement


def conflicts(plans: Mapping[str, Plan]) -> list[tuple[str, str, str]]:
    """Return pairs of adapters that replace the same tensor, which one call cannot have both of, and the tensor."""
    pairs = []
    names = list(plans)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            meeting = (
                replacement.meets(other)
                for _, _, replacement in each(plans[first])
                for _, _, other in each(plans[second])
            )
            if name := next(filter(None, meeting), None):
                pairs.append((first, second, name))
    return pairs


def copies(
    modules: Modules, plan: Plan, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tree:
    """Make fresh leaves: the base's own numbers, in memory of their own.

    Args:
        modules: The model's modules by name.
        plan: What is replaced.
        dtype: Dtype of the leaves; by default float32, or the base's where that is wider.
        device: Device of the leaves; by default the tensor's own.
    """
    made: Tree = {}
    for path, leaf, replacement in each(plan):
        tensor_at(modules, replacement.names[0])
        path_of, _, name = replacement.names[0].rpartition(".")
        tensor = whole(resting(modules[path_of], name)).detach()
        tensor = tensor if replacement.rows is None else tensor[torch.tensor(replacement.rows, device=tensor.device)]
        wide = dtype or torch.promote_types(tensor.dtype, torch.float32)
        made.setdefault(path, {})[leaf] = tensor.to(device or tensor.device, wide, copy=True)
    return made


def over(tensor: Tensor, leaf: Tensor, index: Tensor | None) -> Tensor:
    """Return the tensor with a leaf in its place, or in that of some of its rows; in the tensor's dtype."""
    leaf = leaf.to(tensor.dtype)
    return leaf if index is None else whole(tensor).index_copy(0, index, whole(leaf))


def merged(modules: Modules, plans: Mapping[str, Plan], trees: Mapping[str, Tree]) -> dict[str, Tensor]:
    """Return the tensors of the model that trees replace, with the leaves in, by every name they have in it.

    Raises:
        ValueError: A tensor that is tied to one that the adapter does not replace, which no state dict can express.
    """
    state: dict[str, Tensor] = {}
    names: dict[int, list[str]] = {}
    for path, module in modules.items():
        for leaf, tensor in module._parameters.items():
            names.setdefault(id(tensor), []).append(f"{path}.{leaf}" if path else leaf)
    for adapter, tree in trees.items():
        for path, leaf, replacement in each(plans[adapter]):
            base_tensor = tensor_at(modules, replacement.names[0])
            index = None if replacement.rows is None else torch.tensor(replacement.rows, device=base_tensor.device)
            owners = {id(modules[name.rpartition(".")[0]]) for name in replacement.names}
            for name in names[id(base_tensor)]:
                if id(modules[name.rpartition(".")[0]]) not in owners:
                    raise ValueError(
                        f"{replacement.names[0]}: is tied to {name}, which would change with it; have the adapter "
                        "replace both (ensure_weight_tying=True), untie the two, or use graft.view(params), which "
                        "keeps them apart"
                    )
            check_leaves(path, {leaf: tree[path][leaf]}, base_tensor)
            value = over(state.get(replacement.names[0], base_tensor.detach()), tree[path][leaf], index)
            state.update(dict.fromkeys(names[id(base_tensor)], value))
    return state
