"""LoKr: low-rank adaptation by a Kronecker product.

    y = base(x) + s (C (x) D) x,    s = alpha / r,    C = C1 C2 or whole,    D = D1 D2 or whole

With `C`, `"l m"`, and `D`, `"k n"`, the weight's axes are `out = l k` and `in = m n`, and `D` has the kernel of a
convolution too. The product is applied without being made: an input `"m n"` becomes `C (x D^T)`. With
`use_effective_conv2d` the factor `D` of a kernel is a Tucker decomposition, `D[p, q] = sum_ij A[i, p] T[i, j] B[j, q]`
at each place of it.

Yeh et al., *Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation*, 2023,
arXiv:2309.14859. Names, defaults and initial distributions are those of PEFT's `tuners/lokr`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import Layer, Method, Site, TakesComplex, Weights, widen
from torchgraft.functional.extending import add_scaled

from .._config.base import AdapterConfig
from .._config.matching import by_pattern
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.lycoris import VALUES, RankConstants, check_dropouts, drop_outputs, plan
from .shared.scalings import of_patterns, ranks_of


@dataclasses.dataclass(kw_only=True)
class LoKrConfig(AdapterConfig):
    """LoKr adds the Kronecker product of two small matrices to each targeted weight.

    Supports linear layers and 1- and 2-d convolutions, as PEFT does, and beyond it `transformers`' `Conv1D`, embeddings
    and 3-d convolutions. In groups, a convolution's weight is a matrix `"out in/groups"`, as in PEFT.

    The second factor is whole where its rank would be half of its larger axis or more, and so is the first; the first
    is also whole without `decompose_both`. Leaves are whole or in two accordingly.

    Where PEFT does otherwise: it pads with zeros, whatever the base's padding mode, and with `rank_dropout_scale` a
    rank dropout that drops all outputs gives NaN; here the adapter adds nothing then. Where PEFT departs from the paper
    it is followed, for its files: a whole second factor of a 1-d convolution is multiplied over its last two axes, so
    that the product, read as `"out in kernel"`, is no Kronecker product of the channels.

    Attributes:
        r: Rank of the factors that are in two.
        alpha: Numerator of the scaling factor.
        rank_dropout: Probability for an output to lose the adapter's part, in training mode. The same outputs for the
            whole batch, as in PEFT.
        module_dropout: Probability for a module to lose the adapter's part, in training mode; not scaled up, as in
            PEFT.
        use_effective_conv2d: Decompose kernels as tensors, of convolutions whose kernel is larger than 1.
        decompose_both: Whether the first factor may be in two as well.
        decompose_factor: The first part of each axis, `l` and `m`, where it divides the axis; else the largest divisor
            up to it. `-1` for the two divisors that are nearest to each other.
        rank_dropout_scale: Whether outputs that are kept are scaled up by the share that was kept.
        init_weights: `True` for a zero first factor, `"lycoris"` for a zero second one, `False` for all random.
        rank_pattern: Ranks by pattern of the end of a module's name; the first that matches counts.
        alpha_pattern: The same for `alpha`.

    >>> LoKrConfig(r=4, target_modules=["q_proj"]).decompose_factor
    -1
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dropouts(self)
        factor, start = self.decompose_factor, self.init_weights
        require(factor == -1 or factor > 0, self, f"decompose_factor is {factor}, expected -1 or a positive integer")
        known = isinstance(start, bool) or start == "lycoris"
        require(known, self, f"init_weights is {start!r}, expected True, False or 'lycoris'")


@functools.lru_cache(maxsize=1024)
def split(size: int, factor: int) -> tuple[int, int]:
    """Return the two factors of the size of an axis, as LyCORIS and PEFT choose them.

    >>> split(512, -1), split(12, 6), split(12, 8), split(7, -1)
    ((16, 32), (6, 2), (3, 4), (1, 7))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = next(one for one in range(most, 0, -1) if size % one == 0)
    return first, size // first


def shapes(config: LoKrConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """The first factor is `"l m"` or `"l r"` and `"r m"`; the second `"k n *kernel"` or `"k r"` and `"r n*kernel"`.

    With Tucker the second is `"r r *kernel"` (of a 1-d convolution with an axis of 1 more), `"r k"` and `"r n"`.
    """
    r, (out, fan_in, *kernel) = site.constants.r, site.weight_shape
    (outer, inner), (groups, size) = split(out, config.decompose_factor), split(fan_in, config.decompose_factor)
    found: dict[str, tuple[int, ...]] = {}
    if config.decompose_both and 2 * r < max(outer, groups):
        found |= {"lokr_w1_a": (outer, r), "lokr_w1_b": (r, groups)}
    else:
        found["lokr_w1"] = (outer, groups)
    if 2 * r >= max(inner, size):
        found["lokr_w2"] = (inner, size, *kernel)
    elif config.use_effective_conv2d and math.prod(kernel) > 1:
        found |= {"lokr_w2_a": (r, inner), "lokr_w2_b": (r, size)}
        found["lokr_t2"] = (r, r, *kernel) if len(kernel) > 1 else (r, r, *kernel, 1)
    else:
        found |= {"lokr_w2_a": (inner, r), "lokr_w2_b": (r, size * math.prod(kernel))}
    return found


LEAVES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
"""All leaves, in PEFT's order."""

ZEROS: Mapping[Any, tuple[str, ...]] = {True: LEAVES[:2], "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}
"""Leaves that are zero at first, by `init_weights`."""


def init(
    config: LoKrConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws: one state of the generator gives PEFT's numbers, bit for bit."""
    made = {}
    for site in sites:
        shape = shapes(config, site)
        leaves = {leaf: torch.zeros(shape[leaf], dtype=torch.float32) for leaf in LEAVES if leaf in shape}
        for leaf, tensor in leaves.items():
            if leaf not in ZEROS[config.init_weights]:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
        made[site.path] = leaves
    return made


def apply(config: LoKrConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + s (C (x) D) x`, the sum in the wider dtype and rounded once to the base's.

    The product is made only for convolutions in groups and for whole second factors of 1-d convolutions.
    """
    y = base(x)
    if site.kind == "embedding":
        part = _looked_up(leaves, x)
    elif site.kind == "linear":
        part = _multiplied(leaves, x)
    elif site.groups == 1 and not _is_permuted(site, leaves):
        part = _convolved(site, leaves, x)
    else:
        x, weight = widen(x, _product(site, leaves))
        part = site.call(x, weight)
    factor = drop_outputs(config, site.out_features, part, base.training, config.rank_dropout_scale)
    if factor is not None:
        part = part * factor.to(part.dtype).view(-1, *(1 for _ in site.kernel_size))
    return add_scaled(y, part, site.constants.scaling)


def merge(
    config: LoKrConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + s C (x) D`."""
    return add_scaled(weight, _product(site, leaves), site.constants.scaling), bias


def _first(leaves: dict[str, Tensor]) -> Tensor:
    """`C`, `"l m"`."""
    return leaves["lokr_w1"] if "lokr_w1" in leaves else leaves["lokr_w1_a"] @ leaves["lokr_w1_b"]


def _steps(leaves: dict[str, Tensor]) -> list[Tensor]:
    """Return the maps that make up `D`, in the order in which an input meets them."""
    if "lokr_w2" in leaves:
        return [leaves["lokr_w2"]]
    if "lokr_t2" in leaves:
        return [leaves["lokr_w2_b"], leaves["lokr_t2"], leaves["lokr_w2_a"].mT]
    return [leaves["lokr_w2_b"], leaves["lokr_w2_a"]]


def _multiplied(leaves: dict[str, Tensor], x: Tensor) -> Tensor:
    """`(C (x) D) x` for a linear layer."""
    x, first, down, *up = widen(x, _first(leaves), *_steps(leaves))
    x = first @ F.linear(x.unflatten(-1, (first.shape[1], down.shape[1])), down)
    for step in up:
        x = F.linear(x, step)
    return x.flatten(-2)


def _looked_up(leaves: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Return columns of `C (x) D`, each the product of a column of `C` and one of `D`."""
    first, down, *up = widen(_first(leaves), *_steps(leaves))
    outer, inner = F.embedding(ids // down.shape[1], first.mT), F.embedding(ids % down.shape[1], down.mT)
    for step in up:
        inner = F.linear(inner, step)
    return (outer.unsqueeze(-1) * inner.unsqueeze(-2)).flatten(-2)


def _convolved(site: Site, leaves: dict[str, Tensor], x: Tensor) -> Tensor:
    """`(C (x) D) x` for a convolution: `D` in each of the groups of inputs, then `C` between the groups."""
    x, first, *steps = widen(x, _first(leaves), *_steps(leaves))
    groups, channels, ones = first.shape[1], -1 - len(site.kernel_size), (..., *(None for _ in site.kernel_size))
    batch = x.shape[:channels]
    x = x.unflatten(channels, (groups, -1)).flatten(0, channels - 1)
    if len(steps) == 3:
        x = site.pointwise(x, steps.pop(0)[ones])
    kernel, *up = steps
    x = site.convolve(x, kernel.reshape(-1, x.shape[channels], *site.kernel_size))
    inner = x.shape[channels:]
    x = (first @ x.reshape(*batch, groups, math.prod(inner))).reshape(-1, *inner)
    for step in up:
        x = site.pointwise(x, step[ones])
    return x.reshape(*batch, site.out_features, *inner[1:])


def _product(site: Site, leaves: dict[str, Tensor]) -> Tensor:
    """`C (x) D`, in the shape of the weight."""
    first, steps = _first(leaves), _steps(leaves)
    if "lokr_t2" in leaves:
        second = torch.einsum("jq,ij...,pi->pq...", *steps)
    else:
        second = steps[0] if len(steps) == 1 else steps[1] @ steps[0]
    second = second.clone(memory_format=torch.contiguous_format)  # kron fails on odd strides, also of axes of 1
    ones = 0 if _is_permuted(site, leaves) else second.ndim - 2
    return torch.kron(first[(..., *(None for _ in range(ones)))], second).reshape(site.weight_shape)


def _is_permuted(site: Site, leaves: dict[str, Tensor]) -> bool:
    """Return whether the product is the one over the last two axes, as PEFT makes it of a whole 1-d kernel."""
    return site.kind == "conv1d" and "lokr_w2" in leaves


LoKrConfig.method = Method(
    name="LOKR",
    config=LoKrConfig,
    kinds=frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=RankConstants,
    varying=frozenset({"r", "alpha", "init_weights", "rank_pattern", "alpha_pattern"}),
    abilities=(TakesComplex(),),
)


def _infer(config: LoKrConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return ranks that differ from the config's, and how factors are in two."""
    ranks = {path: _rank(by_pattern(config.rank_pattern, path, config.r), leaves) for path, leaves in found.items()}
    both = config.decompose_both or any("lokr_w1_a" in leaves for leaves in found.values())
    tucker = config.use_effective_conv2d or any("lokr_t2" in leaves for leaves in found.values())
    forms = {"decompose_both": both, "use_effective_conv2d": tucker, "decompose_factor": _factor(config, found)}
    return ranks_of(config, ranks) | forms


def _rank(r: int, leaves: Mapping[str, Tensor]) -> int:
    """Return the rank of factors in two; of whole ones `r`, or the least for which they are whole."""
    for leaf in ("lokr_w1_b", "lokr_w2_b"):
        if leaf in leaves:
            return len(leaves[leaf])
    return max(r, (max(leaves["lokr_w2"].shape[:2]) + 1) // 2) if "lokr_w2" in leaves else r


def _factor(config: LoKrConfig, found: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Return the `decompose_factor` that splits outputs as these leaves have them: the config's own where it does."""
    pairs = set()
    for leaves in found.values():
        first, second = (leaves.get(f"lokr_w{i}", leaves.get(f"lokr_w{i}_a")) for i in "12")
        if first is not None and second is not None:
            pairs.add((len(first), second.shape[1 if "lokr_t2" in leaves else 0]))
    tried = (config.decompose_factor, -1, *sorted({first for first, _ in pairs}))
    fits = (one for one in tried if all(split(math.prod(pair), one) == pair for pair in pairs))
    return next(fits, config.decompose_factor)


LoKrConfig.form = PeftFormat(
    prefix="lokr_",
    parameters=LEAVES,
    infer=_infer,
    express=of_patterns,
    values={**VALUES, "rank_dropout_scale": Value(lambda config, site: config.rank_dropout_scale)},
    only_here=("bias", "fan_in_fan_out"),
)
