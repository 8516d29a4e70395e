"""Which packages are installed, as `peft.import_utils` answers it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

_PACKAGES = {
    "aqlm": "aqlm",
    "bnb": "bitsandbytes",
    "bnb_4bit": "bitsandbytes",
    "diffusers": "diffusers",
    "eetq": "eetq",
    "gptqmodel": "gptqmodel",
    "hqq": "hqq",
    "inc": "neural_compressor",
    "optimum": "optimum",
    "te": "transformer_engine",
    "torchao": "torchao",
}
"""Packages by what PEFT calls them."""


def _question(package: str) -> Callable[[], bool]:
    def is_available() -> bool:
        return find_spec(package) is not None

    is_available.__doc__ = f"Return whether {package} is installed."
    return is_available


def is_xpu_available(check_device: bool = False) -> bool:
    """Return whether torch has a device of type `"xpu"`."""
    return torch.xpu.is_available()


QUESTIONS = {f"is_{name}_available": _question(package) for name, package in _PACKAGES.items()} | {
    "is_xpu_available": is_xpu_available
}
"""The functions by name."""
