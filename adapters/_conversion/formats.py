"""LoRA in the form of other programs' files, both ways, by tables of names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchgraft.functional import UnsupportedConfig
from torchgraft.functional.extending import Tree, modules_of

from .._arithmetic.products import Adapter
from .._config.base import AdapterConfig
from .._config.keys import PREFIX, from_keys, to_keys
from .._config.messages import names_of
from .._methods.lora.lora import LoraConfig
from .adapterhub import from_adapterhub, to_adapterhub
from .factors import adapter_of, factors_of
from .original_unet import original_names
from .pipelines import SUFFIXES, read_pipeline, write_pipeline

FORMS = ("peft", "diffusers", "kohya", "sdxl", "adapterhub")


class Formatted(NamedTuple):
    """A LoRA in another program's file format; made by `to_format`.

    Attributes:
        tensors: The tensors of its file.
        fields: The config that belongs beside the file; empty for programs that have none.
    """

    tensors: dict[str, Tensor]
    fields: dict[str, Any]


def to_format(
    config: LoraConfig,
    params: Tree,
    form: str,
    *,
    prefix: str | None = None,
    modules: nn.Module | Iterable[str] | None = None,
) -> Formatted:
    """Return a plain LoRA as another program's files have it; exact, but for rounding where a factor goes into `B`.

    - `"peft"`: PEFT's keys, `base_model.model.<module>.lora_A.weight`; fields are those of `adapter_config.json`.
    - `"diffusers"`: `<prefix>.<module>.lora_A.weight`, with `prefix` `"unet"` by default, or `"transformer"`,
      `"text_encoder"` and so on. Files without more have a scaling factor of one there, so it goes into `B`.
    - `"kohya"`: `<prefix>_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`, dots of the module's name as
      underscores, with `prefix` `"lora_unet"` by default, or `"lora_te"`, `"lora_te1"`, `"lora_te2"`: what kohya's
      sd-scripts write and ComfyUI reads, which knows a UNet's modules by diffusers' names and by its own.
    - `"sdxl"`: as kohya's, with the names that a UNet's modules have in the original implementation
      (`input_blocks_4_1_...` for `down_blocks.1.attentions.0...`), as files for SDXL have them. Needs `modules`.
    - `"adapterhub"`: `<module>.loras.<prefix>.lora_A`, where `prefix`, `"default"` by default, is the adapter's name;
      fields are those of its `adapter_config.json`.

    Sources: diffusers `utils/state_dict_utils.py`, `utils/peft_utils.py`; kohya-ss/sd-scripts `networks/lora.py`
    (`LoRAModule`); ComfyUI `comfy/lora.py` (`load_lora`, `model_lora_keys_unet`); for AdapterHub see `adapterhub.py`.

    Args:
        config: The config of a plain LoRA.
        params: Its tree.
        form: One of these.
        prefix: What stands before names.
        modules: The UNet, or the names of all its modules, for `"sdxl"`.

    Raises:
        ValueError: Another form; modules whose names become one, or that are not of the UNet.
        TypeError, UnsupportedConfig: No plain LoRA, or modules that the form has nothing for; names them.

    >>> import torch
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
    if form == "sdxl":
        return Formatted(write_pipeline(found, "kohya", prefix, _originals(found, _names(modules))), {})
    return Formatted(write_pipeline(found, form, prefix), {})


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
        modules: The model, or the names of its modules, which kohya's keys do not tell: `a_b` may be `a.b` or `a_b`. A
            UNet's are known by the names of the original implementation too.
        fields: The config that belongs to the file: `adapter_config.json`, or diffusers' `lora_adapter_metadata`. PEFT
            and AdapterHub need it, for their tensors do not tell the scaling factor.

    Returns:
        `(config, params)`, with the scaling factors of the file.

    Raises:
        ValueError: Keys of no form, or that belong to no module; several parts of a pipeline without a `prefix`; a
            config that is missing. Names the key.

    >>> import torch
    >>> tensors = {"lora_unet_a_q.lora_down.weight": torch.ones(1, 2), "lora_unet_a_q.lora_up.weight": torch.ones(3, 1)}
    >>> config, params = from_format(tensors, modules=["a", "a.q"])
    >>> sorted(params), config.r, config.lora_alpha
    (['a.q'], 1, 1)
    """
    form = detect_format(tensors) if form is None else form
    _check_form(form, "from_format")
    names = _names(modules)
    if form == "peft":
        return _from_peft(tensors, fields)
    if form == "adapterhub":
        return adapter_of(from_adapterhub(tensors, prefix, fields), names)
    read = read_pipeline(tensors, "kohya" if form == "sdxl" else form, prefix, names, fields)
    return adapter_of(read, names)


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
        "diffusers": lambda key: key.endswith(tuple(s for s, leaf in SUFFIXES["diffusers"].items() if leaf == "a")),
    }
    for form, look in looks.items():
        if any(map(look, keys)):
            return form
    raise ValueError(
        f"detect_format: {names_of(keys)} look like none of {', '.join(FORMS)}; give form, and only a LoRA's tensors"
    )


def _names(modules: nn.Module | Iterable[str] | None) -> list[str]:
    return list(modules_of(modules)) if isinstance(modules, nn.Module) else list(modules or ())


def _originals(paths: Iterable[str], names: list[str]) -> dict[str, str]:
    """Return the original name of each module.

    Raises:
        ValueError: A module that has none among these names.
    """
    if not names:
        raise ValueError("to_format: 'sdxl' needs all names of the UNet's modules; pass modules=model, or the names")
    known = original_names(names)
    missing = [path for path in paths if path not in known]
    if missing:
        raise ValueError(f"to_format: {names_of(missing)} is no part of a UNet that 'sdxl' has a name for; use 'kohya'")
    return {path: known[path] for path in paths}


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
