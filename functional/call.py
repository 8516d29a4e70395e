"""Calls: a base, an adapter and inputs meet in a skeleton."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .graft import Graft
from .method import Tree
from .replaced import exchange
from .route import Routed
from .skeleton import Skeleton
from .traced import forget_writes, keep_private, skeleton_for, within
from .trial import Entered, finder_of, modes_of


def functional_call(
    graft: Graft,
    params: Tree | Routed | tuple[Mapping[str, Tensor], Tree | Routed],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    return_buffers: bool = False,
) -> Any:
    """Run the bound model as a pure function of adapter parameters, base tensors and inputs.

    Args:
        graft: What `bind` returned.
        params: A parameter tree, or `(base_params, params)` to give base tensors as data too: a dict from names of
            the user's model's parameters or buffers to tensors of any dtype, differentiable and vmappable. What it
            does not name is the model's own.
        args: Positional arguments of the model's forward (a tuple; one bare tensor is taken as one argument).
        kwargs: Keyword arguments of the forward.
        return_buffers: Also return what the forward left in the model's buffers.

    Returns:
        The model's output, or `(output, buffers)`, where `buffers` maps names of the user's model to tensors.

    Raises:
        KeyError, TypeError, ValueError: A tree that does not fit, a base tensor that does not exist.
        RuntimeError: The forward ran past a site, so that its adapter had no effect.

    >>> from torchgraft.adapters import IA3Config
    >>> from torchgraft.functional import bind
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    >>> graft = bind(model, IA3Config(target_modules=["0"], feedforward_modules=[]))
    >>> y, buffers = functional_call(graft, graft.init(), (torch.ones(4, 2),), return_buffers=True)
    >>> buffers["1.num_batches_tracked"], model[1].num_batches_tracked
    (tensor(1), tensor(0))
    """
    if not isinstance(graft, Graft):
        raise TypeError(f"functional_call: graft is of type {type(graft).__name__}, expected what bind returned")
    base: Mapping[str, Tensor] = {}
    if isinstance(params, tuple):
        if len(params) != 2:
            raise TypeError(f"params is a tuple of {len(params)}, expected a tree or (base_params, params)")
        base, params = params
        if not isinstance(base, Mapping):
            raise TypeError(
                f"base_params is of type {type(base).__name__}, expected a dict from names of the model's parameters "
                "or buffers to tensors, such as dict(model.named_parameters())"
            )
    active = now(graft.active(params))
    args, kwargs = args if isinstance(args, tuple) else (args,), kwargs or {}
    return _call(graft, active, base, args, kwargs, return_buffers)


def _call(
    graft: Graft,
    active: dict[str, Any],
    base: Mapping[str, Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
    return_buffers: bool,
) -> Any:
    if torch.compiler.is_dynamo_compiling():
        return _traced(graft, active, base, args, kwargs, return_buffers)
    pool = graft.pool()
    finder = finder_of(graft, pool, active, base, args, kwargs, Entered("", modes_of(pool)))
    lease = pool.lease()
    try:
        lease.skeleton.cell.finder = finder
        fill(lease.skeleton, active, base, args, kwargs, {})
        y = _run(graft, lease.skeleton, args, kwargs, return_buffers, {})
        if finder is not None:
            finder.finish()
        return y
    finally:
        lease.release()


def now(active: Mapping[str, Any]) -> dict[str, Any]:
    """The trees of a call, routed stacks with the rows that they have now."""
    return {name: tree.now() if isinstance(tree, Routed) else tree for name, tree in active.items()}


def _traced(
    graft: Graft,
    active: dict[str, Any],
    base: Mapping[str, Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
    return_buffers: bool,
) -> Any:
    """One call as `torch.compile` sees it: it reads the model's own tensors, and leaves its skeleton as it was.

    If it cannot be compiled in one piece, `_call` runs as it does elsewhere, and what the model calls is compiled.
    """
    skeleton = skeleton_for(graft)
    cell: Any = skeleton.cell
    state = dict(cell.state)
    hanging = [(container, name, container[name]) for places in skeleton.places.values() for container, name in places]
    finder = None
    if any(isinstance(tree, Routed) for tree in active.values()):
        entered = Entered("", tuple(own.training for _, own in skeleton.modules))
        finder = finder_of(graft, graft.pools[0], active, base, args, kwargs, entered)
    current = {key: registry[name].detach() for registry, name, key in skeleton.sources.values()}
    try:
        cell.finder = finder
        fill(skeleton, {name: within(tree) for name, tree in active.items()}, base, args, kwargs, current)
        return _run(graft, skeleton, args, kwargs, return_buffers, current)
    finally:
        for container, name, tensor in hanging:
            container[name] = tensor
        cell.state.update(state)
        if state["trees"] is None:  # or else this call is a part of another one
            forget_writes(skeleton)


def fill(
    skeleton: Skeleton,
    active: dict[str, Any],
    base: Mapping[str, Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
    current: Mapping[int, Tensor],
) -> None:
    """Put the call's adapters, base tensors and own copies of buffers into a skeleton.

    Traced calls have `current`, the model's tensors as they are then, and undo what they do themselves.
    """
    reached: set[str] = set()
    if current:
        keep_private((reached,))
    skeleton.cell.trees, skeleton.cell.reached = active, reached
    named = named_base(skeleton, base) if base else {}
    given = {**current, **named}
    if skeleton.written:
        zero = _batched_zero(active, base, args, kwargs)
        given.update((key, _fresh(given.get(key, skeleton.aliases[key]), zero)) for key in skeleton.written)
    if not current:
        skeleton.filled = given
    for key, tensor in given.items():
        for container, name in skeleton.places[key]:
            container[name] = tensor
    replaced = exchange(skeleton, active)
    if replaced and not current:
        skeleton.filled = [*given, *replaced]


def _run(
    graft: Graft,
    skeleton: Skeleton,
    args: tuple,
    kwargs: Mapping[str, Any],
    return_buffers: bool,
    current: Mapping[int, Tensor],
) -> Any:
    y = skeleton.root(*args, **kwargs)
    if not graft.allow_unreached:
        trees, reached = skeleton.cell.trees or {}, skeleton.cell.reached or set()
        missing = [path for name in trees for path in graft.sites[name] if path not in reached]
        missing = graft.unreached(missing, reached) if missing else missing
        if missing:
            raise RuntimeError(
                f"the forward never reached {', '.join(map(repr, missing[:4]))}{', ...' if len(missing) > 4 else ''} "
                f"({len(missing)} of the adapted modules), so an adapter there has no effect. If the model calls them "
                "through something a copy cannot follow (a global, a compiled function), leave them out of "
                "target_modules; if it may run past them, bind(..., allow_unreached=True)"
            )
    if not return_buffers:
        return y
    own = {id(tensor) for tensor in (*skeleton.aliases.values(), *current.values())}
    buffers = dict(skeleton.root.named_buffers())
    return y, {name: buffer.clone() if id(buffer) in own else buffer for name, buffer in buffers.items()}


def named_base(skeleton: Skeleton, base: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The tensors of `base` by the id of the model's tensor that each stands for, held against it."""
    found: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    for name, tensor in base.items():
        if name not in skeleton.sources:
            close = difflib.get_close_matches(name, skeleton.sources, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
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
        if found.setdefault(key, tensor) is not tensor:
            raise ValueError(
                f"base_params has different tensors for {names[key]!r} and {name!r}, which are one tied tensor in the "
                "model; give one of them, or the same tensor twice"
            )
        names.setdefault(key, name)
    return found


def _batched_zero(
    active: Mapping[str, Any], base: Mapping[str, Tensor], args: tuple, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """A zero with the batch axes of all inputs of a vmapped call: what is written in place must have them."""
    if not _is_transformed():
        return None
    trees = [tree if isinstance(tree, dict) else tree.tensors() for tree in active.values()]
    leaves = pytree.tree_leaves((trees, dict(base), args, dict(kwargs)))  # which dynamo traces
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
