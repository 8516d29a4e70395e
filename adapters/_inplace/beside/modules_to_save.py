"""Modules that are trained as a whole beside an adapter: PEFT's `modules_to_save`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from torchgraft.functional.extending import Tree, unwrapped, whole

from ..placed import Layout, Owners, Slot, own_modules
from ..switched import Switched
from ..tensors.gathering import loaded_copy


class ModulesToSaveWrapper(Switched, nn.Module):
    """A module of the user's model and the copies of it that adapters train, by adapter name.

    Attributes:
        original_module: The user's module, frozen.
        modules_to_save: The copies.
        merged_adapters: Names of the merged adapters that have a copy here, which runs as if it were active.
    """

    def __init__(self, original_module: nn.Module):
        super().__init__()
        self.original_module: Any = original_module
        self.modules_to_save = nn.ModuleDict().train(original_module.training)
        self.training = original_module.training
        self.merged_adapters: list[str] = []
        self._tied: dict[str, set[str]] = {}
        self._active: list[str] = []
        self._disabled = False

    is_layer = False
    adapter_layer_names = ("modules_to_save",)
    other_param_names = ()

    @property
    def active_adapter(self) -> Any:
        """Name of the active adapter, of which one at a time has a copy here; an empty list without one."""
        return self._active[0] if self._active else []

    @property
    def carried_adapters(self) -> list[str]:
        """Names of the adapters that have a copy here."""
        return list(self.modules_to_save)

    def _get_available_adapters(self) -> set[str]:
        return set(self.modules_to_save)

    @property
    def _adapters(self) -> set[str]:
        return set(self.modules_to_save)

    def add(
        self, name: str, given: Mapping[str, Tensor] | None = None, tied: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        """Make a copy of the module for an adapter; it is not active yet.

        Args:
            name: The adapter's name.
            given: Parameters for the copy by their names in the module, in place of copied ones. They share memory
                where dtype and device are the module's.
            tied: Parameters of other copies that this one shares, by their names in the module.
        """
        copied = loaded_copy(self.original_module)
        made: dict[int, nn.Parameter] = {}
        for key, tensor in (given or {}).items():
            path, _, leaf = key.rpartition(".")
            owner = copied.get_submodule(path)
            like = owner.get_parameter(leaf)
            new = made.setdefault(id(tensor), nn.Parameter(tensor.detach().to(like.device, like.dtype)))
            setattr(owner, leaf, new)
        for key, parameter in (tied or {}).items():
            path, _, leaf = key.rpartition(".")
            setattr(copied.get_submodule(path), leaf, parameter)
        self._tied[name] = set(tied or {})
        self.modules_to_save[name] = copied

    def leaves(self, name: str) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters of an adapter's copy by module within it and name, a tied one once and only in one copy."""
        found: dict[str, dict[str, nn.Parameter]] = {}
        seen: set[int] = set()
        for path, module in self.modules_to_save[name].named_modules() if name in self.modules_to_save else ():
            for leaf, parameter in module._parameters.items():
                elsewhere = (f"{path}.{leaf}" if path else leaf) in self._tied.get(name, ())
                if parameter is not None and id(parameter) not in seen and not elsewhere:
                    seen.add(id(parameter))
                    found.setdefault(path, {})[leaf] = parameter
        return found

    def freeze_others(self, names: list[str]) -> None:
        """Freeze the copies of adapters other than these."""
        for name, module in self.modules_to_save.items():
            if name not in names:
                module.requires_grad_(False)

    def activate(self, names: Iterable[str], trained: bool) -> None:
        """Run the copy of this adapter, trainable or not; other copies stay as frozen as they are."""
        self._active = [name for name in names if name in self.modules_to_save]
        self.set_requires_grad(self._active, trained)

    def check_active(self, names: Iterable[str]) -> None:
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

    def widen_adapter(self, adapter_name: str) -> None:
        """Do nothing: copies have the dtype of the user's module."""

    def own_modules(self) -> Iterable[nn.Module]:
        """Return this wrapper and its copies."""
        return own_modules(self)

    def recall_adapters(self, active: list[str]) -> None:
        """Do nothing: which copy runs is read in each call."""

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return the name in this wrapper of each tensor of an adapter's copy, by its name in files."""
        if adapter_name not in self.modules_to_save:
            return {}
        names = self.modules_to_save[adapter_name].state_dict()
        return {name: f"modules_to_save.{adapter_name}.{name}" for name in names}

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of an adapter's copy by their names in files, from the state dict of this wrapper."""
        return {name: state_dict[key] for name, key in self.adapter_state_dict_load_map(adapter_name).items()}

    @property
    def user_module(self) -> Any:
        """The user's module, without what torch has wrapped around it."""
        return unwrapped(self.original_module)

    def under_names(self, name: str) -> Iterable[tuple[str, ModulesToSaveWrapper]]:
        """Return this wrapper, under the name of the user's module."""
        return [(name, self)]

    def copied_module(self, adapter_name: str) -> nn.Module:
        """Return an adapter's copy, or the user's module where it has none."""
        copied = self.modules_to_save._modules.get(adapter_name)
        return self.original_module if copied is None else copied

    @property
    def current(self) -> nn.Module:
        """The module that runs now."""
        return self.original_module if self._disabled else self._of([*self.merged_adapters, *self._active])

    def without_adapters(self) -> nn.Module:
        """Return the copy of a merged adapter, or else the user's module."""
        return self._of(self.merged_adapters)

    def _of(self, names: list[str]) -> nn.Module:
        return self.modules_to_save[names[0]] if names else self.original_module

    def merged_with(self, names: Iterable[str] | None) -> list[str]:
        """Return what is merged together with these adapters, by default with the active ones."""
        return list(dict.fromkeys((*self.merged_adapters, *(self._active if names is None else names))))

    def check_merge(self, names: Iterable[str]) -> None:
        """Refuse several adapters that have a copy here."""
        here = [name for name in dict.fromkeys(names) if name in self.modules_to_save]
        if len(here) > 1:
            raise ValueError(
                f"adapters {here} each have a copy of {type(self.original_module).__name__} (modules_to_save), so "
                "only one of them can be merged; name one in adapter_names"
            )

    def check_tied(self, path: str, names: Iterable[str], owners: Owners, placed: Mapping[int, Any]) -> None:
        """Do nothing: no weight is changed here."""

    def merge_adapters(self, names: Iterable[str] | None, safe: bool) -> None:
        """Count these adapters as merged too."""
        self.remerge(self.merged_with(names))

    def remerge(self, names: Iterable[str]) -> None:
        """Count just these adapters as merged."""
        self.merged_adapters = [name for name in names if name in self.modules_to_save]

    def unmerge(self, adapter_names: Iterable[str] | None = None) -> None:
        """Count these adapters, by default all, as merged no longer."""
        names = self.merged_adapters if adapter_names is None else list(adapter_names)
        self.remerge([name for name in self.merged_adapters if name not in names])

    def check_unwritten(self) -> None:
        """Do nothing: no weight is changed here."""

    def tensors_of(self, adapter_name: str) -> Iterable[Tensor]:
        """Return the parameters of an adapter's copy."""
        return self.modules_to_save[adapter_name].parameters() if adapter_name in self.modules_to_save else ()

    def unmerged_tensors(self, path: str) -> Mapping[str, Tensor]:
        """None: no weight is changed here."""
        return {}

    def adapter_tree(self, path: str, layout: Layout) -> Tree:
        """Return the parameters of the adapter's copy."""
        return {
            f"{path}.{inner}" if inner else path: {leaf: whole(tensor) for leaf, tensor in leaves.items()}
            for inner, leaves in self.leaves(layout.adapter).items()
        }

    def adapter_slots(self, path: str, layout: Layout) -> dict[str, Slot]:
        """Return the parameters and the buffers of the adapter's copy."""
        name = layout.adapter
        if name not in self.modules_to_save:
            return {}
        own = self.modules_to_save[name].state_dict(keep_vars=True)
        return {f"{path}.{key}": Slot(f"{path}.modules_to_save.{name}.{key}", tensor) for key, tensor in own.items()}

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
