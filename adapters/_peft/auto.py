"""`AutoPeftModel` and its kin: the base model that an adapter's config names, with the adapter in it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from .._config.base import AdapterConfig
from .._files.disk.hub import local_folder
from . import tasks  # noqa: F401  its classes are those of PeftModel.of_task
from .peft_model import PeftModel

LIBRARIES = ("diffusers", "lerobot", "megatron-core", "transformers")
"""What a file may name as the library of its base model, which is imported."""


class AutoPeftModel:
    """The base model and the adapter of a directory in one call, for a config without `task_type`.

    The base is what `base_model_name_or_path` names: a directory, or a repository in the Hub's local cache. Its class
    is transformers' own for the task, which has to be installed, or the one in the config's `auto_mapping`.

    >>> AutoPeftModel()
    Traceback (most recent call last):
    OSError: AutoPeftModel is made by AutoPeftModel.from_pretrained(path), which loads a base model with its adapter
    """

    auto_class: ClassVar[str | None] = None
    """Name of the class of transformers that loads the base model."""
    model_class: ClassVar[type[PeftModel]] = PeftModel
    """The class of the result."""
    of_task: ClassVar[dict[str, type[AutoPeftModel]]] = {}
    """The class for each `task_type`."""

    def __init_subclass__(cls, task: str | None = None, auto_class: str | None = None) -> None:
        super().__init_subclass__()
        if task is not None:
            cls.auto_class = auto_class or cls.__name__.replace("Peft", "")
            cls.model_class = PeftModel.of_task[task]
            AutoPeftModel.of_task[task] = cls

    def __init__(self, *_: Any, **__: Any):
        name = type(self).__name__
        raise OSError(f"{name} is made by {name}.from_pretrained(path), which loads a base model with its adapter")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        torch_device: torch.device | str | None = None,
        subfolder: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        **base_kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter's config names, and put the adapter in; nothing is downloaded.

        If the directory has a tokenizer with more tokens than the base has embeddings, these are resized first.

        Args:
            pretrained_model_name_or_path: The adapter's directory, or its name in the Hub's local cache.
            adapter_name: Name for the adapter.
            is_trainable: Whether it is to be trained.
            config: A config to use instead of the directory's, for the adapter.
            revision: The adapter's branch or commit; the base's is the config's `revision`.
            import_allowlist: Libraries, or modules, that the config's `auto_mapping` may name and have imported.
            autocast_adapter_dtype: Give the adapter float32 where it would have float16 or bfloat16.
            low_cpu_mem_usage: Has no effect: parameters are never drawn to be overwritten.
            key_mapping: Regular expressions for the adapter's keys, and what to put in the place of what they match.
            torch_device: Device of the adapter.
            subfolder: A directory in the adapter's.
            cache_dir: The Hub's cache, for both.
            base_kwargs: Arguments of the base model's own `from_pretrained`, such as `dtype` or `trust_remote_code`.

        Returns:
            A `PeftModel` of this class's task.

        Raises:
            FileNotFoundError: An adapter or a base model that is not on this machine.
            ImportError: transformers, or the library of the base model, is not installed.
            ValueError: A config for another task, without a base model, or with one from a library that is not allowed.
        """
        folder = local_folder(pretrained_model_name_or_path, subfolder, revision, cache_dir)
        stored = AdapterConfig.from_pretrained(folder)
        if cache_dir is not None:
            base_kwargs["cache_dir"] = cache_dir
        base = _load_base(cls._base_class(stored, import_allowlist), stored, base_kwargs)
        _fit_vocabulary(base, folder, bool(base_kwargs.get("trust_remote_code")))
        return cls.model_class.from_pretrained(
            base,
            folder,
            adapter_name,
            is_trainable,
            config,
            autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
            torch_device=torch_device,
        )

    @classmethod
    def _base_class(cls, stored: AdapterConfig, allowed: Sequence[str] | None) -> Any:
        """Return the class that loads the base model."""
        task = stored.task_type
        if task is None:
            return _mapped_class(cls.__name__, stored, LIBRARIES if allowed is None else allowed)
        if cls.model_class is not PeftModel.of_task[str(task)]:
            wanted = cls.of_task[str(task)].__name__
            raise ValueError(f"{cls.__name__}: the config's task_type is {str(task)!r}; use {wanted}")
        return getattr(_transformers(cls.__name__), str(cls.auto_class))


class AutoPeftModelForCausalLM(AutoPeftModel, task="CAUSAL_LM"):
    """`AutoPeftModel` for `task_type="CAUSAL_LM"`."""


class AutoPeftModelForSeq2SeqLM(AutoPeftModel, task="SEQ_2_SEQ_LM"):
    """`AutoPeftModel` for `task_type="SEQ_2_SEQ_LM"`."""


class AutoPeftModelForSequenceClassification(AutoPeftModel, task="SEQ_CLS"):
    """`AutoPeftModel` for `task_type="SEQ_CLS"`."""


class AutoPeftModelForTokenClassification(AutoPeftModel, task="TOKEN_CLS"):
    """`AutoPeftModel` for `task_type="TOKEN_CLS"`."""


class AutoPeftModelForQuestionAnswering(AutoPeftModel, task="QUESTION_ANS"):
    """`AutoPeftModel` for `task_type="QUESTION_ANS"`."""


class AutoPeftModelForFeatureExtraction(AutoPeftModel, task="FEATURE_EXTRACTION", auto_class="AutoModel"):
    """`AutoPeftModel` for `task_type="FEATURE_EXTRACTION"`."""


AUTO_MODELS: tuple[type[AutoPeftModel], ...] = (AutoPeftModel, *AutoPeftModel.of_task.values())
"""The classes, one for each task."""


def _transformers(what: str) -> Any:
    """Return the library of the base models.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"{what} loads the base model with transformers, which is not installed; install it, or load the model "
            "yourself and call PeftModel.from_pretrained(model, path)"
        ) from error
    return transformers


def _mapped_class(what: str, stored: AdapterConfig, allowed: Sequence[str]) -> Any:
    """Return the class of a model that a config without a task names in its `auto_mapping`.

    Raises:
        ValueError: It names none, one from a library that is not allowed, or something that is no model.
    """
    given = stored.auto_mapping or {}
    library, name = given.get("parent_library"), given.get("base_model_class")
    if not isinstance(library, str) or not isinstance(name, str):
        raise ValueError(
            f"{what}: the config has no task_type, and auto_mapping is {stored.auto_mapping!r}, so the class of the "
            "base model is not known; load the model yourself and call PeftModel.from_pretrained(model, path)"
        )
    if not any(library == one or library.startswith(f"{one}.") for one in allowed):
        raise ValueError(
            f"{what}: the config asks to import {library!r}, which is none of {list(allowed)}; if you trust it, pass "
            f"import_allowlist=[{library!r}]"
        )
    found = getattr(importlib.import_module(library), name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "from_pretrained")):
        raise ValueError(f"{what}: auto_mapping names {library}.{name}, expected a model with from_pretrained")
    return found


def _load_base(kind: Any, stored: AdapterConfig, kwargs: dict[str, Any]) -> Any:
    """Load the base model of an adapter from this machine.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: The config names none.
    """
    name = stored.base_model_name_or_path
    if not name:
        raise ValueError(
            "the config has no base_model_name_or_path; load the model yourself and call "
            "PeftModel.from_pretrained(model, path)"
        )
    local_folder(name, None, stored.revision, kwargs.get("cache_dir"))  # says how to fetch it
    return kind.from_pretrained(name, **{"revision": stored.revision or "main", "local_files_only": True, **kwargs})


def _fit_vocabulary(base: Any, folder: Path, trust_remote_code: bool) -> None:
    """Give a base model as many embeddings as the tokenizer that came with an adapter has tokens, if that has more."""
    if not (folder / "tokenizer_config.json").is_file() or not hasattr(base, "get_input_embeddings"):
        return
    load = _transformers("the adapter's tokenizer").AutoTokenizer.from_pretrained
    tokens = len(load(str(folder), trust_remote_code=trust_remote_code, local_files_only=True))
    if tokens > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(tokens)
