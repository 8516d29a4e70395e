"""Running a bound model: in a leased skeleton, or as `torch.compile` traces it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._routing.route import Routed
from .._skeleton.skeleton import Skeleton
from .bound_model import BoundModel
from .call import Call
from .fill import fill
from .pool import Pool
from .traced import forget_writes, skeleton_for, within
from .trial import Entered, finder_of


def call(
    bound: BoundModel,
    params: Any,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    return_buffers: bool = False,
) -> Any:
    """Run a bound model, as `functional_call` does."""
    base, params = with_base(params)
    pool = None if torch.compiler.is_dynamo_compiling() else bound.pool()
    active = now(bound.binding.active(params, pool is not None and pool.in_steps))
    given = Call(active, base, args if isinstance(args, tuple) else (args,), kwargs or {}, return_buffers)
    return _traced(bound, given) if pool is None else run(bound, pool, given)


def with_base(params: Any) -> tuple[Mapping[str, Tensor], Any]:
    """Return the base tensors that are given with parameters, none where these are given alone, and the parameters."""
    if not isinstance(params, tuple):
        return {}, params
    if len(params) != 2:
        raise TypeError(f"params is a tuple of {len(params)}, expected a tree or (base_params, params)")
    base, params = params
    if not isinstance(base, Mapping):
        raise TypeError(
            f"base_params is of type {type(base).__name__}, expected a dict from names of the model's parameters "
            "or buffers to tensors, such as dict(model.named_parameters())"
        )
    return base, params


def run(bound: BoundModel, pool: Pool, call: Call) -> Any:
    """Run one call in a leased skeleton."""
    finder = None
    if any(isinstance(tree, Routed) for tree in call.active.values()):
        finder = finder_of(bound, pool, call, Entered("", pool.modes))
    lease = pool.lease()
    try:
        lease.skeleton.context.finder = finder
        fill(lease.skeleton, call, {})
        y = _forward(bound, lease.skeleton, call, {})
        if finder is not None:
            finder.finish()
        return y
    finally:
        lease.release()


def now(active: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trees of a call, routed stacks with the rows that they have now."""
    return {name: tree.now() if isinstance(tree, Routed) else tree for name, tree in active.items()}


def _traced(bound: BoundModel, call: Call) -> Any:
    """Run one call under `torch.compile`: it reads the model's own tensors, and leaves its skeleton as it was.

    If it cannot be compiled in one piece, `run` runs as it does elsewhere, and what the model calls is compiled.
    """
    skeleton = skeleton_for(bound)
    context: Any = skeleton.context
    state = dict(context.state)
    hanging = [(container, name, container[name]) for places in skeleton.places.values() for container, name in places]
    finder = None
    if any(isinstance(tree, Routed) for tree in call.active.values()):
        entered = Entered("", tuple(module.training for _, module in skeleton.modules))
        finder = finder_of(bound, bound.pools[0], call, entered)
    current = {key: registry[name].detach() for registry, name, key in skeleton.sources.values()}
    try:
        context.finder = finder
        active = {name: within(tree) for name, tree in call.active.items()}
        fill(skeleton, Call(active, call.base, call.args, call.kwargs), current)
        return _forward(bound, skeleton, call, current)
    finally:
        for container, name, tensor in hanging:
            container[name] = tensor
        context.state.update(state)
        if state["trees"] is None:  # or else this call is a part of another one
            forget_writes(skeleton)


def _forward(bound: BoundModel, skeleton: Skeleton, call: Call, current: Mapping[int, Tensor]) -> Any:
    y = skeleton.root(*call.args, **call.kwargs)
    if not bound.allow_unreached:
        trees, reached = skeleton.context.trees or {}, skeleton.context.reached or set()
        sites = [bound.binding.sites[name] for name in trees]
        missing = [path for paths in sites if not paths.keys() <= reached for path in paths if path not in reached]
        missing = bound.binding.unreached(missing, reached) if missing else missing
        if missing:
            raise RuntimeError(
                f"the forward never reached {', '.join(map(repr, missing[:4]))}{', ...' if len(missing) > 4 else ''} "
                f"({len(missing)} of the adapted modules), so an adapter there has no effect. If the model calls them "
                "through something a copy cannot follow (a global, a compiled function), leave them out of "
                "target_modules; if it may run past them, bind(..., allow_unreached=True)"
            )
    if not call.return_buffers:
        return y
    known = {id(tensor) for tensor in (*skeleton.aliases.values(), *current.values())}
    buffers = dict(skeleton.root.named_buffers())
    return y, {name: buffer.clone() if id(buffer) in known else buffer for name, buffer in buffers.items()}
