"""The layers that carry adapters of bare parameters, one around the other where a module has several."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from torchgraft.functional.extending import (
    CallContext,
    ParameterRuntime,
    SiteAdapter,
    as_tree,
    names_grouped,
    parametrised_class,
)

from .active import ActiveAdapters, placed
from .containers import SharedContainers
from .shell import run_in_place_of
from .tuner_layer import BaseTunerLayer


class ParameterLayer(BaseTunerLayer):
    """A module of the user's model, one parameter of which has adapters, by name: PEFT's `ParamWrapper`.

    The module's forward reads the adapted parameter, which is multiplied out only where it does more than multiply
    with it; so does a parent that reads it from this layer. The module keeps its parameter: `get_param`.

    Attributes:
        parameter_name: The parameter's name on the module.
        num_experts: Number of matrices in it.
        depth: Number of such layers around this one.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str):
        self.__dict__["parameter_name"] = parameter_name
        super().__init__(base_layer)
        self.num_experts = 1
        self.depth = 0
        for layer in self.inner():
            layer.depth += 1

    def inner(self) -> Iterator[ParameterLayer]:
        """Yield the layers within this one, the outermost first."""
        layer: Any = self._modules["base_layer"]
        while isinstance(layer, ParameterLayer):
            yield layer
            layer = layer._modules["base_layer"]

    def chain(self) -> list[ParameterLayer]:
        """Return this layer and those within, in the order that their module registered the parameters."""
        order = list(self.get_base_layer()._parameters)
        order += [layer.parameter_name for layer in (self, *self.inner())]  # FSDP1 may have taken them away for now
        return sorted((self, *self.inner()), key=lambda layer: order.index(layer.parameter_name))

    def get_base_layer(self) -> Any:
        """Return the user's module."""
        layer: Any = self._modules["base_layer"]
        while isinstance(layer, ParameterLayer):
            layer = layer._modules["base_layer"]
        return layer

    def get_param(self) -> Tensor:
        """Return the base's parameter."""
        result: Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return result

    def add(
        self, name: str, entry: SiteAdapter, leaves: Mapping[str, nn.Parameter], containers: SharedContainers
    ) -> None:
        """Put an adapter on this parameter; it is not active yet."""
        super().add(name, entry, leaves, containers)
        self.num_experts = max(entry.site.experts, 1)

    @property
    def base_prefix(self) -> str:
        """What the names of the module's tensors start with in this layer."""
        return "base_layer." * (1 + len(list(self.inner())))

    def under_names(self, name: str) -> Iterable[tuple[str, BaseTunerLayer]]:
        """Return this layer and those within, each under the name of its parameter."""
        return [(f"{name}.{layer.parameter_name}", layer) for layer in self.chain()]

    def without_adapters(self) -> nn.Module:
        """Return the user's module."""
        result: nn.Module = self.get_base_layer()
        return result

    def place_in_model(self, path: str, carriers: Collection[str]) -> str:
        """Return where this layer hangs in the model, where its parameter is at `path`."""
        return path.rpartition(".")[0] + ".base_layer" * self.depth

    def _collect(self, names: Iterable[str]) -> ActiveAdapters:
        return ActiveOnParameter(self, names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the active adapters of this parameter and of those within."""
        body: ParameterBody = self._live.body  # type: ignore[attr-defined]
        adapted = [layer for layer in body.layers if layer._adapted()]
        if not adapted:
            return self.get_base_layer()(*args, **kwargs)
        return self._live.body.run(self.get_base_layer(), args, kwargs)  # type: ignore[attr-defined]

    def _held(self, name: str) -> Any:
        """Return what the module has under a name, adapted where it is a parameter that adapters are on."""
        base = self.get_base_layer()
        for layer in (self, *self.inner()):
            if layer.parameter_name == name and layer._adapted():
                return layer._live.read(base)  # type: ignore[attr-defined]
        return getattr(base, name)

    def __getattr__(self, name: str) -> Any:
        if "_live" in self.__dict__ and any(name == layer.parameter_name for layer in (self, *self.inner())):
            return self._held(name)
        return super().__getattr__(name)

    def train(self, mode: bool = True) -> ParameterLayer:
        """Set the mode of this layer, its module and its adapters."""
        super().train(mode)
        self._live.body.follow(self.get_base_layer())  # type: ignore[attr-defined]
        return self


class ActiveOnParameter(ActiveAdapters):
    """What a forward needs of a parameter's active adapters.

    Attributes:
        socket: Where the forward finds them.
        body: The module whose forward it is.
    """

    def __init__(self, layer: ParameterLayer, names: Iterable[str]):
        self.names = list(names)
        self.device = layer.get_param().device
        self.entries = [placed(layer.entries[name], self.device) for name in self.names]
        self._hold(layer)
        self.shell = None
        leaf, grouped = layer.parameter_name, names_grouped(type(layer.get_base_layer()))
        path = self.entries[0].site.path if self.entries else leaf
        named = {str(index): entry for index, entry in enumerate(self.entries)}
        self.socket = ParameterRuntime(path, leaf, CallContext(), named, grouped)
        self.body = ParameterBody(layer)

    def read(self, base: nn.Module) -> Any:
        """Return the adapted parameter."""
        self.ready(base.training)
        return self.socket.read(base)

    def ready(self, training: bool) -> None:
        """Have the socket know the parameters as they are now."""
        path = self.socket.path
        found = zip(self.entries, self.tensors(training), strict=True)
        self.socket.context.trees = {str(i): as_tree(path, entry.site, one) for i, (entry, one) in enumerate(found)}


class ParameterBody:
    """A module of the user's class with the parameters of some layers adapted; all else is the wrapped module's."""

    def __init__(self, layer: ParameterLayer):
        self.layers = [layer, *layer.inner()]
        leaves = tuple(one.parameter_name for one in self.layers)
        base: Any = layer.get_base_layer()
        cls: Any = type(base)
        self.module: Any = object.__new__(parametrised_class(cls, leaves))
        vars(self.module)["_parameter_runtimes"] = Sockets(self.layers)
        self.follow(base)

    def follow(self, base: nn.Module) -> None:
        """Take over what the wrapped module has now."""
        vars(self.module).update(vars(base))
        vars(self.module).pop("forward", None)

    def run(self, base: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the adapted output."""
        for layer in self.layers:
            layer._live.ready(base.training)  # type: ignore[attr-defined]
        path = self.layers[0]._live.socket.path  # type: ignore[attr-defined]
        return run_in_place_of(base, self.module, self.follow, path, args, kwargs)


class Sockets(Mapping[str, ParameterRuntime]):
    """The sockets of some layers by their parameters' names, as they are now."""

    def __init__(self, layers: Iterable[ParameterLayer]):
        self.layers = {layer.parameter_name: layer for layer in layers}

    def __getitem__(self, leaf: str) -> ParameterRuntime:
        live: Any = self.layers[leaf]._live
        result: ParameterRuntime = live.socket
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)
