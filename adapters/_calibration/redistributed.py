"""The config that EVA makes of what it found: modules, ranks, scaling factors, and where `A` starts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from torchgraft.functional.extending import Site

from .._config.targets import exact
from .._methods.lora.lora import LoraConfig
from .._methods.shared.scalings import alpha_at
from .initial import Statistics
from .initial.configs import EvaConfig


def redistributed(
    config: LoraConfig,
    sites: Mapping[str, Site],
    names: Collection[str],
    how: EvaConfig,
    parts: Mapping[str, Tensor],
) -> LoraConfig:
    """Return a config with the ranks of what was found, and with that as statistics.

    Args:
        config: The config.
        sites: Its sites in a model, by path.
        names: The names of the model's modules.
        how: Its EVA config.
        parts: The directions of each module that were found, `"rank in"`; none mean that it is a target no longer, and
            a module without an entry starts as plain LoRA does.
    """
    rank_pattern: dict[str, Any] = {}
    alpha_pattern: dict[str, Any] = {}
    kept = []
    for path, site in sites.items():
        old, alpha = site.constants.r, alpha_at(config, site)
        rank = len(parts[path]) if path in parts else old
        if not rank:
            continue
        kept.append(path)
        alpha *= rank / old if how.adjust_scaling_factors else 1
        if rank != config.r:
            rank_pattern[f"^{re.escape(path)}"] = rank
        if alpha != config.lora_alpha:
            alpha_pattern[f"^{re.escape(path)}"] = alpha
    return dataclasses.replace(
        exact(config, kept, names),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        statistics=Statistics("eva", {path: {"components": parts[path]} for path in kept if path in parts}),
    )
