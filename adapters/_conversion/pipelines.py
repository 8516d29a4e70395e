"""LoRA in the forms of image pipelines' files, diffusers' and kohya's: tables of names, and how they are read.

Sources: see `formats.py`, whose functions these are behind.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional import Site

from .._methods.lora.lora import LoraConfig
from .._methods.shared.scalings import alpha_at, rank_at, scaling_of
from .factors import Factors
from .original_unet import original_names

SUFFIXES = {
    "kohya": {".lora_down.weight": "a", ".lora_up.weight": "b", ".alpha": "alpha"},
    "diffusers": {
        ".lora_A.weight": "a",
        ".lora_B.weight": "b",
        ".lora.down.weight": "a",
        ".lora.up.weight": "b",
        ".lora_linear_layer.down.weight": "a",
        ".lora_linear_layer.up.weight": "b",
        "_lora.down.weight": "a",
        "_lora.up.weight": "b",
        ".alpha": "alpha",
    },
}
"""What stands behind the name of a module, those that are written first; with diffusers' older ones."""

_PREFIXES = {
    "kohya": ("lora_unet", "lora_te1", "lora_te2", "lora_te3", "lora_te", "lora_transformer"),
    "diffusers": ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "diffusion_model"),
}
"""What stands before it: the part of a pipeline, by default the first."""

_SEPARATOR = {"kohya": "_", "diffusers": "."}

_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Names that diffusers' oldest files have for a text encoder's projections."""


def write_pipeline(
    found: Mapping[str, Factors], form: str, prefix: str | None, renamed: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Args:
        found: Factors by module.
        form: `"diffusers"` or `"kohya"`.
        prefix: The part of a pipeline; by default the first that the form knows.
        renamed: What a module is called there, where it has another name.

    Raises:
        ValueError: Modules whose names become one.
    """
    renamed = renamed or {}
    part = _PREFIXES[form][0] if prefix is None else prefix
    tensors: dict[str, Tensor] = {}
    written = {leaf: suffix for suffix, leaf in reversed(SUFFIXES[form].items())}
    for path, one in found.items():
        name = _joined(part, renamed.get(path, path), form)
        if name + written["a"] in tensors:
            raise ValueError(f"to_format: {path} and another module both become {name}; leave one out")
        own = one.folded if form == "diffusers" else one
        tensors |= {name + written["a"]: own.a, name + written["b"]: own.b}
        if form == "kohya":
            tensors[name + written["alpha"]] = _number(own.alpha)
    return tensors


def read_pipeline(
    tensors: Mapping[str, Tensor],
    form: str,
    prefix: str | None,
    names: Collection[str],
    fields: Mapping[str, Any] | None,
) -> dict[str, Factors]:
    """Return factors by module.

    Args:
        tensors: The tensors of a file.
        form: `"diffusers"` or `"kohya"`.
        prefix: The part of a pipeline; by default the only one.
        names: Names of the model's modules, where they are known.
        fields: Diffusers' metadata.

    Raises:
        ValueError: Keys that are no factor's or of no module, several parts, ranks that are not the config's.
    """
    part = _part(tensors, form, prefix)
    leaves = _leaves(tensors, form, part, names)
    planned = _planned(fields, part) if form == "diffusers" else None
    return {path: _factors(path, one, planned) for path, one in leaves.items()}


def _number(alpha: float) -> Tensor:
    """Return a number as a tensor that holds it: of float32, as these programs write it, where that is exact."""
    narrow = torch.tensor(alpha, dtype=torch.float32)
    return narrow if float(narrow) == alpha else torch.tensor(alpha, dtype=torch.float64)


def _joined(prefix: str, path: str, form: str) -> str:
    name = path.replace(".", _SEPARATOR[form])
    return f"{prefix}{_SEPARATOR[form]}{name}" if prefix else name


def _part(tensors: Mapping[str, Tensor], form: str, prefix: str | None) -> str:
    """Return the part of a pipeline to read.

    Raises:
        ValueError: Several, or none of that name.
    """
    separator, ordered = _SEPARATOR[form], sorted(_PREFIXES[form], key=len, reverse=True)
    found = {next((one for one in ordered if key.startswith(one + separator)), "") for key in tensors}
    if prefix is None and len(found) == 1:
        return found.pop()
    if prefix is None:
        raise ValueError(f"from_format: the keys are of several parts, {sorted(found)}; pass prefix, one of these")
    if prefix and not any(key.startswith(prefix + separator) for key in tensors):
        raise ValueError(f"from_format: prefix is {prefix!r}, and the keys are of {sorted(found)}")
    return prefix


def _leaves(
    tensors: Mapping[str, Tensor], form: str, part: str, names: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each module.

    Raises:
        ValueError: A key that is no factor's, or of no module.
    """
    before = part + _SEPARATOR[form] if part else ""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if not key.startswith(before):
            continue
        suffix = next((one for one in SUFFIXES[form] if key.endswith(one)), None)
        if suffix is None:
            raise ValueError(
                f"from_format: {key!r} is no factor of a plain LoRA in {form}'s form, whose keys end in "
                f"{', '.join(SUFFIXES[form])}; DoRA, LoHa, LoKr and LoCon's lora_mid are not read here"
            )
        name = key.removeprefix(before).removesuffix(suffix)
        path = _module(key, name, names) if form == "kohya" else _modern(name, suffix, part)
        found.setdefault(path, {})[SUFFIXES[form][suffix]] = tensor
    return found


def _module(key: str, flat: str, names: Collection[str]) -> str:
    """Return the module whose name became this with underscores."""
    meant = [name for name in names if name.replace(".", "_") == flat]
    if not meant:
        meant = [name for name, original in original_names(names).items() if original.replace(".", "_") == flat]
    if len(meant) == 1:
        return meant[0]
    if not names:
        raise ValueError(f"from_format: {key!r} does not tell where a name has dots; pass modules=model, or its names")
    if meant:
        raise ValueError(f"from_format: {key!r} may be any of {meant}; give those names of modules that are meant")
    raise ValueError(
        f"from_format: {key!r} is of no module of these {len(names)}, neither by its own name nor by the one that the "
        "original UNet has for it; perhaps the file is of another model, or modules are not all of the model's"
    )


def _modern(name: str, suffix: str, part: str) -> str:
    """Return the name of a module as diffusers has it today."""
    name = name.replace(".processor.", ".")
    if suffix.startswith("_lora"):
        parent, _, last = name.rpartition(".")
        new = _OLD_TEXT.get(last, last) if part.startswith("text_encoder") else last.replace("to_out", "to_out.0")
        return f"{parent}.{new}" if parent else new
    return name


def _planned(fields: Mapping[str, Any] | None, part: str) -> LoraConfig | None:
    """Return the config in diffusers' metadata, whose fields have the part's name before them."""
    if not fields:
        return None
    before = f"{part}."
    own = {name.removeprefix(before): value for name, value in fields.items() if name.startswith(before)} or dict(
        fields
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fields of another version of PEFT
        return LoraConfig.from_dict(own)


def _factors(path: str, leaves: Mapping[str, Tensor], planned: LoraConfig | None) -> Factors:
    """Return a module's factors; without an alpha the scaling factor is one."""
    a, b = leaves.get("a"), leaves.get("b")
    if a is None or b is None or a.ndim != b.ndim or len(a) != b.shape[1]:
        shapes = {name: tuple(tensor.shape) for name, tensor in leaves.items()}
        raise ValueError(f"from_format: {path} has {shapes}, expected two factors of one rank")
    alpha = float(leaves["alpha"]) if "alpha" in leaves else float(len(a))
    if planned is not None:
        site = Site(path, "linear", 0, 0)
        if rank_at(planned, site) != len(a):
            raise ValueError(f"from_format: {path} has rank {len(a)}, and the config says {rank_at(planned, site)}")
        alpha = scaling_of(planned, len(a), alpha_at(planned, site)) * len(a)
    return Factors(a, b, alpha)
