"""PEANuT: a small network that maps each weight to its change.

    y = base(x) + s B f(A W) x,    f(h) = a chain of trained r x r matrices, with activations and skips

The columns of `A W`, `"r in"`, run through the network one by one: an activation, then `depth` encoders, each with an
activation, then as many decoders, which add what the encoder of the same level was given. `W` is the base's own weight.

Zhong et al., *PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers*, 2024, arXiv:2410.01870. Names,
defaults and initial distributions are those of PEFT's `tuners/peanut`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import Constants, Layer, MergesOver, Method, Rows, Site, Varying, Weights, widen
from torchgraft.functional.extending import Dense, Original

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared import remade
from .shared.low_rank import add_to_site, route_to_linear

A, B, ENCODERS, DECODERS = "peanut_A.weight", "peanut_B.weight", "peanut_encoders", "peanut_decoders"

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "swish": F.silu,
    "tanh": torch.tanh,
}
"""Activations by transformers' names."""


@dataclasses.dataclass(kw_only=True)
class PeanutConfig(AdapterConfig):
    """PEANuT learns a network that reads the columns of each targeted weight and says how they change.

    Supports linear layers and, what PEFT refuses, `transformers`' `Conv1D` and convolutions in any number of groups.
    The change has rank `r` at most, so it is computed as `B (f(A W) x)`, where PEFT makes it as a weight. Beside other
    adapters the network reads the base's own weight, as in PEFT.

    Where PEFT does otherwise: its layers have a list of modules for the encoders and one for the decoders, here each is
    one parameter, `"depth r r"`; state dicts and files are the same.

    Attributes:
        r: Width of the network.
        depth: Number of encoders, and of decoders.
        act_fn: Name of the activation: `"relu"`, `"gelu"`, `"silu"`, `"tanh"` and others.
        scaling: `s`.
        init_weights: `True` for a zero `B`, `False` for a random one.

    >>> PeanutConfig(r=4, depth=1, target_modules=["q_proj"]).act_fn
    'relu'
    """

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r > 0, self, f"r is {self.r}, expected a positive integer")
        require(self.depth >= 0, self, f"depth is {self.depth}, expected an integer >= 0")
        known = self.act_fn in ACTIVATIONS
        require(known, self, f"act_fn is {self.act_fn!r}, expected one of {', '.join(sorted(ACTIVATIONS))}")


@dataclasses.dataclass(frozen=True, eq=False)
class PeanutConstants(Constants):
    """The scaling factor."""

    scaling: Varying[float]


def plan(config: PeanutConfig, sites: list[Site], weights: Weights) -> dict[str, PeanutConstants]:
    """Return the scaling factor of each site."""
    return {site.path: PeanutConstants(config.scaling) for site in sites}


def shapes(config: PeanutConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`A` is `"r out"`, `B` is `"out r"`, encoders and decoders are `"depth r r"`, where there are any."""
    r, chain = config.r, (config.depth, config.r, config.r)
    between = {ENCODERS: chain, DECODERS: chain} if config.depth else {}
    return {A: (r, site.out_features), **between, B: (site.out_features, r)}


def init(
    config: PeanutConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws: all of them twice, `B` once where it is zero."""
    made = {}
    for site in sites:
        leaves = {leaf: torch.empty(shape, dtype=torch.float32) for leaf, shape in shapes(config, site).items()}
        each = [matrix for leaf in leaves.values() for matrix in (leaf if leaf.ndim == 3 else [leaf])]
        for matrix in [*each, *(each[:-1] if config.init_weights else each)]:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
        if config.init_weights:
            leaves[B].zero_()
        made[site.path] = leaves
    return made


def apply(config: PeanutConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + s B (f(A W) x)`, the sum in the wider dtype and rounded once to the base's."""
    a, b = _factors(config, site, leaves, base.original.weight, site.constants.scaling)
    return add_to_site(site, base, x, a, b, 0.0)


def routed(config: PeanutConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with a network for each row; convolutions take the general way."""
    if site.kind != "linear":
        return NotImplemented
    a, b = _factors(config, site, leaves, base.original.weight, 1.0)
    return route_to_linear(base, x, a, b, site.constants.scaling, 0.0, rows)


def merge(config: PeanutConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    """`W' = W + s B f(A W)`."""
    return merge_over(config, site, leaves, weight, bias, lambda: (weight, bias))


def merge_over(
    config: PeanutConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None, original: Original
) -> Dense:
    """`merge` on a weight that other adapters are in; what the network reads is the base's own."""
    a, b = _factors(config, site, leaves, original()[0], site.constants.scaling)
    return weight + (b @ a).reshape(weight.shape), bias


def _factors(
    config: PeanutConfig, site: Site, leaves: dict[str, Any], weight: Tensor, scaling: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return `f(A W)`, `"r in/groups*kernel"`, and `s B`, in float32 or wider; also of a stack."""
    wide = torch.promote_types(leaves[A].dtype, torch.float32)
    act = ACTIVATIONS[config.act_fn]
    h = act(remade.product(leaves[A].to(wide), weight.flatten(1)))
    levels = []
    for i in range(config.depth):
        levels.append(h)
        h = act(leaves[ENCODERS][..., i, :, :].to(wide) @ h)
    for i in range(config.depth):
        h = act(leaves[DECODERS][..., i, :, :].to(wide) @ h) + levels.pop()
    h, b = widen(h, leaves[B])
    return h, b if isinstance(scaling, float) and scaling == 1.0 else (b * scaling).to(b.dtype)


PeanutConfig.method = Method(
    name="PEANUT",
    config=PeanutConfig,
    kinds=frozenset({"linear", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=PeanutConstants,
    routed=routed,
    varying=frozenset({"scaling", "init_weights"}),
    abilities=(MergesOver(merge_over),),
)


def _infer(config: PeanutConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return width and depth of the network."""
    leaves = next((leaves for leaves in found.values() if A in leaves), None)
    return {} if leaves is None else {"r": len(leaves[A]), "depth": len(leaves[ENCODERS]) if ENCODERS in leaves else 0}


def _pack(config: PeanutConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with a key for each encoder and decoder, as PEFT's lists of modules have them."""
    packed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.endswith((ENCODERS, DECODERS)):
            packed |= {f"{key}.{i}.weight": matrix for i, matrix in enumerate(tensor.unbind())}
        else:
            packed[key] = tensor
    return packed


def _unpack(config: PeanutConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with all encoders in one tensor, and all decoders.

    Raises:
        ValueError: One of several is missing, or they differ in shape.
    """
    found: dict[str, Tensor] = {}
    lists: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(rf"(.*\b(?:{ENCODERS}|{DECODERS}))\.(\d+)\.weight", key)
        if match is None:
            found[key] = tensor
        else:
            lists.setdefault(match[1], {})[int(match[2])] = tensor
    for key, matrices in lists.items():
        what = f"there are {key}.{{{', '.join(map(str, sorted(matrices)))}}}, expected all from 0 on"
        require(sorted(matrices) == list(range(len(matrices))), config, what)
        sizes = {tuple(matrix.shape) for matrix in matrices.values()}
        require(len(sizes) == 1, config, f"{key} has matrices of shapes {sorted(sizes)}, expected one shape")
        found[key] = torch.stack([matrices[i] for i in range(len(matrices))])
    return found


PeanutConfig.form = PeftFormat(
    prefix="peanut_",
    grouped=(A, B),
    parameters=(ENCODERS, DECODERS),
    values={
        "r": Value(lambda config, site: config.r),
        "depth": Value(lambda config, site: config.depth),
        "scaling": Value(lambda config, site: site.constants.scaling),
    },
    infer=_infer,
    pack=_pack,
    unpack=_unpack,
    reads=("act_fn",),
    only_here=("bias", "fan_in_fan_out"),
)
