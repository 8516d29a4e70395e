"""The base's embeddings in an adapter's files: of a vocabulary that was resized, and where the adapter changes them."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchgraft.functional.extending import resting, unwrapped, whole

from ..._config.base import AdapterConfig
from ..._config.matching import matches
from ..._files.disk.hub import local_folder
from ..beside.modules_to_save import ModulesToSaveWrapper
from ..beside.tokens import TrainableTokensWrapper
from ..placed import Layout, PlacedModule
from ..tensors.gathering import fill
from ..walk import bare_modules, layers, placed_in

Choice = bool | Literal["auto"]

NAMES = ("embed_tokens", "lm_head")
"""Names by which PEFT knows embeddings among a config's targets."""


@dataclasses.dataclass(frozen=True)
class BaseEmbedding:
    """One tensor of a model's input or output embeddings.

    Attributes:
        key: Its key in files.
        module: The user's module.
        leaf: Its name there.
        tensor: The tensor, as it is without what is merged.
        adapted: Whether the adapter is on the module.
    """

    key: str
    module: nn.Module
    leaf: str
    tensor: Tensor
    adapted: bool

    @property
    def own(self) -> Tensor:
        """The tensor that the module has."""
        result: Tensor = getattr(self.module, self.leaf)
        return result

    @property
    def values(self) -> Tensor:
        """The tensor with its values, also where the module is offloaded."""
        result: Tensor = resting(self.module, self.leaf) if self.tensor.is_meta else self.tensor
        return result


def base_embeddings(model: nn.Module, layout: Layout) -> Iterator[BaseEmbedding]:
    """Yield the tensors of a model's input and output embeddings, by the keys that an adapter's file has them under.

    Args:
        model: A model with injected adapters; one that has no `get_input_embeddings` has none.
        layout: Where the adapter is.
    """
    modules = bare_modules(model)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        part = placed_in(found := _embedding(model, name))
        bare = found if part is None else part.user_module
        path = next((path for path, module in modules.items() if module is bare), None)
        if bare is None or path is None:
            continue
        adapted = part is not None and layout.adapter in part.carried_adapters
        place = f"{path}.{_within(part)}" if part is not None and adapted else path
        for leaf, own in bare._parameters.items():
            if own is not None:
                yield BaseEmbedding(f"{place}.{leaf}", bare, leaf, layout.unmerged.get(f"{path}.{leaf}", own), adapted)


def _embedding(model: nn.Module, name: str) -> Any:
    """Return what a model's method of this name gives; `None` of models that have none."""
    get = getattr(model, name, None)
    try:
        return unwrapped(get()) if callable(get) else None
    except (AttributeError, NotImplementedError):  # of transformers' classes that leave it to others
        return None


def replaceable(model: nn.Module, layout: Layout) -> Iterator[BaseEmbedding]:
    """Yield tensors of the base that files may hold beside an adapter: the model's embeddings, and those it is on."""
    yield from base_embeddings(model, layout)
    for path, layer in layers(model).items():
        entry = layer.entries.get(layout.adapter)
        if entry is not None and entry.site.kind == "embedding":
            leaf = entry.site.weight_names[0]
            yield BaseEmbedding(
                f"{path}.base_layer.{leaf}", layer.user_module, leaf, entry.site.like(layer.user_module), True
            )


def put_base(embedding: BaseEmbedding, value: Tensor) -> None:
    """Have a tensor of the base be the one that came with an adapter, with a warning if it was another."""
    weight = whole(resting(embedding.module, embedding.leaf))
    if not torch.equal(weight, whole(value).to(weight.device, weight.dtype)):
        warnings.warn(
            f"{embedding.key} of the base was replaced by the one that came with the adapter", UserWarning, stacklevel=4
        )
        fill(embedding.module, embedding.leaf, value)


def _within(part: PlacedModule) -> str:
    """Return where PEFT's modules in the place of an embedding have it."""
    if isinstance(part, TrainableTokensWrapper):
        return "token_adapter.base_layer"
    return "original_module" if isinstance(part, ModulesToSaveWrapper) else "base_layer"


def saved_embeddings(model: nn.Module, layout: Layout, chosen: Choice) -> list[BaseEmbedding]:
    """Return the embeddings of the base that are written with an adapter, as PEFT's `save_embedding_layers` means it.

    Args:
        model: A model with injected adapters.
        layout: Where the adapter is.
        chosen: `True` for the input and output embeddings, `False` for none, and `"auto"` for those of them that the
            adapter is on, where `target_modules` has one of `embed_tokens` and `lm_head`, and for both where the
            model's `vocab_size` is not that of the model that the config names, which is looked up on this machine.

    Raises:
        ValueError: Another value.
    """
    if chosen not in (True, False, "auto"):
        raise ValueError(f"save_embedding_layers is {chosen!r}, expected True, False or 'auto'")
    if not chosen:
        return []
    found = list(base_embeddings(model, layout))
    if chosen == "auto":
        return _saved_by_itself(model, layout.config, found)
    if not found:
        _warn("the model has no get_input_embeddings, so no embeddings of the base are written with the adapter")
    return found


def _saved_by_itself(model: nn.Module, config: AdapterConfig, found: list[BaseEmbedding]) -> list[BaseEmbedding]:
    """Return those of a model's embeddings that a file has to have, or has in PEFT."""
    if not found:
        return []
    if _is_resized(config, model):
        _warn("the vocabulary was resized, so the base's embeddings are written with the adapter")
        return found
    tokens = getattr(config, "trainable_token_indices", None)
    if tokens is not None or not _is_targeted(config, model):
        return []
    _warn("an embedding is one of target_modules, so the base's is written with the adapter")
    return [one for one in found if one.adapted]


def _is_targeted(config: AdapterConfig, model: nn.Module) -> bool:
    """Return whether a config's targets have an embedding by its name."""
    targets = config.target_modules
    if not isinstance(targets, str):
        return any(name in NAMES for name in targets or ())
    if targets.lower() == "all-linear":
        return False
    return any(path.rpartition(".")[2] in NAMES and matches(config, path) for path in bare_modules(model))


def _is_resized(config: AdapterConfig, model: nn.Module) -> bool:
    """Return whether the vocabulary of a transformers' model is not that of the model that a config names."""
    own: Any = getattr(model, "config", None)
    name = config.base_model_name_or_path or vars(model).get("name_or_path")
    size, load = getattr(own, "vocab_size", None), getattr(type(own), "from_pretrained", None)
    if not size or not name or load is None:
        return False
    try:
        folder = local_folder(name, revision=config.revision)
    except FileNotFoundError:
        _warn(
            f"{name}, the base model, is not on this machine, so whether its vocabulary was resized is not known; if "
            "it was, pass save_embedding_layers=True"
        )
        return False
    return os.path.exists(folder / "config.json") and load(str(folder)).vocab_size != size


def _warn(message: str) -> None:
    warnings.warn(f"save_embedding_layers: {message}", UserWarning, stacklevel=6)
