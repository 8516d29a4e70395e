"""Filling a skeleton with what a call brings: trees, base tensors, buffers of its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .._messages import did_you_mean
from .._skeleton.skeleton import Skeleton
from .._skeleton.swaps import swap_tensors
from .call import Call
from .traced import keep_private


def fill(skeleton: Skeleton, call: Call, current: Mapping[int, Tensor]) -> None:
    """Put the call's adapters, base tensors and own copies of buffers into a skeleton.

    Traced calls have `current`, the model's tensors as they are then, and undo what they do themselves.
    """
    reached: set[str] = set()
    if current:
        keep_private((reached,))
    skeleton.context.trees, skeleton.context.reached = call.active, reached
    named = named_base(skeleton, call.base) if call.base else {}
    given = {**current, **named}
    if skeleton.written:
        zero = _batched_zero(call)
        given.update((key, _fresh(given.get(key, skeleton.aliases[key]), zero)) for key in skeleton.written)
    if not current:
        skeleton.filled = given
    for key, tensor in given.items():
        for container, name in skeleton.places[key]:
            container[name] = tensor
    replaced = swap_tensors(skeleton, call.active)
    if replaced and not current:
        skeleton.filled = [*given, *replaced]


def named_base(skeleton: Skeleton, base: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Return the tensors of `base` by the id of the model's tensor that each replaces, validated against it."""
    tensors: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    for name, tensor in base.items():
        if name not in skeleton.sources:
            hint = did_you_mean(name, skeleton.sources)
            raise KeyError(f"base_params has {name!r}, which is no parameter or buffer of the model{hint}")
        key = skeleton.sources[name][2]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"base_params[{name!r}] is of type {type(tensor).__name__}, expected a tensor")
        if tensor.shape != skeleton.aliases[key].shape:
            expected = tuple(skeleton.aliases[key].shape)
            raise ValueError(f"base_params[{name!r}] has shape {tuple(tensor.shape)}, expected {expected}")
        if key in skeleton.offloaded:
            raise ValueError(
                f"base_params[{name!r}]: the model's is offloaded by a hook of accelerate, which would load it over "
                "the given one; keep its module in memory"
            )
        if key in skeleton.frozen:
            raise ValueError(
                f"base_params[{name!r}]: the model also keeps this tensor in a tuple, where it cannot be exchanged; "
                "keep it in a list"
            )
        if tensors.setdefault(key, tensor) is not tensor:
            raise ValueError(
                f"base_params has different tensors for {names[key]!r} and {name!r}, which are one tied tensor in the "
                "model; give one of them, or the same tensor twice"
            )
        names.setdefault(key, name)
    return tensors


def _batched_zero(call: Call) -> Tensor | None:
    """Return a zero with the batch axes of all inputs of a vmapped call: what is written in place must have them."""
    if not _is_transformed():
        return None
    trees = [tree if isinstance(tree, dict) else tree.tensors() for tree in call.active.values()]
    leaves = pytree.tree_leaves((trees, dict(call.base), call.args, dict(call.kwargs)))  # which dynamo traces
    zeros = [x.detach().new_zeros((), dtype=torch.float32) for x in leaves if isinstance(x, Tensor)]
    return functools.reduce(torch.add, zeros) if zeros else None


def _is_transformed() -> bool:
    """Return whether a transform of `torch.func` is on."""
    return torch._C._functorch.maybe_current_level() is not None


_is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


# As `torch.compiler.assume_constant_result` does, which imports dynamo: the answer is part of what is traced.


def _fresh(tensor: Tensor, zero: Tensor | None) -> Tensor:
    if zero is None or not tensor.is_floating_point():
        return tensor.clone()
    return tensor + zero.to(tensor)
