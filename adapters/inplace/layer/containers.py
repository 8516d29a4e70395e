"""Where a layer's adapters hang, by name: PEFT's containers, which tell the layer when something in them is replaced.

A compiled forward takes what the layer collected for it, so whoever assigns another parameter (transformers' loader
does, `load_state_dict(assign=True)` does) has to reach that collection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn


class Refreshing(Protocol):
    """A layer that has to know when what hangs in it is replaced."""

    def refresh(self) -> None:
        """Take notice of other parameters."""


class Parameters(nn.ParameterDict):
    """Bare parameters by adapter name."""

    _layer: Refreshing

    def __init__(self, layer: Refreshing):
        super().__init__()
        vars(self)["_layer"] = layer  # not a submodule

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "_layer" in vars(self):
            self._layer.refresh()

    __call__ = nn.Module.__call__

    def forward(self, compute: Callable[[], Any]) -> Any:
        """`compute()`, amid what offloading or sharding this container makes of a call: they see to its parameters."""
        y = compute()
        return y.clone() if isinstance(y, Tensor) and y._is_view() else y  # a view may lose FSDP's hook on it

    def _get_name(self) -> str:
        return "ParameterDict"


class Modules(nn.ModuleDict):
    """Modules that hold a parameter, or do something for an adapter, by its name."""

    _layer: Refreshing

    def __init__(self, layer: Refreshing):
        super().__init__()
        vars(self)["_layer"] = layer

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Take a module in."""
        super().add_module(name, module)
        self._layer.refresh()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) and "_layer" in vars(self):  # FSDP wraps a child by assignment
            self._layer.refresh()

    def _get_name(self) -> str:
        return "ModuleDict"


class Dropouts(Modules):
    """Dropout modules, by adapter name: they hold no parameters."""
