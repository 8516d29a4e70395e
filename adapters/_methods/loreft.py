"""LoReFT: low-rank linear representation fine-tuning, an edit of each targeted module's output in a subspace.

    y = base(x) + R^T (W base(x) + b - R base(x))

with `R` of `r` orthonormal rows: what the output says in their span becomes `W base(x) + b`. The paper edits some
positions of a prompt alone: those are rows of a routed call, one a token, which `edited_positions` finds.

Wu et al., *ReFT: Representation Finetuning for Language Models*, 2024, arXiv:2404.03592. PEFT has no such method.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import Constants, Layer, Method, Rows, Site, UnsupportedConfig, Weights, widen

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat
from .shared.rotated import laid_out
from .shared.scalings import same_rank


@dataclasses.dataclass(kw_only=True)
class LoReftConfig(AdapterConfig):
    """LoReFT edits a targeted module's output within a subspace of `r` dimensions.

    Supports linear layers, `transformers`' `Conv1D` and convolutions, whose channels are the features. The paper edits
    the stream between layers; here it is outputs of modules, such as those that are added to it. A module without a
    bias works, and has no merged form, for no tensor of the model could hold `R^T b`.

    `R` is made of a matrix of any independent rows by Gram and Schmidt, so that it may be stepped freely. One of
    orthonormal rows is itself, by which what was trained elsewhere comes here.

    Attributes:
        r: Dimension of the subspace.
        init_weights: `True` for `W = R` and no `b`, the identity up to the rounding of leaves in another dtype than
            float32; `False` for `W` and `b` as `nn.Linear` has them, with which the authors' program starts. `R` is
            random in both.

    >>> LoReftConfig(r=4, target_modules=["o_proj", "down_proj"]).init_weights
    True
    """

    r: int = 8
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r > 0, self, f"r is {self.r}, expected a positive integer")


def edited_positions(attention_mask: Tensor, first: int, last: int, *, apart: bool = False) -> Tensor:
    """Return the rows of a routed call that edits the first and the last tokens of each prompt, and no others.

    Args:
        attention_mask: `"batch tokens"`, not zero where there is a token of the prompt, on whichever side it is padded.
        first: Number of positions at the beginning of each prompt.
        last: Number of positions at its end. A prompt that is shorter than both has each position once.
        apart: Whether the last positions have the second adapter of the stack, where they are not among the first.

    Returns:
        `"batch tokens"`, long: 0 or 1 where a position is edited, -1 elsewhere.

    Raises:
        ValueError: A mask without the two axes; a negative number.

    >>> mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    >>> edited_positions(mask, 1, 1, apart=True)
    tensor([[ 0, -1, -1,  1],
            [-1, -1,  0,  1]])

    >>> from torchgraft.functional import bind, route, stack
    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    >>> graft = bind(model, LoReftConfig(r=2, init_weights=False, target_modules=["1"]))
    >>> ids = torch.tensor([[5, 6, 7, 8], [0, 0, 3, 4]])
    >>> y = graft(route(stack([graft.init()]), edited_positions(mask, 1, 1)), ids)
    >>> (y == model(ids)).all(-1)
    tensor([[False,  True,  True, False],
            [ True,  True, False, False]])
    """
    if attention_mask.ndim != 2:
        raise ValueError(
            f"edited_positions: attention_mask has the shape {tuple(attention_mask.shape)}, expected (batch, tokens)"
        )
    if min(first, last) < 0:
        raise ValueError(f"edited_positions: first is {first} and last is {last}, expected numbers from 0 on")
    present = attention_mask != 0
    before = present.cumsum(1)  # of each token, itself included
    after = before[:, -1:] - before + 1
    rows = torch.where(present & (after <= last), int(apart), -1)
    return torch.where(present & (before <= first), 0, rows)


def plan(config: LoReftConfig, sites: list[Site], weights: Weights) -> dict[str, Constants]:
    """Check that the outputs have room for the subspace."""
    for site in sites:
        require(
            config.r <= site.out_features,
            config,
            f"r is {config.r} at {site.path}, which has {site.out_features} outputs, expected r <= {site.out_features}",
        )
    return {site.path: Constants() for site in sites}


def shapes(config: LoReftConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """The matrix that `R` is made of and `W` are `"r out"`, `b` is `"r"`."""
    size = (config.r, site.out_features)
    return {"loreft_rotate": size, "loreft_weight": size, "loreft_bias": (config.r,)}


def init(
    config: LoReftConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw an orthonormal `R`, and `W` and `b` where they are not those of the identity."""
    made = {}
    for site in sites:
        leaves = {leaf: torch.zeros(size, dtype=torch.float32) for leaf, size in shapes(config, site).items()}
        nn.init.orthogonal_(leaves["loreft_rotate"], generator=generator)
        if config.init_weights:
            leaves["loreft_weight"] = _orthonormal(leaves["loreft_rotate"]).contiguous()
        else:
            bound = 1 / math.sqrt(site.out_features)
            for leaf in ("loreft_weight", "loreft_bias"):
                nn.init.uniform_(leaves[leaf], -bound, bound, generator=generator)
        made[site.path] = leaves
    return made


def _orthonormal(rows: Tensor) -> Tensor:
    """Gram and Schmidt's rows of a matrix `"... r out"`, in float32 or wider; rows of zeros stay zeros."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    empty = torch.diag_embed((rows == 0).all(-1).to(rows.dtype))
    with torch.autocast(rows.device.type, enabled=False):
        lower = torch.linalg.cholesky(rows @ rows.mT + empty)
        result: Tensor = torch.linalg.solve_triangular(lower, rows, upper=False)
    return result


def apply(config: LoReftConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`h + R^T ((W - R) h + b)` of the base's output `h`, in the wider dtype and rounded once."""
    y = base(x)
    features = -1 - len(site.kernel_size)
    rotate, change = _parts(leaves)
    wide, rotate, change, bias = widen(y.movedim(features, -1), rotate, change, leaves["loreft_bias"])
    edited = wide + F.linear(F.linear(wide, change, bias), rotate.mT)
    return laid_out(edited.to(y.dtype).movedim(-1, features), y)


def routed(config: LoReftConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` where features come last, with an edit for each group of rows in two batched products."""
    if site.kernel_size:
        return NotImplemented
    groups, y = rows.groups(), base(x)
    parts = (groups.pick(part) for part in (*_parts(leaves), leaves["loreft_bias"]))
    wide, rotate, change, bias = widen(y.reshape(groups.size, -1, y.shape[-1]), *parts)
    added = groups.mask(torch.baddbmm(bias.unsqueeze(1), wide, change.mT) @ rotate)
    return laid_out((wide + added).to(y.dtype).view(y.shape), y)


def _parts(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`R`, and `W - R`, which is exactly zero at first in float32."""
    rotate = _orthonormal(leaves["loreft_rotate"])
    return rotate, leaves["loreft_weight"] - rotate


def merge(
    config: LoReftConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`(I + R^T (W - R)) weight`, and the same of the bias, and `R^T b`.

    Raises:
        UnsupportedConfig: A module without a bias.
    """
    if bias is None:
        raise UnsupportedConfig(
            f"{site.path}: LoReFT adds to the bias, and this module has none to merge it into; call the graft instead, "
            "give the module a bias, or leave it out of target_modules"
        )
    rotate, change = _parts(leaves)
    flat = weight.flatten(1)
    edited = torch.addmm(flat, rotate.mT, change @ flat).reshape(weight.shape)
    return edited, bias + rotate.mT @ (change @ bias + leaves["loreft_bias"])


LoReftConfig.method = Method(
    name="LOREFT",
    config=LoReftConfig,
    kinds=frozenset({"linear", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    routed=routed,
    varying=frozenset({"r", "init_weights"}),
)


LoReftConfig.form = PeftFormat(
    prefix="loreft_",
    parameters=("loreft_rotate", "loreft_weight", "loreft_bias"),
    infer=same_rank("loreft_rotate"),
    ranked=("loreft_rotate",),
)
