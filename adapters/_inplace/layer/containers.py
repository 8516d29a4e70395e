"""Where a layer's adapters hang, by name: PEFT's containers, which tell the layer when something in them is replaced.

A compiled forward takes what the layer collected for it, so code that assigns another parameter (transformers' loader
does, `load_state_dict(assign=True)` does) has to reach that collection. A container of leaves that layers share hangs
in all of them, and tells each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn


class Refreshing(Protocol):
    """A layer that has to know when what hangs in it is replaced."""

    @property
    def entries(self) -> Mapping[str, Any]:
        """Config and site of each adapter."""

    def refresh(self) -> None:
        """Take notice of other parameters."""


class Container(nn.Module):
    """Something that hangs in layers, which are told when something in it is replaced.

    Copies and pickles go without their layers, which report themselves again: a layer holds its containers, and none of
    these another layer.
    """

    _layers: weakref.WeakSet[Refreshing]

    def __init__(self, *layers: Refreshing):
        super().__init__()
        vars(self)["_layers"] = weakref.WeakSet(layers)

    @property
    def layers(self) -> list[Refreshing]:
        """The layers that it hangs in."""
        return list(vars(self).get("_layers", ()))

    def tell(self, layer: Refreshing) -> None:
        """Have one more layer be told."""
        vars(self).setdefault("_layers", weakref.WeakSet()).add(layer)

    def refresh_layers(self) -> None:
        """Have the layers take notice of other parameters."""
        for layer in self.layers:
            layer.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_layers"}


class Parameters(Container, nn.ParameterDict):
    """Bare parameters by adapter name, or those of one adapter by their own: by names, or by numbers like a list."""

    def __getitem__(self, key: str | int) -> Any:
        return super().__getitem__(str(key))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value is None or isinstance(value, Tensor):
            self.refresh_layers()

    def hold(self, name: str, tensor: Tensor) -> None:
        """Take a tensor in that is no parameter, as a buffer."""
        if name not in self._buffers:
            self._keys[name] = None
            self.register_buffer(name, None)
        setattr(self, name, tensor)

    __call__ = nn.Module.__call__

    def forward(self, compute: Callable[[], Any]) -> Any:
        """`compute()`, amid what offloading or sharding this container makes of a call: they see to its parameters."""
        y = compute()
        return y.clone() if isinstance(y, Tensor) and y._is_view() else y  # a view may lose FSDP's hook on it

    def _get_name(self) -> str:
        return "ParameterDict"


class Modules(Container, nn.ModuleDict):
    """Modules that hold a parameter, or do something for an adapter, by its name."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Take a module in."""
        super().add_module(name, module)
        self.refresh_layers()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):  # FSDP wraps a child by assignment
            self.refresh_layers()

    def _get_name(self) -> str:
        return "ModuleDict"


class Dropouts(Modules):
    """Dropout modules, by adapter name: they hold no parameters."""


class SharedContainers:
    """The containers of leaves that the layers of a model share: one for each leaf, which hangs in all of these.

    Args:
        hanging: What hangs in each layer that shares leaves, by leaf.

    Attributes:
        held: The modules that hold leaves that several layers share, each in a container of its own, by adapter and
            name.
    """

    def __init__(self, hanging: Iterable[Mapping[str, Any]]):
        self.held: dict[tuple[str, str], nn.Module] = {}
        self._found = {(leaf, isinstance(one, Parameters)): one for here in hanging for leaf, one in here.items()}

    def get(self, leaf: str, kind: type[Parameters] | type[Modules]) -> Any:
        """Return the container of a leaf, of parameters or of dicts of them; made where there is none."""
        where = leaf, kind is Parameters
        if where not in self._found:
            self._found[where] = kind()
        return self._found[where]
