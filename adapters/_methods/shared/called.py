"""Maps that are modules: how an adapter runs through what is attached to the modules that hold its leaves.

A method's `apply` takes a leaf as a tensor and multiplies with it. In place, a leaf hangs in a module, to which
something may be attached: hooks, offloading, sharding, a parametrization, another class. Then the leaf is
`Called`, and `apply` calls the module in the place of the product, as PEFT does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional.extending import computed, whole

DROPOUT = "dropout"
"""The key that a dropout module has among the leaves where it is called."""


class Called:
    """A module that holds a leaf, and computes with it.

    Attributes:
        module: The module.
        path: Path of the site.
        name: Name of the leaf.
        casts: Whether it gets its input in the dtype of its weight.

    >>> double = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(double.weight, 2.0)
    >>> import torch
    >>> Called(double, "head", "lora_A")(torch.ones(1, 1)).item()
    2.0
    """

    __slots__ = ("casts", "module", "name", "path")

    def __init__(self, module: Any, path: str, name: str, casts: bool = True):
        self.module, self.path, self.name, self.casts = module, path, name, casts

    def __call__(self, x: Tensor) -> Tensor:
        """The module's output."""
        y: Tensor = self.module(x)
        return y

    @property
    def is_meta(self) -> bool:
        """Whether the module's weight has no values, and nothing is attached that could load them for a call."""
        own = vars(self.module)
        weight = own["_parameters"].get("weight")
        return weight is not None and weight.is_meta and "_hf_hook" not in own and not own["_forward_pre_hooks"]

    def with_weight(self, x: Tensor, compute: Callable[[Tensor, Tensor], Any]) -> Any:
        """`compute(x, weight)` within a call of a `Holder`: `x` is its input, and what is computed its output."""
        return self.module(x, compute=compute)

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return the module's weight, whole and in memory, as a constant.

        Raises:
            TypeError: A weight that is no tensor of floating point.
            RuntimeError: A weight without memory.
        """
        return read(self.module, "weight", self.path, self.name)

    def cast(self, x: Tensor) -> Tensor:
        """Return an input in the dtype that the module computes in, as far as its weight says it."""
        if not self.casts:
            return x
        weight = getattr(self.module, "weight", None)
        floating = isinstance(weight, Tensor) and weight.is_floating_point()
        return x.to(weight.dtype) if floating and x.is_floating_point() else x  # type: ignore[union-attr]


Map = Tensor | Called
"""A leaf as `apply` has it."""

Dropout = float | Called
"""The probability of dropout, or the module that does it."""


class Holder(nn.Module):
    """Holds a leaf as its weight; called, it computes with an input and its weight what it is told to."""

    weight: Tensor

    def forward(self, x: Any, compute: Callable[[Any, Tensor], Any]) -> Any:
        """`compute(x, weight)`."""
        return compute(x, self.weight)


@contextlib.contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Have a module's tensors in memory within the block, where accelerate offloads them between calls."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def read(module: nn.Module, name: str, path: str, leaf: str) -> Tensor:
    """Return a tensor of a module, whole and in memory.

    Args:
        module: The module.
        name: Name of the tensor there.
        path: Path of the site, for errors.
        leaf: Name of the leaf that it is.

    Raises:
        TypeError: Something else than a tensor of floating point.
        RuntimeError: A tensor without memory.
    """
    with in_memory(module):
        tensor: Any = computed(module, name) if hasattr(module, name) else None
    if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        form = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(
            f"{path}: the {name} of {leaf}, a {type(module).__name__}, is {form}, and the adapter computes with its "
            "numbers there instead of calling it; put a module with a weight of floating point in its place"
        )
    result: Tensor = whole(tensor)
    return result


def is_dropping(dropout: Dropout, training: bool) -> bool:
    """Return whether an input may not be the same after dropout.

    >>> is_dropping(0.5, training=True), is_dropping(0.5, training=False)
    (True, False)
    """
    return isinstance(dropout, Called) or bool(dropout and training)


def dropped(x: Tensor, dropout: Dropout, training: bool) -> Tensor:
    """Return an input after dropout.

    >>> import torch
    >>> dropped(torch.ones(2), 0.5, training=False)
    tensor([1., 1.])
    """
    if isinstance(dropout, Called):
        return dropout(x)
    return F.dropout(x, dropout) if dropout and training else x


def make_dropout(p: float) -> nn.Module:
    """Return the module that PEFT has for a dropout of probability `p`."""
    return nn.Dropout(p) if p else nn.Identity()
