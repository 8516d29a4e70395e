"""Pools: the skeletons of one state of the user's model, each leased to one call at a time."""

from __future__ import annotations

import functools
import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from .._locating.layout import Record
from .._skeleton.context import CallContext
from .._skeleton.skeleton import Skeleton
from .._tensors.placement import is_sharded, local_part
from .._versions import DictContents
from .traced import TracedContext

_HELD = 64
"""Skeletons of calls that are over and that a pool looks after; more of them are left to those who hold them."""


_REGISTRIES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Watch:
    """A check, in microseconds, that the user's model is still what the skeletons were made from.

    It notices whatever a module refers to that becomes another object, the modules' classes, and the storages of all
    tensors, so that `eval()`, `to()`, `load_state_dict(assign=True)`, a replaced module, a new hook and another
    `__class__` are all seen.

    Args:
        modules: The modules.
        others: Other dicts whose values are to stay.
    """

    def __init__(self, modules: Iterable[nn.Module], others: Iterable[dict[str, Any]] = ()):
        modules = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        self._modules = list(map(weakref.ref, modules))  # which may go, with all that is of the user's
        self._classes = list(map(type, modules))
        dicts = [one for m in modules for one in (vars(m), *(vars(m)[name] for name in _REGISTRIES))]
        dicts += others
        self._contents = DictContents(one for one in dicts if one)
        self._empty = sorted([one for one in dicts if not one], key=id)  # as they lie in memory
        tensors = {id(t): t for one in dicts for t in one.values() if isinstance(t, Tensor)}
        self._tensors = sorted([t for t in tensors.values() if has_storage(t)], key=id)
        self._storages = list(map(Tensor.data_ptr, self._tensors))
        self._sharded = [t for t in tensors.values() if is_sharded(t)]
        self._parts = [local_part(t).data_ptr() for t in self._sharded]

    def same_tensors(self) -> bool:
        """Return whether every tensor still lives where it lived."""
        return list(map(Tensor.data_ptr, self._tensors)) == self._storages and (
            not self._sharded or [local_part(t).data_ptr() for t in self._sharded] == self._parts
        )

    def same(self) -> bool:
        """Return whether nothing has changed."""
        try:
            known = not any(self._empty) and list(map(type, map(operator.call, self._modules))) == self._classes
            return known and self._contents.same() and self.same_tensors()
        except Exception:  # tensors that were exchanged may refuse to say where they are
            return False


def has_storage(tensor: Tensor) -> bool:
    """Return whether a tensor is in one piece and has memory, whose place can be compared."""
    try:
        return not is_sharded(tensor) and tensor.data_ptr() != 0
    except RuntimeError:
        return False


class Lease:
    """A skeleton held for one call."""

    __slots__ = ("_pool", "skeleton")

    def __init__(self, skeleton: Skeleton, pool: Pool):
        self.skeleton, self._pool = skeleton, pool

    def release(self) -> None:
        """End the call."""
        self._pool.take_back(self.skeleton)


class Pool:
    """The skeletons for one state of the model: as many as are in use at once, and one for compiled calls if any come.

    A call may be over and its skeleton still in use: what the autograd graph holds may run it again, and finds the
    call's adapters and tensors as long as it does.

    Attributes:
        modes: Whether each of the model's modules is in training mode.
        aliases: The detached alias of each tensor of the model in that, by the tensor's id.
        in_steps: Whether all sites take one step, in which they look at the shapes of their leaves.
        watch: Notices that the model has changed.
        seen: Where rows are, by kind of routed call.
        alike: The same for kinds that differ in numbers alone.
        given: Where they are in samples of the user's own, whatever numbers are among the arguments.
        known: The same by what can be told of a kind under `torch.compile`.
        unchanging: Whether the user promised that no forward writes to the skeletons; some calls look whether one did.
    """

    def __init__(self, build: Callable[..., Skeleton], unchanging: bool = False):
        self.unchanging, self._calls = unchanging, 0
        self.seen: dict[Any, Record] = {}
        self.alike: dict[Any, dict[Any, Record]] = {}
        self.given: dict[Any, Record] = {}
        self.known: dict[Any, Record] = {}
        self._build = build
        first = self._make(CallContext())
        self.modes = tuple(module.training for _, module in first.modules)
        self.aliases, self.in_steps = first.aliases, first.in_steps
        self.watch = Watch(module for module, _ in first.modules)
        self._fresh = iter([first])
        self._free: deque[Skeleton] = deque()
        self._held: deque[tuple[Skeleton, list[int]]] = deque(maxlen=_HELD)

    @functools.cached_property
    def traced(self) -> Skeleton:
        """The skeleton of compiled calls."""
        skeleton = self._make(TracedContext())
        skeleton.remember()
        return skeleton

    def lease(self) -> Lease:
        """Take a free skeleton, or make one."""
        self.sweep()
        try:
            skeleton = self._free.pop()
        except IndexError:
            skeleton = next(self._fresh, None) or self._make(CallContext())
            skeleton.remember()
        return Lease(skeleton, self)

    def take_back(self, skeleton: Skeleton) -> None:
        """Free a skeleton whose call is over, now or when nothing refers to it any more."""
        self._calls += 1
        counts = skeleton.end(self.unchanging and self._calls & (self._calls - 1) != 0)  # not calls 1, 2, 4, 8, ...
        if counts is None:
            self._free.append(skeleton)
        else:
            self._held.append((skeleton, counts))
        if self.unchanging and skeleton.wrote:
            raise RuntimeError(
                f"unchanging: the forward of this {type(skeleton.root).__name__} writes to attributes of its modules, "
                "which one call would leave to the next; the graft that unchanging() was called on undoes it: call that"
            )

    def sweep(self) -> None:
        """Free the skeletons that nothing refers to any more."""
        for _ in range(len(self._held)):
            try:
                skeleton, counts = self._held.popleft()
            except IndexError:  # another thread took it
                return
            if skeleton.recorded.counts() == counts:
                skeleton.restore()
                self._free.append(skeleton)
            else:
                self._held.append((skeleton, counts))

    def _make(self, context: CallContext) -> Skeleton:
        """Make a skeleton, whose tensors outlive the transforms and modes that are on around the call."""
        with temporarily_clear_interpreter_stack(), _disable_current_modes():
            return self._build(context)
