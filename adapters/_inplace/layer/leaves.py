"""The adapters on a layer, and where their parameters hang: PEFT's containers, `layer.lora_A["default"].weight`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchgraft.functional.extending import SiteAdapter, TiedAdapter, Tree, as_tree, computed, unwrapped, whole

from ..._config.keys import SHARED, held_at, join
from ..._methods.shared.called import make_dropout
from ..placed import Layout, Slot
from .containers import Dropouts, Modules, Parameters, SharedContainers
from .gradients import hook_gradient
from .holders import Holders, Traits, Watch, traits


class LayerLeaves(nn.Module):
    """A module of the user's model, and the parameters that adapters have beside it, by adapter name.

    Attributes:
        base_layer: The wrapped module.
        made: What the modules computed that were made to hold leaves, by attribute and adapter.
        parameter_name: The one parameter of the module that the adapters are on; `""` for the module.
    """

    parameter_name = ""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer: Any = base_layer
        self.training = base_layer.training
        self._entries: dict[str, SiteAdapter] = {}
        self.made: dict[tuple[str, str], Traits | None] = {}

    _refreshes = True

    def refresh(self) -> None:
        """Take notice of other adapters or parameters."""

    @contextmanager
    def refreshed_once(self) -> Iterator[None]:
        """Collect what the forward needs once, at the end, while much is hung in."""
        self._refreshes = False
        try:
            yield
        finally:
            del self._refreshes
            self.refresh()

    def get_base_layer(self) -> Any:
        """Return the wrapped module."""
        return unwrapped(self.base_layer)

    @property
    def entries(self) -> Mapping[str, SiteAdapter]:
        """Config and site of each adapter, in the order they were added."""
        return self._entries

    @property
    def carried_adapters(self) -> list[str]:
        """Names of the adapters on this layer, in the order they were added."""
        return list(self._entries)

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of the attributes that hold parameters that may be trained."""
        return tuple(name for name in self._leaf_attributes if name not in self._fixed_attributes)

    @property
    def _fixed_attributes(self) -> tuple[str, ...]:
        """Names of the attributes that hold leaves that no adapter trains."""
        fixed, trained = dict[str, None](), set[str]()
        for name, entry in self._entries.items():
            config: Any = entry.config
            for leaf, (attribute, _) in config.form.places(entry.site).items():
                if leaf in self.fixed(name) or leaf in config.form.buffers:
                    fixed[attribute] = None
                else:
                    trained.add(attribute)
        return tuple(attribute for attribute in fixed if attribute not in trained)

    @property
    def _leaf_attributes(self) -> tuple[str, ...]:
        """Names of the attributes that hold leaves."""
        kinds = (nn.ModuleDict, nn.ParameterDict)
        return tuple(
            name
            for name, child in self._modules.items()
            if isinstance(child, kinds) and name != "base_layer" and not isinstance(child, Dropouts)
        )

    def add(
        self, name: str, entry: SiteAdapter, leaves: Mapping[str, nn.Parameter], containers: SharedContainers
    ) -> None:
        """Put an adapter on this layer; it is not active yet.

        Args:
            name: The adapter's name.
            entry: Its config and this site.
            leaves: Its parameters; each is registered as it is.
            containers: Where those hang that layers of the model share.
        """
        with self.refreshed_once():
            self._hang(name, entry, leaves, containers)

    def _hang(
        self, name: str, entry: SiteAdapter, leaves: Mapping[str, nn.Parameter], containers: SharedContainers
    ) -> None:
        config: Any = entry.config
        for leaf, (attribute, part) in config.form.places(entry.site).items():
            kind = Parameters if part is None else Modules
            if leaf in config.form.buffers and leaf not in leaves:  # a constant that no file has
                continue
            if leaf in config.form.together(entry.site):
                self._join(attribute, name, containers.get(leaf, kind))
            elif not self._is_own(attribute, kind):  # of a deleted adapter's method, it is empty
                self.add_module(attribute, kind(self).train(self.training))
            if config.form.is_grouped(leaf) and name not in self._container(attribute):
                self._container(attribute)[name] = Parameters(self).train(self.training)
        self._entries[name] = entry
        for leaf in leaves:
            apart = leaf in config.form.together(entry.site) or config.form.is_grouped(leaf)
            if not apart and config.form.place(leaf)[1] == "weight":
                shared = entry.site.shared.get(leaf)
                held = None if shared is None else containers.held.get((name, shared))
                held = config.form.holder(config, entry.site, leaf) if held is None else held
                if shared is not None:
                    containers.held[name, shared] = held
                self._put(leaf, name, held)
        if dropout := config.form.dropout:
            if dropout not in self._modules:
                self.add_module(dropout, Dropouts(self).train(self.training))
            self._put(dropout, name, make_dropout(config.form.dropout_of(config)))
        for leaf, parameter in leaves.items():
            self.set_leaf(name, leaf, parameter)
        for fact, value in config.form.facts(config, entry.site).items():
            setattr(self, fact, value)

    def _is_own(self, attribute: str, kind: type[Parameters] | type[Modules]) -> bool:
        """Return whether a container of this kind hangs here, and in no other layer."""
        container = self._modules.get(attribute)
        return isinstance(container, kind) and not any(layer is not self for layer in container.layers)

    def _join(self, attribute: str, name: str, container: Any) -> None:
        """Hang in the container of leaves that layers share, with a dict of the adapter's where it has several."""
        if self._modules.get(attribute) is not container:
            self.add_module(attribute, container.train(self.training))
            container.tell(self)
        if isinstance(container, Modules) and name not in container:
            container[name] = Parameters().train(self.training)

    def shared_containers(self) -> dict[str, Any]:
        """Return the containers of the leaves that adapters here share with other layers, by leaf."""
        entries: Any = self._entries.values()
        return {leaf: self._modules[leaf] for one in entries for leaf in one.config.form.together(one.site)}

    def drop(self, name: str) -> None:
        """Take an adapter's parameters out of this layer, and an adapter that no layer has out of what they share."""
        entry: Any = self._entries.pop(name, None)
        for attribute in [] if entry is None else self.attributes(name):
            container, own = self._container(attribute), entry.config.form.together(entry.site).get(attribute)
            there = (one.entries[name].site.shared for one in container.layers if own and name in one.entries)
            others = (names[attribute] for names in there if attribute in names)
            if (other := next(others, None)) is None:
                del container[name]
            elif isinstance(container, Modules) and other != own and own not in others:
                held: Any = container[name]
                del held[entry.config.form.places(entry.site)[attribute][1]]

    def replace_adapter(self, name: str, entry: SiteAdapter, leaves: Mapping[str, nn.Parameter]) -> None:
        """Give an adapter other parameters, of other shapes, and the config and the site that go with these."""
        order = list(self._entries)
        self.drop(name)
        self.add(name, entry, leaves, SharedContainers([]))
        self._entries = {one: self._entries[one] for one in order}

    def _put(self, attribute: str, name: str, module: nn.Module) -> None:
        """Hang a module of an adapter in, and note what it computes."""
        self.made[attribute, name] = traits(module)
        self._container(attribute)[name] = module.train(self.training)

    def set_leaf(self, name: str, leaf: str, parameter: nn.Parameter) -> None:
        """Register another parameter for one of an adapter's leaves."""
        config: Any = self._entries[name].config
        attribute, part = config.form.places(self._entries[name].site)[leaf]
        held, key = (self._container(attribute), name) if part is None else (self._container(attribute)[name], part)
        if leaf in config.form.buffers:
            held.hold(key, parameter.detach())
        elif not isinstance(held, nn.ParameterDict):
            setattr(held, key, parameter)
        elif held._parameters.get(key) is not parameter:
            held[key] = parameter
        hook_gradient(self._entries[name], leaf, parameter)
        self.refresh()

    def _container(self, leaf: str) -> Any:
        """Return what holds one of the leaves of all adapters, by adapter name."""
        return self._modules[leaf]

    def leaves(self, name: str) -> dict[str, nn.Parameter]:
        """Return an adapter's parameters by leaf, as they are now.

        Raises:
            KeyError: No such adapter on this layer.
            TypeError: A module without a tensor as its weight, in the place of one that holds a parameter.
        """
        found = {
            leaf: computed(self._container(attribute), name) if part is None else computed(one, part)
            for leaf, one, attribute, part in self.held(name)
        }
        config: Any = self._entries[name].config
        for leaf in (*config.form.modules, *config.form.bare_modules):
            if name in self._modules.get(leaf, ()) and not isinstance(found.get(leaf), Tensor):  # type: ignore[operator]
                held = self._container(leaf)[name]
                raise TypeError(
                    f"{self._entries[name].site.path}: {leaf}[{name!r}] is a {type(held).__name__}, whose weight is no "
                    "tensor, so it is no parameter of the adapter; put the module that was there back first"
                )
        return found

    def numbers(self, name: str) -> dict[str, Tensor]:
        """Return an adapter's parameters by leaf, for code that does not call the modules that hold them.

        Raises:
            KeyError: No such adapter on this layer.
            TypeError: A module in the place of one that holds a parameter, without a weight of floating point.
        """
        holders = Holders(self._modules, self.made, name, self._entries[name])
        found: dict[str, Tensor] = Watch([holders]).amid(lambda: holders.maps(called=False))
        return {leaf: whole(tensor) for leaf, tensor in found.items()}

    def fixed(self, name: str) -> tuple[str, ...]:
        """Return those of an adapter's leaves that are never trained."""
        config: Any = self._entries[name].config
        result: tuple[str, ...] = config.form.fixed(config, self._entries[name].site)
        return result

    def is_source(self, name: str) -> bool:
        """Return whether an adapter has parameters of its own here, not those of a module that this one is tied to."""
        return name in self._entries and not isinstance(self._entries[name], TiedAdapter)

    def named_leaves(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of all adapters, each with the adapter's name."""
        for container in map(self._container, self._leaf_attributes):
            if isinstance(container, nn.ParameterDict):
                held_by_name: Any = container._parameters
                yield from ((name, one) for name, one in held_by_name.items() if name in self._entries)
                continue
            for name, held in container._modules.items():
                if isinstance(held, nn.ParameterDict):
                    shared: Any = held._parameters
                    yield from ((name, one) for one in shared.values() if name in self._entries)
                    continue
                # Without nn.Module.__getattr__: with many adapters this is most of the time of set_adapter.
                own = held._parameters.get("weight")
                own = getattr(held, "weight", None) if own is None else own
                if isinstance(own, nn.Parameter):
                    yield name, own
                if (bias := held._parameters.get("bias")) is not None:
                    yield name, bias

    def held(self, name: str) -> list[tuple[str, Any, str, str | None]]:
        """An adapter's leaves: name; parameter, or the module that has it; attribute it hangs in; and as what there."""
        config: Any = self._entries[name].config
        found = []
        for leaf, (attribute, part) in sorted(config.form.places(self._entries[name].site).items()):
            container: Any = self._modules.get(attribute, ())
            if name in container and (part is None or getattr(container[name], part, None) is not None):
                found.append((leaf, container[name], attribute, part))
        return found

    def attributes(self, name: str) -> list[str]:
        """Return the attributes in which something of an adapter hangs."""
        return [
            attribute
            for attribute, container in self._modules.items()
            if attribute != "base_layer"
            and isinstance(container, (nn.ModuleDict, nn.ParameterDict))
            and name in container
        ]

    def widen_adapter(self, adapter_name: str) -> None:
        """Give an adapter's parameters float32 where they have a lower precision."""
        for leaf, p in self.leaves(adapter_name).items() if adapter_name in self._entries else ():
            if p.is_floating_point() and p.itemsize < 4:
                self.set_leaf(adapter_name, leaf, nn.Parameter(p.detach().float(), p.requires_grad))

    def place_in_model(self, path: str, carriers: Collection[str]) -> str:
        """Where this layer hangs in the model, where its module is at `path` and such layers are at `carriers`."""
        return held_at(path, carriers)

    def tensors_of(self, adapter_name: str) -> Iterable[Tensor]:
        """Return an adapter's parameters, if they are this layer's own."""
        return self.leaves(adapter_name).values() if self.is_source(adapter_name) else ()

    def adapter_tree(self, path: str, layout: Layout) -> Tree:
        """Return the adapter's leaves, if they are this layer's own."""
        name = layout.adapter
        if not self.is_source(name):
            return {}
        fixed = self.fixed(name)
        leaves = {leaf: own for leaf, own in self.numbers(name).items() if leaf not in fixed}
        return as_tree(path, self._entries[name].site, leaves)

    def adapter_slots(self, path: str, layout: Layout) -> dict[str, Slot]:
        """Return the adapter's leaves."""
        name, found = layout.adapter, dict[str, Slot]()
        if name not in self._entries:
            return found
        site = self._entries[name].site
        where = layout.config.form.places(site)
        for leaf, parameter in self.leaves(name).items():
            attribute, part = where[leaf]
            key = f"{self.place_in_model(path, layout.carriers)}.{attribute}.{name}"
            slot = Slot(key if part is None else f"{key}.{part}", parameter)
            together = layout.config.form.together(site)
            shared = f"{SHARED}{together[leaf]}" if leaf in together else None
            found[shared or join(layout.config, layout.places[path], leaf)] = slot
        return found


def key_of(layer: LayerLeaves) -> tuple[int, str]:
    """Return what a layer is around: a module by its identity, and one of its parameters.

    >>> linear = nn.Linear(2, 2)
    >>> key_of(LayerLeaves(linear)) == (id(linear), "")
    True
    """
    return id(layer.get_base_layer()), layer.parameter_name
