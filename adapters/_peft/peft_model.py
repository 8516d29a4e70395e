"""`PeftModel`: PEFT's wrapper around a model, on the in-place functions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchgraft.functional import UnsupportedCall
from torchgraft.functional.extending import check_module

from .. import _inplace as inplace
from .._config.base import AdapterConfig
from .._config.replaced import HEADS
from .._files.disk.hub import local_folder
from .._files.save import save_adapter
from .._inplace import IncompatibleKeys
from .card import write_card
from .status import LayerStatus, ModelStatus, count_parameters, get_layer_status, get_model_status
from .weights import Loading, check_without_effect, load_peft_weights, load_values, put_adapter
from .wrapper import AdaptedModel


class PeftModel(AdaptedModel):
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

    of_task: ClassVar[dict[str, type[PeftModel]]] = {}
    """The class for each `task_type`."""

    def __init_subclass__(cls, task: str | None = None) -> None:
        super().__init_subclass__()
        if task is not None:
            cls.heads = HEADS.get(task, ())
            PeftModel.of_task[task] = cls

    @classmethod
    def class_for(cls, config: AdapterConfig) -> type[PeftModel]:
        """Return the class of a model with an adapter of this config: that of its task, if it has one."""
        return cls.of_task.get(config.task_type or "", cls)

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
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        torch_device: torch.device | str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        ignore_mismatched_sizes: bool = False,
        strict: bool = True,
        **without_effect: Any,
    ) -> PeftModel:
        """Put an adapter from a directory, or from the Hub's local cache, into a model, as its active adapter.

        The class of the result is that of the config's `task_type`. See `torchgraft.adapters.load_adapter` for what is
        checked. Unless the adapter is to be trained, the model is in evaluation mode afterwards.

        Args:
            model: The model; changed in place.
            model_id: The directory, or the name of a repository on the Hub that was downloaded before.
            adapter_name: Name for the adapter.
            is_trainable: Whether it is to be trained.
            config: A config to use instead of the directory's.
            autocast_adapter_dtype: Give its parameters float32 where they would have float16 or bfloat16.
            ephemeral_gpu_offload: Has no effect.
            low_cpu_mem_usage: Has no effect: parameters are never drawn to be overwritten.
            key_mapping: Regular expressions and what to put in the place of what they match in keys, which they see
                without `base_model.model.`; by default those that a model of transformers has for its older files.
            torch_device: Device of its parameters; by default each layer's own.
            subfolder: The directory's subdirectory.
            revision: The repository's branch or commit.
            cache_dir: The Hub's cache.
            ignore_mismatched_sizes: Leave out tensors of another shape, with a warning.
            strict: Whether tensors that are missing, or that belong to nothing, are an error; if not, a warning.
            without_effect: `token` and others of PEFT's about downloads and offloading; other names are errors.

        Raises:
            FileNotFoundError, ValueError, KeyError: As `load_adapter`.
            TypeError: A model that is a `PeftModel` already; an argument that is none of PEFT's.
        """
        if isinstance(model, PeftModel):
            raise TypeError(f"model is a {type(model).__name__} already; call its load_adapter(path, adapter_name)")
        check_module(model, other=model_id)
        check_without_effect(f"{cls.__name__}.from_pretrained", without_effect)
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        loading = Loading(adapter_name, is_trainable, torch_device, key_mapping, strict, ignore_mismatched_sizes)
        put_adapter(model, local_folder(model_id, subfolder, revision, cache_dir), loading, config)
        inplace.cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype)
        injected: Any = model
        given = injected.peft_config[adapter_name]
        wrapped = cls.class_for(given).around(model, given)
        return wrapped if is_trainable else wrapped.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: torch.device | str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        ignore_mismatched_sizes: bool = False,
        strict: bool = True,
        **without_effect: Any,
    ) -> IncompatibleKeys:
        """Load another adapter, which does not become the active one, or new values for one that is there.

        Arguments are those of `from_pretrained`.

        Returns:
            `(missing_keys, unexpected_keys)`, both empty unless `strict` is false.
        """
        check_without_effect("load_adapter", without_effect)
        model, folder = self.get_base_model(), local_folder(model_id, subfolder, revision, cache_dir)
        loading = Loading(adapter_name, is_trainable, torch_device, key_mapping, strict, ignore_mismatched_sizes)
        if adapter_name in self.peft_config:
            result = load_values(model, load_peft_weights(folder, torch_device, key_mapping), loading, folder)
        else:
            result = put_adapter(model, folder, loading, activate=False)
            inplace.set_requires_grad(model, adapter_name, is_trainable)
            inplace.cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype)
        if not is_trainable:
            self.eval()
        return result

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **without_effect: Any,
    ) -> None:
        """Write adapters, by default all, with `save_adapter`: "default" into the directory, others into their own.

        Args:
            save_directory: The directory; made if it is not there.
            safe_serialization: Has to be true.
            selected_adapters: Names of the adapters.
            save_embedding_layers: Whether the base's input and output embeddings are written too: `True`, `False`, or
                `"auto"`, where the adapter is on one or the vocabulary was resized.
            is_main_process: Whether this process writes.
            path_initial_model_for_weight_conversion: If given, adapters that started as PiSSA or alike are written as
                plain LoRA. The path is not needed, for the base was not changed.
            state_dict: The state dict of this model, from which the tensors are taken; by default its own are.
            without_effect: Others of PEFT's, about uploads; other names are errors.

        Raises:
            UnsupportedCall: Pickles are asked for.
            ValueError: A name that the model does not have.
        """
        if not safe_serialization:
            raise UnsupportedCall("save_pretrained: safe_serialization is False; files are safetensors, never pickles")
        check_without_effect("save_pretrained", without_effect)
        chosen = [selected_adapters] if isinstance(selected_adapters, str) else selected_adapters
        names = list(self.peft_config) if chosen is None else list(chosen)
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(f"selected_adapters has {unknown[0]!r}; the model has {list(self.peft_config)}")
        if not is_main_process:
            return
        plain = path_initial_model_for_weight_conversion is not None
        for name in names:
            save_adapter(
                self,
                save_directory,
                name,
                plain=plain,
                save_embedding_layers=save_embedding_layers,  # type: ignore[arg-type]
                state_dict=state_dict,
            )
        self.create_or_update_model_card(save_directory)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write a `README.md` that says what the adapters are, where there is none."""
        write_card(Path(output_dir), next(iter(self.peft_config.values())), self.get_base_model())

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        """Refuse: nothing is uploaded here, and the model's own method would upload something else."""
        raise UnsupportedCall(
            "push_to_hub: nothing is uploaded here; write the adapter by save_pretrained(folder), and upload that: "
            "hf upload NAME folder"
        )

    # -- numbers ---------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count the parameters that are trained, and all, the adapters' with the base's."""
        return count_parameters(self)

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
