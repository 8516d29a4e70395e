"""FourierFT: a few coefficients of the weight's Fourier transform.

    y = base(x) + s Re(F^-1 C) x,    C_jk = c_i at the i-th of n places, else 0

`F^-1` is the inverse two-dimensional Fourier transform, with the factor `1 / (rows columns)`, and the places are drawn
from a seed. One token costs two transforms of vectors, `Re F_out^-1 (C (F_in^-1 x))`; for many tokens the weight is
made, by a transform of half of the (symmetric) coefficients, and is not kept for the backward.

Gao et al., *Parameter-Efficient Fine-Tuning with Discrete Fourier Transform*, 2024, arXiv:2405.03003. Names, defaults,
places and initial distributions are those of PEFT's `tuners/fourierft`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from torchgraft.functional import Constants, Layer, Method, Site, Varying, Weights
from torchgraft.functional.extending import add_scaled

from .._config.base import AdapterConfig
from .._config.peft_format import PeftFormat, Value
from .shared.spectra import add_made, counts_of, infer_counts, plan_each, scaled

_TRANSFORM = 8
"""Entries of a weight that can be made while one number of an input or an output is transformed."""


@dataclasses.dataclass(kw_only=True)
class FourierFTConfig(AdapterConfig):
    """FourierFT adds a weight of which a few Fourier coefficients are learned, at places that a seed chooses.

    Supports linear layers (also `transformers`' `Conv1D`) and, what PEFT refuses, convolutions in any number of groups,
    whose weight is a matrix, `"out in/groups*kernel"`. Transforms are computed in float32 or wider; PEFT computes those
    of float64 in float32 too.

    Attributes:
        n_frequency: Number of coefficients of each module.
        scaling: Factor of the weight that is added.
        random_loc_seed: Seed of the places of the coefficients.
        n_frequency_pattern: Numbers by pattern of the end of a module's name; the first that matches counts.
        init_weights: `True` for zeros, the identity, `False`, the default, for normal numbers, so that the adapter
            starts as something else.

    >>> FourierFTConfig(n_frequency=500, target_modules=["q_proj"]).scaling
    150.0
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    n_frequency_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    init_weights: bool = False

    method: ClassVar[Method]


@dataclasses.dataclass(frozen=True, eq=False)
class FourierFTConstants(Constants):
    """Factor, and where the coefficients are: in the spectrum, and in the half of it that a real weight has.

    Attributes:
        n: Number of coefficients.
        scaling: Factor.
        rows: Row of each in the spectrum, `"n"`.
        columns: Column of each, `"n"`.
        halves: Flat places, in `columns // 2 + 1` columns, of each and of the one that mirrors it, `"2 n"`.
        shares: The part of a coefficient that is there, 1/2, or 0 where it is in the other half, `"2 n"`.
    """

    n: Varying[int]
    scaling: Varying[float]
    rows: Varying[Tensor]
    columns: Varying[Tensor]
    halves: Varying[Tensor]
    shares: Varying[Tensor]


def plan(config: FourierFTConfig, sites: list[Site], weights: Weights) -> dict[str, FourierFTConstants]:
    """Draw the places of each site's coefficients."""

    def make(m: int, n: int, j: Tensor, k: Tensor) -> FourierFTConstants:
        rows, columns = torch.stack([j, -j % m]), torch.stack([k, -k % n])
        there = columns <= n // 2
        halves = torch.where(there, rows * (n // 2 + 1) + columns, 0)
        return FourierFTConstants(len(j), config.scaling, j, k, halves, there.float() / 2)

    return plan_each(config, sites, counts_of(config, sites), make)


def _columns(site: Site) -> int:
    """Number of columns of the weight as a matrix."""
    return site.in_features // site.groups * math.prod(site.kernel_size)


def shapes(config: FourierFTConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`"n"`."""
    return {"fourierft_spectrum": (site.constants.n,)}


def init(
    config: FourierFTConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws; zeros use up the same random numbers."""
    made = {}
    for site in sites:
        drawn = torch.randn(site.constants.n, dtype=torch.float32, generator=generator)
        made[site.path] = {"fourierft_spectrum": torch.zeros_like(drawn) if config.init_weights else drawn}
    return made


def apply(config: FourierFTConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + s Re(F^-1 C) x`; few tokens are transformed themselves, for many the weight is made."""
    values = scaled(leaves["fourierft_spectrum"], site.constants.scaling)
    if site.kind == "linear" and _is_few(x, site):
        y, wide = base(x), torch.promote_types(x.dtype, values.dtype)
        return add_scaled(y, _transformed(site, x.to(wide), values.to(wide)), 1.0)

    def dense(values: Tensor) -> Tensor:
        return _dense(site, values)

    def pull(g: Tensor, x: Tensor, weight: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient of the coefficients: the transform of the weight's, at their places."""
        own, mirrored = site.constants.halves
        places = torch.where(site.constants.shares[0] > 0, own, mirrored)
        return (torch.fft.rfft2(g.mT @ x).real.flatten()[places] / weight.numel(),)

    return add_made(site, base, x, values, dense, pull)


def merge(
    config: FourierFTConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + s Re(F^-1 C)`."""
    return weight + _dense(site, scaled(leaves["fourierft_spectrum"], site.constants.scaling)), bias


def _is_few(x: Tensor, site: Site) -> bool:
    """Return whether transforms of an input and an output are faster than making a weight."""
    tokens = x.numel() // site.in_features
    return 0 < tokens * (site.in_features + site.out_features) * _TRANSFORM < site.in_features * site.out_features


def _transformed(site: Site, x: Tensor, values: Tensor) -> Tensor:
    """`Re(F^-1 C) x` of `"... in"` by transforms of the input and the output."""
    at = torch.fft.ifft(x)[..., site.constants.columns] * values
    spectrum = at.new_zeros(*x.shape[:-1], site.out_features).index_add(-1, site.constants.rows, at)
    y: Tensor = torch.fft.ifft(spectrum).real
    return y


def _dense(site: Site, values: Tensor) -> Tensor:
    """`Re(F^-1 C)`, in the shape of the weight: the transform of `C` and its mirror image, each half."""
    m, n = site.weight_shape[0], _columns(site)
    shares = (site.constants.shares.to(values.dtype) * values).flatten()
    half = values.new_zeros(m * (n // 2 + 1)).index_add(0, site.constants.halves.flatten(), shares)
    weight: Tensor = torch.fft.irfft2(half.view(m, -1), s=(m, n))
    return weight.reshape(site.weight_shape)


FourierFTConfig.method = Method(
    name="FOURIERFT",
    config=FourierFTConfig,
    kinds=frozenset({"linear", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=FourierFTConstants,
    varying=frozenset({"n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern", "init_weights"}),
)


FourierFTConfig.form = PeftFormat(
    prefix="fourierft_",
    layers="FourierFT{}",
    parameters=("fourierft_spectrum",),
    infer=lambda config, found: infer_counts(config, found, "fourierft_spectrum"),
    values={
        "fourierft_n_frequency": Value(lambda config, site: site.constants.n),
        "fourierft_scaling": Value(lambda config, site: site.constants.scaling),
        "fourierft_random_loc_seed": Value(lambda config, site: config.random_loc_seed),
        "indices": Value(lambda config, site: torch.stack([site.constants.rows, site.constants.columns])),
    },
)
