"""What an adapter's files change in a model's, tensor by tensor and, of large ones, rows by rows."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import UnsupportedConfig
from torchgraft.functional.extending import SiteAdapter, Tree, modules_of

from .._calibration.initial import REMOVING, kind_of
from .._config.base import AdapterConfig
from .._config.keys import PREFIX, split_key
from .._config.messages import names_of
from .._config.tokens import LEAF as TOKENS
from .._files.disk.config_file import about, parse_fields
from .._files.disk.folder import WEIGHTS, find_folder, open_pair
from .._files.disk.headers import Weights, open_weights
from .._files.fit import found_leaves
from .._files.into_model import load_into_model
from .._files.packed import unpacked
from .._files.stored import Stored
from .._inplace import extract_graft, extract_params
from .folder import ModelFolder
from .rows import Part, expert_of, parts_of
from .skeleton import is_embedding, skeleton_of


@dataclasses.dataclass(frozen=True)
class SomeWeights(Weights):
    """An opened file, seen as if it had some of its tensors only, which are in memory already."""

    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def read(self) -> dict[str, Tensor]:
        """Return these tensors."""
        return {key: self.tensors[key] for key in self.specs}


@dataclasses.dataclass(frozen=True)
class Changes:
    """An adapter, bound to a model's files.

    Attributes:
        base: The model's files.
        instead: Tensors of the adapter that replace the base's own, by name: modules and biases that it trained.
        rows: The same for rows: their indices, and their values.
        sites: The site, and the attribute of its module, that a tensor's name means.
        modules: The modules of the skeleton, by path.
        tree: The adapter's tree.
    """

    base: ModelFolder
    instead: Mapping[str, Tensor]
    rows: Mapping[str, tuple[Tensor, Tensor]]
    sites: Mapping[str, tuple[SiteAdapter, str]]
    modules: Mapping[str, nn.Module]
    tree: Tree

    @property
    def names(self) -> frozenset[str]:
        """The names of the files' tensors that change."""
        pieces = [name for name, piece in self.base.tensors.pieces.items() if piece.parameter in self.sites]
        whole = {*self.instead, *self.rows, *self.sites}
        return frozenset({*whole, *pieces} - self.base.tensors.stacks.keys())

    def merged(self, name: str, most: int) -> Iterator[Tensor]:
        """Yield a merged tensor, part by part, as the file has it, in the base's dtype.

        Args:
            name: Its name.
            most: Bytes of the base's that a part may have, where the method can be merged in parts.
        """
        spec, piece = self.base.spec(name), self.base.tensors.pieces.get(name)
        if piece is not None and piece.parameter in self.sites:
            adapter, leaf = self.sites[piece.parameter]
            part = expert_of(adapter, adapter.leaves(self.tree), piece.expert)
            yield self._merged(adapter, part, leaf)[0, slice(*piece.rows)].to(spec.dtype)
        elif name in self.sites:
            adapter, leaf = self.sites[name]
            count = -(-(spec.end - spec.start) // most)
            for part in parts_of(adapter, adapter.leaves(self.tree), leaf, count):
                yield self._merged(adapter, part, leaf).to(spec.dtype)
        else:
            yield self._read(name).to(spec.dtype)

    def _merged(self, adapter: SiteAdapter, part: Part, leaf: str) -> Tensor:
        """Merge a part of a site."""
        site = adapter.site
        names = (*site.weight_names, *((site.bias_name,) if site.has_bias else ()))
        tensors = {one: self._part(f"{site.owner}.{one}", part.rows.get(one)) for one in names}
        own = SiteAdapter(adapter.config, part.site)
        weight, bias = own.merge(part.leaves, *part.site.read(self.modules[site.owner], tensors))
        return part.site.stored(weight, bias)[leaf]

    def _part(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        return self._read(name) if rows is None else self._read(name, *rows)

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows of a tensor, with those that the adapter replaces."""
        if name in self.instead:
            return self.instead[name][start:stop]
        tensor = self.base.tensors.read(name, start, stop)
        if name in self.rows:
            indices, values = self.rows[name]
            here = (indices >= start) & (indices < start + len(tensor))
            tensor = tensor.index_copy(0, indices[here] - start, values[here].to(tensor.dtype))
        return tensor


def changes_of(base: ModelFolder, path: str | os.PathLike[str], adapter_name: str = "default") -> Changes:
    """Read an adapter's files and bind them to a model's.

    Raises:
        KeyError, ValueError: Files that do not fit each other; an adapter that no dense weight expresses.
    """
    with open_pair(find_folder(path, adapter_name)) as (config_file, data, handle):
        with about(config_file):
            config = AdapterConfig.from_dict(parse_fields(config_file, data))
            _check(config)
        file = config_file.parent / WEIGHTS
        with about(file), torch.no_grad():
            whole = open_weights(handle, file)
            tensors = whole.read()
            instead, rows, kept = _apart(base, config, tensors)
            specs = {key: spec for key, spec in whole.specs.items() if key in kept}
            weights = SomeWeights(whole.file, specs, whole.size, whole.handle, tensors=tensors)
            _check_whole(config, base, instead, rows)
            sites, modules, tree = _bound(base, config, weights) if specs else ({}, {}, {})
            embeddings = [name for name, (adapter, _) in sites.items() if adapter.site.kind == "embedding"]
            _check_tied(base, [*embeddings, *rows, *filter(is_embedding, instead)])
            return Changes(base, instead, rows, sites, modules, tree)


def _bound(base: ModelFolder, config: AdapterConfig, weights: Weights) -> tuple[Any, Mapping[str, nn.Module], Tree]:
    """Bind an adapter to a skeleton of the model."""
    weights = unpacked(config, weights)
    model, config = skeleton_of(base, config, found_leaves(config, weights))
    wide = torch.float64 if any(spec.dtype == torch.float64 for spec in weights.specs.values()) else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of training
        load_into_model(model, Stored(config, weights, False, wide, "cpu"), "default", False, True)
        graft, tree = extract_graft(model), extract_params(model)
    sites = {}
    for adapter in graft.binding.adapters("").values():
        for leaf in adapter.site.names[: None if adapter.site.has_bias else -1]:
            sites[f"{adapter.site.owner}.{leaf}"] = adapter, leaf
    return sites, modules_of(graft.model), tree


def _check(config: Any) -> None:
    """Refuse what no file of the base expresses."""
    kind = kind_of(getattr(config, "init_lora_weights", True))
    if kind in REMOVING or kind == "loftq":
        raise UnsupportedConfig(
            f"init_lora_weights is {kind!r}, so the adapter is for a base that lost its initial product, which is not "
            "in the file; save it with save_adapter(..., plain=True) first, where the model is"
        )
    if getattr(config, "layer_replication", None):
        raise UnsupportedConfig("layer_replication repeats layers of the base, which its files do not; bind the model")


def _apart(base: ModelFolder, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> tuple[Any, Any, set[str]]:
    """Return tensors that replace the base's own, rows that do, and the keys of all other tensors."""
    instead, rows, kept = {}, {}, set()
    for key, tensor in tensors.items():
        name = key.removeprefix("_orig_mod.").removeprefix(PREFIX)
        bare = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if name.endswith(f".token_adapter.{TOKENS}"):
            path = name.removesuffix(f".token_adapter.{TOKENS}")
            rows[f"{path}.weight"] = torch.tensor(_indices(config, path)), tensor
        elif split_key(config, key) is not None or bare not in base.tensors.specs:
            if ".original_module." not in name:
                kept.add(key)
        elif base.spec(bare).shape != tuple(tensor.shape):
            raise ValueError(
                f"{key!r} has shape {tuple(tensor.shape)} and the base's {bare!r} {base.spec(bare).shape}; resize the "
                "base's embeddings and save it first"
            )
        elif not torch.equal(tensor, base.tensors.read(bare)):  # PEFT writes embeddings that stayed as they were, too
            instead[bare] = tensor
    return instead, rows, kept


def _indices(config: Any, path: str) -> list[int]:
    """Return the rows that an adapter trains of an embedding."""
    given = config.trainable_token_indices
    if not isinstance(given, Mapping):
        return list(given)
    return next(list(one) for name, one in given.items() if path == name or path.endswith(f".{name}"))


def _check_whole(config: AdapterConfig, base: ModelFolder, instead: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
    """Refuse a file without tensors that its config speaks of."""
    held = [*instead, *rows]
    for name in config.modules_to_save or ():
        if not any(f".{name}." in f".{one}" for one in held):
            raise KeyError(
                f"has no tensors of {name!r}, which the config has in modules_to_save; save the adapter again"
            )
    biases = [name for name in base.tensors.specs if name.endswith(".bias")]
    if config.bias != "none" and biases and not any(name.endswith(".bias") for name in held):
        raise KeyError(f"has no biases, and the config's bias is {config.bias!r}; save the adapter again")
    if getattr(config, "trainable_token_indices", None) and not rows:
        raise KeyError("has no rows of tokens, which the config has in trainable_token_indices; save the adapter again")


def _check_tied(base: ModelFolder, embeddings: list[str]) -> None:
    """Refuse a change of an embedding that is also the model's output, which its files have once."""
    config = base.config()
    generates = any(
        word in str(config.get("architectures")) for word in ("CausalLM", "LMHead", "MaskedLM", "Conditional")
    )
    tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", True))
    outputs = any(name.endswith(("lm_head.weight", "embed_out.weight", "output.weight")) for name in base.tensors.specs)
    if generates and tied and embeddings and not outputs:
        raise UnsupportedConfig(
            f"{names_of(embeddings)}: is tied to the model's output, which would change with it; untie the two "
            "(tie_word_embeddings=false, with an lm_head.weight in the files) and merge then, or serve the adapter"
        )
