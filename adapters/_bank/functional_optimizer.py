"""Functional optimizers for the rows of a bank: pairs of `init` and `update`, as torchopt's are."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from torchgraft.functional.extending import Tree, given_type

from .layout import Layout
from .optimizers import Row, check_known

_MOST = 64
"""Optimizers that are kept, one for each set of hyper-parameters."""


@dataclasses.dataclass(frozen=True)
class Functional:
    """An optimizer that is a pair of functions.

    Attributes:
        name: What files call it.
        make: `(**hyper) -> optimizer`, with `init(params) -> state` and `update(gradients, state, params=...) ->
            (updates, state)`.
        hyper: Hyper-parameters by name, with their defaults.
    """

    name: str
    make: Callable[..., Any] = dataclasses.field(repr=False)
    hyper: Mapping[str, Any]
    _known: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def buffers(self, row: Tensor, layout: Layout) -> dict[str, Tensor]:
        leaves: list[Any] = optree.tree_leaves(self.make(**self.hyper).init(layout.views(row.clone())))
        if other := next((leaf for leaf in leaves if not isinstance(leaf, Tensor)), None):
            raise TypeError(
                f"{self.name}: its state has {given_type(other)} in it, and slots hold tensors; give an optimizer "
                "whose state is a tree of tensors"
            )
        return {str(i): leaf.detach().clone() for i, leaf in enumerate(leaves)}

    def check(self, layout: Layout) -> None:
        pass

    def check_hyper(self, hyper: Mapping[str, Any], what: str) -> None:
        check_known(hyper, self.hyper, what, self.name)
        try:
            self.make(**{**self.hyper, **hyper})
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error

    def with_hyper(self, hyper: Mapping[str, Any]) -> Functional:
        return dataclasses.replace(self, hyper=hyper)

    def update(self, row: Row, hyper: Mapping[str, Any]) -> None:
        optimizer = self._made(hyper, row.layout, row.parameters)
        cut = {**row.layout.shapes, **row.own}  # of sites that it has not, zeros, so that states have one structure
        params, gradients = (row.layout.views(tensor, cut) for tensor in (row.parameters, row.gradient))
        fresh, structure = optree.tree_flatten(optimizer.init(params))
        held = [_cut(row.moments[str(i)], leaf) for i, leaf in enumerate(fresh)]
        state = optree.tree_unflatten(structure, [leaf.clone() for leaf in held])
        updates, state = _update(optimizer, gradients, state, params)
        for leaf, new in zip(held, optree.tree_leaves(state), strict=True):
            leaf.copy_(new)
        for path, leaves in updates.items():
            for name, update in leaves.items():
                if update is not None and path in row.own:
                    params[path][name].add_(update)

    def _made(self, hyper: Mapping[str, Any], layout: Layout, like: Tensor) -> Any:
        """Return the optimizer with some hyper-parameters.

        Some remember outside of their state whether they were ever called (torchopt's momentum), which has to say
        nothing of an adapter: so each is called once before.
        """
        key = repr(sorted(hyper.items()))
        if key not in self._known:
            made, zeros = self.make(**hyper), layout.views(torch.zeros_like(like))
            _update(made, zeros, made.init(zeros), zeros)
            self._known[key] = made
            if len(self._known) > _MOST:
                del self._known[next(iter(self._known))]
        return self._known[key]


def _update(optimizer: Any, gradients: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    options = {"inplace": False} if "inplace" in inspect.signature(optimizer.update).parameters else {}
    updates, state = optimizer.update(gradients, state, params=params, **options)
    return updates, state


def _cut(held: Tensor, like: Tensor) -> Tensor:
    """Return the part of a padded tensor that an adapter's own has."""
    for axis, length in enumerate(like.shape):
        held = held.narrow(axis, 0, length)
    return held


def functional_optimizer(make: Callable[..., Any], *, name: str = "", **hyper: Any) -> Functional:
    """Make an optimizer for the rows of a bank of a functional one: `functional_optimizer(torchopt.adam, lr=1e-3)`.

    It steps each adapter's own tree, without padding. Its state has to be a tree of tensors that `init` makes in one
    structure whatever the hyper-parameters are.

    Args:
        make: `(**hyper) -> optimizer`, with `init(params) -> state` and `update(gradients, state, params=...) ->
            (updates, state)`; updates are added.
        name: What files call it; by default that of `make` and its package.
        **hyper: Hyper-parameters with their defaults; a step may have others of these names.

    Raises:
        TypeError: What makes no such pair.

    >>> from typing import NamedTuple
    >>> class Descent(NamedTuple):
    ...     lr: float
    ...     def init(self, params):
    ...         return ()
    ...     def update(self, gradients, state, params=None):
    ...         down = lambda g: -self.lr * g
    ...         return {p: {n: down(g) for n, g in leaves.items()} for p, leaves in gradients.items()}, state
    >>> functional_optimizer(Descent, name="descent", lr=0.1)
    Functional(name='descent', hyper={'lr': 0.1})
    """
    made = make(**hyper)
    if not (callable(getattr(made, "init", None)) and callable(getattr(made, "update", None))):
        raise TypeError(
            f"functional_optimizer: make gave {given_type(made)}, expected an optimizer with init and update, such as "
            "torchopt's; adamw, sgd and muon are made for banks"
        )
    package = str(getattr(make, "__module__", "")).partition(".")[0]
    return Functional(name or f"{package}.{getattr(make, '__name__', type(make).__name__)}", make, hyper)
