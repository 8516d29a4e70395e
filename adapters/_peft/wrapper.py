"""A model with adapters under PEFT's names: running it, and which adapters are there, active and trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

from torch import nn

from .. import _inplace as inplace
from .._config.base import AdapterConfig
from .._config.fields import own_type
from .._config.peft_type import PeftType
from .._config.replaced import with_heads
from .._config.ties import others_tied_to
from .by_rows import by_rows
from .conversion import supports_lora_conversion
from .tuner_classes import tuner_class
from .tuners import BaseTuner


class AdaptedModel(inplace.ModelWrapper):
    """What a `PeftModel` is apart from its files: a thin wrapper, each of whose methods is an in-place function.

    Args:
        model: The model.
        peft_config: The first adapter's config; it is copied.
        adapter_name: Its name.
        autocast_adapter_dtype: Give its parameters float32 where they would have float16 or bfloat16.
        low_cpu_mem_usage: Make its parameters on the meta device.
    """

    base_model: Any
    heads: ClassVar[tuple[str, ...]] = ()
    """Names of new heads, which a task's model trains as `modules_to_save`."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: AdapterConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ):
        super().__init__()
        self.training = model.training
        config = with_heads(peft_config, dict(model.named_modules()), self.heads)
        self.base_model = self.tuner_of(config)(model, config, adapter_name, low_cpu_mem_usage)
        inplace.cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype)
        warn_of_ties(model, adapter_name)
        _let_inputs_require_grad(model)

    @classmethod
    def around(cls, model: nn.Module, config: AdapterConfig) -> Self:
        """Wrap a model that has its adapters already; `config` is the first one's."""
        wrapped = cls.__new__(cls)
        nn.Module.__init__(wrapped)
        wrapped.training = model.training
        wrapped.base_model = cls.tuner_of(config).around(model)
        _let_inputs_require_grad(model)
        return wrapped

    @classmethod
    def tuner_of(cls, config: AdapterConfig) -> type[BaseTuner]:
        """Return the class of `base_model`."""
        return tuner_class(type(config))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # -- running ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with its active adapters, or each row with its own, `adapter_names=[...]`: `adapter_rows`.

        With `task_ids`, the active adapter knows several tasks, and each row is of one. Of an activated LoRA, the
        tokens that it adapts are found in `input_ids`.
        """
        rows = by_rows(self.get_base_model(), args, kwargs)
        return (self.base_model if rows is None else rows)(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's `generate`, with `adapter_names=[...]` and `task_ids` as a call does."""
        rows = by_rows(self.get_base_model(), args, kwargs, generates=True)
        return (self.base_model if rows is None else rows).generate(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the model without its adapters, within a `with` block."""
        with inplace.disable_adapter(self.get_base_model()):
            yield

    def get_base_model(self) -> Any:
        """Return the user's model, with the adapters in it."""
        return self.base_model.model

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Have the embeddings of a model require gradients, which checkpoints that are reentrant need; return it.

        Nothing is done to a model whose weights are packed.
        """
        packed = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
        if not any(getattr(model, name, False) for name in packed):
            if hasattr(model, "enable_input_require_grads"):
                model.enable_input_require_grads()
            elif hasattr(model, "get_input_embeddings"):
                model.get_input_embeddings().register_forward_hook(_require_grad)
        return model

    # -- adapters --------------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """The config of each adapter, by name."""
        result: dict[str, AdapterConfig] = self.get_base_model().peft_config
        return result

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return inplace.active_adapters(self.get_base_model())

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter; a list where there are several, or none."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> AdapterConfig:
        """The config of the first active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter takes part in calls."""
        placed = inplace.placed_modules(self.get_base_model())
        return any(not part.disable_adapters and part.active_adapters for _, part in placed)

    @property
    def base_model_torch_dtype(self) -> Any:
        """The model's `dtype`, if it has one."""
        return getattr(self.get_base_model(), "dtype", None)

    @property
    def peft_type(self) -> PeftType | str:
        """Name of the first adapter's method."""
        return own_type(type(next(iter(self.peft_config.values()))), None)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train copies of; `None` where there are none."""
        found = {name for config in self.peft_config.values() for name in config.modules_to_save or ()}
        return found or None

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: AdapterConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter that is frozen and not active yet; `set_adapter` makes it the active one."""
        model = self.get_base_model()
        config = with_heads(peft_config, dict(model.named_modules()), self.heads)
        inplace.inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage, activate=False)
        inplace.cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype)
        warn_of_ties(model, adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, and trainable unless `inference_mode`; others are frozen."""
        inplace.set_adapter(self.get_base_model(), adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters, active or not."""
        inplace.set_requires_grad(self.get_base_model(), adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        inplace.delete_adapter(self.get_base_model(), adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether `convert_to_lora` is for an adapter of this model."""
        return supports_lora_conversion(self, adapter_name)


def _require_grad(module: nn.Module, inputs: Any, output: Any) -> None:
    output.requires_grad_(True)


def _let_inputs_require_grad(model: Any) -> None:
    """Have the embeddings of a transformers' model that checkpoints require gradients, which reentrant ones need."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    checkpointing = next((getattr(model, name) for name in names if hasattr(type(model), name)), False)
    if checkpointing and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()


def warn_of_ties(model: nn.Module, adapter_name: str) -> None:
    """Name the modules of an adapter whose weight is another module's too, which the adapter does not change."""
    configs: Any = getattr(inplace.unwrap(model), "peft_config", {})
    config = configs[adapter_name]
    if getattr(config, "ensure_weight_tying", False) or getattr(config, "layer_replication", None):
        return
    modules = inplace.bare_modules(model)
    adapted = [path for path in inplace.adapted_modules(model, adapter_name) if path in modules]  # or parameters
    found = {path: others_tied_to(path, modules) for path in adapted}
    tied = [f"{path} (with {', '.join(others)})" for path, others in found.items() if others]
    if tied:
        warnings.warn(
            f"adapter {adapter_name!r} is on what is tied: {'; '.join(tied)}, and does not change the other; a layer "
            "of these cannot be merged. Set ensure_weight_tying=True (LoRA) to adapt both, or untie them",
            UserWarning,
            stacklevel=4,
        )
