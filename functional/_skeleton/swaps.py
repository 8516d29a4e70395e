"""Tensor swaps: where the tensors hang in a skeleton that adapters replace, and putting leaves in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._binding.replaced import Modules, Plan, Replaced, each, over, tensor_at
from .._layers.no_weight import stand_in
from .._method import is_per_row
from .._sites.tensors import check_leaves
from .._tensors.placement import is_sharded, offloading, spread
from .sharded import is_gathering
from .skeleton import Place, Skeleton


@dataclasses.dataclass(frozen=True, eq=False)
class TensorSwap:
    """A leaf of a tree and its places in a skeleton.

    Attributes:
        adapter: Name of the adapter.
        path: Path of the leaf in its tree.
        leaf: Its name there.
        key: Identity of the model's tensor.
        places: Where the tensor hangs.
        index: Rows of the tensor that the leaf has.
        parallel: Whether the tensor's module computes with shards, and not with what a copy gathers.
    """

    adapter: str
    path: str
    leaf: str
    key: int
    places: Sequence[Place]
    index: Tensor | None
    parallel: bool = False

    def put(self, leaf: Tensor) -> None:
        """Have the skeleton use this leaf."""
        before: Any = None
        new: Any = None
        for container, name in self.places:
            current = container[name]
            if current is not before:
                before, new = current, over(current, leaf, self.index)
                if self.parallel and is_sharded(current):
                    new = spread(new, current.device_mesh, current.placements)
            container[name] = new

    def hide(self, nothing: Tensor) -> None:
        """Have the skeleton refuse to use the tensor."""
        for container, name in self.places:
            container[name] = nothing


def tensor_swaps(skeleton: Skeleton, modules: Modules, plans: Mapping[str, Plan]) -> list[TensorSwap]:
    """Find where replaced tensors hang in a skeleton.

    Raises:
        ValueError: A tensor that the model no longer has, or has in another shape or another tie; one that is also
            kept where it cannot be exchanged.
    """
    if not any(plans.values()):
        return []
    parallel = not any(is_gathering(copied) for _, copied in skeleton.modules)
    copy_of = {id(original): copied for original, copied in skeleton.modules}
    holders: dict[int, set[int]] = {}
    for module, _ in skeleton.modules:
        for held in module._parameters.values():
            holders.setdefault(id(held), set()).add(id(module))
    swaps = []
    for adapter, plan in plans.items():
        for path, leaf, replacement in each(plan):
            owners: dict[int, tuple[nn.Module, str]] = {}
            tensor = tensor_at(modules, replacement.names[0])
            key = id(tensor)
            for name in replacement.names:
                owner, _, tensor_name = name.rpartition(".")
                _check_same(modules, name, replacement, key)
                _check_resting(modules[owner], name)
                owners[id(modules[owner])] = modules[owner], tensor_name
            if any(owner not in copy_of for owner in owners) or key not in skeleton.places or key in skeleton.frozen:
                raise ValueError(
                    f"{replacement.names[0]}: the model keeps this tensor in a tuple or in a scripted module, where it "
                    "cannot be replaced; keep it in a module or in a list"
                )
            others = {id(copy_of[other]._parameters) for other in holders[key] - owners.keys()}
            places = [place for place in skeleton.places[key] if id(place[0]) not in others]
            index = None if replacement.rows is None else torch.tensor(replacement.rows, device=tensor.device)
            swaps.append(TensorSwap(adapter, path, leaf, key, places, index, parallel))
    return swaps


def _check_resting(module: nn.Module, name: str) -> None:
    if next(offloading(module), None) is not None:
        raise ValueError(
            f"{name}: is offloaded by a hook of accelerate, which would load the base's over what replaces it; keep "
            f"this module in memory (a device_map, or accelerate.hooks.remove_hook_from_module), or do not train it "
            "(modules_to_save, bias, trainable_token_indices)"
        )


def _check_same(modules: Modules, name: str, replacement: Replaced, key: int) -> None:
    tensor = tensor_at(modules, name)
    shape = tuple(tensor.shape) if replacement.rows is None else (len(replacement.rows), *tensor.shape[1:])
    if shape != replacement.shape or (replacement.rows and max(replacement.rows) >= tensor.shape[0]):
        raise ValueError(
            f"{name}: was replaced after bind by a tensor of shape {tuple(tensor.shape)}, which parameters of shape "
            f"{replacement.shape} do not fit; bind the model again"
        )
    if id(tensor) != key:
        raise ValueError(
            f"{name}: was one tensor with {replacement.names[0]} at bind and is not any more; bind the model again"
        )


def swap_tensors(skeleton: Skeleton, trees: Mapping[str, Any]) -> list[int]:
    """Put the leaves of the active trees into their skeleton; return the tensors that were replaced, by identity.

    Where each row has its own, the owner of the tensor runs with them (`routing.owners`), and nothing else can use it.
    """
    active = [swap for swap in skeleton.swaps if swap.adapter in trees]
    if not active:
        return []
    skeleton.context.kept = kept = {}
    for swap in active:
        tree = trees[swap.adapter]
        leaf = (tree if type(tree) is dict else tree.tree)[swap.path][swap.leaf]
        if leaf.is_meta:
            check_leaves(swap.path, {swap.leaf: leaf}, swap.places[0][0][swap.places[0][1]])
        if not is_per_row(tree):
            swap.put(leaf)
    for swap in active:
        if is_per_row(trees[swap.adapter]) and swap.key not in kept:
            container, name = swap.places[0]
            kept[swap.key] = current = container[name]
            swap.hide(stand_in(current, swap.path))
    return [swap.key for swap in active]
