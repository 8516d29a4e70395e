"""Gradients with torch.func's numbers and plain autograd's speed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor


def value_and_grad(
    f: Callable[..., Any], argnums: int = 0, has_aux: bool = False, create_graph: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """Make a function that returns `f`'s value and its gradient, from one forward and one backward.

    The numbers are those of `torch.func.grad_and_value`; a leaf that the value does not depend on has a zero
    gradient. Plain autograd does the work, which costs less where kernels are small. Inside `torch.func`
    transforms and `torch.compile` the functional transform takes over, so that nesting keeps working.

    Args:
        f: Returns a scalar tensor, or `(scalar, aux)` with `has_aux`.
        argnums: Position of the argument to differentiate: a tree of floating-point tensors.
        has_aux: Whether `f` returns auxiliary data beside the value.
        create_graph: Keep the results differentiable, for second order or for leaves that come out of another
            network.

    Returns:
        `g(*args, **kwargs) -> (value, grads)`, or `((value, aux), grads)` with `has_aux`.

    Raises:
        ValueError: `f` returned a tensor that is no scalar.
        TypeError: `f` returned no tensor, or a leaf is no floating-point tensor.

    >>> value_and_grad(lambda p, x: (p["w"] * x).sum())({"w": torch.tensor([1.0, 2.0])}, 3.0)
    (tensor(9.), {'w': tensor([3., 3.])})
    """

    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not isinstance(argnums, int):
            raise TypeError(
                f"value_and_grad: argnums is {argnums!r}, expected an int; put several arguments into one tree"
            )
        if not 0 <= argnums < len(args):
            raise ValueError(f"value_and_grad: argnums={argnums}, but only {len(args)} positional arguments were given")
        if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
            grads, value = torch.func.grad_and_value(f, argnums=argnums, has_aux=has_aux)(*args, **kwargs)
            return value, grads
        leaves, treedef = optree.tree_flatten(args[argnums])
        for path, leaf in zip(optree.tree_paths(args[argnums]), leaves, strict=True):
            if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
                what = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"value_and_grad: leaf {path} is {what}, expected a floating-point tensor")
        keep = create_graph and torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [leaf if keep and leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
            tree = optree.tree_unflatten(treedef, inputs)
            out = f(*args[:argnums], tree, *args[argnums + 1 :], **kwargs)
            if has_aux and not (isinstance(out, tuple) and len(out) == 2):
                raise TypeError(
                    f"value_and_grad: the function returned {type(out).__name__}, expected (scalar, aux) with "
                    "has_aux=True"
                )
            value, aux = out if has_aux else (out, None)
            _check_scalar(value)
            if value.requires_grad:
                grads = torch.autograd.grad(value, inputs, create_graph=keep, materialize_grads=True)
            else:
                grads = tuple(map(torch.zeros_like, inputs))
        if not keep:
            value, aux = value.detach(), _detach(aux)
        return (value, aux) if has_aux else value, optree.tree_unflatten(treedef, grads)

    return wrapped


def _detach(tree: Any) -> Any:
    return optree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree, none_is_leaf=True)


def _check_scalar(value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"value_and_grad: the function returned {type(value).__name__}, expected a scalar tensor")
    if value.ndim:
        raise ValueError(
            f"value_and_grad: the function returned a tensor of shape {tuple(value.shape)}, expected a scalar; "
            "reduce it with .mean() or .sum()"
        )
