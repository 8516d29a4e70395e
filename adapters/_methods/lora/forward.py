"""What a LoRA site computes: its forward, for one adapter and for rows of many, and its merged weight."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.functional import Layer, PerAdapter, Rows, Site, UnsupportedConfig, widen
from torchgraft.functional.extending import Dense, Leaves, Original, Step, add_scaled

from ..shared import fused
from ..shared.called import DROPOUT, Called, Dropout, dropped
from ..shared.embedding_grad import as_embedding
from ..shared.low_rank import (
    Scaling,
    add_called,
    add_product,
    add_routed,
    add_to_groups,
    add_to_linear,
    route_to_linear,
)
from . import dora
from .activated import check_positions, check_unmerged
from .bases import BaseMinusInitial, base_of
from .blocks import of_leaves
from .parameters import factors_of_parameter

if TYPE_CHECKING:
    from .lora import LoraConfig

BIAS = "lora_B_bias"
"""The leaf that holds the bias of `B`."""


def apply(config: LoraConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + s B A dropout(x)`, the sum in the wider dtype and rounded once to the base's.

    `A`, `B`, the dropout and DoRA's magnitude may be modules, which are called in PEFT's order.
    """
    scaling, dropout = site.constants.scaling, leaves.get(DROPOUT, config.lora_dropout)
    called = isinstance(leaves.get("lora_A"), Called)
    if site.constants.activated:
        check_positions(config, site, None)
    linear = site.kind == "linear" and not (called or config.use_dora or config.lora_bias)
    if linear and site.constants.initial_A is None and site.constants.rounding is None:  # most sites, in each call
        return add_to_linear(base, x, *own_factors(site, leaves), scaling, dropout)
    base = base_of(site, base)
    if site.constants.initial_A is not None and (called or (dropout and base.training)):
        a, b = own_factors(site, leaves)
        base = BaseMinusInitial(base, site)  # what the base lost sees the whole input
    else:
        a, b = factors(site, leaves)
    if linear:
        return add_to_linear(base, x, a, b, scaling, dropout)
    y = base(x)
    if config.use_dora and isinstance(leaves[dora.MAGNITUDE], Called):
        return dora.DoraTerms(site, leaves, a, b, base).add_called(y, x, dropout)
    if called:
        return add_called(y, x, a, b, scaling, dropout)
    dtype, d = y.dtype, _dropped(dropout, site, base, x)
    if config.use_dora:
        y, b = dora.DoraTerms(site, leaves, a, b, base).rescale(y, d)
    if config.lora_bias:
        y = _with_bias(y, leaves[BIAS].view(-1, *(1 for _ in site.kernel_size)), scaling)
    if d is not None:
        x = d
    if site.kind == "embedding":
        return add_product(y, as_embedding(site, x, F.embedding(x, a.mT)), b, scaling).to(dtype)
    x, a, b = widen(x, a, b)
    if site.kernel_size:
        return add_scaled(y, site.pointwise(site.convolve(x, a), b), scaling).to(dtype)
    return add_product(y, F.linear(x, a), b, scaling).to(dtype)


def decide(config: LoraConfig, site: Site) -> Step | None:
    """Return `apply` as one step for a site whose `A` and `B` are all that is added; `None` for another."""
    constants = site.constants
    fixed = (constants.initial_A, constants.initial_B, constants.rounding, constants.lora_B)
    scaling = constants.scaling
    if constants.activated or constants.blocks or type(scaling) is not float or any(one is not None for one in fixed):
        return None
    if config.use_dora or config.lora_bias:
        return None
    return _step(scaling, config.lora_dropout, (constants.r, site.in_features), (site.out_features, constants.r))


@functools.lru_cache(maxsize=256)
def _step(scaling: float, p: float, down: tuple[int, int], up: tuple[int, int]) -> Step:
    """Return the step of all sites with these numbers: one object, which stays in the processor's caches."""

    def step(x: Tensor, weight: Tensor, bias: Tensor | None, leaves: Leaves, training: bool) -> Tensor | None:
        a, b = leaves["lora_A"], leaves["lora_B"]
        if a.shape != down or b.shape != up:
            return None
        if not (p and training) and fused.composes(x, weight, a, b):
            return fused.composed(x, weight, bias, a, b, scaling)
        if a.is_meta or b.is_meta or x.is_nested or not fused.fits(x, weight, a, b):
            return None
        return fused.linear(x, weight, bias, a, b, scaling, p if training else 0.0)

    return step


def routed(config: LoraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with an `A` and a `B` for each row.

    Convolutions, LoftQ's base, and dropout where the base lost a part take the general way.
    """
    check_positions(config, site, rows)
    if site.kernel_size or site.constants.rounding is not None:
        return NotImplemented
    if site.constants.initial_A is not None and config.lora_dropout and base.training:
        return NotImplemented
    (a, b), scaling = factors(site, leaves), site.constants.scaling
    if site.kind == "linear" and not config.use_dora and not config.lora_bias:
        return route_to_linear(base, x, a, b, scaling, config.lora_dropout, rows)
    y = base(x)
    dtype, d = y.dtype, _dropped(config.lora_dropout, site, base, x)
    if config.use_dora:
        y, b = dora.DoraTerms(site, leaves, a, b, base).rescale_rows(y, d, rows)
    if config.lora_bias:
        y = _with_bias_of_rows(y, leaves[BIAS], scaling, rows)
    if d is not None:
        x = d
    if site.kind == "embedding":
        groups = rows.groups()
        index = torch.arange(groups.size, device=x.device) if groups.index is None else groups.index.clamp(min=0)
        a, b = widen(a, b)
        ids, adapter = x.reshape(groups.size, -1), index.view(-1, 1)
        down = as_embedding(site, ids, a.mT[adapter, ids], adapter, len(a))
        return add_to_groups(y, down, b, scaling, rows).to(dtype)
    x, a, b = widen(x, a, b)
    return add_routed(y, x, a, b, scaling, rows).to(dtype)


def merge(config: LoraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    """`W' = W + s B A`; for `lora_bias` also `bias' = bias + s b`, for DoRA with the rows of `W'` rescaled."""
    return merge_over(config, site, leaves, weight, bias, lambda: (weight, bias))


def merge_over(
    config: LoraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None, original: Original
) -> Dense:
    """`merge` on a weight that other adapters are in; the norms of DoRA are those of the original one."""
    check_unmerged(site)
    if site.groups > 1:
        raise UnsupportedConfig(
            f"{site.path}: LoRA on a convolution with {site.groups} groups sees all channels through A, so no grouped "
            "weight is its merged form; call the graft instead, or leave this module out of target_modules"
        )
    if site.is_parameter:
        up, down, scaling = factors_of_parameter(config, site, leaves)
        return add_scaled(weight, up @ down, scaling), bias
    (a, b), scaling = factors(site, leaves), site.constants.scaling
    product = (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    if config.use_dora:
        own = original()
        below = _quantised(site, (weight, bias))
        own = below if own[0] is weight else _quantised(site, own)
        return dora.merge(leaves[dora.MAGNITUDE], product * scaling, below, own)
    weight = add_scaled(_quantised(site, (weight, bias))[0], product, scaling)
    if config.lora_bias:
        if bias is None:
            raise UnsupportedConfig(
                f"{site.path}: lora_bias adds a bias, and this module has none to merge it into; call the graft "
                "instead, give the module a bias, or leave it out of target_modules"
            )
        bias = add_scaled(bias, leaves[BIAS], scaling)
    return weight, bias


def _quantised(site: Site, dense: Dense) -> Dense:
    """Return a base as the site's adapter is for it: LoftQ's has another weight."""
    return (dense[0] + site.constants.rounding, dense[1]) if site.constants.rounding is not None else dense


def precompute(config: LoraConfig, site: Site, leaves: dict[str, Tensor], base: Layer) -> dict[str, Tensor]:
    """DoRA's share of the base's output, which depends on no input."""
    if not config.use_dora or site.is_parameter:
        return {}
    base = base_of(site, base)
    part = dora.DoraTerms(site, leaves, *factors(site, leaves), base)
    return {"gains": part.gains(base.original.weight)}


def names(site: Site) -> tuple[str, str]:
    """Return the leaves that hold `A` and `B`."""
    return ("lora_embedding_A", "lora_embedding_B") if site.kind == "embedding" else ("lora_A", "lora_B")


def factors(site: Site, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`A` and `B` of the product that a site adds to the base as it is.

    Where the base has to lose `s B0 A0`, the sum `B A - B0 A0` is one product, `[B - B0, B0] [A; A - A0]`, which is
    zero, bit for bit, as long as the leaves are `A0` and `B0`.

    Args:
        site: The site; its constants may be a stack's.
        leaves: One adapter's, or a stack's.
    """
    a, b = own_factors(site, leaves)
    if site.constants.initial_A is None:
        return a, b
    a, a0 = widen(a, _of_all(site, "initial_A"))
    b, b0 = widen(b, _of_all(site, "initial_B"))
    if more := a.shape[-2] - a0.shape[-2]:  # in a stack, of an adapter that starts otherwise
        a0, b0 = F.pad(a0, (0, 0, 0, more)), F.pad(b0, (0, more))
    return torch.cat([a, a - a0], -2), torch.cat([b - b0, b0.expand_as(b)], -1)


def own_factors(site: Site, leaves: Mapping[str, Any]) -> tuple[Any, Any]:
    """`A` and `B` themselves, tensors or modules; one that is not trained is a constant."""
    a_name, b_name = names(site)
    a, b = leaves[a_name], leaves[b_name] if b_name in leaves else _of_all(site, b_name)
    if isinstance(a, Called) or isinstance(b, Called):
        return a, b
    if site.constants.blocks is not None:
        a, b = of_leaves(a, b, site.constants.blocks)
    return a, b.expand(*a.shape[: a.ndim - b.ndim], *b.shape) if b.ndim < a.ndim else b


def _of_all(site: Site, name: str) -> Tensor:
    constant = getattr(site.constants, name)
    return constant.values if isinstance(constant, PerAdapter) else constant


def _dropped(dropout: Dropout, site: Site, base: Layer, x: Tensor) -> Tensor | None:
    """Return the input after dropout, where there is any."""
    if site.kind == "embedding":
        return None
    if not isinstance(dropout, Called) and not (dropout and base.training):
        return None
    return dropped(x, dropout, base.training)


def _with_bias(y: Tensor, bias: Tensor, scaling: Scaling) -> Tensor:
    """`y + s b` in the wider dtype."""
    y, bias = widen(y, bias)
    return add_scaled(y, bias, scaling)


def _with_bias_of_rows(y: Tensor, bias: Tensor, scaling: float | PerAdapter, rows: Rows) -> Tensor:
    """`y + s b` in the wider dtype, each row with its own; `bias` is `"N out"`."""
    if isinstance(scaling, PerAdapter):
        bias, scaling = bias * scaling.values.to(bias.dtype).unsqueeze(-1), 1.0
    groups = rows.groups()
    each = groups.pick(bias).unsqueeze(1)
    return _with_bias(y.reshape(groups.size, -1, y.shape[-1]), each, scaling).view(y.shape)
