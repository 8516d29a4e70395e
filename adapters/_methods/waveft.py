"""WaveFT: a few coefficients of the weight's wavelet transform.

    y = base(x) + s sum_k c_k p_k (q_k . x),    p_k and q_k shifted filters of a wavelet

Each of `n` coefficients, whose places are drawn from a seed, is a small block of the weight: a product of two filters,
of `F` numbers each, low- or high-pass by the quarter of the transform that the place is in. The weight is a sum of `n`
such blocks. One token costs `2 n F` products; for many the weight is made, and not kept for the backward. The inverse
transform is never run. Without it, `use_idwt=False`, a coefficient is one entry of the weight.

Bilican et al., *Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets*, 2025, arXiv:2505.12532. Names,
defaults, places and initial distributions are those of PEFT's `tuners/waveft`, and so is which quarter has which
filters: the rows' by the half of the columns, and the other way round.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchgraft.functional import Constants, Layer, Method, Site, Varying, Weights
from torchgraft.functional.extending import add_scaled

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.spectra import add_made, counts_of, infer_counts, plan_each, scaled
from .shared.wavelets import FAMILIES, filters_of

_GATHER = 16
"""Entries of a weight that are multiplied while one number of a filter is gathered or scattered."""


@dataclasses.dataclass(kw_only=True)
class WaveFTConfig(AdapterConfig):
    """WaveFT adds a weight of which a few wavelet coefficients are learned, at places that a seed chooses.

    Supports linear layers (also `transformers`' `Conv1D`) and, what PEFT refuses, convolutions in any number of groups,
    whose weight is a matrix, `"out in/groups*kernel"`.

    Where PEFT does otherwise: for most names that it takes it has no filters, which fails in the forward, and its
    `coif4` and `coif5` are no wavelets (not orthogonal to their shifts); all of these are errors here.

    Attributes:
        n_frequency: Number of coefficients of each module.
        scaling: Factor of the weight that is added.
        wavelet_family: `"db1"` to `"db10"`, `"sym2"` to `"sym10"` or `"coif1"` to `"coif3"`.
        use_idwt: Whether coefficients are those of the transform; else they are entries of the weight.
        random_loc_seed: Seed of the places of the coefficients.
        n_frequency_pattern: Numbers by pattern of the end of a module's name; the first that matches counts.
        proportional_parameters: Divide `n_frequency` times the number of modules among them by the sizes of their
            weights; the pattern has no effect then.
        init_weights: `True` for zeros, the identity, `False` for normal numbers of standard deviation 0.01.

    >>> WaveFTConfig(n_frequency=500, target_modules=["q_proj"]).wavelet_family
    'db1'
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    n_frequency_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.use_idwt or self.wavelet_family in FAMILIES,
            self,
            f"wavelet_family is {self.wavelet_family!r}, expected one of {', '.join(FAMILIES)}",
        )
        require(
            not (self.proportional_parameters and self.n_frequency_pattern),
            self,
            "proportional_parameters is True, so n_frequency_pattern has no effect; set one",
        )


@dataclasses.dataclass(frozen=True, eq=False)
class WaveFTConstants(Constants):
    """Factor, and the filters of each coefficient as rows and columns of the weight, and their numbers there.

    Attributes:
        n: Number of coefficients.
        scaling: Factor.
        rows: `"n F"`.
        columns: `"n F"`.
        of_rows: `"n F"`, float64; zero beyond the weight's edge.
        of_columns: `"n F"`, float64.
    """

    n: Varying[int]
    scaling: Varying[float]
    rows: Varying[Tensor]
    columns: Varying[Tensor]
    of_rows: Varying[Tensor]
    of_columns: Varying[Tensor]


def plan(config: WaveFTConfig, sites: list[Site], weights: Weights) -> dict[str, WaveFTConstants]:
    """Draw the places of each site's coefficients, and lay their filters out."""
    filters = torch.tensor(
        filters_of(config.wavelet_family) if config.use_idwt else [], dtype=torch.float64, device="cpu"
    )

    def make(m: int, n: int, row: Tensor, column: Tensor) -> WaveFTConstants:
        if not config.use_idwt:
            one = torch.ones_like(row, dtype=torch.float64).unsqueeze(1)
            return WaveFTConstants(len(row), config.scaling, row.unsqueeze(1), column.unsqueeze(1), one, one)
        (j, high_rows), (k, high_columns) = _halved(row, m, filters), _halved(column, n, filters)
        rows, of_rows = _laid_out(j, filters[high_columns.long()], m)
        columns, of_columns = _laid_out(k, filters[high_rows.long()], n)
        return WaveFTConstants(len(row), config.scaling, rows, columns, of_rows, of_columns)

    counts = _proportional(config, sites) if config.proportional_parameters else counts_of(config, sites)
    return plan_each(config, sites, counts, make)


def _proportional(config: WaveFTConfig, sites: list[Site]) -> dict[str, int]:
    """Return the number of coefficients of each site by its share of all weights' entries."""
    sizes = {site.path: math.prod(site.weight_shape) for site in sites}
    share, budget = sum(sizes.values()), config.n_frequency * len(sizes)
    return {path: max(1, round(size / share * budget)) for path, size in sizes.items()}


def _halved(place: Tensor, size: int, filters: Tensor) -> tuple[Tensor, Tensor]:
    """Return where coefficients are in their half of a transform of an axis, and whether that is the second."""
    more = filters.shape[1] - 2
    half = (size + more + 1) // 2
    place = place + (2 * half - size) // 2
    return place % half, place >= half


def _laid_out(place: Tensor, numbers: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return where in an axis filters lie, `"n F"`, and their numbers, zero for those that are beyond it."""
    length = numbers.shape[1]
    at = 2 * place.unsqueeze(1) + torch.arange(length, device="cpu") - (length - 2)
    there = (at >= 0) & (at < size)
    return torch.where(there, at, 0), torch.where(there, numbers, 0)


def shapes(config: WaveFTConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`"n"`."""
    return {"waveft_spectrum": (site.constants.n,)}


def init(
    config: WaveFTConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Zeros, or normal numbers in PEFT's order of draws."""
    made = {}
    for site in sites:
        spectrum = torch.zeros(site.constants.n, dtype=torch.float32)
        if not config.init_weights:
            spectrum = spectrum.normal_(generator=generator) * 0.01
        made[site.path] = {"waveft_spectrum": spectrum}
    return made


def apply(config: WaveFTConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + s sum_k c_k p_k (q_k . x)`; few tokens meet the filters, for many the weight is made."""
    values = scaled(leaves["waveft_spectrum"], site.constants.scaling)
    if site.kind == "linear" and _is_few(x, site):
        y, wide = base(x), torch.promote_types(x.dtype, values.dtype)
        return add_scaled(y, _filtered(site, x.to(wide), values.to(wide)), 1.0)

    def dense(values: Tensor) -> Tensor:
        return _dense(site, values)

    def pull(g: Tensor, x: Tensor, weight: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient of the coefficients: the weight's, in their blocks."""
        blocks, (of_rows, of_columns) = (g.mT @ x).flatten()[_places(site)], _numbers(site, values)
        return (torch.einsum("kij,ki,kj->k", blocks, of_rows, of_columns),)

    return add_made(site, base, x, values, dense, pull)


def merge(
    config: WaveFTConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + s sum_k c_k p_k q_k^T`."""
    return weight + _dense(site, scaled(leaves["waveft_spectrum"], site.constants.scaling)), bias


def _is_few(x: Tensor, site: Site) -> bool:
    """Return whether filters of an input and an output are faster than making a weight."""
    tokens = x.numel() // site.in_features
    numbers: int = site.constants.rows.numel() + site.constants.columns.numel()
    return tokens * numbers * _GATHER < site.in_features * site.out_features


def _numbers(site: Site, like: Tensor) -> tuple[Tensor, Tensor]:
    return site.constants.of_rows.to(like.dtype), site.constants.of_columns.to(like.dtype)


def _places(site: Site) -> Tensor:
    """Return the flat places of all blocks, `"n F F"`."""
    columns = math.prod(site.weight_shape[1:])
    return torch.add(site.constants.columns.unsqueeze(1), site.constants.rows.unsqueeze(2), alpha=columns)


def _filtered(site: Site, x: Tensor, values: Tensor) -> Tensor:
    """`sum_k c_k p_k (q_k . x)` of `"... in"`."""
    of_rows, of_columns = _numbers(site, x)
    each = (x[..., site.constants.columns] * of_columns).sum(-1) * values
    waves = (each.unsqueeze(-1) * of_rows).flatten(-2)
    return waves.new_zeros(*x.shape[:-1], site.out_features).index_add(-1, site.constants.rows.flatten(), waves)


def _dense(site: Site, values: Tensor) -> Tensor:
    """`sum_k c_k p_k q_k^T`, in the shape of the weight."""
    of_rows, of_columns = _numbers(site, values)
    blocks = (values.unsqueeze(1) * of_rows).unsqueeze(2) * of_columns.unsqueeze(1)
    zeros = values.new_zeros(math.prod(site.weight_shape))
    return zeros.index_add(0, _places(site).flatten(), blocks.flatten()).reshape(site.weight_shape)


WaveFTConfig.method = Method(
    name="WAVEFT",
    config=WaveFTConfig,
    kinds=frozenset({"linear", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=WaveFTConstants,
    varying=frozenset(
        {"n_frequency", "scaling", "wavelet_family", "use_idwt", "random_loc_seed", "n_frequency_pattern"}
        | {"proportional_parameters", "init_weights"}
    ),
)


def _infer(config: WaveFTConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the numbers of coefficients, but for those that follow from the sizes of the weights."""
    return {} if config.proportional_parameters else infer_counts(config, found, "waveft_spectrum")


WaveFTConfig.form = PeftFormat(
    prefix="waveft_",
    layers="WaveFT{}",
    parameters=("waveft_spectrum",),
    infer=_infer,
    values={
        "waveft_n_frequency": Value(lambda config, site: site.constants.n),
        "waveft_scaling": Value(lambda config, site: site.constants.scaling),
        "waveft_random_loc_seed": Value(lambda config, site: config.random_loc_seed),
        "waveft_wavelet_family": Value(lambda config, site: config.wavelet_family),
        "waveft_use_idwt": Value(lambda config, site: config.use_idwt),
    },
)
