"""OFT: orthogonal fine-tuning, a rotation of the input in blocks.

    y = base(x R),    R = diag(R_1, ..., R_n),    R_i = (I + Q_i)(I - Q_i)^-1,    Q_i skew-symmetric

so that `W' = W R^T`. By default each block is the start of its Neumann series, `I + 2Q + 2Q^2 + ...`; the exact form,
`use_cayley_neumann=False`, turns the other way, `(I - Q)(I + Q)^-1`, as in PEFT.

Qiu et al., *Controlling Text-to-Image Diffusion by Orthogonal Finetuning*, 2023, arXiv:2306.07280; Qiu et al.,
*Orthogonal Finetuning Made Scalable*, 2025, arXiv:2506.19847. Names, defaults and initial distributions are those of
PEFT's `tuners/oft`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchgraft.functional import Constants, Layer, Method, Site, UnsupportedConfig, Weights, widen

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.called import Called, Holder
from .shared.rotated import add_block_product, cayley, laid_out


@dataclasses.dataclass(kw_only=True)
class OFTConfig(AdapterConfig):
    """OFT rotates the input of each targeted module (an embedding's output), block by block of its coordinates.

    Supports linear layers (also `transformers`' `Conv1D`), embeddings and 2-d convolutions of one group. A size that
    does not divide the coordinates is replaced by the nearest that does, with a warning.

    Where PEFT does otherwise: `module_dropout` is never applied there. For a kernel larger than 1 x 1 its forward
    rotates overlapping patches and adds them up, which is not the identity even for `R = I` and not what it merges;
    here a convolution is its merged form. `coft` overwrites the parameter there, in the forward; here the value is
    projected where it is used, the parameter stays, and gradients go through the projection.

    Attributes:
        r: Number of blocks; give this or `oft_block_size`, and 0 for the other.
        oft_block_size: Number of coordinates in a block.
        module_dropout: Probability for a block to be the identity, in training mode.
        coft: Keep `Q` small: project each block on the ball of radius `eps / sqrt(number of blocks)`.
        eps: Size of that ball.
        block_share: One rotation for all blocks.
        use_cayley_neumann: Sum a series instead of solving a linear system; orthogonal up to the series' error.
        num_cayley_neumann_terms: Number of terms; 3 is the same as 4, as in PEFT.
        init_weights: `True` for a zero `Q`, `False` for a normal one of standard deviation 0.1.

    >>> OFTConfig(oft_block_size=8, target_modules=["q_proj"]).use_cayley_neumann
    True
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.r >= 0 and self.oft_block_size >= 0 and (self.r == 0) != (self.oft_block_size == 0),
            self,
            f"r is {self.r} and oft_block_size is {self.oft_block_size}, expected one positive and the other 0, "
            "for r * oft_block_size is the number of coordinates",
        )
        require(0 <= self.module_dropout < 1, self, f"module_dropout is {self.module_dropout}, expected 0 <= p < 1")
        require(self.eps > 0, self, f"eps is {self.eps}, expected a positive number")
        require(
            self.num_cayley_neumann_terms > 1,
            self,
            f"num_cayley_neumann_terms is {self.num_cayley_neumann_terms}, expected 2 or more; the first term is the "
            "identity, whatever the parameters",
        )


@dataclasses.dataclass(frozen=True, eq=False)
class OFTConstants(Constants):
    """Blocks of a site, their size, and where each entry of a skew-symmetric block comes from."""

    blocks: int
    block_size: int
    skew: Tensor


def plan(config: OFTConfig, sites: list[Site], weights: Weights) -> dict[str, OFTConstants]:
    """Number of blocks, their size, and where each entry of a skew-symmetric block comes from."""
    tables: dict[int, Tensor] = {}
    planned = {}
    for site in sites:
        require(
            site.groups == 1,
            config,
            f"{site.path} is a convolution with {site.groups} groups, expected 1; leave it out of target_modules",
            UnsupportedConfig,
        )
        width = _width(site)
        name = "r" if config.r else "oft_block_size"
        given = config.r or config.oft_block_size
        size = _divisor(width, given)
        if size != given:
            warnings.warn(
                f"OFTConfig: {name} is {given} at {site.path}, which does not divide its {width} coordinates; "
                f"taking {size} there",
                UserWarning,
                stacklevel=2,
            )
        blocks, block = (size, width // size) if config.r else (width // size, size)
        require(
            block > 1,
            config,
            f"{name}={given} makes blocks of 1 at {site.path}, which has {width} coordinates; expected blocks of 2 or "
            "more, for a single coordinate does not rotate",
        )
        if block not in tables:
            tables[block] = _skew_table(block)
        planned[site.path] = OFTConstants(blocks, block, tables[block])
    return planned


def _width(site: Site) -> int:
    """Number of coordinates that are rotated."""
    return site.out_features if site.kind == "embedding" else site.in_features * math.prod(site.kernel_size)


def _divisor(width: int, size: int) -> int:
    """Return the divisor of `width` that is nearest to `size`, the lower of two."""
    size = min(size, width)
    near = (size + sign * distance for distance in range(size) for sign in (-1, 1))
    return next(candidate for candidate in near if width % candidate == 0)


def _skew_table(size: int) -> Tensor:
    """Indices into `[v, -v, 0]` that lay the vector of a block's upper triangle out as a skew-symmetric matrix."""
    count = size * (size - 1) // 2
    rows, columns = torch.triu_indices(size, size, 1, device="cpu")
    table = torch.full((size, size), 2 * count, dtype=torch.long, device="cpu")
    table[rows, columns] = torch.arange(count, device="cpu")
    table[columns, rows] = torch.arange(count, 2 * count, device="cpu")
    return table.flatten()


def shapes(config: OFTConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`"blocks size*(size-1)/2"`, one row where blocks share."""
    size = site.constants.block_size
    return {_name(site): (1 if config.block_share else site.constants.blocks, size * (size - 1) // 2)}


def init(
    config: OFTConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Zeros, or normal numbers in PEFT's order of draws."""
    made = {}
    for site in sites:
        leaf = torch.zeros(shapes(config, site)[_name(site)], dtype=torch.float32)
        made[site.path] = {_name(site): leaf if config.init_weights else leaf.normal_(std=0.1, generator=generator)}
    return made


def apply(config: OFTConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x R)`; an embedding `base(x) R`; a convolution with a kernel, its function with the weight `W R^T`."""
    leaf, drop = leaves[_name(site)], config.module_dropout if base.training else 0.0

    def rotate(x: Tensor, back: bool = False) -> Tensor:
        def by(x: Tensor, leaf: Tensor) -> Tensor:
            turn = _turn(config, site, leaf)
            return _rotate(x, turn.mT if back else turn, site, drop)

        if isinstance(leaf, Called):
            result: Tensor = leaf.with_weight(x, lambda x, leaf: by(x, leaf).to(x.dtype))
            return result
        return by(x, leaf)

    if site.kind == "embedding":
        y = base(x)
        return rotate(y).to(y.dtype)
    if site.kind == "linear":
        return base(laid_out(rotate(x).to(x.dtype), x))
    if math.prod(site.kernel_size) == 1:
        return base(laid_out(rotate(x.movedim(-3, -1)).movedim(-1, -3).to(x.dtype), x))
    weight, bias = base.weight, base.bias
    rotated = rotate(weight.flatten(1), back=True).reshape(weight.shape)
    return site.call(x, laid_out(rotated.to(x.dtype), weight), None if bias is None else bias.to(x.dtype))


def merge(
    config: OFTConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W R^T`, over the kernel's coordinates too; an embedding's `W' = R^T W`."""
    turn = _turn(config, site, leaves[_name(site)])
    if site.kind == "embedding":
        return _rotate(weight.mT, turn, site).mT, bias
    return _rotate(weight.flatten(1), turn.mT, site).reshape(weight.shape), bias


def _turn(config: OFTConfig, site: Site, leaf: Tensor) -> Tensor:
    """`R - I` by blocks, `"blocks size size"`, computed in float32 or wider; exactly zero for a zero leaf."""
    vector = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
    if config.coft:
        vector = _project(vector, config.eps / math.sqrt(len(vector)))
    entries = torch.cat([vector, -vector, torch.zeros_like(vector[:, :1])], dim=1)
    size = site.constants.block_size
    q = entries.index_select(1, site.constants.skew).unflatten(1, (size, size))
    if not config.use_cayley_neumann:
        return cayley(q).to(leaf.dtype)
    if config.num_cayley_neumann_terms == 2:
        result: Tensor = (2 * q).to(leaf.dtype)
        return result
    series = q
    for _ in range(max(3, config.num_cayley_neumann_terms - 1) - 1):
        series = torch.baddbmm(q, q, series, beta=2)
    result = series.to(leaf.dtype)
    return result


def _project(vector: Tensor, radius: float) -> Tensor:
    """Return each row, a block, on the ball of this radius in the Frobenius norm of its skew-symmetric matrix."""
    square = 2 * vector.square().sum(1, keepdim=True)
    outside = square > radius**2
    return torch.where(outside, radius * torch.where(outside, square, 1).rsqrt(), 1) * vector


def _rotate(x: Tensor, turn: Tensor, site: Site, drop: float = 0.0) -> Tensor:
    """`x R`, as `x + x (R - I)`, in the wider dtype."""
    if drop:
        kept = torch.rand(site.constants.blocks, 1, device=x.device) >= drop
        turn = torch.where(kept.unsqueeze(-1), turn, 0)
    return add_block_product(*widen(x, turn))


def _name(site: Site) -> str:
    return "oft_embedding_R" if site.kind == "embedding" else "oft_R"


OFTConfig.method = Method(
    name="OFT",
    config=OFTConfig,
    kinds=frozenset({"linear", "embedding", "conv2d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=OFTConstants,
    varying=frozenset({"init_weights"}),
)


def _infer(config: OFTConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the size of the blocks, where all modules have one size: `size * (size - 1) / 2` entries each."""
    entries = {tensor.shape[1] for leaves in found.values() for tensor in leaves.values()}
    size = (1 + math.isqrt(1 + 8 * max(entries))) // 2
    return {"r": 0, "oft_block_size": size} if len(entries) == 1 else {}


class Rotation(Holder):
    """Holds the entries of skew-symmetric blocks, `"blocks size*(size-1)/2"`; called, it rotates its input."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device="meta"))


OFTConfig.form = PeftFormat(
    prefix="oft_",
    modules=("oft_R", "oft_embedding_R"),
    holder=lambda config, site, leaf: Rotation(shapes(config, site)[leaf]),
    values={
        "oft_block_size": Value(lambda config, site: site.constants.block_size),
        "r": Value(lambda config, site: site.constants.blocks),
    },
    infer=_infer,
    input_side=lambda site: site.kind != "embedding",
    reads=("coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms"),
)
