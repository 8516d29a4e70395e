"""RoAd: rotation adaptation, a rotation and rescaling of pairs of outputs.

    y = R base(x),    R_i = [[a cos t, -a sin t], [a sin t, a cos t]]

for each pair `i` of outputs, so that `W' = R W` and `b' = R b`. In `road_1` a pair has one angle `t` and one scale `a`,
in `road_2` each row of `R_i` has its own, in `road_4` each entry. `R` is never made: it costs two products of numbers
for each output. Output `j` of the first half of a group is paired with output `j` of its second half.

Liao et al., *3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability*, 2024,
arXiv:2409.00119. Names, defaults and initial distributions are those of PEFT's `tuners/road`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from torchgraft.functional import Constants, Layer, Method, Rows, Site, Weights, widen

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.rotated import laid_out

_PARAMETERS = {"road_1": 1, "road_2": 2, "road_4": 4}
"""Angles, and scales, of a pair of outputs in each variant."""


@dataclasses.dataclass(kw_only=True)
class RoadConfig(AdapterConfig):
    """RoAd rotates and rescales the outputs of each targeted module, pair by pair.

    Supports linear layers and, what PEFT refuses, `transformers`' `Conv1D`, embeddings and convolutions in any number
    of groups, whose channels are paired. A bias is an output like the rest.

    Attributes:
        variant: `"road_1"`, `"road_2"` or `"road_4"`: numbers of angles and of scales for each pair of outputs.
        group_size: Number of outputs in a group, an even divisor of their number; pairs are half a group apart.
        init_weights: `True` for angles of 0 and scales of 1, the identity, `False` for normal ones of standard
            deviation 0.5.

    >>> RoadConfig(group_size=32, target_modules=["q_proj"]).variant
    'road_1'
    """

    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.variant in _PARAMETERS, self, f"variant is {self.variant!r}, expected one of {', '.join(_PARAMETERS)}"
        )
        require(
            self.group_size > 0 and self.group_size % 2 == 0,
            self,
            f"group_size is {self.group_size}, expected a positive even number, of pairs of outputs",
        )


def plan(config: RoadConfig, sites: list[Site], weights: Weights) -> dict[str, Constants]:
    """Check that groups divide the outputs."""
    for site in sites:
        require(
            site.out_features % config.group_size == 0,
            config,
            f"group_size is {config.group_size} at {site.path}, which has {site.out_features} outputs, expected an "
            "even divisor",
        )
    return {site.path: Constants() for site in sites}


def shapes(config: RoadConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """Both are `"pairs*n"`, with `n` of 1, 2 or 4 by the variant."""
    size = site.out_features // 2 * _PARAMETERS[config.variant]
    return {"road_theta": (size,), "road_alpha": (size,)}


def init(
    config: RoadConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Zeros and ones, or normal numbers in PEFT's order of draws."""
    made = {}
    for site in sites:
        size = shapes(config, site)["road_theta"]
        theta, alpha = torch.zeros(size, dtype=torch.float32), torch.ones(size, dtype=torch.float32)
        if not config.init_weights:
            theta.normal_(0.0, 0.5, generator=generator)
            alpha.normal_(1.0, 0.5, generator=generator)
        made[site.path] = {"road_theta": theta, "road_alpha": alpha}
    return made


def apply(config: RoadConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`R base(x)`, in the wider dtype and rounded once."""
    return _turn_features(site, base(x), *_entries(config, leaves))


def routed(config: RoadConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Tensor:
    """`apply` with the entries of `R` for each row."""
    groups, y = rows.groups(), base(x)
    own, other = _entries(config, leaves)
    own, other = groups.mask(groups.pick(own), identity=1.0), groups.pick(other)
    per_group = y.unflatten(0, (groups.size, -1))
    ones = (1,) * (per_group.ndim - 2 - len(site.kernel_size))
    own, other = (entries.reshape(groups.size, *ones, *entries.shape[1:]) for entries in (own, other))
    return _turn_features(site, per_group, own, other).flatten(0, 1)


def merge(
    config: RoadConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = R W` and `b' = R b`."""
    entries = _entries(config, leaves)
    turned = _turn(weight.flatten(1).mT, *entries).mT.reshape(weight.shape)
    return turned, None if bias is None else _turn(bias, *entries)


def _entries(config: RoadConfig, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the diagonal of `R`, and beside it the sines, `"... groups 2 half"`, in float32 or wider."""
    theta, alpha = leaves["road_theta"], leaves["road_alpha"]
    wide = torch.promote_types(torch.promote_types(theta.dtype, alpha.dtype), torch.float32)
    half = config.group_size // 2
    theta, alpha = (leaf.to(wide).unflatten(-1, (-1, _PARAMETERS[config.variant], half)) for leaf in (theta, alpha))
    if config.variant == "road_4":
        return alpha[..., :2, :] * theta[..., :2, :].cos(), alpha[..., 2:, :] * theta[..., 2:, :].sin()
    own, other = alpha * theta.cos(), alpha * theta.sin()
    size = (*own.shape[:-2], 2, half)
    return own.expand(size), other.expand(size)


def _turn_features(site: Site, y: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """`R y` of an output, whose features are its last axis, or channels before those of space; laid out as it is."""
    return laid_out(_turn(y, own, other, len(site.kernel_size)).to(y.dtype), y)


def _turn(y: Tensor, own: Tensor, other: Tensor, space: int = 0) -> Tensor:
    """`R y` of the axis before those of space, in the wider dtype; of what autograd keeps, only `y` is as large."""
    y, own, other = widen(y, own, other)
    half = -1 - space
    first, second = y.unflatten(half, own.shape[-3:]).unbind(half - 1)
    ones = (..., *(None,) * space)
    own_first, own_second, other_first, other_second = (
        entries[ones] for both in (own, other) for entries in both.unbind(-2)
    )
    turned = (
        torch.addcmul(first * own_first, second, other_first, value=-1),
        torch.addcmul(second * own_second, first, other_second),
    )
    return torch.stack(turned, half - 1).flatten(half - 2, half)


RoadConfig.method = Method(
    name="ROAD",
    config=RoadConfig,
    kinds=frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    routed=routed,
    varying=frozenset({"init_weights"}),
)


RoadConfig.form = PeftFormat(
    prefix="road_",
    parameters=("road_theta", "road_alpha"),
    values={
        "variant": Value(lambda config, site: config.variant),
        "group_size": Value(lambda config, site: config.group_size),
    },
    reads=("variant", "group_size"),
    only_here=("bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform"),
)
