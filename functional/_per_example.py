"""Gradients of one adapter for each example of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from ._grads import value_and_grad
from ._messages import given_type
from ._method import Tree
from ._norms import clip_factors, norms
from ._trees import flatten


class ClippedSum(NamedTuple):
    """What `PerExample.clipped_sum` returns.

    Attributes:
        total: The sum over examples of clipped gradients, a tree like that of the adapter.
        norms: The norm of each example's gradient before it was clipped, `"N"`.
        losses: The loss of each example, `"N"`.
    """

    total: Tree
    norms: Tensor
    losses: Tensor


def per_example(
    f: Callable[..., Any],
    *,
    stacked: bool = False,
    chunk_size: int | None = None,
    in_dims: int | Sequence[int | None] | None = 0,
    randomness: str = "error",
) -> PerExample:
    """Make a function that returns the loss and the gradient of each example of a batch.

    The numbers are those of `vmap(grad_and_value(f))` over the examples, and of `value_and_grad(f)` for a batch of each
    alone. All come from one forward and one backward, of copies of the adapter that take no memory: without `stacked`,
    `torch.vmap` runs `f` for each example as a batch of one. With it, `f` gets a stack of as many copies and the whole
    batch, and routes it: `lambda many, x, t: cross_entropy(graft(route(many), x), t, reduction="none")`. That keeps the
    model's own kernels (attention on a CPU is a loop under `vmap`).

    Args:
        f: `f(params, *args, **kwargs)`, which returns a scalar for a batch of one example; with `stacked`, losses `"N"`
            for a stack of `N` and a batch of `N`, each of its own row only.
        stacked: Whether `f` takes a stack.
        chunk_size: Number of examples at a time, so that memory holds activations and gradients of as many; by default
            all.
        in_dims: 0 for a positional argument after the tree whose tensors have the example as leading axis, `None` for
            one that all examples share; one for all, or one each. Keyword arguments are shared.
        randomness: What `torch.vmap` does where the model draws random numbers: `"error"`, `"different"` or `"same"`.

    Raises:
        TypeError, ValueError: Arguments that are no function, no number of examples.

    >>> each = per_example(lambda p, x: (p["w"] * x).sum())
    >>> each({"w": torch.tensor([1.0, 2.0])}, torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 5.0]]))
    (tensor([ 3.,  3., 10.]), {'w': tensor([[3., 0.],
            [1., 1.],
            [0., 5.]])})
    """
    if not callable(f):
        raise TypeError(f"per_example: f is {given_type(f)}, expected a function: per_example(loss)(params, x, t)")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"per_example: chunk_size is {chunk_size!r}, expected a positive number of examples")
    return PerExample(f, stacked, chunk_size, in_dims, randomness)


class PerExample:
    """Per-example gradients of a loss; made by `per_example`.

    Arguments are those of the loss. Its errors are those of calls: `ValueError` for tensors that disagree on the number
    of examples, or a loss that is not one number for each; and what `value_and_grad` raises.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        stacked: bool,
        chunk_size: int | None,
        in_dims: int | Sequence[int | None] | None,
        randomness: str,
    ):
        self._f, self._stacked, self._chunk_size = f, stacked, chunk_size
        self._in_dims, self._randomness = in_dims, randomness

    def __call__(self, params: Tree, *args: Any, **kwargs: Any) -> tuple[Tensor, Tree]:
        """Return losses `"N"` and gradients, a stacked tree with leaves `"N ..."`."""
        chunks = list(self._chunks(params, args, kwargs))
        return torch.cat([losses for losses, _ in chunks]), _joined([grads for _, grads in chunks])

    def norms(self, params: Tree, *args: Any, **kwargs: Any) -> Tensor:
        """Return the norm of each example's gradient over all leaves, `"N"`.

        >>> each = per_example(lambda p, x: (p["w"] * x).sum())
        >>> each.norms({"w": torch.ones(2)}, torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([5., 1.])
        """
        return torch.cat([norms(grads) for _, grads in self._chunks(params, args, kwargs)])

    def map(self, g: Callable[[Tree], Any], params: Tree, *args: Any, **kwargs: Any) -> Any:
        """Return `g(gradients)` of each chunk, joined along axis 0: what is needed of gradients, not all of them.

        Args:
            g: Takes a stacked tree of `N` gradients, and returns a tensor or a tree of tensors `"N ..."`.
            params: The tree of the adapter.
            *args: What the loss takes after it.
            **kwargs: What the loss takes by name.

        >>> from torchgraft.functional import project
        >>> each = per_example(lambda p, x: (p["w"] * x).sum(), chunk_size=32)
        >>> each.map(lambda g: project(g, 8, seed=0, stacked=True), {"w": torch.ones(50)}, torch.randn(100, 50)).shape
        torch.Size([100, 8])
        """
        return _joined([g(grads) for _, grads in self._chunks(params, args, kwargs)])

    def clipped_sum(self, params: Tree, *args: Any, max_norm: float | Tensor, **kwargs: Any) -> ClippedSum:
        """Return the sum over examples of `g * min(1, max_norm / (|g| + 1e-6))`, and their norms and losses.

        What differentially private SGD adds noise to (Abadi et al., 2016). A batch without examples, which Poisson
        sampling may draw, has the sum zero.

        Args:
            params: The tree of the adapter.
            *args: What the loss takes after it.
            max_norm: The largest norm of an example's gradient in the sum.
            **kwargs: What the loss takes by name.

        >>> each = per_example(lambda p, x: (p["w"] * x).sum())
        >>> each.clipped_sum({"w": torch.ones(2)}, torch.tensor([[3.0, 4.0], [0.0, 0.5]]), max_norm=1.0).total["w"]
        tensor([0.6000, 1.3000])
        """
        totals, each_norm, each_loss = [], [], []
        for losses, grads in self._chunks(params, args, kwargs):
            each_norm.append(norms(grads))
            each_loss.append(losses)
            factors = clip_factors(each_norm[-1], max_norm)
            totals.append(optree.tree_map(lambda leaf, by=factors: torch.tensordot(by.to(leaf), leaf, 1), grads))
        total = optree.tree_map(lambda *parts: sum(parts[1:], start=parts[0]), *totals)
        return ClippedSum(total, torch.cat(each_norm), torch.cat(each_loss))

    def _chunks(self, params: Tree, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, Tree]]:
        """Yield losses and gradients of one chunk of examples after another."""
        if not flatten(params):
            raise ValueError("per_example: the tree has no leaves; graft.init(generator) makes one")
        leaves, treedef = optree.tree_flatten(tuple(args), none_is_leaf=True)
        mapped = _mapped_leaves(args, self._in_dims)
        count = _examples(args, mapped)
        if count == 0:
            empty = optree.tree_map(lambda leaf: leaf.new_zeros(0, *leaf.shape), params)
            yield optree.tree_leaves(empty)[0].new_zeros(0), empty
        size = self._chunk_size or max(count, 1)
        for start in range(0, count, size):
            stop = min(start + size, count)
            part = [leaf[start:stop] if by else leaf for leaf, by in zip(leaves, mapped, strict=True)]
            copies = optree.tree_map(lambda leaf, n=stop - start: leaf.expand(n, *leaf.shape), params)

            def losses(copies: Tree, part: list[Any]) -> Any:
                if self._stacked:
                    return self._f(copies, *optree.tree_unflatten(treedef, part), **kwargs)
                return self._alone(copies, part, mapped, treedef, kwargs)

            yield value_and_grad(losses, stacked=True)(copies, part)

    def _alone(
        self, copies: Tree, part: Sequence[Any], mapped: Sequence[bool], treedef: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """Return the loss of each example, which is a batch of one for the function."""

        def loss(params: Tree, example: Sequence[Tensor]) -> Any:
            rows = iter(example)
            batch = [next(rows)[None] if by else leaf for leaf, by in zip(part, mapped, strict=True)]
            value = self._f(params, *optree.tree_unflatten(treedef, batch), **kwargs)
            if isinstance(value, Tensor) and value.ndim:
                raise ValueError(
                    f"per_example: the function returned a tensor of shape {tuple(value.shape)} for a batch of one "
                    "example, expected a scalar; reduce it with .mean() or .sum(), or say stacked=True if it takes a "
                    "stack and returns one loss for each row"
                )
            return value

        rows = [leaf for leaf, by in zip(part, mapped, strict=True) if by]
        losses: Tensor = torch.vmap(loss, randomness=self._randomness)(copies, rows)
        return losses


def _mapped_leaves(args: Sequence[Any], in_dims: int | Sequence[int | None] | None) -> list[bool]:
    """Return for each leaf of the arguments whether its leading axis is the example."""
    dims = list(in_dims) if isinstance(in_dims, (list, tuple)) else [in_dims] * len(args)
    if len(dims) != len(args) or any(dim not in (0, None) for dim in dims):
        raise ValueError(
            f"per_example: in_dims is {in_dims!r}, expected 0 or None, or one of these for each of the {len(args)} "
            "positional arguments after the tree"
        )
    return [
        dim == 0 and isinstance(leaf, Tensor)
        for arg, dim in zip(args, dims, strict=True)
        for leaf in optree.tree_leaves(arg, none_is_leaf=True)
    ]


def _examples(args: Sequence[Any], mapped: Sequence[bool]) -> int:
    """Return the number of examples in the arguments."""
    paths, leaves, _ = optree.tree_flatten_with_path(tuple(args), none_is_leaf=True)
    given = [(path, leaf) for path, leaf, by in zip(paths, leaves, mapped, strict=True) if by]
    if not given:
        raise ValueError(
            "per_example: no positional argument after the tree has tensors with an axis of examples; inputs and "
            "targets are given by position, as in per_example(loss)(params, x, t)"
        )
    (first, leaf), *_ = given
    for path, other in given:
        if other.ndim == 0 or leaf.ndim == 0 or len(other) != len(leaf):
            raise ValueError(
                f"per_example: argument {_name(path)} has a tensor of shape {tuple(other.shape)} and argument "
                f"{_name(first)} one of {tuple(leaf.shape)}; their leading axes must be equal: the number of examples. "
                "in_dims=None at its position shares one"
            )
    return len(leaf)


def _name(path: Sequence[Any]) -> str:
    return f"{path[0]}" + "".join(f"[{key!r}]" for key in path[1:])


def _joined(parts: Sequence[Any]) -> Any:
    return optree.tree_map(lambda *tensors: torch.cat(tensors) if len(tensors) > 1 else tensors[0], *parts)
