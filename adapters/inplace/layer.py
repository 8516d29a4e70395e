"""The layer that carries injected adapters: PEFT's names outside, the functional forward inside."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchgraft.functional.extending import Adapted, Base, Entry, unwrapped, whole

from ..methods.shared.called import make_dropout
from .containers import Dropouts, Modules, Parameters
from .holders import Holders, Traits, Watch, traits
from .live import Live
from .originals import Originals, refresh_after_loading, refuse_while_merged
from .reads import computes
from .values import Values

_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that compute with `child.weight` instead of calling the child."""


class BaseTunerLayer(nn.Module):
    """A module of the user's model with adapters on it, by name.

    The wrapped module is `base_layer`. Parameters hang where PEFT has them, `layer.lora_A["default"].weight`, and so
    do the numbers that go with them, `layer.scaling["default"]`. The forward is that of `torchgraft.functional`: the
    base, then the active adapters, each around what came before.

    Merged adapters are part of the base's weights until they are unmerged; active ones that are not merged are added
    to them. The original weights are kept, so that unmerging restores every bit.

    Attributes:
        base_layer: The wrapped module.
        merged_adapters: Names of the adapters that are part of the base's weights now, the innermost first.
        originals: The base's weights without them.
        made: What the modules computed that were made to hold leaves, by attribute and adapter.
    """

    def __init__(self, base_layer: nn.Module, parents: Iterable[nn.Module] = ()):
        super().__init__()
        self.base_layer: Any = base_layer
        self.training = base_layer.training
        self.merged_adapters: list[str] = []
        self.originals = Originals()
        self._entries: dict[str, Entry] = {}
        self.made: dict[tuple[str, str], Traits | None] = {}
        self._active: list[str] = []
        self._disabled = False
        self._dense_weight = any(isinstance(parent, _READS_WEIGHTS) for parent in parents)
        self._live = self._collect([])
        self._argument = next(iter(list(inspect.signature(type(base_layer).forward).parameters)[1:]), "input")
        self.register_load_state_dict_pre_hook(refuse_while_merged)
        self.register_load_state_dict_post_hook(refresh_after_loading)

    # -- adapters ------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Config and site of each adapter, in the order they were added."""
        return self._entries

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of the attributes that hold parameters."""
        kinds = (nn.ModuleDict, nn.ParameterDict)
        return tuple(
            name
            for name, child in self._modules.items()
            if isinstance(child, kinds) and name != "base_layer" and not isinstance(child, Dropouts)
        )

    def add(self, name: str, entry: Entry, leaves: Mapping[str, nn.Parameter]) -> None:
        """Put an adapter on this layer; it is not active yet.

        Args:
            name: The adapter's name.
            entry: Its config and this site.
            leaves: Its parameters; each is registered as it is.
        """
        config: Any = entry.config
        for attribute, part in map(config.form.place, config.form.leaves):
            kind = Parameters if part is None else Modules
            if not isinstance(self._modules.get(attribute), kind):  # of a deleted adapter's method, it is empty
                self.add_module(attribute, kind(self).train(self.training))
        self._entries[name] = entry
        for leaf in leaves:
            if config.form.place(leaf)[1] == "weight":
                self._put(leaf, name, config.form.holder(config, entry.site, leaf))
        if dropout := config.form.dropout:
            if dropout not in self._modules:
                self.add_module(dropout, Dropouts(self).train(self.training))
            self._put(dropout, name, make_dropout(getattr(config, dropout)))
        for leaf, parameter in leaves.items():
            self.set_leaf(name, leaf, parameter)
        for fact, value in config.form.facts(config, entry.site).items():
            setattr(self, fact, value)
        self.refresh()

    def _put(self, attribute: str, name: str, module: nn.Module) -> None:
        """Hang a module of an adapter in, and note what it computes."""
        self.made[attribute, name] = traits(module)
        self._container(attribute)[name] = module.train(self.training)

    def set_leaf(self, name: str, leaf: str, parameter: nn.Parameter) -> None:
        """Register another parameter for one of an adapter's leaves."""
        config: Any = self._entries[name].config
        attribute, part = config.form.place(leaf)
        if part is None:
            self._container(attribute)[name] = parameter
        else:
            setattr(self._container(attribute)[name], part, parameter)
        self.refresh()

    def _container(self, leaf: str) -> Any:
        """What holds one of the leaves of all adapters, by adapter name."""
        return self._modules[leaf]

    def set_constants(self, name: str, constants: Mapping[str, Any]) -> None:
        """Give an adapter on this layer other constants: a scaling factor, shared tensors.

        Raises:
            RuntimeError: Something else wrote to the weights while adapters were merged.
        """
        self.check_unwritten()
        entry = self._entries[name]
        site = dataclasses.replace(entry.site, constants={**entry.site.constants, **constants})
        self._entries[name] = dataclasses.replace(entry, site=site)
        self.remerge(self.merged_adapters)

    def leaves(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters by leaf, as they are now.

        Raises:
            KeyError: No such adapter on this layer.
            TypeError: A module without a tensor as its weight, in the place of one that holds a parameter.
        """
        found = {leaf: one if part is None else getattr(one, part) for leaf, one, _, part in self.held(name)}
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
        """An adapter's parameters by leaf, for whoever computes with them instead of calling what holds them.

        Raises:
            KeyError: No such adapter on this layer.
            TypeError: A module in the place of one that holds a parameter, without a weight of floating point.
        """
        holders = Holders(self, name, self._entries[name])
        found: dict[str, Tensor] = Watch([holders]).amid(lambda: holders.maps(called=False))
        return {leaf: whole(tensor) for leaf, tensor in found.items()}

    def fixed(self, name: str) -> tuple[str, ...]:
        """Those of an adapter's leaves that are never trained."""
        config: Any = self._entries[name].config
        return config.form.fixed(config, self._entries[name].site)

    def named_leaves(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of all adapters, each with the adapter's name."""
        for container in map(self._container, self.adapter_layer_names):
            if isinstance(container, nn.ParameterDict):
                held_by_name: Any = container._parameters
                yield from held_by_name.items()
                continue
            for name, held in container._modules.items():
                # Without nn.Module.__getattr__: with many adapters this is most of the time of set_adapter.
                own = held._parameters.get("weight")
                own = getattr(held, "weight", None) if own is None else own
                if isinstance(own, nn.Parameter):
                    yield name, own
                if (bias := held._parameters.get("bias")) is not None:
                    yield name, bias

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off this layer; if no other is active then, the first of the others becomes active.

        Raises:
            ValueError: The adapter is merged.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged; call unmerge_adapter(model) before deleting it")
        for container in self._modules.values():
            if isinstance(container, (Modules, Parameters)) and adapter_name in container:
                del container[adapter_name]
        self._entries.pop(adapter_name, None)
        if adapter_name in self._active:
            rest = [name for name in self._active if name != adapter_name]
            if not rest and self._entries:
                rest = sorted(self._entries)[:1]
                warnings.warn(f"adapter {adapter_name!r} was active; now {rest[0]!r} is", UserWarning, stacklevel=2)
            self.set_adapter(rest)
        self.refresh()

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; some may have nothing on this layer."""
        return self._active

    @property
    def active_adapter(self) -> list[str]:
        """The same as `active_adapters`."""
        return self._active

    @property
    def disable_adapters(self) -> bool:
        """Whether the forward is the base's alone."""
        return self._disabled

    @property
    def merged(self) -> bool:
        """Whether any adapter is part of the base's weights."""
        return bool(self.merged_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, and trainable unless `inference_mode`; all others are frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name, parameter in self.named_leaves():
            if parameter.requires_grad and name not in names:
                parameter.requires_grad_(False)
        self.activate(names, not inference_mode)

    def activate(self, names: Iterable[str], trained: bool) -> None:
        """Make these adapters the active ones, trainable or not; others stay as frozen as they are."""
        self._active = list(names)
        self.set_requires_grad(self._active, trained)
        self.refresh()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; merged ones are unmerged before they are switched off."""
        self._disabled = not enabled
        if enabled:
            self.set_adapter(self._active)
            return
        self.unmerge()
        for _, parameter in self.named_leaves():
            parameter.requires_grad_(False)
        self.refresh()

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze the parameters of these adapters."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            for leaf, one, _, part in self.held(name) if name in self._entries else ():
                parameter = one if part is None else getattr(one, part)
                if isinstance(parameter, Tensor) and parameter.is_floating_point():
                    parameter.requires_grad_(requires_grad and leaf not in self.fixed(name))

    # -- weights -------------------------------------------------------------------------------------------------

    def get_base_layer(self) -> Any:
        """The wrapped module."""
        return unwrapped(self.base_layer)

    @property
    def base_prefix(self) -> str:
        """What the names of the wrapped module's tensors start with in this layer."""
        return "base_layer."

    @property
    def weight(self) -> Tensor:
        """The base's weight; the adapted one for a forward that computes with it instead of calling this layer."""
        return cast(Tensor, self._held("weight"))

    @property
    def bias(self) -> Tensor | None:
        """The base's bias; the adapted one for a forward that computes with it instead of calling this layer."""
        return self._held("bias")

    def _held(self, name: str) -> Tensor | None:
        adapted = self._adapted() and (self._dense_weight or computes(3))
        return self._live.dense(self.base_layer, name) if adapted else getattr(self.base_layer, name)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What an adapter adds to the base's weight, in the layout of that weight and the adapter's dtype.

        Computed in float64. For a method that does not add, it is the difference that it makes to the original weight.

        Raises:
            KeyError: No such adapter on this layer.
        """
        entry, leaves = self._entries[adapter_name], self.numbers(adapter_name)
        weight, bias = self.originals.base(self.get_base_layer(), entry.site).dense()
        delta = entry.merge(leaves, weight.double(), None if bias is None else bias.double())[0] - weight
        parts = [*entry.site.stored(delta, None).values()]
        return (torch.block_diag(*parts) if len(parts) > 1 else parts[0]).to(next(iter(leaves.values())).dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make adapters part of the base's weights; the sum is taken in float32 or wider and rounded once.

        Args:
            safe_merge: Refuse weights that are not finite.
            adapter_names: Names of the adapters; by default the active ones.

        Raises:
            ValueError: Weights that are not finite, that are computed, or that have no merged form.
        """
        new = self.unmerged(adapter_names)
        if new:
            self._bake([*self.merged_adapters, *self._inside_out(new)], safe_merge)

    def unmerged(self, adapter_names: Iterable[str] | None = None) -> list[str]:
        """Which of these adapters, by default of the active ones, are on this layer and not merged."""
        names = dict.fromkeys(self._active if adapter_names is None else adapter_names)
        return [name for name in names if name in self._entries and name not in self.merged_adapters]

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Take merged adapters, by default all, out of the base's weights again, bit for bit.

        Raises:
            RuntimeError: Something else wrote to the weights while adapters were merged.
        """
        names = self.merged_adapters if adapter_names is None else adapter_names
        rest = [name for name in self.merged_adapters if name not in names]
        if len(rest) < len(self.merged_adapters):
            self._bake(rest, False)

    def remerge(self, names: Iterable[str]) -> None:
        """Have just these adapters merged, the innermost first, with their parameters as they are now."""
        names = [name for name in names if name in self._entries]
        if names or self.merged:
            self._bake(names, False)
        self.refresh()

    def check_unwritten(self) -> None:
        """Make sure that nothing else wrote to the weights while adapters were merged.

        Raises:
            RuntimeError: Something did.
        """
        if self.merged:
            self.originals.check_unwritten(self.get_base_layer(), self._entries[self.merged_adapters[0]].site.path)

    @torch.no_grad()
    def _bake(self, names: list[str], safe: bool) -> None:
        layer: Base | Adapted | None = None
        module = self.get_base_layer()
        for name in names:
            entry = self._entries[name]
            layer = layer or self.originals.base(module, entry.site)
            layer = Adapted(layer, entry, self.numbers(name))
        if isinstance(layer, Adapted):
            self.originals.replace(module, layer, names, safe)
        else:
            self.originals.restore(module, self._entries[self.merged_adapters[0]].site.path)
        self.merged_adapters = names
        self.refresh()

    # -- calls ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base with the active adapters."""
        base: Any = self._modules["base_layer"]  # attributes of modules take long to find
        if not self._adapted():
            return base(*args, **kwargs)
        if args:
            x, args = args[0], args[1:]
        elif self._argument in kwargs:
            x = kwargs.pop(self._argument)
        else:
            raise TypeError(f"{self._live.entries[0].site.path}: forward() got no {self._argument!r}")
        return self._live.run(base, x, args, kwargs)

    def _adapted(self) -> bool:
        """Whether any adapter runs; looks for replaced parameters first."""
        if not torch.compiler.is_compiling() and self._live.stale(self):
            self.refresh()
        return bool(self._live)

    def refresh(self) -> None:
        """Collect anew what the forward needs."""
        names = [] if self._disabled else [name for name in self._active if name in self._entries]
        self._live = self._collect(self._inside_out(name for name in names if name not in self.merged_adapters))

    def _collect(self, names: Iterable[str]) -> Live:
        return Live(self, names)

    def train(self, mode: bool = True) -> BaseTunerLayer:
        """Set the mode of this layer, its module and its adapters."""
        super().train(mode)
        if self._live.shell is not None:
            self._live.shell.follow(self.base_layer)
        return self

    def _inside_out(self, names: Iterable[str]) -> list[str]:
        """These adapters, the innermost first: the last of those that act on the input."""
        names = list(names)
        entries: list[Any] = [self._entries[name] for name in names]
        return names[::-1] if any(entry.config.form.input_side(entry.site) for entry in entries) else names

    def held(self, name: str) -> list[tuple[str, Any, str, str | None]]:
        """An adapter's leaves: name; parameter, or the module that has it; attribute it hangs in; and as what there."""
        config: Any = self._entries[name].config
        found = []
        for leaf in sorted(config.form.leaves):
            attribute, part = config.form.place(leaf)
            container: Any = self._modules[attribute]
            if name in container and (part is None or getattr(container[name], part, None) is not None):
                found.append((leaf, container[name], attribute, part))
        return found

    def attributes(self, name: str) -> list[str]:
        """The attributes in which something of an adapter hangs."""
        return [
            attribute
            for attribute, container in self._modules.items()
            if attribute != "base_layer"
            and isinstance(container, (nn.ModuleDict, nn.ParameterDict))
            and name in container
        ]

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles need; the rest is collected anew."""
        return {key: value for key, value in self.__dict__.items() if key != "_live"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.refresh()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BaseTunerLayer:
        self.originals.apply(self.get_base_layer(), fn, lambda: super(BaseTunerLayer, self)._apply(fn, recurse))
        self.refresh()
        return self

    def __getattr__(self, name: str) -> Any:
        """Weight and bias, numbers by adapter (`scaling`, `r`); else what the wrapped module has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if (name.startswith("_") and name != "_qkv_same_embed_dim") or "base_layer" not in self.__dict__.get(
                "_modules", {}
            ):
                raise
        configs: list[Any] = [entry.config for entry in self._entries.values()]
        if any(name in config.form.values for config in configs):
            return Values(self, name)
        if any(name in entry.site.names for entry in self._entries.values()):
            return self._held(name)
        return getattr(self.get_base_layer(), name)

    def _get_name(self) -> str:
        methods = sorted({entry.config.method.name.lower() for entry in self._entries.values()})
        return ".".join([*methods, type(self.base_layer).__name__])
