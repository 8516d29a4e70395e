"""BEFT: bias-efficient fine-tuning, a bias of its own for each targeted module and nothing else.

    y = base(x) + b

Huang et al., *BEFT: Bias-Efficient Fine-Tuning of Language Models*, 2025, arXiv:2509.15974. Names, defaults and initial
values are those of PEFT's `tuners/beft`.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import ClassVar

import torch
from torch import Tensor

from torchgraft.functional import (
    AddsLeafwise,
    Constants,
    Layer,
    Method,
    Rows,
    Site,
    TakesComplex,
    UnsupportedConfig,
    Weights,
)
from torchgraft.functional.extending import add_scaled

from .._config.base import AdapterConfig
from .._config.peft_format import PeftFormat


@dataclasses.dataclass(kw_only=True)
class BeftConfig(AdapterConfig):
    """BEFT adds a learned number to each channel that leaves a targeted module; the paper takes value projections.

    Supports linear layers and, what PEFT refuses, `transformers`' `Conv1D` and convolutions. A module without a bias
    has a warning, and no merged form, for no tensor of the model could hold it.

    Attributes:
        init_weights: `True` for zeros, `False` for normal numbers.

    >>> BeftConfig(target_modules=["v_proj"]).init_weights
    True
    """

    init_weights: bool = True

    method: ClassVar[Method]


def plan(config: BeftConfig, sites: list[Site], weights: Weights) -> dict[str, Constants]:
    """Warn of modules without a bias; there is nothing to fix."""
    if bare := [site.path for site in sites if not site.has_bias]:
        what = f"BeftConfig: {bare} have no bias, so the adapter works there but cannot be merged"
        warnings.warn(what, UserWarning, stacklevel=2)
    return {site.path: Constants() for site in sites}


def shapes(config: BeftConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`"1 out"`."""
    return {"beft_bias": (1, site.out_features)}


def init(
    config: BeftConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws; zeros use up the same random numbers."""
    made = {}
    for site in sites:
        drawn = torch.randn(shapes(config, site)["beft_bias"], dtype=torch.float32, generator=generator)
        made[site.path] = {"beft_bias": torch.zeros_like(drawn) if config.init_weights else drawn}
    return made


def apply(config: BeftConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + b`, the sum in the wider dtype and rounded once to the base's."""
    return add_scaled(base(x), leaves["beft_bias"].view(-1, *(1 for _ in site.kernel_size)), 1.0)


def routed(config: BeftConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Tensor:
    """`apply` with a bias for each row."""
    groups, y = rows.groups(), base(x)
    space = tuple(1 for _ in site.kernel_size)
    tokens = (1,) * (y.ndim - 2 - len(space))
    bias = groups.pick(leaves["beft_bias"]).view(groups.size, 1, *tokens, -1, *space)
    return add_scaled(y.unflatten(0, (groups.size, -1)), bias, 1.0).flatten(0, 1)


def merge(
    config: BeftConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`b' = bias + b`.

    Raises:
        UnsupportedConfig: A module without a bias.
    """
    if bias is None:
        raise UnsupportedConfig(
            f"{site.path}: BEFT adds a bias, and this module has none to merge it into; call the graft instead, give "
            "the module a bias, or leave it out of target_modules"
        )
    return weight, bias + leaves["beft_bias"].flatten()


BeftConfig.method = Method(
    name="BEFT",
    config=BeftConfig,
    kinds=frozenset({"linear", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    routed=routed,
    varying=frozenset({"init_weights"}),
    abilities=(TakesComplex(), AddsLeafwise()),
)

BeftConfig.form = PeftFormat(
    prefix="beft_",
    parameters=("beft_bias",),
    only_here=("bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform"),
)
