"""What is in an adapter's files, told from the config and the header alone: no model, and no tensor is read."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torchgraft.functional.extending import SHARED as SHARED_LEAVES

from .._config.base import AdapterConfig
from .._config.keys import PREFIX, SHARED, split_key
from .._config.matching import matches
from .._config.messages import names_of, spelled
from .._config.tokens import LEAF as TOKENS
from .disk.config_file import about, parse_fields
from .disk.folder import PICKLE, WEIGHTS, find_folder, open_pair
from .disk.headers import Weights, open_weights
from .fit import found_leaves

_Found = Mapping[str, Mapping[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk; `print` shows it.

    Attributes:
        path: The directory that has the two files.
        method: PEFT's name of the method, as `"LORA"`.
        config: The config; `None` where there is none here for the method or its options.
        targets: The modules that it has tensors for, in the order of the file.
        ranks: The different ranks, sorted; empty for a method without.
        parameters: Number of values in the file.
        bytes: Their size.
        dtypes: Their dtypes, sorted, as `"float32"`.
        base: The base model that the config names.
        odd: What is not as it is in most files, a sentence each. Only loading tells whether it fits a model.
    """

    path: Path
    method: str
    config: AdapterConfig | None
    targets: tuple[str, ...]
    ranks: tuple[int, ...]
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    base: str | None
    odd: tuple[str, ...]

    def __str__(self) -> str:
        lines = {
            "adapter": str(self.path),
            "method": self.method,
            "base": self.base or "(not named)",
            "modules": f"{len(self.targets):,}: {names_of(self.targets)}" if self.targets else "none",
            "rank": ", ".join(map(str, self.ranks)) or "-",
            "size": f"{self.parameters:,} parameters, {self.bytes:,} bytes, {' and '.join(self.dtypes) or 'none'}",
        }
        return "\n".join(f"{name:<9}{text}" for name, text in [*lines.items(), *(("odd", what) for what in self.odd)])


def inspect_adapter(path: str | os.PathLike[str], adapter_name: str = "default") -> AdapterFile:
    """Describe the adapter in a directory, without a model.

    The config and the header of the weights are read, no tensor. The header is checked as when loading: sizes, offsets
    and the file's length.

    Args:
        path: The directory, as for `load_adapter`.
        adapter_name: Name of a subdirectory with the adapter.

    Raises:
        FileNotFoundError: No such directory or file.
        ValueError: Files that are damaged, or that lead out of the directory.

    >>> import tempfile, torch
    >>> from torchgraft.adapters import LoraConfig, save_adapter
    >>> from torchgraft.functional import bind
    >>> graft = bind(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = inspect_adapter(save_adapter(graft, folder, params=graft.init()))
    >>> found.method, found.targets, found.ranks, found.parameters, found.bytes, found.odd
    ('LORA', ('0',), (2,), 14, 56, ())
    """
    folder = find_folder(path, adapter_name)
    with open_pair(folder) as (config_file, data, handle):
        fields = parse_fields(config_file, data)
        with about(config_file.parent / WEIGHTS):
            weights = open_weights(handle, config_file.parent / WEIGHTS)
    config, odd = _config(fields)
    found = found_leaves(config, weights) if config else {}
    specs = weights.specs.values()
    dtypes = tuple(sorted({str(spec.dtype).removeprefix("torch.") for spec in specs}))
    if folder.has(PICKLE):
        odd.append(f"{PICKLE} is there too, a pickle, which is never read")
    if len(dtypes) > 1:
        odd.append(f"tensors have several dtypes: {', '.join(dtypes)}")
    if config:
        odd += [
            *_odd_keys(config, weights),
            *_odd_leaves(found),
            *_odd_targets(config, found),
            *_odd_fit(config, found),
        ]
    base = fields.get("base_model_name_or_path")
    return AdapterFile(
        path=folder.path,
        method=str(fields["peft_type"]),
        config=config,
        targets=tuple(path for path in found if path != SHARED_LEAVES),
        ranks=_ranks(config, found) if config else (),
        parameters=sum(math.prod(spec.shape) for spec in specs),
        bytes=sum(spec.end - spec.start for spec in specs),
        dtypes=dtypes,
        base=base if isinstance(base, str) else None,
        odd=tuple(odd),
    )


def _config(fields: dict[str, Any]) -> tuple[AdapterConfig | None, list[str]]:
    """Return the config, and what is odd about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            config = AdapterConfig.from_dict(fields)
        except (TypeError, ValueError, re.error) as error:
            return None, [f"cannot be loaded here: {error}"]
    return config, [str(one.message) for one in caught]


def _ranks(config: AdapterConfig, found: _Found) -> tuple[int, ...]:
    """Return the ranks of the tensors; where these do not tell (stacked experts, blocks), those of the config."""
    ranked = config.form.ranked
    if getattr(config, "target_parameters", None) or not ranked:
        return _said(config)
    tensors = [leaves[name] for leaves in found.values() for name in ranked if name in leaves]
    return tuple(sorted({len(tensor) for tensor in tensors if tensor.ndim}))


def _said(config: Any) -> tuple[int, ...]:
    """Return the ranks that a config says, none of a method whose layers show none."""
    if "r" not in config.form.values or not getattr(config, "r", 0):
        return ()
    return tuple(sorted({config.r, *getattr(config, "rank_pattern", {}).values()}))


def _odd_keys(config: AdapterConfig, weights: Weights) -> Iterator[str]:
    """Name keys that are no leaf, no shared constant, and no tensor that the config trains as a whole."""
    whole = [rf"(^|.*\.){re.escape(name)}\..*" for name in config.modules_to_save or ()]
    if config.bias != "none":
        whole.append(r".*\.bias")
    other = []
    for key in weights.specs:
        name = key.removeprefix("_orig_mod.").removeprefix(PREFIX)
        known = split_key(config, key) is not None or key.removeprefix(SHARED).partition(".")[0] in config.form.shared
        known = known or name.endswith(f".{TOKENS}") or any(re.fullmatch(pattern, name) for pattern in whole)
        if not known:
            other.append(key)
    if other:
        yield (
            f"{names_of(other)}: no tensor of {config.method.name} and none that the config trains as a whole; perhaps "
            "resized embeddings of the base, or another library's form"
        )
    if empty := [key for key, spec in weights.specs.items() if not math.prod(spec.shape)]:
        yield f"{names_of(empty)}: without values"


def _odd_leaves(found: _Found) -> Iterator[str]:
    """Name modules that have some of the leaves that others have."""
    kinds = {frozenset(leaves) for path, leaves in found.items() if path != SHARED_LEAVES}
    for kind in kinds:
        fuller = next((other for other in kinds if kind < other), None)
        if fuller is not None:
            paths = [path for path, leaves in found.items() if leaves.keys() == kind]
            yield f"{names_of(paths)}: only {', '.join(sorted(kind))}, where others have {', '.join(sorted(fuller))}"


def _odd_targets(config: AdapterConfig, found: _Found) -> Iterator[str]:
    """Name modules that the config does not target, and targets without a module."""
    targets = config.target_modules
    paths = [path for path in found if path != SHARED_LEAVES]
    if not paths:
        yield f"no tensor of {config.method.name}"
    if not targets or getattr(config, "target_parameters", None) or str(targets).lower() == "all-linear":
        return
    try:
        missed = [path for path in paths if not matches(config, path)]
    except ValueError as error:  # an expression that is none, or that takes too long
        yield str(error)
        return
    if missed:
        yield f"{names_of(missed)}: not among the config's target_modules, {spelled(targets)}"
    names = [] if isinstance(targets, str) else sorted(targets)
    if unused := [name for name in names if not any(path == name or path.endswith(f".{name}") for path in paths)]:
        yield f"no tensors for the targets {names_of(unused)}"


def _odd_fit(config: AdapterConfig, found: _Found) -> Iterator[str]:
    """Say where the config and the tensors contradict each other."""
    try:
        config.form.check(config, found)
        inferred = config.form.infer(config, found) if config.form.infer and config.form.ranked else {}
    except (IndexError, KeyError, TypeError, ValueError) as error:
        yield f"config and tensors do not fit: {error}"
        return
    said: Any = config
    experts = getattr(config, "target_parameters", None)
    if (
        any(name in inferred and inferred[name] != getattr(said, name) for name in ("r", "rank_pattern"))
        and not experts
    ):
        yield f"the config gives rank {said.r}, pattern {said.rank_pattern or 'none'}, and the tensors have others"
