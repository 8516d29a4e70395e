"""Gradients with torch.func's numbers and plain autograd's speed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from ._messages import given_type
from ._trees import adapters_in


def value_and_grad(
    f: Callable[..., Any],
    argnums: int = 0,
    has_aux: bool = False,
    create_graph: bool = False,
    *,
    stacked: bool = False,
    chunk_size: int | None = None,
    in_dims: int | Sequence[int | None] | None = 0,
) -> Callable[..., tuple[Any, Any]]:
    """Make a function that returns `f`'s value and its gradient, from one forward and one backward.

    The numbers are those of `torch.func.grad_and_value`; a leaf that the value does not depend on has a zero
    gradient, and a value that depends on no leaf is an error. Plain autograd does the work, which costs less where
    kernels are small. Inside `torch.func` transforms and `torch.compile` the functional transform takes over, so that
    nesting keeps working; there, as with `torch.func.grad`, all gradients may be zero without a word.

    With `stacked`, `f` takes a stacked tree and returns one loss for each adapter; each adapter's gradient is that of
    its own loss, all from one backward. With `chunk_size`, `f` sees that many adapters at a time, so that memory
    holds the activations of one chunk only.

    Args:
        f: Returns a scalar tensor, or `(scalar, aux)` with `has_aux`; with `stacked`, losses `"N"`, where a loss
            depends on its own adapter only.
        argnums: Position of the argument to differentiate: a tree of floating-point tensors.
        has_aux: Whether `f` returns auxiliary data beside the value; chunks' tensors are joined along axis 0.
        create_graph: Keep the results differentiable, for second order or for leaves that come out of another
            network.
        stacked: Whether `f` returns losses of a stack.
        chunk_size: Number of adapters at a time; implies `stacked`.
        in_dims: For chunks: 0 for a positional argument whose tensors have `N` equal parts along axis 0, one for each
            adapter (as `route(stacked)` has it), `None` for one that all adapters share; one for all, or one each.
            Keyword arguments are shared.

    Returns:
        `g(*args, **kwargs) -> (value, grads)`, or `((value, aux), grads)` with `has_aux`.

    Raises:
        ValueError: `f` returned a tensor that is no scalar, or not one loss for each adapter; an argument that cannot
            be split.
        TypeError: `f` returned no tensor, or a leaf is no floating-point tensor.
        RuntimeError: No gradient reaches any of the leaves.

    >>> value_and_grad(lambda p, x: (p["w"] * x).sum())({"w": torch.tensor([1.0, 2.0])}, 3.0)
    (tensor(9.), {'w': tensor([3., 3.])})
    >>> value_and_grad(lambda p, x: p["w"] * x, chunk_size=1)({"w": torch.tensor([1.0, 2.0])}, torch.tensor([3.0, 4.0]))
    (tensor([3., 8.]), {'w': tensor([3., 4.])})
    """
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"value_and_grad: chunk_size is {chunk_size!r}, expected a positive number of adapters")
    if not callable(f):
        raise TypeError(
            f"value_and_grad: f is {given_type(f)}, expected a function, which is called later: "
            "value_and_grad(loss)(params, x), not value_and_grad(loss(params, x))"
        )
    stacked = stacked or chunk_size is not None

    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not isinstance(argnums, int):
            raise TypeError(
                f"value_and_grad: argnums is {argnums!r}, expected an int; put several arguments into one tree"
            )
        if not 0 <= argnums < len(args):
            raise ValueError(f"value_and_grad: argnums={argnums}, but only {len(args)} positional arguments were given")
        count = adapters_in(args[argnums], "value_and_grad") if stacked else None
        run = functools.partial(_once, f, argnums, has_aux, create_graph)
        if chunk_size is None or count is None or count <= chunk_size:
            return run(count, args, kwargs)
        results = []
        for start in range(0, count, chunk_size):
            stop = min(start + chunk_size, count)
            results.append(run(stop - start, _part(args, in_dims, argnums, start, stop, count), kwargs))
        result: tuple[Any, Any] = optree.tree_map(_join, *results, none_is_leaf=True)
        return result

    return wrapped


def grad(
    f: Callable[..., Any],
    argnums: int = 0,
    has_aux: bool = False,
    create_graph: bool = False,
    *,
    stacked: bool = False,
    chunk_size: int | None = None,
    in_dims: int | Sequence[int | None] | None = 0,
) -> Callable[..., Any]:
    """Make a function that returns `f`'s gradient, as `torch.func.grad` does; see `value_and_grad`.

    Returns:
        `g(*args, **kwargs) -> grads`, or `(grads, aux)` with `has_aux`.

    >>> grad(lambda p: (p["w"] ** 2).sum())({"w": torch.tensor([1.0, 2.0])})
    {'w': tensor([2., 4.])}
    """
    both = value_and_grad(f, argnums, has_aux, create_graph, stacked=stacked, chunk_size=chunk_size, in_dims=in_dims)

    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return wrapped


def _once(
    f: Callable[..., Any],
    argnums: int,
    has_aux: bool,
    create_graph: bool,
    count: int | None,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> tuple[Any, Any]:
    """Run one forward and one backward; `count` is the number of losses, `None` for a scalar."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        loss = functools.partial(_total, f, has_aux, count)
        grads, (_, out) = torch.func.grad_and_value(loss, argnums=argnums, has_aux=True)(*args, **kwargs)
        return out if has_aux else out[0], grads
    leaves, treedef = optree.tree_flatten(args[argnums])
    for path, leaf in zip(optree.tree_paths(args[argnums]), leaves, strict=True):
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            what = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"value_and_grad: leaf {path} is {what}, expected a floating-point tensor")
    keep = create_graph and torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [leaf if keep and leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
        tree = optree.tree_unflatten(treedef, inputs)
        total, (value, *aux) = _total(f, has_aux, count, *args[:argnums], tree, *args[argnums + 1 :], **kwargs)
        grads = _gradients(total, inputs, keep)
    if not keep:
        value, aux = value.detach(), _detach(aux)
    return (value, *aux) if has_aux else value, optree.tree_unflatten(treedef, grads)


def _gradients(total: Tensor, inputs: Sequence[Tensor], create_graph: bool) -> list[Tensor]:
    """Return the gradient of a total, zero at inputs that it does not depend on.

    Raises:
        RuntimeError: It depends on none of them, or reentrant checkpointing hides whether it does.
    """
    grads: Sequence[Tensor | None] = [None] * len(inputs)
    if total.requires_grad and inputs:
        grads = torch.autograd.grad(total, inputs, create_graph=create_graph, allow_unused=True)
    missing = sum(g is None for g in grads)
    if missing and _checkpoints_reentrantly(total):
        raise RuntimeError(
            f"value_and_grad: no gradient reaches {missing} of the {len(inputs)} leaves, and the model checkpoints "
            "activations reentrantly, where torch.autograd.grad reaches no leaf; use use_reentrant=False, or call "
            ".backward() on the loss"
        )
    if missing and missing == len(inputs):
        state = "requires grad, but through other tensors" if total.requires_grad else "does not require grad"
        raise RuntimeError(
            f"value_and_grad: no gradient reaches the {len(inputs)} leaves: the function's value {state}. Does the "
            "model run its adapted modules under torch.no_grad, torch.inference_mode or .detach(), or in reentrant "
            "checkpointing of inputs that do not require grad (use use_reentrant=False)? Does the function use the "
            "tree that it is given, and what it differentiates itself with create_graph=True? torch.func.grad returns "
            "zeros here"
        )
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]


def _checkpoints_reentrantly(total: Tensor) -> bool:
    """Return whether a graph has nodes of `torch.utils.checkpoint` that run a backward of their own."""
    stack, seen = [total.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            if node.name() == "CheckpointFunctionBackward":
                return True
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return False


def _total(
    f: Callable[..., Any], has_aux: bool, count: int | None, *args: Any, **kwargs: Any
) -> tuple[Tensor, tuple[Any, ...]]:
    """Return the number to differentiate: losses are independent, so the gradient of their sum is that of each."""
    out = f(*args, **kwargs)
    what = "scalar" if count is None else "losses"
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            f"value_and_grad: the function returned {type(out).__name__}, expected ({what}, aux) with has_aux=True"
        )
    value, *aux = out if has_aux else (out,)
    _check_value(value, count)
    return value if count is None else value.sum(), (value, *aux)


def _part(
    args: Sequence[Any], in_dims: int | Sequence[int | None] | None, argnums: int, start: int, stop: int, count: int
) -> list[Any]:
    """Return the arguments of adapters `start` to `stop` of `count`."""
    dims = list(in_dims) if isinstance(in_dims, (list, tuple)) else [in_dims] * len(args)
    if len(dims) != len(args) or any(dim not in (0, None) for dim in dims) or dims[argnums] != 0:
        raise ValueError(
            f"value_and_grad: in_dims is {in_dims!r}, expected 0 or None, or one of these for each of the {len(args)} "
            "positional arguments, with 0 for the stack"
        )

    def part(position: int, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.ndim == 0 or len(x) % count:
            raise ValueError(
                f"value_and_grad: argument {position} has a tensor of shape {tuple(x.shape)}, whose axis 0 does not "
                f"split into equal parts for the {count} adapters; in_dims=None at its position shares it"
            )
        each = len(x) // count
        return x[start * each : stop * each]

    return [
        arg if dim is None else optree.tree_map(functools.partial(part, i), arg, none_is_leaf=True)
        for i, (arg, dim) in enumerate(zip(args, dims, strict=True))
    ]


def _join(*parts: Any) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0] if parts[0] is None else list(parts)
    return torch.stack(parts) if parts[0].ndim == 0 else torch.cat(parts)


def _detach(tree: Any) -> Any:
    return optree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree, none_is_leaf=True)


def _check_value(value: Any, count: int | None) -> None:
    expected = "a scalar tensor" if count is None else f"a tensor of {count} losses"
    if not isinstance(value, Tensor):
        raise TypeError(f"value_and_grad: the function returned {type(value).__name__}, expected {expected}")
    if count is None and value.ndim:
        raise ValueError(
            f"value_and_grad: the function returned a tensor of shape {tuple(value.shape)}, expected a scalar; "
            "reduce it with .mean() or .sum(), or say stacked=True if it is one loss for each adapter of a stack"
        )
    if count is not None and value.shape != (count,):
        raise ValueError(
            f"value_and_grad: the function returned a tensor of shape {tuple(value.shape)}, expected ({count},): one "
            "loss for each adapter of the stack"
        )
