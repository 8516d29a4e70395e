"""PVeRA: probabilistic vector-based random matrix adaptation, VeRA with a latent vector that is normal.

    y = base(x) + b * (B z),    z = m + e * exp(v / 2),    (m, v) = d * (A x)

`A` and `B` are random, frozen and shared by all modules; `e` is drawn from the standard normal distribution in training
and is zero in evaluation, where `z` is its mean. A merged weight is that of the mean.

Fillioux et al., *PVeRA: Probabilistic Vector-Based Random Matrix Adaptation*, 2025, arXiv:2512.07703. Names, defaults
and initial distributions are those of PEFT's `tuners/pvera`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.functional import (
    Constants,
    DrawsNoise,
    Layer,
    Method,
    PerAdapter,
    Rows,
    Site,
    UnsupportedCall,
    Varying,
    Weights,
    widen,
)

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.called import DROPOUT, dropped
from .shared.projections import check_rank, draw_pair


@dataclasses.dataclass(kw_only=True)
class PveraConfig(AdapterConfig):
    """PVeRA learns two vectors per module, around one pair of random matrices, of the mean and variance of a latent.

    Supports linear layers (also `transformers`' `Conv1D`). The shared matrices are constants of the graft, drawn from
    `projection_prng_key` alone, and no leaves of the tree.

    Noise is drawn from torch's generator, as that of dropout is: `torch.manual_seed` fixes it, `torch.vmap` takes
    `randomness=`, and the adapters of a `Bank` have generators of their own. With `generator_seed` each module has one
    too, as in PEFT, which goes on from call to call: `graft.sites[""][path].constants.noise.generator`, whose state
    can be read and set. `sample_latent` is the function, for noise that is given.

    Attributes:
        r: Rank.
        projection_prng_key: Seed of the shared matrices.
        save_projection: Whether files hold the shared matrices too.
        pvera_dropout: Probability of dropout on the adapter's input, in training mode.
        d_initial: Initial value of the vector `d`.
        init_weights: `True` for a constant `d` and a zero `b`, `False` for a normal `d` and a `b` of ones.
        sample_at_inference: Draw noise in evaluation mode too.
        generator_seed: Seed of a generator for each module; `None` for torch's own.

    >>> PveraConfig(r=64, target_modules=["q_proj"]).sample_at_inference
    False
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r > 0, self, f"r is {self.r!r}, expected a positive integer")
        require(0 <= self.pvera_dropout < 1, self, f"pvera_dropout is {self.pvera_dropout}, expected 0 <= p < 1")


@dataclasses.dataclass(frozen=True)
class Noise:
    """The source of a module's noise; two are equal where their seeds are."""

    seed: int
    generator: torch.Generator = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True, eq=False)
class PveraConstants(Constants):
    """The matrices that all sites share, `"2*r max_in"` and `"max_out r"`, and where noise comes from, if not torch."""

    pvera_A: Varying[Tensor]
    pvera_B: Varying[Tensor]
    noise: Noise | None


def plan(config: PveraConfig, sites: list[Site], weights: Weights) -> dict[str, PveraConstants]:
    """Return the shared matrices and, where the config has a seed, a generator for each site."""
    a, b = draw_pair(config.projection_prng_key, sites, 2 * config.r, config.r)
    return {site.path: PveraConstants(a, b, _noise(config.generator_seed)) for site in sites}


def _noise(seed: int | None) -> Noise | None:
    return None if seed is None else Noise(seed, torch.Generator("cpu").manual_seed(seed))


def shapes(config: PveraConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`pvera_lambda_b` is `"out"`, `pvera_lambda_d` is `"2*r"`, of the mean and of the logarithm of the variance."""
    return {"pvera_lambda_b": (site.out_features,), "pvera_lambda_d": (2 * config.r,)}


def init(
    config: PveraConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws; a constant `d` uses up the same random numbers."""
    made = {}
    for site in sites:
        b = torch.ones(site.out_features, dtype=torch.float32)
        d = torch.randn(2 * config.r, dtype=torch.float32, generator=generator)
        if config.init_weights:
            b, d = torch.zeros_like(b), torch.full_like(d, config.d_initial)
        made[site.path] = {"pvera_lambda_b": b, "pvera_lambda_d": d}
    return made


def sample_latent(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """`m + e * exp(v / 2)`: a sample of a normal distribution, differentiable in its parameters.

    Args:
        mean: `m`, `"... r"`.
        log_variance: `v`, `"... r"`.
        noise: `e`, standard normal, `"... r"`.

    >>> sample_latent(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0.5]))
    tensor([1.5000])
    """
    return torch.addcmul(mean, noise, (0.5 * log_variance).exp())


def apply(config: PveraConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + b * (B z)`, the sum in the wider dtype and rounded once to the base's."""
    y = base(x)
    x = dropped(x, leaves.get(DROPOUT, config.pvera_dropout), base.training)
    x, lambda_b, lambda_d = widen(x, leaves["pvera_lambda_b"], leaves["pvera_lambda_d"])
    a, b = _projections(config, site, base.training, x.dtype)
    z = _latent(site, F.linear(x, a), lambda_d)
    wide, lambda_b, up = widen(y, lambda_b, F.linear(z, b))
    return torch.addcmul(wide, lambda_b, up).to(y.dtype)


def routed(config: PveraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with vectors for each row; adapters with projections of their own take the general way."""
    if isinstance(site.constants.pvera_A, PerAdapter) or isinstance(site.constants.pvera_B, PerAdapter):
        return NotImplemented
    if rows.noise is not None and site.constants.noise is not None:
        raise UnsupportedCall(
            f"{site.path}: each adapter has a generator of its own here, and generator_seed is "
            f"{config.generator_seed}, of a generator of the module's; set generator_seed=None"
        )
    y = base(x)
    if config.pvera_dropout:
        x = F.dropout(x, config.pvera_dropout, training=base.training)
    x, lambda_b, lambda_d = widen(x, leaves["pvera_lambda_b"], leaves["pvera_lambda_d"])
    a, b = _projections(config, site, base.training, x.dtype)
    groups = rows.groups()
    lambda_b, lambda_d = (groups.pick(vector).unsqueeze(1) for vector in (lambda_b, lambda_d))
    z = _latent(site, F.linear(x, a).reshape(groups.size, -1, a.shape[0]), lambda_d)
    wide, lambda_b, up = widen(y, lambda_b, F.linear(z, b))
    return torch.addcmul(wide.reshape(up.shape), lambda_b, up).view(y.shape).to(y.dtype)


def merge(
    config: PveraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + diag(b) B diag(d) A` of the mean."""
    a, b = _projections(dataclasses.replace(config, sample_at_inference=False), site, False, weight.dtype)
    mean = leaves["pvera_lambda_d"][: config.r]
    return torch.addmm(weight, leaves["pvera_lambda_b"].unsqueeze(1) * b, mean.unsqueeze(1) * a), bias


def _latent(site: Site, projected: Tensor, lambda_d: Tensor) -> Tensor:
    """Return `z`, a sample where the variance was projected too, else the mean."""
    size = projected.shape[-1]
    if size < lambda_d.shape[-1]:
        return lambda_d[..., :size] * projected
    mean, log_variance = (lambda_d * projected).chunk(2, -1)
    source = site.constants.noise
    if source is None:
        return sample_latent(mean, log_variance, torch.randn_like(mean))
    drawn = torch.randn(mean.shape, dtype=mean.dtype, generator=source.generator, device="cpu")
    return sample_latent(mean, log_variance, drawn.to(mean.device))


def _projections(config: PveraConfig, site: Site, training: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the site's part of the shared matrices, without the variance's where there is no noise."""
    sampling = training or config.sample_at_inference
    a = site.constants.pvera_A[: (2 if sampling else 1) * config.r, : site.in_features]
    return a.to(dtype), site.constants.pvera_B[: site.out_features].to(dtype)


PveraConfig.method = Method(
    name="PVERA",
    config=PveraConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=PveraConstants,
    routed=routed,
    varying=frozenset({"projection_prng_key", "save_projection", "d_initial", "init_weights"}),
    abilities=(DrawsNoise(),),
)


PveraConfig.form = PeftFormat(
    prefix="pvera_",
    dropout="pvera_dropout",
    parameters=("pvera_lambda_b", "pvera_lambda_d"),
    values={
        "r": Value(lambda config, site: config.r),
        "sample_at_inference": Value(lambda config, site: config.sample_at_inference),
        "pvera_generator": Value(lambda config, site: site.constants.noise and site.constants.noise.generator),
        "pvera_A": Value(lambda config, site: site.constants.pvera_A),
        "pvera_B": Value(lambda config, site: site.constants.pvera_B),
    },
    infer=lambda config, found: {"r": len(next(iter(found.values()))["pvera_lambda_d"]) // 2},
    shared=("pvera_A", "pvera_B"),
    saves_shared=lambda config: config.save_projection,
    check=lambda config, found: check_rank(config, found, "pvera_lambda_d", 2 * config.r, "2*r"),
    reads=("sample_at_inference",),
    only_here=("exclude_modules",),
)
