"""Views of routed stacks: the module that is called first finds out where the rows of the call are.

Generation calls an encoder, a decoder or an embedding by itself, and not the model; each is a kind of call.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._skeleton.context import CallContext
from .._skeleton.marking import mark, reduce_marked
from .._skeleton.skeleton import Skeleton
from .bound_model import BoundModel
from .call import Call
from .pool import Pool
from .run import now
from .trial import Entered, finder_of


@dataclasses.dataclass(eq=False)
class Entrance:
    """The facts that a module of a routed view has beyond its class.

    Attributes:
        path: Path of the user's module.
        cls: Class of the copy.
        view: What all modules of the view share.
    """

    path: str
    cls: Any
    view: RoutedView


class RoutedView:
    """A view and its active trees.

    Attributes:
        context: CallContext of the view's skeleton.
        active: The view's trees, by adapter name.
    """

    def __init__(
        self, bound: BoundModel, pool: Pool, skeleton: Skeleton, active: Mapping[str, Any], base: Mapping[str, Tensor]
    ):
        self.context: CallContext = skeleton.context
        self.active = active
        self._bound, self._pool, self._base = bound, pool, base
        self._modules = [module for _, module in skeleton.modules]
        self._inside = False

    def call(self, path: str, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module's forward; the first of a call finds out where rows are."""
        if self._inside:
            return forward(*args, **kwargs)
        context = self.context
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return forward(*args, **kwargs)  # checkpointing runs it once more, with what the call has left
        trees = now(self.active)
        entered = Entered(path, tuple(module.training for module in self._modules), repeats=True)
        finder = finder_of(self._bound, self._pool, Call(trees, self._base, args, kwargs), entered)
        context.trees, context.finder, self._inside = trees, finder, True
        try:
            y = forward(*args, **kwargs)
            if finder is not None and not torch.compiler.is_compiling():
                finder.finish()
            return y
        finally:
            self._inside = False

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutedView:
        new = memo[id(self)] = copy.copy(self)
        new.context = copy.deepcopy(self.context, memo)
        new._modules = [copy.deepcopy(module, memo) for module in self._modules]
        return new


class EnteredModule:
    """A base class placed in front of the class of each module that leads to a site."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduce_marked(self, "_entrance", super().__reduce_ex__(protocol), _mark)


def _mark(module: Any, entrance: Entrance) -> None:
    mark(module, "_entrance", entrance, _entered_class)


@functools.lru_cache(maxsize=512)
def _entered_class(cls: Any) -> Any:
    @functools.wraps(cls.forward)  # generation asks for its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        entrance: Entrance = self.__dict__["_entrance"]
        return entrance.view.call(entrance.path, functools.partial(cls.forward, self), args, kwargs)

    members = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (EnteredModule, cls), members)


def watch(bound: BoundModel, skeleton: Skeleton, active: Mapping[str, Any], base: Mapping[str, Tensor]) -> None:
    """Turn the modules of a view that lead to sites into `EnteredModule`s."""
    view = RoutedView(bound, bound.pool(), skeleton, active, base)
    paths = bound.binding.paths(active)
    leading = {path.rsplit(".", depth)[0] if depth else path for path in paths for depth in range(path.count(".") + 1)}
    names = {id(module): name for name, module in bound.binding.model.named_modules()}
    for original, copied in skeleton.modules:
        name = names.get(id(original))
        if name is not None and (name in leading or not name) and isinstance(copied, nn.Module):
            _mark(copied, Entrance(name, type(copied), view))
