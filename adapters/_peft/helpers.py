"""What `peft.helpers` has: factors and casts for a while, signatures, and whether a folder has an adapter."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

from .._config.base import AdapterConfig
from .._files.disk.hub import local_folder
from .._inplace.walk import layers, unwrap
from .peft_model import PeftModel

_SCALED = ("LORA", "ADALORA")
"""Methods whose factors are rescaled, those of PEFT's `LoraLayer`."""


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling factors of a model's LoRA adapters, active or not, within a `with` block.

    Afterwards they are the very numbers that they were; contexts nest. Merged weights follow.

    Args:
        model: A model with injected adapters.
        multiplier: The number; between 0 and 1 it interpolates to the base, in the weights.

    Raises:
        TypeError: No number.
        ValueError: A model without LoRA adapters.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> with rescale_adapter_scale(model, 0.5):
    ...     print(model[0].scaling["default"])
    0.5
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise TypeError(f"multiplier is {multiplier!r:.60}, expected a number")
    found: list[tuple[Any, str]] = [
        (layer, name)
        for layer in layers(unwrap(model)).values()
        for name, entry in layer.entries.items()
        if entry.config.method.name in _SCALED
    ]
    if not found:
        raise ValueError("the model has no LoRA adapter, whose scaling factor could be multiplied; inject one first")
    before = [_kept(layer, name) for layer, name in found]
    try:
        for (layer, name), factor in zip(found, before, strict=True):
            layer.write_scaling(name, factor * multiplier)
        yield
    finally:
        for (layer, name), factor in zip(found, before, strict=True):
            if name in layer.entries:
                layer.write_scaling(name, factor)


def _kept(layer: Any, name: str) -> Any:
    """Return a factor as it is now; one that is written in place as a number."""
    factor = layer.scaling_of(name)
    return float(factor) if name in layer.adjustable else factor


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Leave the inputs of modules that adapters call as they are, for a while.

    A module that holds a parameter of an adapter and has hooks is called with its input in the parameter's dtype. Where
    hooks cast the parameter itself during the call (diffusers' layerwise casting), that would be the wrong one.

    Args:
        model: A model with injected adapters, or a part of one.
        active: Whether to do anything.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> with disable_input_dtype_casting(model):
    ...     print(model[0].cast_input_dtype_enabled)
    False
    """
    before = [(layer, layer.cast_input_dtype_enabled) for layer in layers(unwrap(model)).values()] if active else []
    try:
        for layer, _ in before:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.cast_input_dtype_enabled = enabled


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Return whether a directory, or a repository in the Hub's local cache, has an adapter's config.

    >>> check_if_peft_model("nowhere/at-all")
    False
    """
    try:
        AdapterConfig.from_pretrained(local_folder(model_name_or_path))
    except (OSError, ValueError, TypeError):
        return False
    return True


def update_signature(model: PeftModel, method: str = "all") -> None:
    """Have `forward` and `generate` of a wrapped model show the signatures of the model's own.

    Args:
        model: A `PeftModel`.
        method: `"forward"`, `"generate"` or `"all"`.

    Raises:
        ValueError: Another method.
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method is {method!r}, expected 'forward', 'generate' or 'all'")
    for name in ("forward", "generate"):
        shown = getattr(type(model.get_base_model()), name, None)
        if method in (name, "all") and shown is not None:
            _show(model, name, shown)


def update_forward_signature(model: PeftModel) -> None:
    """Have `forward` of a wrapped model show the signature of the model's own."""
    update_signature(model, "forward")


def update_generate_signature(model: PeftModel) -> None:
    """Have `generate` of a wrapped model show the signature of the model's own, if it has one."""
    update_signature(model, "generate")


def _show(model: Any, name: str, shown: Any) -> None:
    own = getattr(type(model), name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    setattr(model, name, MethodType(functools.update_wrapper(call, shown), model))
