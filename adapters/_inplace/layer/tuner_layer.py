"""The layer that carries injected adapters: PEFT's names outside, the functional forward inside."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.compiler import is_compiling

from ..placed import own_modules
from ..switched import Switched
from .active import ActiveAdapters
from .containers import Container
from .gradients import hook_gradients
from .names import NamedLayer
from .reads import computes
from .values import Values

_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that compute with `child.weight` instead of calling the child."""


class BaseTunerLayer(Switched, NamedLayer):
    """A module of the user's model with adapters on it, by name.

    The wrapped module is `base_layer`. Parameters hang where PEFT has them, `layer.lora_A["default"].weight`, and so
    do the numbers that go with them, `layer.scaling["default"]`. The forward is that of `torchgraft.functional`: the
    base, then the active adapters, each around what came before.

    Merged adapters are part of the base's weights until they are unmerged; active ones that are not merged are added
    to them.
    """

    def __init__(self, base_layer: nn.Module, parents: Iterable[nn.Module] = ()):
        super().__init__(base_layer)
        self._disabled = False
        self._dense_weight = any(isinstance(parent, _READS_WEIGHTS) for parent in parents)
        self._live = self._collect([])
        self._argument = next(iter(list(inspect.signature(type(base_layer).forward).parameters)[1:]), "input")

    # -- which run -----------------------------------------------------------------------------------------------

    def freeze_others(self, names: list[str]) -> None:
        """Freeze the parameters of adapters other than these."""
        for name, parameter in self.named_leaves():
            if parameter.requires_grad and name not in names:
                parameter.requires_grad_(False)

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

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off this layer; if no other is active then, the first of the others becomes active.

        Raises:
            ValueError: The adapter is merged.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged; call unmerge_adapter(model) before deleting it")
        self.drop(adapter_name)
        if adapter_name in self._active:
            rest = [name for name in self._active if name != adapter_name]
            if not rest and self._entries:
                rest = sorted(self._entries)[:1]
                warnings.warn(f"adapter {adapter_name!r} was active; now {rest[0]!r} is", UserWarning, stacklevel=2)
            self.set_adapter(rest)
        self.refresh()

    # -- in the model --------------------------------------------------------------------------------------------

    @property
    def user_module(self) -> Any:
        """The wrapped module, without what torch has wrapped around it."""
        return self.get_base_layer()

    def under_names(self, name: str) -> Iterable[tuple[str, BaseTunerLayer]]:
        """Return this layer, under the name of its module."""
        return [(name, self)]

    def copied_module(self, adapter_name: str) -> nn.Module:
        """Return the wrapped module."""
        result: nn.Module = self.get_base_layer()
        return result

    def without_adapters(self) -> nn.Module:
        """Return the wrapped module, within what torch has wrapped around it."""
        result: nn.Module = self.base_layer
        return result

    def own_modules(self) -> Iterable[nn.Module]:
        """Return this layer and what hangs in it beside its module."""
        return own_modules(self)

    def recall_adapters(self, active: list[str]) -> None:
        """Collect anew what the forward needs."""
        self.refresh()

    # -- calls ---------------------------------------------------------------------------------------------------

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

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base with the active adapters."""
        attributes = self.__dict__  # those of modules take long to find
        if not (kwargs or is_compiling()) and len(args) == 1:
            decided = attributes["_live"].decided
            y: Tensor | None = None if decided is None else decided.run(args[0])
            if y is not None:
                return y
        base: Any = attributes["_modules"]["base_layer"]
        if not self._adapted():
            result: Tensor = base(*args, **kwargs)
            return result
        if args:
            x, args = args[0], args[1:]
        elif self._argument in kwargs:
            x = kwargs.pop(self._argument)
        else:
            raise TypeError(f"{self._live.entries[0].site.path}: forward() got no {self._argument!r}")
        output: Tensor = attributes["_live"].run(base, x, args, kwargs)
        return output

    def _adapted(self) -> bool:
        """Return whether any adapter runs; looks for replaced parameters first."""
        attributes = vars(self)
        live: ActiveAdapters = attributes["_live"]
        if not is_compiling() and live.stale(attributes["_modules"]):
            self.refresh()
            live = attributes["_live"]
        return bool(live.entries)

    def refresh(self) -> None:
        """Collect anew what the forward needs."""
        if not self._refreshes:
            return
        names = [] if self._disabled else [name for name in self._active if name in self._entries]
        self._live = self._collect(self._inside_out(name for name in names if name not in self.merged_adapters))

    def _collect(self, names: Iterable[str]) -> ActiveAdapters:
        return ActiveAdapters(self, names)

    def train(self, mode: bool = True) -> BaseTunerLayer:
        """Set the mode of this layer, its module and its adapters."""
        super().train(mode)
        if self._live.shell is not None:
            self._live.shell.follow(self.base_layer)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles need; the rest is collected anew."""
        return {key: value for key, value in self.__dict__.items() if key != "_live"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call,unused-ignore]
        for container in self._modules.values():
            if isinstance(container, Container):
                container.tell(self)
        hook_gradients(self)
        self.refresh()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BaseTunerLayer:
        self.originals.apply(self.get_base_layer(), fn, lambda: super(BaseTunerLayer, self)._apply(fn, recurse))  # type: ignore[no-untyped-call,unused-ignore]
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
