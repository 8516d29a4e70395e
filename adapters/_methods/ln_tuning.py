"""LN tuning: the parameters of a model's norms are trained, and nothing else.

    y = g * (x - mean(x)) / sqrt(var(x) + eps) + b,    g and b trained, from the base's own values

Zhao et al., *Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning*, 2023, arXiv:2312.11420.
Names and keys are those of PEFT's `tuners/ln_tuning`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from torchgraft.functional import Method

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat
from .._config.targets import find_modules
from .shared.siteless import siteless

LAYERS = "ln_tuning_layers"
"""What PEFT's keys have between a module and its parameter."""


@dataclasses.dataclass(kw_only=True)
class LNTuningConfig(AdapterConfig):
    """LN tuning trains copies of all parameters of the targeted modules, of whatever class these are.

    The copies are leaves under the names of the parameters, `params["norm"]["weight"]`, and start as the base's. A call
    runs the module's own forward with them.

    Where PEFT does otherwise: a layer in place is a wrapper with a copy of the module, as for `modules_to_save`, under
    whose name its parameters stand; keys of state dicts and files are PEFT's.

    >>> LNTuningConfig(target_modules=["norm"]).modules_to_save is None
    True
    """

    method: ClassVar[Method]

    def whole_modules(self, modules: Mapping[str, nn.Module]) -> list[str]:
        """Return the names of the targeted modules.

        Raises:
            ValueError: A module without parameters.
        """
        model = modules[""]
        found = find_modules(self.for_model(model, dict(modules)), modules, model)
        for path in found:
            there = next(modules[path].parameters(), None) is not None
            what = f"target_modules names {path}, a {type(modules[path]).__name__}, which has no parameters"
            require(there, self, what)
        return found


LNTuningConfig.method = siteless("LN_TUNING", LNTuningConfig)


def _pack(config: LNTuningConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with PEFT's keys of all that is not of `modules_to_save`."""
    saved = [rf"(.*\.)?{re.escape(name)}\..*" for name in config.modules_to_save or ()]
    packed = {}
    for key, tensor in state.items():
        path, _, name = key.rpartition(".")
        whole = any(re.fullmatch(pattern, key) for pattern in saved)
        packed[key if whole else f"{path}.{LAYERS}.{name}"] = tensor
    return packed


def _unpack(config: LNTuningConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the parameters' own names."""
    return {key.replace(f".{LAYERS}.", "."): tensor for key, tensor in state.items()}


LNTuningConfig.form = PeftFormat(
    prefix="ln_tuning_",
    pack=_pack,
    unpack=_unpack,
    only_here=("bias", "fan_in_fan_out", "layers_pattern", "layers_to_transform"),
)
