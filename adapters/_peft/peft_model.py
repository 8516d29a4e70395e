"""`PeftModel`: PEFT's wrapper around a model, on the in-place functions."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from torchgraft.functional import UnsupportedCall
from torchgraft.functional.extending import check_module

from .. import _inplace as inplace
from .._config.base import AdapterConfig
from .._config.replaced import HEADS
from .._files.save import save_adapter
from .._inplace.states.base_state import IncompatibleKeys
from .._inplace.walk import ModelWrapper
from .card import write_card
from .hub import local_folder
from .status import LayerStatus, ModelStatus, get_layer_status, get_model_status
from .tuners import tuner_class
from .weights import load_peft_weights, load_values, put_adapter


class PeftModel(ModelWrapper):
    """A model with adapters injected, under PEFT's names: `base_model.model` is the user's model, changed in place.

    A thin wrapper: each method is one of the in-place functions, which do the same without it. Attributes that it has
    not (`config`, `generate`, ...) are the model's. Adapters of several methods may stand in one model.

    Args:
        model: The model.
        peft_config: The first adapter's config; it is copied.
        adapter_name: Its name.
        autocast_adapter_dtype: Give its parameters float32 where they would have float16 or bfloat16.
        low_cpu_mem_usage: Make its parameters on the meta device.

    >>> from torchgraft.adapters import LoraConfig
    >>> model = PeftModel(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> model.print_trainable_parameters()
    trainable params: 14 || all params: 29 || trainable%: 48.2759
    >>> with model.disable_adapter():
    ...     y = model(torch.ones(1, 4))
    """

    base_model: Any
    heads: ClassVar[tuple[str, ...]] = ()
    """Names of new heads, which a task's model trains as `modules_to_save`."""
    of_task: ClassVar[dict[str, type[PeftModel]]] = {}
    """The class for each `task_type`."""

    def __init_subclass__(cls, task: str | None = None) -> None:
        super().__init_subclass__()
        if task is not None:
            cls.heads = HEADS.get(task, ())
            PeftModel.of_task[task] = cls

    def __init__(
        self,
        model: nn.Module,
        peft_config: AdapterConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ):
        super().__init__()
        config = with_heads(peft_config, model, self.heads)
        self.base_model = tuner_class(type(config))(model, config, adapter_name, low_cpu_mem_usage)
        inplace.cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype)
        _let_inputs_require_grad(model)

    @classmethod
    def around(cls, model: nn.Module, config: AdapterConfig) -> Self:
        """Wrap a model that has its adapters already; `config` is the first one's."""
        wrapped = cls.__new__(cls)
        nn.Module.__init__(wrapped)
        wrapped.base_model = tuner_class(type(config)).around(model)
        return wrapped

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # -- running ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with its active adapters, or each row with its own, `adapter_names=[...]`: `adapter_rows`."""
        return self._by_rows(kwargs.pop("adapter_names", None))(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's `generate`, with `adapter_names=[...]` as a call does."""
        return self._by_rows(kwargs.pop("adapter_names", None)).generate(*args, **kwargs)

    def _by_rows(self, adapter_names: Sequence[str] | None) -> Any:
        """Return what is called: the user's model, or one whose rows have adapters of their own."""
        model = self.get_base_model()
        return model if adapter_names is None else inplace.adapter_rows(model, adapter_names)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the model without its adapters for a while."""
        with inplace.disable_adapter(self.get_base_model()):
            yield

    def get_base_model(self) -> Any:
        """Return the user's model, with the adapters in it."""
        return self.base_model.model

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
    def peft_type(self) -> str:
        """Name of the first adapter's method."""
        return next(iter(self.peft_config.values())).method.name

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
        config = with_heads(peft_config, model, self.heads)
        inplace.inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage, activate=False)
        inplace.cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, and trainable unless `inference_mode`; others are frozen."""
        inplace.set_adapter(self.get_base_model(), adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters, active or not."""
        inplace.set_requires_grad(self.get_base_model(), adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        inplace.delete_adapter(self.get_base_model(), adapter_name)

    # -- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        torch_device: torch.device | str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> PeftModel:
        """Put an adapter from a directory, or from the Hub's local cache, into a model, as its active adapter.

        The class of the result is that of the config's `task_type`. See `torchgraft.adapters.load_adapter` for what is
        checked.

        Args:
            model: The model; changed in place.
            model_id: The directory, or the name of a repository on the Hub that was downloaded before.
            adapter_name: Name for the adapter.
            is_trainable: Whether it is to be trained.
            config: A config to use instead of the directory's.
            autocast_adapter_dtype: Give its parameters float32 where they would have float16 or bfloat16.
            low_cpu_mem_usage: Has no effect: parameters are never drawn to be overwritten.
            key_mapping: Regular expressions and what to put in the place of what they match in keys.
            torch_device: Device of its parameters; by default each layer's own.
            subfolder: The directory's subdirectory.
            revision: The repository's branch or commit.
            cache_dir: The Hub's cache.
        """
        if isinstance(model, PeftModel):
            raise TypeError(f"model is a {type(model).__name__} already; call its load_adapter(path, adapter_name)")
        check_module(model, other=model_id)
        folder = local_folder(model_id, subfolder, revision, cache_dir)
        put_adapter(model, folder, adapter_name, is_trainable, torch_device, key_mapping, config)
        inplace.cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype)
        injected: Any = model
        given = injected.peft_config[adapter_name]
        return (cls.of_task.get(str(given.task_type), cls) if cls is PeftModel else cls).around(model, given)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: torch.device | str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> IncompatibleKeys:
        """Load another adapter, which does not become the active one, or new values for one that is there.

        Arguments are those of `from_pretrained`.

        Returns:
            `(missing_keys, unexpected_keys)`, both empty: where some are, it is an error.
        """
        model, folder = self.get_base_model(), local_folder(model_id, subfolder, revision, cache_dir)
        if adapter_name in self.peft_config:
            return load_values(model, load_peft_weights(folder, torch_device, key_mapping), adapter_name, folder)
        put_adapter(model, folder, adapter_name, is_trainable, torch_device, key_mapping, activate=False)
        inplace.set_requires_grad(model, adapter_name, is_trainable)
        inplace.cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype)
        return IncompatibleKeys([], [])

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write adapters, by default all, with `save_adapter`: "default" into the directory, others into their own.

        Args:
            save_directory: The directory; made if it is not there.
            safe_serialization: Has to be true.
            selected_adapters: Names of the adapters.
            save_embedding_layers: `True` is refused; embeddings that an adapter trains are written anyway.
            is_main_process: Whether this process writes.
            path_initial_model_for_weight_conversion: If given, adapters that started as PiSSA or alike are written as
                plain LoRA. The path is not needed, for the base was not changed.
            state_dict: Has no effect: tensors are the model's own, gathered where they are sharded.

        Raises:
            UnsupportedCall: Pickles, or the base's embeddings, are asked for.
            ValueError: A name that the model does not have.
        """
        if not safe_serialization:
            raise UnsupportedCall("save_pretrained: safe_serialization is False; files are safetensors, never pickles")
        if save_embedding_layers is True:
            raise UnsupportedCall(
                "save_pretrained: save_embedding_layers is True; the base's embeddings are no part of an adapter here: "
                "train them (modules_to_save, trainable_token_indices), or save the base"
            )
        chosen = [selected_adapters] if isinstance(selected_adapters, str) else selected_adapters
        names = list(self.peft_config) if chosen is None else list(chosen)
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(f"selected_adapters has {unknown[0]!r}; the model has {list(self.peft_config)}")
        if not is_main_process:
            return
        plain = path_initial_model_for_weight_conversion is not None
        for name in names:
            folder = save_adapter(self.get_base_model(), save_directory, name, plain=plain)
            if name == "default" or len(names) == 1:
                self.create_or_update_model_card(save_directory if name == "default" else folder)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write a `README.md` that says what the adapter is, where there is none."""
        write_card(Path(output_dir), next(iter(self.peft_config.values())), self.get_base_model())

    # -- numbers ---------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count the parameters that are trained, and all, the adapters' with the base's."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print the number of trained parameters, of all, and their share."""
        trained, count = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {count:,d} || trainable%: {100 * trained / count:.4f}")

    def get_layer_status(self) -> list[LayerStatus]:
        """Describe each layer with adapters."""
        return get_layer_status(self)

    def get_model_status(self) -> ModelStatus:
        """Describe the model with its adapters."""
        return get_model_status(self)


def _let_inputs_require_grad(model: Any) -> None:
    """Have the embeddings of a transformers' model that checkpoints require gradients, which reentrant ones need."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    checkpointing = next((getattr(model, name) for name in names if hasattr(type(model), name)), False)
    if checkpointing and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()


def with_heads(config: AdapterConfig, model: nn.Module, heads: Sequence[str]) -> AdapterConfig:
    """Return a config whose `modules_to_save` has the new heads of a task, if the model has one."""
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if not ends.intersection(heads):
        return config
    return dataclasses.replace(config, modules_to_save=list(dict.fromkeys([*(config.modules_to_save or ()), *heads])))
