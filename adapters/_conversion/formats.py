"""LoRA in the form of other programs' files, both ways, by tables of names."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchgraft.functional import Site, UnsupportedConfig
from torchgraft.functional.extending import Tree, modules_of

from .._arithmetic.products import Adapter
from .._config.base import AdapterConfig
from .._config.keys import PREFIX, from_keys, to_keys
from .._config.messages import names_of
from .._methods.lora.lora import LoraConfig
from .._methods.shared.scalings import alpha_at, rank_at, scaling_of
from .adapterhub import from_adapterhub, to_adapterhub
from .factors import Factors, adapter_of, factors_of

FORMS = ("peft", "diffusers", "kohya", "adapterhub")

_SUFFIXES = {
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


class Formatted(NamedTuple):
    """A LoRA in a program's form.

    Attributes:
        tensors: The tensors of its file.
        fields: The config that belongs beside the file; empty for programs that have none.
    """

    tensors: dict[str, Tensor]
    fields: dict[str, Any]


def to_format(config: LoraConfig, params: Tree, form: str, *, prefix: str | None = None) -> Formatted:
    """Return a plain LoRA as another program's files have it; exact, but for rounding where a factor goes into `B`.

    - `"peft"`: PEFT's keys, `base_model.model.<module>.lora_A.weight`; fields are those of `adapter_config.json`.
    - `"diffusers"`: `<prefix>.<module>.lora_A.weight`, with `prefix` `"unet"` by default, or `"transformer"`,
      `"text_encoder"` and so on. Files without more have a scaling factor of one there, so it goes into `B`.
    - `"kohya"`: `<prefix>_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`, dots of the module's name as
      underscores, with `prefix` `"lora_unet"` by default, or `"lora_te"`, `"lora_te1"`, `"lora_te2"`: what kohya's
      sd-scripts write and ComfyUI reads, which knows a UNet's modules by diffusers' names and by its own.
    - `"adapterhub"`: `<module>.loras.<prefix>.lora_A`, where `prefix`, `"default"` by default, is the adapter's name;
      fields are those of its `adapter_config.json`.

    Sources: diffusers `utils/state_dict_utils.py`, `utils/peft_utils.py`; kohya-ss/sd-scripts `networks/lora.py`
    (`LoRAModule`); ComfyUI `comfy/lora.py` (`load_lora`, `model_lora_keys_unet`); for AdapterHub see `adapterhub.py`.

    Args:
        config: The config of a plain LoRA.
        params: Its tree.
        form: One of these.
        prefix: What stands before names.

    Raises:
        ValueError: Another form; modules whose names become one.
        TypeError, UnsupportedConfig: No plain LoRA, or modules that the form has nothing for; names them.

    >>> tree = {"a.q": {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(3, 1)}}
    >>> sorted(to_format(LoraConfig(r=1, target_modules=["q"]), tree, "kohya").tensors)
    ['lora_unet_a_q.alpha', 'lora_unet_a_q.lora_down.weight', 'lora_unet_a_q.lora_up.weight']
    """
    _check_form(form, "to_format")
    if form == "peft":
        _check_no_parameters(config, "to_format", "save_adapter(graft, path, params=params)")
        return Formatted(to_keys(config, params, PREFIX if prefix is None else prefix), config.to_dict())
    found = factors_of(config, params, "to_format")
    if form == "adapterhub":
        return Formatted(*to_adapterhub(found, prefix or "default"))
    prefix, tensors = _PREFIXES[form][0] if prefix is None else prefix, {}
    for path, one in found.items():
        name = _joined(prefix, path, form)
        if any(key.startswith(f"{name}.") for key in tensors):
            raise ValueError(f"to_format: {path} and another module both become {name}; leave one out")
        own = one.folded if form == "diffusers" else one
        values = {"a": own.a, "b": own.b, "alpha": _number(own.alpha)}
        written = {leaf: suffix for suffix, leaf in reversed(_SUFFIXES[form].items())}
        kept = ("a", "b") if form == "diffusers" else ("a", "b", "alpha")
        tensors |= {name + written[leaf]: values[leaf] for leaf in kept}
    return Formatted(tensors, {})


def from_format(
    tensors: Mapping[str, Tensor],
    form: str | None = None,
    *,
    prefix: str | None = None,
    modules: nn.Module | Iterable[str] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Adapter:
    """Return the LoRA that another program's file holds.

    Args:
        tensors: The tensors of the file, as `safetensors.torch.load_file` reads them.
        form: As for `to_format`; by default what the keys look like. Diffusers' older keys are read too.
        prefix: The part of a pipeline to take: `"unet"`, `"lora_te1"`; by default the only one. Of AdapterHub's, the
            name of the adapter.
        modules: The model, or the names of its modules, which kohya's keys do not tell: `a_b` may be `a.b` or `a_b`.
        fields: The config that belongs to the file: `adapter_config.json`, or diffusers' `lora_adapter_metadata`. PEFT
            and AdapterHub need it, for their tensors do not tell the scaling factor.

    Returns:
        `(config, params)`, with the scaling factors of the file.

    Raises:
        ValueError: Keys of no form, or that belong to no module; several parts of a pipeline without a `prefix`; a
            config that is missing. Names the key.

    >>> tensors = {"lora_unet_a_q.lora_down.weight": torch.ones(1, 2), "lora_unet_a_q.lora_up.weight": torch.ones(3, 1)}
    >>> config, params = from_format(tensors, modules=["a", "a.q"])
    >>> sorted(params), config.r, config.lora_alpha
    (['a.q'], 1, 1)
    """
    form = detect_format(tensors) if form is None else form
    _check_form(form, "from_format")
    names = list(modules_of(modules)) if isinstance(modules, nn.Module) else list(modules or ())
    if form == "peft":
        return _from_peft(tensors, fields)
    if form == "adapterhub":
        return adapter_of(from_adapterhub(tensors, prefix, fields), names)
    part = _part(tensors, form, prefix)
    leaves = _leaves(tensors, form, part, names)
    planned = _planned(fields, part) if form == "diffusers" else None
    return adapter_of({path: _factors(path, one, planned) for path, one in leaves.items()}, names)


def _number(alpha: float) -> Tensor:
    """Return a number as a tensor that holds it: of float32, as these programs write it, where that is exact."""
    narrow = torch.tensor(alpha, dtype=torch.float32)
    return narrow if float(narrow) == alpha else torch.tensor(alpha, dtype=torch.float64)


def detect_format(tensors: Iterable[str]) -> str:
    """Return the form that a file's keys look like.

    Raises:
        ValueError: None of those that are known.

    >>> detect_format(["lora_unet_a_q.lora_down.weight"])
    'kohya'
    """
    keys = list(tensors)
    looks = {
        "adapterhub": lambda key: ".loras." in key,
        "peft": lambda key: key.startswith(PREFIX),
        "kohya": lambda key: key.endswith(".lora_down.weight"),
        "diffusers": lambda key: key.endswith(tuple(s for s, leaf in _SUFFIXES["diffusers"].items() if leaf == "a")),
    }
    for form, look in looks.items():
        if any(map(look, keys)):
            return form
    raise ValueError(
        f"detect_format: {names_of(keys)} look like none of {', '.join(FORMS)}; give form, and only a LoRA's tensors"
    )


def _check_form(form: str, what: str) -> None:
    if form not in FORMS:
        raise ValueError(f"{what}: form is {form!r}, expected one of {FORMS}")


def _check_no_parameters(config: Any, what: str, instead: str) -> None:
    if getattr(config, "target_parameters", None):
        raise UnsupportedConfig(
            f"{what}: target_parameters are {config.target_parameters}, whose places in PEFT's files only a model "
            f"tells; use {instead}"
        )


# -- PEFT's --------------------------------------------------------------------------------------------------------


def _from_peft(tensors: Mapping[str, Tensor], fields: Mapping[str, Any] | None) -> Adapter:
    if not fields:
        raise ValueError(
            "from_format: PEFT's tensors do not tell their scaling factor; pass fields, adapter_config.json"
        )
    config = AdapterConfig.from_dict(fields)
    _check_no_parameters(config, "from_format", "load_adapter(graft, path)")
    tree, rest = from_keys(config, tensors)
    if rest:
        raise ValueError(f"from_format: {names_of(rest)} is no factor of {config.method.name}; use load_adapter")
    return config, tree


# -- pipelines' ----------------------------------------------------------------------------------------------------


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
        suffix = next((one for one in _SUFFIXES[form] if key.endswith(one)), None)
        if suffix is None:
            raise ValueError(
                f"from_format: {key!r} is no factor of a plain LoRA in {form}'s form, whose keys end in "
                f"{', '.join(_SUFFIXES[form])}; DoRA, LoHa, LoKr and LoCon's lora_mid are not read here"
            )
        name = key.removeprefix(before).removesuffix(suffix)
        path = _module(key, name, names) if form == "kohya" else _modern(name, suffix, part)
        found.setdefault(path, {})[_SUFFIXES[form][suffix]] = tensor
    return found


def _module(key: str, flat: str, names: Collection[str]) -> str:
    """Return the module whose name became this with underscores."""
    meant = [name for name in names if name.replace(".", "_") == flat]
    if len(meant) == 1:
        return meant[0]
    if not names:
        raise ValueError(f"from_format: {key!r} does not tell where a name has dots; pass modules=model, or its names")
    if meant:
        raise ValueError(f"from_format: {key!r} may be any of {meant}; give those names of modules that are meant")
    raise ValueError(
        f"from_format: {key!r} is of no module of these {len(names)}; perhaps the file is of another model, or names "
        "its modules as the original implementation does"
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
