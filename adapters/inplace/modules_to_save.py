"""Modules that are trained as a whole beside an adapter: PEFT's `modules_to_save`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..config import AdapterConfig, require


class ModulesToSaveWrapper(nn.Module):
    """A module of the user's model and the copies of it that adapters train, by adapter name.

    Attributes:
        original_module: The user's module, frozen.
        modules_to_save: The copies.
    """

    def __init__(self, original_module: nn.Module):
        super().__init__()
        self.original_module: Any = original_module
        self.modules_to_save = nn.ModuleDict()
        self.training = original_module.training
        self._active: list[str] = []
        self._disabled = False

    def add(self, name: str) -> None:
        """Make a copy of the module for an adapter; it is not active yet."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module)

    def named_leaves(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of all copies, each with the adapter's name."""
        for name, module in self.modules_to_save.items():
            for parameter in module.parameters():
                yield name, parameter

    @property
    def active_adapters(self) -> list[str]:
        """The adapter whose copy runs, if it has one here."""
        return self._active

    @property
    def active_adapter(self) -> list[str]:
        """The same as `active_adapters`."""
        return self._active

    @property
    def disable_adapters(self) -> bool:
        """Whether the user's module runs."""
        return self._disabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Run and train the copy of this adapter; adapters without a copy here leave the user's module in place.

        Raises:
            ValueError: Several of the adapters have a copy, and only one can run.
        """
        self.activate(adapter_names)
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name in self._active and not inference_mode)

    def activate(self, adapter_names: str | list[str]) -> None:
        """Run the copy of this adapter, and leave what is trained as it is.

        Raises:
            ValueError: Several of the adapters have a copy, and only one can run.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check(names)
        self._active = [name for name in names if name in self.modules_to_save]

    def check(self, names: Iterable[str]) -> None:
        """Refuse several adapters that have a copy here."""
        here = [name for name in names if name in self.modules_to_save]
        if len(here) > 1:
            raise ValueError(
                f"adapters {here} each have a copy of {type(self.original_module).__name__} (modules_to_save), so "
                "only one of them can be active; set one"
            )

    def enable_adapters(self, enabled: bool) -> None:
        """Run the active copy, or the user's module."""
        self._disabled = not enabled
        if enabled:
            self.set_adapter(self._active)
        else:
            self.modules_to_save.requires_grad_(False)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze the copies of these adapters."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for name in names & set(self.modules_to_save):
            self.modules_to_save[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter's copy."""
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        self._active = [name for name in self._active if name != adapter_name]

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """The name in this wrapper of each tensor of an adapter's copy, by its name in files."""
        if adapter_name not in self.modules_to_save:
            return {}
        names = self.modules_to_save[adapter_name].state_dict()
        return {name: f"modules_to_save.{adapter_name}.{name}" for name in names}

    @property
    def current(self) -> nn.Module:
        """The module that runs now."""
        if self._disabled or not self._active:
            return self.original_module
        return self.modules_to_save[self._active[0]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active copy, or the user's module."""
        return self.current(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the module that runs now has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "original_module" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.current, name)


def wrap_modules(
    config: AdapterConfig, model: nn.Module, adapter_name: str, modules: Mapping[str, nn.Module]
) -> list[Callable[[], None]]:
    """What has to be done to wrap the modules that `config.modules_to_save` names; nothing is done yet.

    A name is a whole name, or the end of one after a dot. (PEFT takes any end of a name, so that `"in0"` wraps `lin0`.)

    Raises:
        ValueError: A name that matches nothing, or a container without a forward.
    """
    todo: list[Callable[[], None]] = []
    for saved in config.modules_to_save or ():
        paths = [path for path in modules if path and (path == saved or path.endswith(f".{saved}"))]
        require(bool(paths), config, f"modules_to_save has {saved!r}, which is no module of the model")
        for path in paths:
            module = modules[path]
            containers = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
            require(
                not isinstance(module, containers),
                config,
                f"modules_to_save names {path}, a {type(module).__name__}, which has no forward; name what is in it",
            )
            parent, _, name = path.rpartition(".")
            todo.append(functools.partial(_wrap, modules[parent], name, adapter_name))
    return todo


def _wrap(parent: nn.Module, name: str, adapter_name: str) -> None:
    module = parent._modules[name]
    assert module is not None
    wrapper = module if isinstance(module, ModulesToSaveWrapper) else ModulesToSaveWrapper(module)
    with torch.no_grad():
        wrapper.add(adapter_name)
    parent._modules[name] = wrapper
