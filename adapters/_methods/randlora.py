"""RandLoRA: an update of full rank from random matrices of low rank.

    y = base(x) + s B D x,    D_k = diag(l_k) A diag(g_k),    s = alpha / r

`A` and the blocks of `B` are random, frozen and shared by all modules; each of the `n = min(in, out) / r` products of
rank `r` has two trained vectors, `l_k` and `g_k`. `D` stands on the smaller side of the weight: of a module with more
inputs than outputs the update is its transpose, `D^T B^T`. The rows of `D` meet the columns of `B` as PEFT lays them
out: row `(i, k)` is number `i n + k`, column `(k, i)` number `k r + i`.

Albert et al., *RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models*, 2025, arXiv:2502.00987. Names,
defaults and initial distributions are those of PEFT's `tuners/randlora`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import Constants, Layer, Method, PerAdapter, Rows, Site, Varying, Weights, widen
from torchgraft.functional.extending import add_scaled

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared import remade
from .shared.called import DROPOUT, dropped
from .shared.low_rank import add_product

BASES = ("randlora_A", "randlora_B")
"""The shared random matrices."""


@dataclasses.dataclass(kw_only=True)
class RandLoraConfig(AdapterConfig):
    """RandLoRA adds products of random matrices, each rescaled by two learned vectors, to each targeted weight.

    Supports linear layers (also `transformers`' `Conv1D`). The shared matrices are as large as the largest targeted
    module; each module takes its first rows and columns. They are constants of the graft, drawn from
    `projection_prng_key` alone, in bfloat16 as PEFT draws them, and no leaves of the tree.

    Where PEFT does otherwise: state dicts and files have the shared matrices once more for every module there, which is
    as much as all targeted weights; here once for all, which PEFT reads too.

    Attributes:
        r: Rank of the random matrices: the smaller, the more of them, and the more parameters.
        projection_prng_key: Seed of the shared matrices.
        save_projection: Whether files hold the shared matrices too.
        sparse: Draw shared matrices two thirds of whose entries are zero, and the others of one size.
        very_sparse: The same with a share of `1 / sqrt(min(in, out))` that is not zero; counts before `sparse`.
        randlora_dropout: Probability of dropout on the adapter's input, in training mode.
        randlora_alpha: Numerator of the scaling factor.
        init_weights: `True` for a zero `l`, the identity, `False` for a normal one.

    >>> RandLoraConfig(r=16, target_modules=["q_proj"]).randlora_alpha
    640
    """

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    randlora_alpha: int = 640
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r > 0, self, f"r is {self.r}, expected a positive integer")
        p = self.randlora_dropout
        require(0 <= p < 1, self, f"randlora_dropout is {p}, expected 0 <= p < 1")


@dataclasses.dataclass(frozen=True, eq=False)
class RandLoraConstants(Constants):
    """Factor, and the matrices that all sites share: `"r 1 min"` and `"max n r"`, over all sites."""

    scaling: Varying[float]
    randlora_A: Varying[Tensor]
    randlora_B: Varying[Tensor]


def plan(config: RandLoraConfig, sites: list[Site], weights: Weights) -> dict[str, RandLoraConstants]:
    """Return the shared matrices, of the largest numbers of inputs and of outputs."""
    largest = max(site.in_features for site in sites), max(site.out_features for site in sites)
    shapes = (config.r, 1, min(largest)), (max(largest), math.ceil(min(largest) / config.r), config.r)
    generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
    if config.very_sparse or config.sparse:
        share = math.sqrt(min(largest)) if config.very_sparse else 3
        drawn = [torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes]
        signs = [(one > 1 - 1 / (2 * share)).float() - (one < 1 / (2 * share)).float() for one in drawn]
        a, b = (one / one.std() for one in signs)
    else:
        a = _uniform(shapes[0], generator)
        b = torch.cat([_uniform((max(largest), 1, config.r), generator) for _ in range(shapes[1][1])], 1)
        a, b = ((one / one.std()).float() for one in (a, b))
    require(
        bool(a.isfinite().all() and b.isfinite().all()),
        config,
        "the sparse shared matrices have no entry that is not zero; set sparse=True, very_sparse=False or another "
        "projection_prng_key",
    )
    return {site.path: RandLoraConstants(config.randlora_alpha / config.r, a, b) for site in sites}


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    drawn: Tensor = nn.init.kaiming_uniform_(
        torch.empty(shape, dtype=torch.bfloat16, device="cpu"), a=math.sqrt(5), generator=generator
    )
    return drawn


def shapes(config: RandLoraConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`l` is `"r n"`, `g` is `"n min(in,out)"`."""
    smaller = min(site.in_features, site.out_features)
    count = math.ceil(smaller / config.r)
    return {"randlora_lambda": (config.r, count), "randlora_gamma": (count, smaller)}


def init(
    config: RandLoraConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws; a zero `l` uses up the same random numbers."""
    made = {}
    for site in sites:
        shape = shapes(config, site)
        first = torch.randn(shape["randlora_lambda"], dtype=torch.float32, generator=generator)
        second = torch.ones(shape["randlora_gamma"], dtype=torch.float32)
        if config.init_weights:
            first, second = torch.zeros_like(first), torch.full_like(second, 1 / max(second.shape))
        else:
            second = second / max(site.in_features, site.out_features)
        made[site.path] = {"randlora_lambda": first, "randlora_gamma": second}
    return made


def apply(config: RandLoraConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + s B D dropout(x)`, the sum in the wider dtype and rounded once to the base's; `D` is not kept."""
    y = base(x)
    x = dropped(x, leaves.get(DROPOUT, config.randlora_dropout), base.training)
    x, first, second = widen(x, leaves["randlora_lambda"], leaves["randlora_gamma"])
    a, b = _bases(site, second.shape[0], x.dtype)
    if _is_narrow(site):
        return add_product(y, remade.linear(_rows, x, a, None, first, second), b, site.constants.scaling)
    added = remade.linear(_columns, F.linear(x, b.mT), a, None, first, second)
    return add_scaled(y, added, site.constants.scaling)


def routed(config: RandLoraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with a `D` for each adapter; bases or factors that differ, and noise, take the general way."""
    constants = site.constants
    if any(isinstance(one, PerAdapter) for one in (constants.randlora_A, constants.randlora_B, constants.scaling)):
        return NotImplemented
    if config.randlora_dropout and base.training:
        return NotImplemented
    y, groups = base(x), rows.groups()
    x, first, second = widen(x, leaves["randlora_lambda"], leaves["randlora_gamma"])
    a, b = _bases(site, second.shape[-2], x.dtype)
    made = groups.pick(_rows(a, first, second))
    if _is_narrow(site):
        added = F.linear(x.reshape(groups.size, -1, x.shape[-1]) @ made.mT, b)
    else:
        added = F.linear(x, b.mT).reshape(groups.size, -1, b.shape[1]) @ made
    return add_scaled(y, groups.mask(added).reshape(y.shape), constants.scaling)


def merge(
    config: RandLoraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + s B D`, or `W + s (B D)^T`."""
    a, b = _bases(site, leaves["randlora_gamma"].shape[0], weight.dtype)
    update = b @ _rows(a, leaves["randlora_lambda"], leaves["randlora_gamma"])
    return add_scaled(weight, update if _is_narrow(site) else update.mT, site.constants.scaling), bias


def _is_narrow(site: Site) -> bool:
    """Return whether the trained vectors are on the side of the inputs."""
    return site.in_features <= site.out_features


def _bases(site: Site, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the site's part of the shared matrices, `"r min"` and `"max n*r"`."""
    smaller, larger = sorted((site.in_features, site.out_features))
    a, b = site.constants.randlora_A[:, 0, :smaller], site.constants.randlora_B[:larger, :count].flatten(1)
    return a.to(dtype), b.to(dtype)


def _rows(a: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`D`, `"... r*n min"`, row `(i, k)` of which is `l_ik a_i * g_k`."""
    return ((first.unsqueeze(-1) * a.unsqueeze(1)) * second.unsqueeze(-3)).flatten(-3, -2)


def _columns(a: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`D^T`."""
    return _rows(a, first, second).mT


RandLoraConfig.method = Method(
    name="RANDLORA",
    config=RandLoraConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=RandLoraConstants,
    routed=routed,
    varying=frozenset(
        {"projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_alpha", "init_weights"}
    ),
)


def _unpack(config: RandLoraConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without what PEFT's have once more for every module."""
    ends = tuple(f".{name}" for name in BASES)
    shared = {f"base_model.{name}" for name in BASES}
    return {key: tensor for key, tensor in state.items() if key in shared or not key.endswith(ends)}


def _check(config: RandLoraConfig, found: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Hold the rank, by which `plan` makes the shared matrices, against the tensors."""
    given = {path: len(leaves["randlora_lambda"]) for path, leaves in found.items() if "randlora_lambda" in leaves}
    require(bool(given), config, f"there is no randlora_lambda to hold r={config.r} against")
    for path, r in given.items():
        require(r == config.r, config, f"r is {config.r}, and randlora_lambda of {path} has {r} rows, expected r")


RandLoraConfig.form = PeftFormat(
    prefix="randlora_",
    dropout="randlora_dropout",
    parameters=("randlora_lambda", "randlora_gamma"),
    ranked=("randlora_lambda",),
    values={
        "r": Value(lambda config, site: config.r),
        "scaling": Value(lambda config, site: site.constants.scaling),
        "randlora_A": Value(lambda config, site: site.constants.randlora_A),
        "randlora_B": Value(lambda config, site: site.constants.randlora_B),
    },
    infer=lambda config, found: {"r": len(next(iter(found.values()))["randlora_lambda"])},
    shared=BASES,
    saves_shared=lambda config: config.save_projection,
    check=_check,
    unpack=_unpack,
    only_here=("exclude_modules",),
)
