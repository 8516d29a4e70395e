"""Optimizers as operations on rows: each row of a bank is stepped by itself, with hyper-parameters of its own.

A row is one tensor to a fused kernel, so a step of many adapters costs what one fused call over as many numbers does,
and the rows that are not stepped are not touched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
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
        gradient: `"P"`, divided and clipped; may be written to.
        moments: The optimizer's buffers, by name, written to.
        step: Steps taken with this one, no axes.
        layout: Where leaves are in `parameters`, `gradient` and moments of their size.
        own: The shapes of the adapter's own leaves; what is beyond is padding.
        first: Whether this is the first step.
    """

    parameters: Tensor
    gradient: Tensor
    moments: Mapping[str, Tensor]
    step: Tensor
    layout: Layout
    own: Shapes
    first: bool = False


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

    def buffers(self, row: Tensor, layout: Layout) -> dict[str, Tensor]:
        """Return the moments of a row before its first step, by name, for parameters `"P"`."""
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

    def update(self, row: Row, hyper: Mapping[str, Any]) -> None:
        """Take one step of one row."""
        ...


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An optimizer that is a function of one row.

    Attributes:
        name: What files call it.
        hyper: Hyper-parameters by name, with their defaults.
        moments: Names of its buffers, each of the size of the parameters.
        update: `(row, hyper) -> None`, one step in place.
        refuse: `layout -> None`, an error for leaves that it is not for.
    """

    name: str
    hyper: Mapping[str, Any]
    moments: tuple[str, ...]
    update: Callable[[Row, Mapping[str, Any]], None] = dataclasses.field(repr=False)
    refuse: Callable[[Layout], None] = dataclasses.field(default=lambda layout: None, repr=False)

    def __post_init__(self) -> None:
        self._check_values(self.hyper, self.name)

    def buffers(self, row: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {name: torch.zeros_like(row) for name in self.moments}

    def check(self, layout: Layout) -> None:
        self.refuse(layout)

    def check_hyper(self, hyper: Mapping[str, Any], what: str) -> None:
        check_known(hyper, self.hyper, what, self.name)
        self._check_values(hyper, what)

    def with_hyper(self, hyper: Mapping[str, Any]) -> Kernel:
        return dataclasses.replace(self, hyper=hyper)

    def _check_values(self, hyper: Mapping[str, Any], what: str) -> None:
        for name, value in hyper.items():
            check_value(name, value, what)


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


def adamw(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Kernel:
    """Make AdamW for the rows of a bank, as `torch.optim.AdamW`; each adapter may have other values at each step.

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        w = w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.

    Args:
        lr: Learning rate.
        betas: Decay of both moments.
        eps: Added to the denominator, above 0.
        weight_decay: Decoupled decay.

    Raises:
        ValueError: A value out of its range.

    >>> adamw(lr=3e-4).hyper["lr"]
    0.0003
    """
    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return Kernel("adamw", hyper, ("exp_avg", "exp_avg_sq"), _adamw)


def _adamw(row: Row, hyper: Mapping[str, Any]) -> None:
    beta1, beta2 = hyper["betas"]
    torch._fused_adamw_(
        [row.parameters],
        [row.gradient],
        [row.moments["exp_avg"]],
        [row.moments["exp_avg_sq"]],
        [],
        [row.step],
        lr=hyper["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=hyper["weight_decay"],
        eps=hyper["eps"],
        amsgrad=False,
        maximize=False,
    )


def sgd(
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> Kernel:
    """Make SGD with momentum for the rows of a bank, as `torch.optim.SGD`.

        g = g + decay w,  m = momentum m + (1 - dampening) g  (m = g at first),  w = w - lr m

    Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep learning", ICML 2013.

    Args:
        lr: Learning rate.
        momentum: Decay of the velocity.
        dampening: Part of a gradient that the velocity does not take.
        weight_decay: L2 penalty.
        nesterov: Look ahead along the velocity.

    Raises:
        ValueError: A value out of its range.

    >>> sgd(momentum=0.9).moments
    ('momentum_buffer',)
    """
    hyper = {
        "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov
    }  # fmt: skip
    return Kernel("sgd", hyper, ("momentum_buffer",), _sgd)


def _sgd(row: Row, hyper: Mapping[str, Any]) -> None:
    velocity = row.moments["momentum_buffer"]
    first = row.first or bool(hyper["dampening"] and not velocity.any())  # momentum may begin at a later step
    torch._fused_sgd_(
        [row.parameters],
        [row.gradient],
        [velocity] if hyper["momentum"] else [],
        lr=hyper["lr"],
        weight_decay=hyper["weight_decay"],
        momentum=hyper["momentum"],
        dampening=hyper["dampening"],
        nesterov=hyper["nesterov"],
        maximize=False,
        is_first_step=first,
    )
