"""Adapters around a module of a class with its own forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional.extending import (
    CallContext,
    ProjectionSlice,
    Site,
    SiteAdapter,
    SiteRuntime,
    adapted_class,
    as_tree,
    inner_class,
)

from ..tensors.originals import Originals
from .called_base import BaseOverMerged


@dataclasses.dataclass(eq=False)
class SocketOverMerged(SiteRuntime):
    """A socket of a module that adapters are merged into."""

    originals: Originals

    def _base(
        self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, part: ProjectionSlice | None
    ) -> Any:
        if part is not None:
            return super()._base(site, args, kwargs, part)
        base = BaseOverMerged(self.inner, site, args, kwargs)
        base.originals = self.originals
        return base


class Shell:
    """A module of a class with its own forward, with the adapters around the forward that this one inherits.

    It shares the wrapped module's tensors, hooks and flags; the wrapped module itself stays as it is.
    """

    def __init__(self, base: Any, forward_class: Any, entries: list[SiteAdapter], merged: Originals | None):
        self.cell = CallContext()
        cls: Any = type(base)
        self.inner: Any = object.__new__(inner_class(cls, forward_class))
        self.module: Any = object.__new__(adapted_class(cls, forward_class, entries[0].site))
        state: dict[str, Any] = {}
        for one in (self.inner, self.module):
            object.__setattr__(one, "__dict__", state)
        named = {str(index): entry for index, entry in enumerate(entries)}
        self.socket = SiteRuntime(entries[0].site.path, self.cell, named, self.inner, "input", cls, forward_class)
        if merged is not None:
            self.socket = SocketOverMerged(**vars(self.socket), originals=merged)
        self.follow(base)

    def follow(self, base: Any) -> None:
        """Take over what the wrapped module has now."""
        vars(self.module).update(vars(base), _runtime=self.socket)
        vars(self.module).pop("forward", None)

    def run(
        self,
        base: Any,
        entries: list[SiteAdapter],
        leaves: list[dict[str, Any]],
        x: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """Return the adapted output."""
        path = self.socket.path
        self.socket.entries = {str(index): entry for index, entry in enumerate(entries)}
        found = zip(entries, leaves, strict=True)
        self.cell.trees = {str(index): as_tree(path, entry.site, one) for index, (entry, one) in enumerate(found)}
        result: Tensor = run_in_place_of(base, self.module, self.follow, path, (x, *args), kwargs)
        return result


def run_in_place_of(
    base: Any, module: Any, follow: Callable[[Any], None], path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call a module that shares a wrapped one's tensors, as that one would be called.

    Args:
        base: The wrapped module.
        module: The other.
        follow: Has it take over what the wrapped module has now.
        path: Path of the site.
        args: Positional arguments of the call.
        kwargs: Keyword arguments.

    Raises:
        RuntimeError: Somebody has set another forward on the wrapped module.
    """
    if torch.compiler.is_compiling():
        return module(*args, **kwargs)
    own = vars(base).get("forward")
    if own is None or getattr(own, "__func__", None) is type(base).forward:  # accelerate leaves the class's behind
        follow(base)
        return module(*args, **kwargs)
    hook = vars(base).get("_hf_hook")
    if hook is None:
        raise RuntimeError(
            f"{path}: this {type(base).__name__} has a forward set on itself, which would run without the adapter; "
            "move it into a subclass, or into hooks"
        )
    args, kwargs = hook.pre_forward(base, *args, **kwargs)
    follow(base)
    return hook.post_forward(base, module(*args, **kwargs))
