"""Trials: watched runs of a bound model with random adapters, and what they found out about kinds of calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from .._binding.binding import Shapes
from .._locating.finder import Declared, Finder
from .._locating.inputs import (
    GivenSample,
    Inputs,
    check_length,
    have_equal_rows,
    kind_of,
    length_of,
    tensors_in,
    unwrapped,
)
from .._locating.layout import Record
from .._locating.look import ADAPTERS, look, look_at
from .._locating.looking import looking
from .._locating.observed import Observed, Recorder, calm, outputs_of
from .._locating.tokens import look_at_tokens
from .._method import SiteAdapter, Tree
from .._routing.route import Routed
from .._rows import Rows
from .._skeleton.row_outputs import behind
from .._tensors.wrappers import modules_of
from .bound_model import BoundModel
from .call import Call
from .fill import fill
from .pool import Pool
from .token_rows import borders_of, check_sizes, check_tokens

_COARSE = {torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""What rounding may change of a number, of a model that computes in half precision."""


_NUMBERS = 8
"""Different numbers among the arguments of a kind that are looked at, before what all have shown holds for others."""

BaseTensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Entered:
    """The module through which a call came into a model.

    Attributes:
        path: Its path.
        modes: Whether each module of the skeleton is in training mode.
        repeats: Whether what calls it may have repeated each row in succession, as generation does for beams.
    """

    path: str
    modes: tuple[bool, ...]
    repeats: bool = False


class Random(Routed):
    """Random adapters for the rows of a trial; each has every site."""

    def along(self, adapter: SiteAdapter, rows: Rows) -> tuple[SiteAdapter, Rows]:
        return adapter.several(ADAPTERS), rows


class ModelTrial:
    """A bound model as a look runs it.

    Args:
        bound: The bound model.
        pool: Skeletons of the state that the model is looked at in.
        active: The trees of the call; those of one adapter stay, routed ones give way to random adapters.
        base: Tensors of the base that the call was given.
        entered: The module that is run.
    """

    def __init__(self, bound: BoundModel, pool: Pool, active: Mapping[str, Any], base: BaseTensors, entered: Entered):
        self._binding, self._pool, self._entered = bound.binding, pool, entered
        self._base = {name: unwrapped(tensor) for name, tensor in base.items()}
        self._unrouted = {name: _unwrapped_tree(tree) for name, tree in active.items() if not isinstance(tree, Routed)}
        shapes = bound.binding.shapes
        self._random = {
            name: _random(tree.tree, shapes[name]) for name, tree in active.items() if isinstance(tree, Routed)
        }
        parts = [bound.binding.adapters(name) for name in bound.binding.configs]
        sites = {path: adapter.site for adapters in parts for path, adapter in adapters.items()}
        spatial = {path: site.features - 1 for path, site in sites.items()}
        self._recorder = Recorder(
            spatial | {behind(path): -1 for path, site in sites.items() if site.routing.by_module}
        )
        self._sites = set(sites)
        tensors = [t for t in pool.aliases.values() if t.device.type != "meta"]
        self._devices = sorted({t.device for t in tensors if t.device.type != "cpu"}, key=str)
        self.floor = _floor(tensors)

    def base(self, inputs: Inputs, seed: int) -> Observed:
        """Run without adapters."""
        return self._forward({}, None, inputs, seed)

    def alone(self, adapter: int, inputs: Inputs) -> Observed:
        """Run with one random adapter for all rows."""
        if self._binding.members is not None:
            return self.routed([adapter], Finder(None), inputs)
        trees = {name: _nested(lambda leaf: leaf[adapter], tree) for name, tree in self._random.items()}
        return self._forward({**self._unrouted, **trees}, None, inputs, 3)

    def routed(self, rows: Sequence[int], finder: Finder, inputs: Inputs) -> Observed:
        """Run with a random adapter for each row."""
        trees = {}
        for name, tree in self._random.items():
            device = next(iter(next(iter(tree.values())).values())).device
            trees[name] = Random(tree, Rows(torch.tensor(rows, device=device), ADAPTERS))
        return self._forward({**self._unrouted, **trees}, finder, inputs, 3)

    def _forward(self, trees: Mapping[str, Any], finder: Finder | None, inputs: Inputs, seed: int) -> Observed:
        args, kwargs = inputs
        lease = self._pool.lease()
        skeleton = lease.skeleton
        modes = [module.training for _, module in skeleton.modules]
        generators = [(g, g.get_state()) for g in _generators(module for _, module in skeleton.modules)]
        try:
            self._recorder.start()
            self._set_modes(skeleton)
            order = {name: trees[name] for name in self._binding.configs if name in trees}
            fill(skeleton, Call(order, self._base, args, kwargs), {})
            skeleton.context.finder, skeleton.context.see = finder, self._recorder
            skeleton.context.apart = self._random
            with calm(seed, self._devices), looking():
                result = skeleton.root.get_submodule(self._entered.path)(*args, **kwargs)
            return Observed(self._recorder.seen, outputs_of(result))
        finally:
            skeleton.context.see = None
            for (_, module), mode in zip(skeleton.modules, modes, strict=True):
                module.training = mode
            for generator, state in generators:
                generator.set_state(state)
            lease.release()

    def _set_modes(self, skeleton: Any) -> None:
        """Set the call's modes, without dropout."""
        for (_, module), mode in zip(skeleton.modules, self._entered.modes, strict=True):
            still = isinstance(module, (_DropoutNd, nn.RNNBase)) or "_runtime" in vars(module)
            module.training = mode and (not still or isinstance(module, (_NormBase, nn.MultiheadAttention)))


def finder_of(bound: BoundModel, pool: Pool, call: Call, entered: Entered) -> Finder | None:
    """Return the finder of a call's rows, after a look where one is needed and possible; `None` without routed stacks.

    Raises:
        ValueError: A look that shows no way to give each row its own adapter.
    """
    active, base = call.active, call.base
    stacks = [tree for tree in active.values() if isinstance(tree, Routed)]
    if not stacks:
        return None
    size, declared, tokens = max(stack.batch for stack in stacks), stacks[0].declared, stacks[0].tokens
    inputs: Inputs = call.args, dict(call.kwargs)
    check_tokens(bound, active)
    if size == tokens == 1 or _is_declared(bound, active, declared, tokens):
        return Finder(None)
    if not entered.repeats and any(stack.rows.index is not None for stack in stacks):
        check_length(inputs, size)
    if any(stack.rows.tokens for stack in stacks):
        check_sizes(inputs, size, tokens)
    key = _kind(active, declared, inputs, entered, tokens)
    if not may_look(inputs, base, active):
        return Finder(_known(bound, key) or _known(bound, (*key[:-1], kind_of(inputs, inside=False, numbers=False))))
    exact = (*key, torch.is_grad_enabled(), kind_of(inputs))
    alike = (*key[:-1], torch.is_grad_enabled(), kind_of(inputs, numbers=False))

    def again() -> Record:
        if not bound.may_look:
            raise ValueError(
                "the call routes rows, nothing that look has seen was of its kind, and this graft may not find out by "
                "itself, which would run a model again that processes have to run together: call graft.look(*sample), "
                "with arguments of this kind whose rows differ, the same in each process, before the first such call"
            )
        with temporarily_clear_interpreter_stack():
            trial = ModelTrial(bound, pool, active, base, entered)
            full = any(stack.check_all for stack in stacks)
            record = look(trial, inputs, size, declared, full)
            if tokens > 1:
                record = look_at_tokens(trial, inputs, size, tokens, record, borders_of(stacks), declared, full)
        if not record.lasting:
            return record
        if not record.equal:
            pool.known[key] = _common(pool.known.get(key), record)
        pool.alike.setdefault(alike, {})[exact] = record
        pool.seen[exact] = record  # last, for a thread that finds it may ask for the others
        return record

    known = pool.seen.get(exact) or pool.given.get(alike) or _of_any_number(pool.alike.get(alike, {}).values())
    if any(stack.check_all for stack in stacks):
        known = None
    if known is not None and known.equal and not have_equal_rows(inputs, known.equal):
        known = None
    paths = {path for stack in stacks for path in stack.tree}
    if known is not None:
        return Finder(known, length_of(inputs, size), again, paths)
    return Finder(again(), length_of(inputs, size), None, paths)


def _of_any_number(records: Collection[Record]) -> Record | None:
    """Return what many kinds have found alike that differ in the numbers among their arguments."""
    if len(records) < _NUMBERS:
        return None
    first, *others = records
    alike = all(record.places == first.places and not record.equal for record in (first, *others))
    return first if alike else None


def remember(
    bound: BoundModel,
    inputs: Inputs,
    size: int | None,
    declared: Declared,
    rearranged: Inputs | None = None,
    tokens: int = 1,
) -> None:
    """Look at a kind of call before it is made, with all adapters of a bound model."""
    pool = bound.pool()
    entered = Entered("", pool.modes)
    size = next((len(x) for x in tensors_in(inputs) if x.ndim), 0) if size is None else size
    if size < 2 and tokens == 1:
        raise ValueError(f"look: the sample has {size} rows, expected at least 2 that differ; rows=... says how many")
    if tokens > 1:
        check_sizes(inputs, size, tokens)
    stacks = {name: Random(_like(bound, name), Rows(None, ADAPTERS)) for name in bound.binding.configs}
    trial = ModelTrial(bound, pool, stacks, {}, entered)
    if rearranged is None:
        record = look(trial, inputs, size, declared)
    else:
        record = look_at(trial, GivenSample(inputs, rearranged, size), declared, 1)
    if tokens > 1:
        record = look_at_tokens(trial, inputs, size, tokens, record, [[]] * size, declared)
        if not record.lasting:
            raise ValueError(
                "look: where the tokens of this sample are is decided by a mask or another input beside them, so that "
                "it says nothing of other calls; declare it: route(stacked, rows, batch_dim=0, tokens_dim=1)"
            )
    key = _kind(stacks, declared, inputs, entered, tokens)
    if not record.equal:
        pool.known[key] = _common(pool.known.get(key), record)
    for mode in (False, True):
        pool.seen[(*key, mode, kind_of(inputs))] = record
        if rearranged is not None:  # its numbers are the sizes of its rows
            pool.given[(*key[:-1], mode, kind_of(inputs, numbers=False))] = record
    if rearranged is not None:
        pool.known[(*key[:-1], kind_of(inputs, inside=False, numbers=False))] = record


def _like(bound: BoundModel, name: str) -> Tree:
    """Return leaves of a stack that has the shapes of one adapter."""
    modules = modules_of(bound.binding.model)
    made: Tree = {}
    for path, leaves in bound.binding.shapes[name].items():
        site = bound.binding.sites[name].get(path)
        like = None if site is None else site.like(modules[site.owner])
        device = next(iter(bound.binding.model.parameters())).device if like is None else like.device
        wide = like is not None and like.dtype.is_floating_point and like.dtype.itemsize > 4
        dtype = torch.float64 if wide else torch.float32
        made[path] = {leaf: torch.empty((1, *shape), dtype=dtype, device=device) for leaf, shape in leaves.items()}
    return made


def may_look(inputs: Inputs, base: BaseTensors, active: Mapping[str, Any]) -> bool:
    """Return whether the model can be run aside now: nothing compiles, traces, transforms or captures the call."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
    ):
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() if functorch.maybe_current_level() is not None else None
    kinds = {level.key() for level in stack or ()}
    return kinds <= {functorch.TransformType.Grad, functorch.TransformType.Jvp}


def _kind(
    active: Mapping[str, Any], declared: Declared, inputs: Inputs, entered: Entered, tokens: int
) -> tuple[Hashable, ...]:
    """Return what decides how a model arranges its rows, as far as it can be told under `torch.compile`."""
    said = (declared.batch_dim, declared.tokens_dim)
    axes = tuple(tuple(axis.items()) if isinstance(axis, Mapping) else axis for axis in said)
    names = tuple((name, isinstance(tree, Routed)) for name, tree in active.items())
    return entered.path, entered.modes, names, axes, declared.mixed, tokens > 1, kind_of(inputs, inside=False)


def _known(bound: BoundModel, key: tuple[Hashable, ...]) -> Record | None:
    for pool in bound.pools:
        if key in pool.known:
            return pool.known[key]
    return None


def _common(before: Record | None, after: Record) -> Record:
    """Return the record that two looks agree on: places that differ are not known."""
    if before is None or before.places == after.places:
        return after
    paths = [*before.places, *(path for path in after.places if path not in before.places)]
    return Record({path: (*before.places.get(path, ()), *after.places.get(path, ())) for path in paths})


def _is_declared(bound: BoundModel, active: Mapping[str, Any], declared: Declared, tokens: int) -> bool:
    """Return whether the user said where the rows are at every site, and their tokens where these are routed."""
    given = {"batch_dim": declared.batch_dim} | ({"tokens_dim": declared.tokens_dim} if tokens > 1 else {})
    by_path = {name: said for name, said in given.items() if isinstance(said, Mapping)}
    paths = bound.binding.paths(active) if by_path else set()
    for name, said in by_path.items():
        if unknown := [path for path in said if path not in paths]:
            raise KeyError(
                f"route: {name} names {unknown[0]!r}, which is no adapted module of this call; there are "
                f"{', '.join(sorted(paths)[:6])}{', ...' if len(paths) > 6 else ''}"
            )
    return all(paths <= set(by_path[name]) if name in by_path else said is not None for name, said in given.items())


def _random(tree: Tree, shapes: Shapes) -> Tree:
    """Make random adapters like those of a stack, of a size that shows, and of the shapes that were bound."""
    generator = torch.Generator().manual_seed(0)

    def drawn(leaf: Tensor, shape: tuple[int, ...]) -> Tensor:
        shape = (ADAPTERS, *shape)
        dtype = leaf.dtype if leaf.dtype.is_floating_point or leaf.dtype.is_complex else torch.float32
        values = torch.randn(shape, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
        scale = 0.5 if len(shape) < 3 else 0.7 * max(1, shape[-1]) ** -0.5
        values = (values * scale).to(leaf.device, dtype)
        return values.requires_grad_(leaf.requires_grad or torch._C._functorch.is_gradtrackingtensor(leaf))

    return {path: {leaf: drawn(one, shapes[path][leaf]) for leaf, one in own.items()} for path, own in tree.items()}


def _nested(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return {key: _nested(change, value) for key, value in tree.items()} if isinstance(tree, dict) else change(tree)


def _unwrapped_tree(tree: Any) -> Any:
    return _nested(unwrapped, tree) if isinstance(tree, dict) else tree


def _floor(tensors: Iterable[Tensor]) -> float:
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    if torch._C._is_any_autocast_enabled():
        dtypes |= {torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}
    if any(dtype.itemsize <= 2 for dtype in dtypes):
        return max(_COARSE.get(dtype, 2e-2 if dtype.itemsize == 2 else 6e-2) for dtype in dtypes if dtype.itemsize <= 2)
    fast = torch.get_float32_matmul_precision() != "highest"
    return 3e-3 if fast else 1e-9 if dtypes == {torch.float64} else 3e-5


def _generators(modules: Iterable[nn.Module]) -> list[torch.Generator]:
    return [value for module in modules for value in vars(module).values() if isinstance(value, torch.Generator)]
