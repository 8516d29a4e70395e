"""LoRA's leaves: their shapes, the numbers that they start with, and parts of them."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torchgraft.functional import Site, Weights

from ..._calibration.initial import factors, kind_of, warn_of_plain
from ..shared.called import DROPOUT
from . import dora, forward
from .forward import BIAS, names

if TYPE_CHECKING:
    from .lora import LoraConfig


def shapes(config: LoraConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`A` is `"r in *kernel"`, `B` is `"out r/groups *ones"`; an embedding's are `"r vocab"` and `"dim r"`.

    Those of experts are `"experts*r in"`, expert by expert, and `"out r*experts"`, rank by rank, as in PEFT. The bias
    of `B` is `"out"`; the magnitude of DoRA is `"out"`, for a convolution `"1 out *ones"`.
    """
    fixed = fixed_leaves(config, site)
    found = {leaf: shape for leaf, shape in _drawn_shapes(config, site).items() if leaf not in fixed}
    if config.use_dora:
        found[dora.MAGNITUDE] = dora.shape(site)
    return found


def _drawn_shapes(config: LoraConfig, site: Site) -> dict[str, tuple[int, ...]]:
    r = site.constants.r * max(site.experts, 1)
    a, b = names(site)
    of_a, of_b, _ = site.constants.blocks or (1, 1, r)
    found: dict[str, tuple[int, ...]] = {
        a: (r, site.in_features // of_a, *site.kernel_size),
        b: (site.out_features, r // site.groups // of_b, *(1 for _ in site.kernel_size)),
    }
    if config.lora_bias:
        found[BIAS] = (site.out_features,)
    return found


def blocks(config: LoraConfig, site: Site) -> dict[str, int]:
    """Return how many blocks `A` has along its ranks: one for each expert, or for each group of a convolution."""
    count = max(site.experts, site.groups)
    return {names(site)[0]: count} if count > 1 else {}


def fixed_leaves(config: LoraConfig, site: Site) -> tuple[str, ...]:
    """Return leaves that are not trained: constants of the site, which files hold."""
    return names(site)[1:] if kind_of(config.init_lora_weights) == "mica" else ()


def init(
    config: LoraConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws: one state of the generator gives PEFT's numbers, bit for bit."""
    started = {}
    warn_of_plain(config, sites)
    for site in sites:
        drawn, special = _with_blocks(config, site, generator), factors(config, site, generator, weights)
        leaves = drawn if special is None else dict(zip(names(site), special, strict=True))
        if config.use_dora:
            leaves[dora.MAGNITUDE] = _magnitude(config, site, leaves, weights(site.path))
        started[site.path] = {leaf: leaves[leaf].contiguous() for leaf in shapes(config, site)}
    return started


def _magnitude(config: LoraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor) -> Tensor:
    """Return the magnitude that DoRA starts from."""
    leaves = {leaf: tensor.to(weight.device) for leaf, tensor in leaves.items()}
    weight = weight + site.constants.rounding if site.constants.rounding is not None else weight
    return dora.initial(site, *forward.factors(site, leaves), weight)


def _with_blocks(config: LoraConfig, site: Site, generator: torch.Generator | None) -> dict[str, Tensor]:
    """Return plain parameters; blocks, which are drawn after whole matrices, in the place of one of these."""
    blocks = site.constants.blocks
    if blocks is None:
        return _drawn(config, site, generator)
    whole = dataclasses.replace(site, constants=dataclasses.replace(site.constants, blocks=None))
    leaves, shape = _drawn(config, whole, generator), _drawn_shapes(config, site)
    if blocks[0] > 1:
        leaves["lora_A"] = nn.init.kaiming_uniform_(leaves["lora_A"].new_empty(shape["lora_A"]), generator=generator)
    else:
        leaves["lora_B"] = leaves["lora_B"].new_zeros(shape["lora_B"])
    return leaves


def _drawn(config: LoraConfig, site: Site, generator: torch.Generator | None) -> dict[str, Tensor]:
    """Return plain parameters; the other initialisations use up the same random numbers first."""
    a_name, b_name = names(site)
    shape = _drawn_shapes(config, site)
    a = torch.empty(shape[a_name], dtype=torch.float32)
    b = torch.empty(shape[b_name], dtype=torch.float32)
    if site.kind == "embedding":
        for tensor in (a, b):
            tensor.normal_(generator=generator)
        if config.init_lora_weights:
            a.zero_()
            b.normal_(generator=generator)
        return {a_name: a, b_name: b}
    if site.kind == "attention" and not site.blocks:
        # PEFT draws for the output projection twice, before and after; the second draw is that of its own site.
        _drawn(config, dataclasses.replace(site, kind="linear", out_features=site.in_features), generator)
    parts = a.split(site.blocks, 1) if site.blocks else (a,)
    for tensor in (*parts, b):
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    leaves = {a_name: a, b_name: b}
    if config.lora_bias:
        bound = 1 / math.sqrt(site.constants.r // site.groups)
        leaves[BIAS] = a.new_empty(site.out_features).uniform_(-bound, bound, generator=generator)
    if config.init_lora_weights is True:
        for tensor in parts:
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    elif config.init_lora_weights == "gaussian":
        a.normal_(std=1 / site.constants.r, generator=generator)
    if config.init_lora_weights:
        for leaf in leaves.keys() - {a_name}:
            leaves[leaf].zero_()
    return leaves


def part(config: LoraConfig, site: Site, leaves: dict[str, Tensor], rows: slice, columns: slice) -> dict[str, Tensor]:
    """`A` of some inputs and `B`, with its bias, of some outputs."""
    own = {"lora_A": leaves["lora_A"][..., columns], "lora_B": leaves["lora_B"][..., rows, :]}
    own |= {DROPOUT: leaves[DROPOUT]} if DROPOUT in leaves else {}
    return own | ({BIAS: leaves[BIAS][..., rows]} if BIAS in leaves else {})
