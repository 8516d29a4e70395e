"""MiSS: matrix shard sharing, one block that all shards of the weight have.

    y = base(x) + M^T s(x),    s(x)_j = sum_i x_(i r + j)

The weight changes by copies of one block `M^T`, `"out r"`, side by side; the last one is cut where `r` does not divide
the number of inputs. So the input is folded to `r` numbers before the product. The smaller form, `mini`, repeats the
block along the outputs too. The form `bat` has a block `B_p`, `"r r"`, for each `r` outputs, which acts on the weight:

    W'_pn = W_pn + W_pn B_p + B_p    for each block of `r` outputs, `p`, and of `r` inputs, `n`

Kang et al., *MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure*, 2024,
arXiv:2409.15371. Names, defaults and initial distributions are those of PEFT's `tuners/miss`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import Constants, Layer, Method, Rows, RunsInOneStep, Site, Weights, widen
from torchgraft.functional.extending import Leaves, Step, add_scaled

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared import fused, remade
from .shared.called import DROPOUT, dropped, is_dropping
from .shared.low_rank import add_product

FORMS = {True: "default", False: "default", "bat": "bat", "mini": "mini"}
"""The form that each value of `init_weights` means."""


@dataclasses.dataclass(kw_only=True)
class MissConfig(AdapterConfig):
    """MiSS adds one trained block to all shards of a targeted weight.

    Supports linear layers (also `transformers`' `Conv1D`, which PEFT refuses).

    Attributes:
        r: Number of inputs of a shard, at most the module's.
        miss_dropout: Probability of dropout on the adapter's input, in training mode; `bat` has none, as in PEFT.
        mini_r: Number of outputs of a shard in the form `mini`, a divisor of the module's.
        init_weights: `True` for a zero block, `False` for a random one; `"mini"` and `"bat"` are other forms, whose
            blocks are zero.

    >>> MissConfig(r=4, target_modules=["q_proj"]).mini_r
    1
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | str = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.miss_dropout < 1, self, f"miss_dropout is {self.miss_dropout}, expected 0 <= p < 1")
        what = f"init_weights is {self.init_weights!r}, expected True, False, 'bat' or 'mini'"
        require(self.init_weights in FORMS, self, what)


@dataclasses.dataclass(frozen=True, eq=False)
class MissConstants(Constants):
    """Sizes of a site's shards, and the form of its block."""

    r: int
    mini_r: int
    form: str


def plan(config: MissConfig, sites: list[Site], weights: Weights) -> dict[str, MissConstants]:
    """Return the sizes of the shards, which are the same at all sites."""
    form = FORMS[config.init_weights]
    for site in sites:
        r, mini, inputs, outputs = config.r, config.mini_r, site.in_features, site.out_features
        what = f"r is {r} at {site.path}, which has {inputs} inputs"
        require(0 < r <= inputs, config, f"{what}, expected 1 <= r <= {inputs}")
        if form == "bat":
            divisor = math.gcd(inputs, outputs)
            what = f"{what} and {outputs} outputs; 'bat' expects a divisor of both, of {divisor}"
            require(divisor % r == 0, config, what)
        if form == "mini":
            what = f"mini_r is {mini} at {site.path}, which has {outputs} outputs, expected a divisor"
            require(mini > 0 and outputs % mini == 0, config, what)
    if form == "bat" and config.miss_dropout:
        warnings.warn(
            f"MissConfig: miss_dropout is {config.miss_dropout}, and the form 'bat' has no dropout; set 0.0",
            UserWarning,
            stacklevel=3,
        )
    return {site.path: MissConstants(config.r, config.mini_r, form) for site in sites}


def shapes(config: MissConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`"r out"`; of the form `mini` `"r mini_r"`, of the form `bat` `"out/r r r"`."""
    constants, out = site.constants, site.out_features
    r = constants.r
    forms = {"default": (r, out), "mini": (r, constants.mini_r), "bat": (out // r, r, r)}
    return {"miss_block": forms[constants.form]}


def init(
    config: MissConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Make zero blocks, or draw them, in PEFT's order of draws: one state of the generator gives PEFT's numbers."""
    made = {site.path: {"miss_block": torch.zeros(shapes(config, site)["miss_block"])} for site in sites}
    for leaves in made.values() if config.init_weights is False else ():
        nn.init.kaiming_uniform_(leaves["miss_block"], a=math.sqrt(5), generator=generator)
    return made


def apply(config: MissConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + M^T s(dropout(x))`, the sum in the wider dtype and rounded once to the base's.

    The form `bat` is one product with the changed weight, which is not kept for the backward.
    """
    block, form, dropout = leaves["miss_block"], site.constants.form, leaves.get(DROPOUT, config.miss_dropout)
    whole = form == "bat" or (_is_whole(site) and not is_dropping(dropout, base.training))
    linear = base.as_linear if whole and not torch.compiler.is_compiling() else None
    fits = linear is not None and fused.fits(x, linear[0], block, block)
    if form == "bat":
        if linear is not None and fits and x.itemsize >= 4:
            return remade.linear(_moved, x, *linear, block)
        y, weight = base(x), base.weight
        x, block = widen(x, block)
        return add_scaled(y, remade.linear(_change, x, weight, None, block), 1.0)
    if linear is not None and fits:
        return _linear(x, *linear, block)
    y = base(x)
    x, block = widen(dropped(x, dropout, base.training), block)
    if form == "mini":
        return add_scaled(y, _repeated(_folded(x, site.constants.r) @ block, site), 1.0)
    return add_product(y, _folded(x, site.constants.r), block.mT, 1.0)


def _is_whole(site: Site) -> bool:
    """Return whether a site has whole shards, and a block for all outputs."""
    constants: MissConstants = site.constants
    return constants.form == "default" and site.in_features % constants.r == 0


def _decide(config: MissConfig, site: Site) -> Step | None:
    """Return `apply` as one step for a site of whole shards; `None` for another."""
    shape = shapes(config, site)["miss_block"]

    def step(x: Tensor, weight: Tensor, bias: Tensor | None, leaves: Leaves, training: bool) -> Tensor | None:
        block = leaves["miss_block"]
        if block.is_meta or block.shape != shape or x.is_nested or (training and config.miss_dropout):
            return None
        return _linear(x, weight, bias, block) if fused.fits(x, weight, block, block) else None

    return step if _is_whole(site) else None


def routed(config: MissConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with a block for each group of rows; the form `bat` takes the general way."""
    if site.constants.form == "bat":
        return NotImplemented
    y, groups = base(x), rows.groups()
    x = F.dropout(x, config.miss_dropout, base.training)
    x, block = widen(x, groups.pick(leaves["miss_block"]))
    x = groups.mask(x.reshape(groups.size, -1, x.shape[-1]))  # no NaN of a row without adapter reaches a gradient
    delta = torch.bmm(_folded(x, site.constants.r), block)
    if site.constants.form == "mini":
        delta = _repeated(delta, site)
    return add_scaled(y, delta.reshape(y.shape), 1.0)


def merge(
    config: MissConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + (M^T M^T ...)`, with as many copies as there are shards; `bat`: `W' = W + W B + B`, block by block."""
    block = leaves["miss_block"]
    if site.constants.form == "bat":
        return weight + _change(weight, block), bias
    if site.constants.form == "mini":
        block = _repeated(block, site)
    return weight + block.mT[:, torch.arange(site.in_features, device=block.device) % site.constants.r], bias


def _folded(x: Tensor, r: int) -> Tensor:
    """`s(x)`: the sum over shards, `"... in"` to `"... r"`."""
    missing = -x.shape[-1] % r
    x = F.pad(x, (0, missing)) if missing else x
    folded: Tensor = x.reshape(*x.shape[:-1], x.shape[-1] // r, r).sum(-2)
    return folded


def _repeated(delta: Tensor, site: Site) -> Tensor:
    """Repeat the outputs of a shard over all, `"... mini_r"` to `"... out"`."""
    times = site.out_features // site.constants.mini_r
    return delta.unsqueeze(-2).expand(*delta.shape[:-1], times, delta.shape[-1]).flatten(-2)


def _change(weight: Tensor, block: Tensor) -> Tensor:
    """`W B + B` for each block of `r` outputs and `r` inputs."""
    p, r = block.shape[0], block.shape[-1]
    shards = weight.unflatten(0, (p, r)).unflatten(-1, (-1, r))  # "p r n r"
    changed: Tensor = torch.einsum("panj,pjk->pank", shards, block) + block.unsqueeze(2)
    return changed.reshape(weight.shape)


def _moved(weight: Tensor, block: Tensor) -> Tensor:
    """`W + W B + B`, block by block."""
    return weight + _change(weight, block)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
    """`x W^T + bias + M^T s(x)`; of large inputs one step of autograd, which keeps `s(x)` alone for a frozen base."""
    if not fused.pays(x):
        return F.linear(x, weight, bias) + _folded(x, len(block)) @ block
    folded = _folded(x.reshape(-1, x.shape[-1]), len(block))
    if torch.is_grad_enabled():
        result: Tensor = _Linear.apply(x, weight, bias, folded, block)  # type: ignore[no-untyped-call,unused-ignore]
        return result
    return fused.shaped(fused.base_output(x, weight, bias).addmm_(folded, block), x)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, folded: Tensor, block: Tensor) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight, folded, block)
        return fused.shaped(fused.base_output(x, weight, bias).addmm_(folded, block), x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, folded, block = ctx.saved_tensors
        for_x, for_weight, for_bias, _, for_block = ctx.needs_input_grad
        flat, gx = g.reshape(-1, g.shape[-1]), None
        if for_x:  # with what comes through `s(x)`, which is an input for the sake of second derivatives alone
            gx = flat @ weight
            gx.view(len(gx), gx.shape[1] // len(block), len(block)).add_((flat @ block.mT).unsqueeze(1))
            gx = gx.view(*g.shape[:-1], gx.shape[-1])
        gw = flat.mT @ x.reshape(-1, x.shape[-1]) if for_weight else None
        return gx, gw, flat.sum(0) if for_bias else None, None, folded.mT @ flat if for_block else None


MissConfig.method = Method(
    name="MISS",
    config=MissConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=MissConstants,
    routed=routed,
    varying=frozenset({"init_weights"}),
    abilities=(RunsInOneStep(_decide),),
)


def _infer(config: MissConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the size of the shards, from the first axis of a block, which `bat` has twice at the end."""
    axis = 1 if FORMS[config.init_weights] == "bat" else 0
    sizes = {leaves["miss_block"].shape[axis] for leaves in found.values() if "miss_block" in leaves}
    return {"r": sizes.pop()} if len(sizes) == 1 and sizes != {config.r} else {}


MissConfig.form = PeftFormat(
    prefix="miss_",
    layers="Miss{}",
    parameters=("miss_block",),
    dropout="miss_dropout",
    infer=_infer,
    values={
        "miss_r": Value(lambda config, site: site.constants.r),
        "miss_mini_r": Value(lambda config, site: site.constants.mini_r),
    },
    only_here=("fan_in_fan_out",),
)
