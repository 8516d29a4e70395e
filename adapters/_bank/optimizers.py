"""Optimizers as operations on rows: each row of a bank is stepped by itself, with hyper-parameters of its own.

A row is one tensor to a fused kernel, and rows whose hyper-parameters are equal are one list, so a step of many
adapters costs what one fused call over as many numbers does, and the rows that are not stepped are not touched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torchgraft.functional.extending import did_you_mean

from .layout import Layout, Shapes

ADJUSTMENTS = ("original", "match_rms_adamw")
"""How Muon's learning rate may depend on the shape of a matrix."""


@dataclasses.dataclass(eq=False)
class Row:
    """One adapter in its slot, as an optimizer steps it.

    Attributes:
        parameters: `"P"`, written to.
        gradient: `"P"`, of which `factor` times is stepped with; may be written to.
        moments: The optimizer's buffers, by name, written to.
        step: Steps taken with this one, no axes.
        layout: Where leaves are in `parameters`, `gradient` and moments of their size.
        own: The shapes of the adapter's own leaves; what is beyond is padding.
        first: Whether this is the first step.
        factor: What divides the gradient by tokens and clips it.
    """

    parameters: Tensor
    gradient: Tensor
    moments: Mapping[str, Tensor]
    step: Tensor
    layout: Layout
    own: Shapes
    first: bool = False
    factor: float = 1.0

    def scaled(self) -> Tensor:
        """Return the gradient, multiplied in place."""
        if self.factor != 1:
            self.gradient.mul_(self.factor)
            self.factor = 1.0
        return self.gradient


class RowOptimizer(Protocol):
    """The interface of an optimizer of a bank."""

    @property
    def name(self) -> str:
        """What files call it."""
        ...

    @property
    def hyper(self) -> Mapping[str, Any]:
        """Hyper-parameters by name, with their defaults."""
        ...

    @property
    def family(self) -> Hashable:
        """What is equal for optimizers that differ in their hyper-parameters only."""
        ...

    def buffers(self, row: Tensor, layout: Layout, own: Shapes) -> dict[str, Tensor]:
        """Return the moments of a row before its first step, by name, for parameters `"P"` and an adapter's shapes."""
        ...

    def check(self, layout: Layout) -> None:
        """Refuse leaves that the optimizer is not for."""
        ...

    def check_hyper(self, hyper: Mapping[str, Any], what: str) -> None:
        """Refuse values that are none of these hyper-parameters."""
        ...

    def with_hyper(self, hyper: Mapping[str, Any]) -> RowOptimizer:
        """Return the same optimizer with other defaults."""
        ...

    def update(self, rows: Sequence[Row], hypers: Sequence[Mapping[str, Any]]) -> None:
        """Take one step of each of some rows, with hyper-parameters of its own."""
        ...


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An optimizer that is a function of rows.

    Attributes:
        name: What files call it.
        hyper: Hyper-parameters by name, with their defaults.
        moments: Names of its buffers, each of the size of the parameters.
        step: `(rows, hyper) -> None`, one step in place of rows whose hyper-parameters are equal.
        refuse: `layout -> None`, an error for leaves that it is not for.
    """

    name: str
    hyper: Mapping[str, Any]
    moments: tuple[str, ...]
    step: Callable[[Sequence[Row], Mapping[str, Any]], None] = dataclasses.field(repr=False)
    refuse: Callable[[Layout], None] = dataclasses.field(default=lambda layout: None, repr=False)

    def __post_init__(self) -> None:
        self._check_values(self.hyper, self.name)

    @property
    def family(self) -> Hashable:
        return self.name, self.step

    def buffers(self, row: Tensor, layout: Layout, own: Shapes) -> dict[str, Tensor]:
        return {name: torch.zeros_like(row) for name in self.moments}

    def check(self, layout: Layout) -> None:
        self.refuse(layout)

    def check_hyper(self, hyper: Mapping[str, Any], what: str) -> None:
        check_known(hyper, self.hyper, what, self.name)
        self._check_values(hyper, what)

    def with_hyper(self, hyper: Mapping[str, Any]) -> Kernel:
        return dataclasses.replace(self, hyper=hyper)

    def update(self, rows: Sequence[Row], hypers: Sequence[Mapping[str, Any]]) -> None:
        for alike, hyper in equal_hyper(rows, hypers):
            self.step(alike, hyper)

    def _check_values(self, hyper: Mapping[str, Any], what: str) -> None:
        for name, value in hyper.items():
            check_value(name, value, what)


def equal_hyper(
    rows: Sequence[Row], hypers: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[list[Row], Mapping[str, Any]]]:
    """Yield the rows whose hyper-parameters are equal, and these.

    >>> [(rows, hyper["lr"]) for rows, hyper in equal_hyper([1, 2, 3], [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.1}])]
    [([1, 3], 0.1), ([2], 0.2)]
    """
    groups: dict[Hashable, tuple[list[Row], Mapping[str, Any]]] = {}
    for row, hyper in zip(rows, hypers, strict=True):
        key: Hashable = tuple([tuple(one) if isinstance(one, list) else one for one in hyper.values()])
        groups.setdefault(key, ([], hyper))[0].append(row)
    yield from groups.values()


def check_known(hyper: Mapping[str, Any], known: Mapping[str, Any], what: str, name: str) -> None:
    """Refuse hyper-parameters that an optimizer does not have."""
    for given in hyper:
        if given not in known:
            raise TypeError(
                f"{what}: {name} has no hyper-parameter {given!r}{did_you_mean(given, known)}; it has "
                f"{', '.join(sorted(known))}"
            )


def check_value(name: str, value: Any, what: str) -> None:
    """Refuse a value that a hyper-parameter of this name cannot have."""
    if name in ("nesterov",):
        fits, expected = isinstance(value, bool), "True or False"
    elif name == "betas":
        fits = isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_number(b) and 0 <= b < 1 for b in value)
        expected = "two numbers from 0 to below 1"
    elif name == "ns_coefficients":
        fits, expected = (
            isinstance(value, (tuple, list)) and len(value) == 3 and all(map(_is_number, value)),
            "three numbers",
        )
    elif name == "adjust_lr":
        fits, expected = value in ADJUSTMENTS, f"one of {', '.join(map(repr, ADJUSTMENTS))}"
    elif name == "eps":
        fits, expected = _is_number(value) and value > 0, "a number above 0, for padding would become 0 / 0"
    else:
        fits, expected = _is_number(value) and 0 <= value < math.inf, "a finite number, 0 or more"
    if not fits:
        raise ValueError(f"{what}: {name} is {value!r:.60}, expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
