"""Pools: the skeletons of one state of the user's model, each leased to one call at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from .skeleton import Skeleton

_REGISTRIES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


class Watch:
    """Notices, in microseconds, that the user's model is no longer what the skeletons were made from.

    It compares object identities of everything a module refers to and the storages of all tensors, so that
    `eval()`, `to()`, `load_state_dict(assign=True)`, a replaced module and a new hook are all seen.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        modules = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        registries = [vars(module)[name] for module in modules for name in _REGISTRIES]
        self._empty = [registry for registry in registries if not registry]
        self._views = [vars(module).values() for module in modules]
        self._views += [registry.values() for registry in registries if registry]
        self._state = list(chain.from_iterable(self._views))
        tensors = {id(t): t for view in self._views for t in view if isinstance(t, Tensor)}
        self._tensors = [t for t in tensors.values() if _has_storage(t)]
        self._storages = list(map(Tensor.data_ptr, self._tensors))

    def same_tensors(self) -> bool:
        """Whether every tensor still lives where it lived."""
        return list(map(Tensor.data_ptr, self._tensors)) == self._storages

    def same(self) -> bool:
        """Whether nothing has changed."""
        try:
            return (
                not any(self._empty)  # truth is cheaper to ask for than values
                and list(chain.from_iterable(self._views)) == self._state
                and self.same_tensors()
            )
        except Exception:
            return False


def _has_storage(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        return False


class Lease:
    """Holds a skeleton for one call, and for as long afterwards as the call's autograd graph may run it again."""

    __slots__ = ("_free", "skeleton")

    def __init__(self, skeleton: Skeleton, free: deque[Skeleton]):
        self.skeleton, self._free = skeleton, free

    def __del__(self) -> None:
        cell = self.skeleton.cell
        cell.trees = cell.reached = cell.finder = None
        self.skeleton.restore()
        self._free.append(self.skeleton)


class Pool:
    """Skeletons for one state of the model: as many as are in use at once, and one for compiled calls."""

    def __init__(self, build: Callable[[], Skeleton]):
        self.traced = build()
        self.watch = Watch(module for module, _ in self.traced.modules)
        self._build = build
        self._free: deque[Skeleton] = deque()

    def lease(self) -> Lease:
        """Take a free skeleton, or make one."""
        try:
            skeleton = self._free.pop()
        except IndexError:
            skeleton = self._build()
        return Lease(skeleton, self._free)
