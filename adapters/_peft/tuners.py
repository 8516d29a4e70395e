"""PEFT's tuners: what stands between a `PeftModel` and the user's model, so that keys begin with `base_model.model.`"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from .. import _inplace as inplace
from .._arithmetic.weighted import add_weighted_adapter
from .._config.base import AdapterConfig
from .conversion import supports_lora_conversion


class BaseTuner(inplace.ModelWrapper):
    """A model with adapters in it, as `base_model` of a `PeftModel`; attributes it has not are the model's.

    Args:
        model: The model; changed in place.
        peft_config: The adapter's config, or `{name: config}` with one.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Make the parameters on the meta device.
        state_dict: Keys of an adapter, which say what its targets are.

    >>> from torchgraft.adapters import LoraConfig
    >>> tuner = BaseTuner(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    >>> tuner.active_adapters, tuner.targeted_module_names
    (['default'], ['0'])
    """

    prefix: ClassVar[str] = ""
    """What names of the method's parameters begin with."""
    uses_shared_state: ClassVar[bool] = False
    """Whether the method needs a `PeftModel`, as some do in PEFT; here none does."""
    shared_names: ClassVar[frozenset[str]] = frozenset()
    """Names of the tensors that all layers of an adapter of the method share; attributes here, by adapter name."""
    model: Any

    def __init__(
        self,
        model: nn.Module,
        peft_config: AdapterConfig | Mapping[str, AdapterConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        config = peft_config[adapter_name] if isinstance(peft_config, Mapping) else peft_config
        self.model = inplace.inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage, state_dict)

    @classmethod
    def around(cls, model: nn.Module) -> Self:
        """Wrap a model that has its adapters already."""
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner.model = model
        return tuner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return self._shared(name) if name in self.shared_names else getattr(self.model, name)

    def _shared(self, name: str) -> dict[str, Tensor]:
        """Return a tensor that layers share, as each adapter has it."""
        found = (getattr(layer, name, {}) for layer in inplace.layers(self.model).values())
        return {adapter: tensor for one in found for adapter, tensor in one.items()}

    @property
    def targeted_module_names(self) -> list[str]:
        """Names of the modules that adapters are on: those of the first in the model's order, what others add, ..."""
        modules, layers = inplace.bare_modules(self.model), inplace.layers(self.model)
        order = [path for name in self.model.peft_config for path, layer in layers.items() if name in layer.entries]
        return [path for path in dict.fromkeys(order) if path in modules]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Names of the parameters that adapters are on (`target_parameters`)."""
        modules = inplace.bare_modules(self.model)
        return [name for name in inplace.layers(self.model) if name not in modules]

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """Return a model's `config` as a dictionary; one that says `"custom"` for a model without."""
        config: Any = getattr(model, "config", {"model_type": "custom"})
        if hasattr(config, "to_dict"):
            config = config.to_dict()
        result: dict[str, Any] = config
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            result = dataclasses.asdict(config)
        return result

    def get_base_model(self) -> Any:
        """Return the user's model, with the adapters in it."""
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return inplace.active_adapters(self.model)

    @property
    def active_adapter(self) -> list[str]:
        """The same as `active_adapters`."""
        return self.active_adapters

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, peft_config: AdapterConfig, low_cpu_mem_usage: bool = False
    ) -> None:
        """Add an adapter that is not active yet."""
        inplace.inject_adapter_in_model(peft_config, model, adapter_name, low_cpu_mem_usage, activate=False)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones."""
        inplace.set_adapter(self.model, adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze these adapters."""
        inplace.set_requires_grad(self.model, adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        inplace.delete_adapter(self.model, adapter_name)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add the weighted sum of adapters as another one, with the arguments of `torchgraft.adapters`' function."""
        add_weighted_adapter(self.model, adapters, weights, adapter_name, *args, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether `convert_to_lora` is for an adapter of this model."""
        return supports_lora_conversion(self, adapter_name)

    def enable_adapter_layers(self) -> None:
        """Switch adapters on."""
        inplace.enable_adapter_layers(self.model)

    def disable_adapter_layers(self) -> None:
        """Switch adapters off."""
        inplace.disable_adapter_layers(self.model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters, by default the active ones, into the weights."""
        inplace.merge_adapter(self.model, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Take merged adapters out of the weights again, bit for bit."""
        inplace.unmerge_adapter(self.model)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge adapters for good and return the user's model; `progressbar` has no effect."""
        return inplace.merge_and_unload(self.model, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """Remove all adapters and return the user's model."""
        return inplace.unload(self.model)
