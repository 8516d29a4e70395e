"""BD-LoRA: an `A` or a `B` of blocks along its diagonal, so that a model that is split needs no exchange within it.

A leaf has the blocks below each other, `"rows columns/blocks"`, as in PEFT's `BlockDiagonalLinear`; what is computed
with is the whole matrix, in which all else is zero.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import Site, UnsupportedConfig

from ..._config.messages import require
from ..shared.called import Holder

if TYPE_CHECKING:
    from .lora import LoraConfig

Blocks = tuple[int, int, int]
"""Numbers of blocks of `A` and of `B`, 1 for a matrix as a whole, and the rank."""


@dataclasses.dataclass(frozen=True)
class BdLoraConfig:
    """The modules whose `A` is block-diagonal, and those whose `B` is.

    Attributes:
        target_modules_bd_a: Parts of the names of modules whose `A` has blocks: those split by inputs.
        target_modules_bd_b: Parts of the names of modules whose `B` has blocks: those split by outputs.
        nblocks: Number of blocks.
        match_strict: Refuse modules of which neither has blocks.

    >>> BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2).match_strict
    True
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.nblocks, int) or self.nblocks < 1:
            raise ValueError(f"BdLoraConfig: nblocks is {self.nblocks!r}, expected a positive integer")
        for name in ("target_modules_bd_a", "target_modules_bd_b"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, str) or not all(isinstance(one, str) for one in value)):
                raise ValueError(f"BdLoraConfig: {name} is {value!r}, expected a list of parts of names")
        both = sorted({*(self.target_modules_bd_a or ())} & {*(self.target_modules_bd_b or ())})
        if both:
            raise ValueError(f"BdLoraConfig: {both} are in target_modules_bd_a and in target_modules_bd_b; leave one")


def blocks_of(config: LoraConfig, site: Site, r: int) -> Blocks | None:
    """Return the numbers of blocks at a site; `None` for plain LoRA.

    Raises:
        ValueError: Neither matrix has blocks, or both have; sizes that the blocks do not divide. All name the site.
    """
    blocks = config.use_bdlora
    if not isinstance(blocks, BdLoraConfig):
        return None
    what = f"use_bdlora is given, and {site.path} is {site.kind}; it is for linear layers: leave others out"
    require(site.kind == "linear", config, what, UnsupportedConfig)
    a, b = (
        any(part in site.path for part in parts or ())
        for parts in (blocks.target_modules_bd_a, blocks.target_modules_bd_b)
    )
    require(not (a and b), config, f"use_bdlora has {site.path} in target_modules_bd_a and in target_modules_bd_b")
    what = f"use_bdlora has {site.path} neither in target_modules_bd_a nor in target_modules_bd_b"
    require(a or b or not blocks.match_strict, config, f"{what}; add a part of its name, or set match_strict=False")
    n = blocks.nblocks
    sizes = {"r": r, "inputs": site.in_features} if a else {"r": r, "outputs": site.out_features} if b else {}
    for name, size in sizes.items():
        require(
            size % n == 0, config, f"use_bdlora has nblocks {n}, which does not divide {name}, {size}, at {site.path}"
        )
    return (n if a else 1, n if b else 1, r) if a or b else None


def whole(matrix: Tensor, blocks: int) -> Tensor:
    """Return the matrix whose blocks are below each other in another, of a stack of them each.

    >>> whole(torch.tensor([[1.0], [2.0]]), 2)
    tensor([[1., 0.],
            [0., 2.]])
    """
    if blocks == 1:
        return matrix
    each = matrix.unflatten(-2, (blocks, -1))
    here = torch.eye(blocks, dtype=matrix.dtype, device=matrix.device)[:, None, :, None]
    result: Tensor = (each.unsqueeze(-2) * here).flatten(-4, -3).flatten(-2)
    return result


def of_leaves(a: Tensor, b: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Return the whole matrices of leaves, as `whole` does."""
    return whole(a, blocks[0]), whole(b, blocks[1])


class BlockDiagonalLinear(Holder):
    """A linear map whose matrix is blocks along the diagonal; its weight has them below each other."""

    def __init__(self, in_features: int, out_features: int, blocks: int):
        super().__init__()
        self.in_features, self.out_features, self.nblocks = in_features, out_features, blocks
        self.weight = nn.Parameter(torch.empty(out_features, in_features // blocks, device="meta"))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the map's output."""
        return F.linear(x, whole(self.weight, self.nblocks))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, nblocks={self.nblocks}"
