"""BOFT: orthogonal fine-tuning with butterfly factors, a rotation of the input and a scale for each output.

    y = s * (base(x R) - b) + b,    R = B_m ... B_1,    B_i = P_i diag(R_i1, ..., R_in) P_i^T

so that `W' = diag(s) W R^T`, and `b`, the base's bias, stays. Each block is Cayley's rotation `(I - S) (I + S)^-1` of a
skew-symmetric `S`. The permutations `P_i` mix ever more blocks, `2^(i-1)` of them: few small blocks make a large
rotation. `R` is never made.

Liu et al., *Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization*, 2023, arXiv:2311.06243. Names,
defaults and initial distributions are those of PEFT's `tuners/boft`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchgraft.functional import Constants, Layer, Method, Site, Weights, widen

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.rotated import add_block_product, cayley, laid_out


@dataclasses.dataclass(kw_only=True)
class BOFTConfig(AdapterConfig):
    """BOFT rotates the input of each targeted module by butterfly factors, and rescales its outputs.

    Supports linear layers and 2-d convolutions and, what PEFT refuses, `transformers`' `Conv1D` and other convolutions,
    in any number of groups. A convolution is rotated over the inputs of one output, over the kernel.

    Where PEFT does otherwise: without its CUDA extension it takes one factor, whatever the config says; here as many as
    the config says, on every device, and files that have one are read as such. It ignores a convolution's dilation and
    padding mode, and takes the kernel for a square.

    Attributes:
        boft_block_size: Number of inputs in a block; give this or `boft_block_num`, and 0 for the other.
        boft_block_num: Number of blocks.
        boft_n_butterfly_factor: Number of factors; more than one needs blocks of an even size, and a multiple of
            `2^(m-1)` blocks.
        boft_dropout: Share of the blocks, rounded down, of one factor that are the identity, in training mode.
        init_weights: `True` for the identity, `False` for normal numbers of standard deviation 0.1.

    >>> BOFTConfig(boft_block_size=8, target_modules=["q_proj"]).boft_n_butterfly_factor
    1
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        size, number = self.boft_block_size, self.boft_block_num
        require(
            size >= 0 and number >= 0 and (size == 0) != (number == 0),
            self,
            f"boft_block_size is {size} and boft_block_num is {number}, expected one positive and the other 0, for "
            "their product is the number of inputs",
        )
        factors = self.boft_n_butterfly_factor
        require(factors > 0, self, f"boft_n_butterfly_factor is {factors}, expected a positive integer")
        require(0 <= self.boft_dropout < 1, self, f"boft_dropout is {self.boft_dropout}, expected 0 <= p < 1")


@dataclasses.dataclass(frozen=True, eq=False)
class BOFTConstants(Constants):
    """Blocks of a site, and their size."""

    blocks: int
    block_size: int


def plan(config: BOFTConfig, sites: list[Site], weights: Weights) -> dict[str, BOFTConstants]:
    """Return the number of blocks of each site and their size, which the number of factors allows."""
    planned, mixed = {}, 2 ** (config.boft_n_butterfly_factor - 1)
    for site in sites:
        width, name = (
            math.prod(site.weight_shape[1:]),
            "boft_block_size" if config.boft_block_size else "boft_block_num",
        )
        given: int = getattr(config, name)
        require(
            width % given == 0,
            config,
            f"{name} is {given} at {site.path}, whose outputs have {width} inputs, expected a divisor",
        )
        size, blocks = (given, width // given) if config.boft_block_size else (width // given, given)
        require(
            mixed == 1 or (size % 2 == 0 and blocks % mixed == 0),
            config,
            f"boft_n_butterfly_factor is {config.boft_n_butterfly_factor} at {site.path}, which has {blocks} blocks of "
            f"{size}; expected an even size, and a multiple of {mixed} blocks",
        )
        planned[site.path] = BOFTConstants(blocks, size)
    return planned


def shapes(config: BOFTConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`boft_R` is `"factors blocks size size"`, `boft_s` is `"out 1"`, of a convolution `"1 out"`."""
    blocks, size, out = site.constants.blocks, site.constants.block_size, site.out_features
    scale = (1, out) if site.kernel_size else (out, 1)
    return {"boft_R": (config.boft_n_butterfly_factor, blocks, size, size), "boft_s": scale}


def init(
    config: BOFTConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Zeros and ones, or normal numbers in PEFT's order of draws."""
    made = {}
    for site in sites:
        shape = shapes(config, site)
        r, s = torch.zeros(shape["boft_R"], dtype=torch.float32), torch.ones(shape["boft_s"], dtype=torch.float32)
        if not config.init_weights:
            r.normal_(0.0, 0.1, generator=generator)
            s.normal_(1.0, 0.1, generator=generator)
        made[site.path] = {"boft_R": r, "boft_s": s}
    return made


def apply(config: BOFTConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`s * (base(x R) - b) + b`; a convolution with a kernel or in groups, its function with the weight `W R^T`."""
    turns, s = _turns(config, leaves["boft_R"], base.training), leaves["boft_s"].flatten()
    if site.kind == "linear":
        return _scale(base(laid_out(_rotate(x, turns).to(x.dtype), x)), s, base.bias)
    s = s.view(-1, *(1 for _ in site.kernel_size))
    bias = None if base.bias is None else base.bias.view(s.shape)
    if math.prod(site.kernel_size) == site.groups == 1:
        channels = -1 - len(site.kernel_size)
        turned = _rotate(x.movedim(channels, -1), turns).movedim(-1, channels)
        return _scale(base(laid_out(turned.to(x.dtype), x)), s, bias)
    weight = base.weight
    rotated = _rotate(weight.flatten(1), turns, back=True).reshape(weight.shape)
    y = site.call(x, laid_out(rotated.to(x.dtype), weight), None if base.bias is None else base.bias.to(x.dtype))
    return _scale(y, s, bias)


def merge(
    config: BOFTConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = diag(s) W R^T`, over the kernel's coordinates too."""
    turned = _rotate(weight.flatten(1), _turns(config, leaves["boft_R"], training=False), back=True)
    return (turned * leaves["boft_s"].view(-1, 1)).reshape(weight.shape), bias


def _turns(config: BOFTConfig, leaf: Tensor, training: bool) -> Tensor:
    """Each block less the identity, `"factors blocks size size"`, in float32 or wider; zero for a symmetric leaf."""
    wide = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
    turns = cayley((wide - wide.mT) / 2)
    factors, blocks = turns.shape[:2]
    dropped = int(config.boft_dropout * blocks) if training else 0
    if not dropped:
        return turns
    factor = torch.arange(factors, device=leaf.device) == torch.randint(0, factors, (1,), device=leaf.device)
    lost = factor.unsqueeze(1) & (torch.randperm(blocks, device=leaf.device) < dropped)
    return torch.where(lost[..., None, None], 0, turns)


def _rotate(x: Tensor, turns: Tensor, back: bool = False) -> Tensor:
    """`x R`, or `x R^T`, of the last axis in the wider dtype: `x P B P^T` for each factor, the last one first."""
    x, turns = widen(x, turns)
    count, half = len(turns), turns.shape[-1] // 2
    for i in range(count) if back else reversed(range(count)):
        blocks = turns[i].mT if back else turns[i]
        if i == 0:
            x = add_block_product(x, blocks)
            continue
        near = x.unflatten(-1, (-1, 2, 2**i, half)).transpose(-3, -2).flatten(-4)
        x = add_block_product(near, blocks).unflatten(-1, (-1, 2**i, 2, half)).transpose(-3, -2).flatten(-4)
    return x


def _scale(y: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
    """`s * (y - b) + b` in the wider dtype, exactly `y` where `s` is one; rounded once."""
    wide, s = widen(y, s)
    return torch.addcmul(wide, wide if bias is None else wide - bias, s - 1).to(y.dtype)


BOFTConfig.method = Method(
    name="BOFT",
    config=BOFTConfig,
    kinds=frozenset({"linear", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=BOFTConstants,
    varying=frozenset({"init_weights"}),
)


def _infer(config: BOFTConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the number of factors, and the size of the blocks, or their number, where all modules have the same."""
    given = [leaves["boft_R"].shape[:3] for leaves in found.values() if "boft_R" in leaves]
    factors, blocks, sizes = (set(each) for each in zip(*given, strict=True))
    fields = {"boft_n_butterfly_factor": factors.pop()} if len(factors) == 1 else {}
    if len(sizes) == 1 and (config.boft_block_size or len(blocks) > 1):
        return {**fields, "boft_block_size": sizes.pop(), "boft_block_num": 0}
    return {**fields, "boft_block_size": 0, "boft_block_num": blocks.pop()} if len(blocks) == 1 else fields


def _unpack(config: BOFTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the factors that the config says, where it has one; the others are the identity.

    PEFT without its extension makes one factor and writes the number that it was asked for.
    """
    more, found = config.boft_n_butterfly_factor - 1, dict(state)
    for key, tensor in state.items():
        if more and key.endswith("boft_R") and tensor.ndim == 4 and len(tensor) == 1:
            found[key] = torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])])
    return found


BOFTConfig.form = PeftFormat(
    prefix="boft_",
    parameters=("boft_R", "boft_s"),
    values={
        "boft_block_size": Value(lambda config, site: site.constants.block_size),
        "boft_block_num": Value(lambda config, site: site.constants.blocks),
    },
    infer=_infer,
    unpack=_unpack,
)
