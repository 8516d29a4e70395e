"""What the methods of LyCORIS share: the rank and scaling factor of each site, and dropouts of outputs and modules."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional import Constants, Site, Varying, Weights

from ..._config.matching import by_pattern
from ..._config.messages import require
from ..._config.peft_format import Value
from .scalings import alpha_at, planned_scaling, scaling_of, warn_of_unused_patterns, written


@dataclasses.dataclass(frozen=True, eq=False)
class RankConstants(Constants):
    """Rank of a site, the numerator of its scaling factor, and the factor."""

    r: Varying[int]
    alpha: Varying[float]
    scaling: Varying[float]


def plan(config: Any, sites: list[Site], weights: Weights) -> dict[str, RankConstants]:
    """Return rank and scaling factor of each site.

    Raises:
        ValueError: A rank that is not positive; names the site.
    """
    warn_of_unused_patterns(config, sites)
    planned = {}
    for site in sites:
        r, alpha = by_pattern(config.rank_pattern, site.path, config.r), alpha_at(config, site)
        require(r > 0, config, f"r is {r!r} at {site.path}, expected a positive integer")
        planned[site.path] = RankConstants(r, alpha, scaling_of(config, r, alpha))
    return planned


def check_dropouts(config: Any) -> None:
    """Refuse dropouts that are no probabilities below 1.

    Raises:
        ValueError: Such a field; names it and its value.
    """
    for name in ("rank_dropout", "module_dropout"):
        value = getattr(config, name)
        require(0 <= value < 1, config, f"{name} is {value}, expected 0 <= p < 1")


def drop_outputs(config: Any, outputs: int, like: Tensor, training: bool, scale_up: bool) -> Tensor | None:
    """Draw the factors by which both dropouts multiply the adapter's outputs, in PEFT's order of draws.

    Args:
        config: A config with `rank_dropout`, for single outputs, and `module_dropout`, for all of them together.
        outputs: Number of outputs.
        like: A tensor of the device and dtype that they have; their dtype is float32 or wider.
        training: Whether outputs are dropped.
        scale_up: Whether those that are kept make up for those that are dropped one by one.

    Returns:
        `"outputs"` or `"1"`; `None` where nothing can be dropped.
    """
    if not training or not (config.rank_dropout or config.module_dropout):
        return None
    wide = torch.promote_types(like.dtype, torch.float32)
    factor: Tensor = (torch.rand(1, device=like.device) > config.module_dropout).to(wide)
    if config.rank_dropout:
        kept: Tensor = torch.rand(outputs, device=like.device) > config.rank_dropout
        factor = factor * kept
        if scale_up:
            factor = factor * outputs / kept.sum().clamp(min=1)
    return factor


VALUES = {
    "alpha": Value(alpha_at),
    "module_dropout": Value(lambda config, site: config.module_dropout),
    "r": Value(lambda config, site: site.constants.r),
    "rank_dropout": Value(lambda config, site: config.rank_dropout),
    "scaling": Value(lambda config, site: site.constants.scaling, written, planned_scaling),
}
"""The numbers that layers show for each adapter."""
