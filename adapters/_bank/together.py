"""Steps of a functional optimizer for several adapters at once: its functions under `vmap`, their values as data."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchgraft.functional.extending import Tree, cut_to

from .optimizers import Row

Outcome = tuple[Tree, list[Tensor]]
"""The updates of an adapter's parameters, and the leaves of its optimizer's state; for several, along an axis."""

_functorch = torch._C._functorch
_SUMS = {torch.add, torch.sub, Tensor.add, Tensor.add_, Tensor.sub, Tensor.sub_}
_PRODUCTS = {torch.addcmul, Tensor.addcmul, Tensor.addcmul_}
_QUOTIENTS = {torch.addcdiv, Tensor.addcdiv, Tensor.addcdiv_}


class HyperAsData(TorchFunctionMode):
    """Let hyper-parameters under `vmap` be where torch takes numbers, and decide what is the same for all of them.

    >>> def step(x, lr):
    ...     return x.add(x, alpha=lr) if lr > 0 else x
    >>> with HyperAsData():
    ...     torch.vmap(step)(torch.ones(2), torch.tensor([1.0, 2.0]))
    tensor([2., 3.])
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.__bool__ and _functorch.is_batchedtensor(args[0]):
            return _agreed(args[0])
        if func in _SUMS and isinstance(kwargs.get("alpha"), Tensor):
            args = args[0], args[1] * kwargs.pop("alpha"), *args[2:]
        elif func in _PRODUCTS | _QUOTIENTS and any(map(_is_batched, (*args, kwargs.get("value")))):
            x, y, z = args
            y = y * kwargs.pop("value", 1)
            add = Tensor.add_ if func.__name__.endswith("_") else Tensor.add
            func, args = add, (x, y * z if func in _PRODUCTS else y / z)
        return func(*args, **kwargs)


def _is_batched(value: Any) -> bool:
    return isinstance(value, Tensor) and _functorch.is_batchedtensor(value)


def _agreed(value: Tensor) -> bool:
    """Return a truth value that is the same for all.

    Raises:
        RuntimeError: It is not.
    """
    while _functorch.is_functorch_wrapped_tensor(value):
        value = _functorch.get_unwrapped(value)
    if bool(value.any()) != bool(value.all()):
        raise RuntimeError("hyper-parameters lead to different branches")
    return bool(value.any())


def as_data(name: str, values: Sequence[Any], device: torch.device) -> Any:
    """Return the values that a hyper-parameter has for each adapter, `"n"`, in float64; for tuples, a tuple of these.

    Raises:
        TypeError: They are no numbers.

    >>> as_data("lr", [0.1, 0.2], torch.device("cpu"))
    tensor([0.1000, 0.2000], dtype=torch.float64)
    """
    if all(isinstance(value, tuple) and len(value) == len(values[0]) for value in values):
        return tuple(as_data(name, column, device) for column in zip(*values, strict=True))
    if not all(type(value) in (int, float) for value in values):
        raise TypeError(f"{name} is no number")
    return torch.tensor(values, dtype=torch.float64, device=device)


def under_vmap(step: Callable[..., Any], *stacked: Any) -> Any:
    """Return what a step makes of each of some adapters, all at once.

    Raises:
        Exception: Something that cannot be vectorized.
    """
    with warnings.catch_warnings(), HyperAsData():
        warnings.filterwarnings("ignore", "There is a performance drop")
        return torch.vmap(step)(*stacked)


def stacked_leaves(trees: Sequence[Any]) -> Any:
    """Return one tree of the leaves of several, each along a new leading axis."""
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def agree(found: Any, expected: Any, dtype: torch.dtype) -> bool:
    """Return whether the leaves of two trees are equal but for rounding in a dtype."""
    close = 1e3 * torch.finfo(dtype).eps
    pairs = zip(optree.tree_leaves(found), optree.tree_leaves(expected), strict=True)
    return all(
        one.shape == other.shape
        and torch.allclose(
            one.double(), other.double(), rtol=close, atol=close * float(other.abs().max()), equal_nan=True
        )
        for one, other in pairs
        if other.numel()
    )


def trees_of(row: Row) -> tuple[Tree, Tree]:
    """Return the parameters and gradients of one adapter, of sites that it has not too, in one structure for all."""
    cut = {**row.layout.shapes, **row.own}
    return row.layout.tree(row.parameters, cut), row.layout.tree(row.scaled(), cut)


def held_by(row: Row, fresh: Any) -> list[Tensor]:
    """Return views of the leaves of an optimizer's state, cut to those of a fresh one."""
    return [cut_to(row.moments[str(i)], leaf.shape) for i, leaf in enumerate(optree.tree_leaves(fresh))]


def step_of(optimizer: Any, params: Tree, gradients: Tree, held: Sequence[Tensor]) -> Outcome:
    """Return the updates that an optimizer makes of one adapter's gradients, and the leaves of its new state."""
    state = optree.tree_unflatten(optree.tree_structure(optimizer.init(params)), [leaf.clone() for leaf in held])
    updates, state = _update(optimizer, gradients, state, params)
    known = {
        path: {name: torch.zeros_like(params[path][name]) if one is None else one for name, one in leaves.items()}
        for path, leaves in updates.items()
    }
    return known, optree.tree_leaves(state)


def called_once(optimizer: Any, like: Tree) -> Any:
    """Return an optimizer that was called before.

    Some remember outside of their state whether they ever were (torchopt's momentum), which has to say nothing of an
    adapter.
    """
    zeros = optree.tree_map(torch.zeros_like, like)
    _update(optimizer, zeros, optimizer.init(zeros), zeros)
    return optimizer


def _update(optimizer: Any, gradients: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    options = {"inplace": False} if "inplace" in inspect.signature(optimizer.update).parameters else {}
    updates, state = optimizer.update(gradients, state, params=params, **options)
    return updates, state


def write(rows: Sequence[Row], stepped: Outcome) -> None:
    """Write what a step has made of some rows, leaves `"n ..."`."""
    updates, states = stepped
    for i, row in enumerate(rows):
        for path, leaves in row.layout.views(row.parameters, row.own).items():
            for name, leaf in leaves.items():
                if name in updates.get(path, {}):
                    leaf.add_(updates[path][name][i].reshape(leaf.shape))
        for number, new in enumerate(states):
            cut_to(row.moments[str(number)], new.shape[1:]).copy_(new[i])
