"""Functional optimizers for the rows of a bank: pairs of `init` and `update`, as torchopt's are."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import optree
from torch import Tensor

from torchgraft.functional.extending import Tree, cut_to, given_type

from .layout import Layout, Shapes
from .optimizers import Row, check_known, equal_hyper
from .together import (
    Outcome,
    agree,
    as_data,
    called_once,
    held_by,
    stacked_leaves,
    step_of,
    trees_of,
    under_vmap,
    write,
)

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
    _vectorizes: dict[str, bool] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def family(self) -> Hashable:
        return self.name, self.make

    def buffers(self, row: Tensor, layout: Layout, own: Shapes) -> dict[str, Tensor]:
        leaves, mine = (
            optree.tree_leaves(self.make(**self.hyper).init(layout.tree(row.clone(), cut)))
            for cut in (layout.shapes, {**layout.shapes, **own})
        )
        if other := next((leaf for leaf in leaves if not isinstance(leaf, Tensor)), None):
            raise TypeError(
                f"{self.name}: its state has {given_type(other)} in it, and slots hold tensors; give an optimizer "
                "whose state is a tree of tensors"
            )
        made = {str(i): leaf.detach().clone() for i, leaf in enumerate(leaves)}
        for whole, part in zip(made.values(), mine, strict=True):
            cut_to(whole, part.shape).copy_(part)
        return made

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

    def update(self, rows: Sequence[Row], hypers: Sequence[Mapping[str, Any]]) -> None:
        for alike, theirs in _of_equal_shapes(rows, hypers):
            equal = [*equal_hyper(alike, theirs)]
            if self._step_together(alike, theirs):
                continue
            if 1 < len(equal) < len(alike):
                for some, hyper in equal:
                    self.update(some, [hyper] * len(some))
            else:
                for row, hyper in zip(alike, theirs, strict=True):
                    write([row], optree.tree_map(lambda one: one[None], self._alone(row, hyper)))

    def _step_together(self, rows: Sequence[Row], hypers: Sequence[Mapping[str, Any]]) -> bool:
        """Step rows of equal shapes at once, and return whether that can be done.

        The first time it is held against steps of one row each.
        """
        if len(rows) == 1:
            return False
        names = {name for name in hypers[0] if any(hyper[name] != hypers[0][name] for hyper in hypers)}
        fixed = {n: value for n, value in hypers[0].items() if n not in names and type(value) is not float}
        key = repr((sorted(names), sorted(fixed.items())))
        stepped: Any = None
        if self._vectorizes.get(key, True):
            with contextlib.suppress(Exception):  # what is wrong with the optimizer itself, steps of one row show
                stepped = self._under_vmap(rows, hypers, names)
        if stepped is not None and key not in self._vectorizes:
            alone = [self._alone(row, hyper) for row, hyper in zip(rows, hypers, strict=True)]
            stepped = stepped if agree(stepped, stacked_leaves(alone), rows[0].parameters.dtype) else None
        self._vectorizes[key] = stepped is not None
        if stepped is not None:
            write(rows, stepped)
        return stepped is not None

    def _alone(self, row: Row, hyper: Mapping[str, Any]) -> Outcome:
        optimizer, (params, gradients) = self._made(hyper, row.layout, row.parameters), trees_of(row)
        return step_of(optimizer, params, gradients, held_by(row, optimizer.init(params)))

    def _under_vmap(self, rows: Sequence[Row], hypers: Sequence[Mapping[str, Any]], names: Collection[str]) -> Outcome:
        params, gradients = stacked_leaves([trees_of(row) for row in rows])
        made = self._made(hypers[0], rows[0].layout, rows[0].parameters)
        fresh = made.init(trees_of(rows[0])[0])
        held = stacked_leaves([held_by(row, fresh) for row in rows])
        fixed = {name: value for name, value in hypers[0].items() if name not in names}
        data = {name: as_data(name, [hyper[name] for hyper in hypers], rows[0].parameters.device) for name in names}

        def step(params: Tree, gradients: Tree, held: list[Tensor], data: dict[str, Any]) -> Outcome:
            optimizer = called_once(self.make(**fixed, **data), params) if data else made
            return step_of(optimizer, params, gradients, held)

        outcome: Outcome = under_vmap(step, params, gradients, held, data)
        return outcome

    def _made(self, hyper: Mapping[str, Any], layout: Layout, like: Tensor) -> Any:
        """Return the optimizer with some hyper-parameters."""
        key = repr(sorted(hyper.items()))
        if key not in self._known:
            self._known[key] = called_once(self.make(**hyper), layout.views(like))
            if len(self._known) > _MOST:
                del self._known[next(iter(self._known))]
        return self._known[key]


def _of_equal_shapes(
    rows: Sequence[Row], hypers: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[list[Row], list[Mapping[str, Any]]]]:
    """Yield the rows whose own leaves have equal shapes, and their hyper-parameters."""
    left = [*zip(rows, hypers, strict=True)]
    while left:
        own = left[0][0].own
        alike = [row.own is own or row.own == own for row, _ in left]
        group = [pair for pair, same in zip(left, alike, strict=True) if same]
        left = [pair for pair, same in zip(left, alike, strict=True) if not same]
        yield [row for row, _ in group], [hyper for _, hyper in group]


def functional_optimizer(make: Callable[..., Any], *, name: str = "", **hyper: Any) -> Functional:
    """Make an optimizer for the rows of a bank of a functional one: `functional_optimizer(torchopt.adam, lr=1e-3)`.

    It steps each adapter's own tree, without padding; those of equal shapes at once, under `torch.vmap` and with the
    hyper-parameters in which they differ as tensors, where this gives what a step of each gives. Its state has to be a
    tree of tensors that `init` makes in one structure whatever the hyper-parameters are.

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
