"""Weights made of a few coefficients in another basis: where these are, how many, and the step that adds such a weight.

The places of the coefficients are drawn from a seed, so that they are constants and files need not have them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchgraft.functional import Layer, Site
from torchgraft.functional.extending import add_scaled

from ..._config.matching import by_pattern
from ..._config.messages import require
from . import fused, remade
from .scalings import patterns_of, warn_of_unused_patterns

C = TypeVar("C")

Dense = Callable[[Tensor], Tensor]
"""`values -> weight`, linear in its argument and in the shape of the site's weight."""


def counts_of(config: Any, sites: list[Site]) -> dict[str, int]:
    """Return the number of coefficients of each site, by `n_frequency` and its pattern."""
    warn_of_unused_patterns(config, sites, ("n_frequency_pattern",))
    return {site.path: by_pattern(config.n_frequency_pattern, site.path, config.n_frequency) for site in sites}


def plan_each(
    config: Any, sites: list[Site], counts: Mapping[str, int], make: Callable[[int, int, Tensor, Tensor], C]
) -> dict[str, C]:
    """Return what is made of the places of each site's coefficients, which are drawn as PEFT draws them.

    Sites of one size and one number of coefficients share it.

    Args:
        config: An adapter's config.
        sites: Its sites.
        counts: The number of coefficients of each.
        make: `(rows, columns, row, column) -> constants`: the size of the weight as a matrix, and where in it the
            coefficients are, `"n"`.

    Raises:
        ValueError: No coefficient, or more than the weight has entries.
    """

    @functools.cache
    def drawn(rows: int, columns: int, count: int) -> C:
        generator = torch.Generator("cpu").manual_seed(config.random_loc_seed)
        places = torch.randperm(rows * columns, generator=generator, device="cpu")[:count]
        return make(rows, columns, places // columns, places % columns)

    planned = {}
    for site in sites:
        count, (rows, *rest) = counts[site.path], site.weight_shape
        columns = math.prod(rest)
        size = rows * columns
        require(
            0 < count <= size,
            config,
            f"n_frequency is {count} at {site.path}, whose weight has {size} entries, expected 1 <= n_frequency <= "
            f"{size}",
        )
        planned[site.path] = drawn(rows, columns, count)
    return planned


def infer_counts(config: Any, found: Mapping[str, Mapping[str, Tensor]], leaf: str) -> dict[str, Any]:
    """Return the pattern of a config whose sites have as many coefficients as their leaves."""
    counts = {path: len(leaves[leaf]) for path, leaves in found.items() if leaf in leaves}
    return patterns_of(config, counts, "n_frequency", "n_frequency_pattern")


def scaled(leaf: Tensor, scaling: float | Tensor) -> Tensor:
    """Return coefficients times a factor, in float32 or wider."""
    wide = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
    return wide * (scaling.to(wide.dtype) if isinstance(scaling, Tensor) else scaling)


def add_made(site: Site, base: Layer, x: Tensor, values: Tensor, dense: Dense, pull: remade.Pull) -> Tensor:
    """`base(x) + D x` with `D = dense(values)`, the sum in the wider dtype and rounded once to the base's.

    A linear layer keeps no `D` for the backward. One of full precision is one product with `W + D`.

    Args:
        site: The site.
        base: Its layer.
        x: The input.
        values: The coefficients, `"n"`, in float32 or wider.
        dense: Makes `D`.
        pull: The gradient of `values` from those of outputs, and inputs.
    """

    def moved(weight: Tensor, values: Tensor) -> Tensor:
        return weight + dense(values)

    linear = None if torch.compiler.is_compiling() or site.kind != "linear" else base.as_linear
    if linear is not None and x.itemsize >= 4 and fused.fits(x, linear[0], values, values):
        return remade.linear(moved, x, *linear, values, pull=pull)
    y, wide = base(x), torch.promote_types(x.dtype, values.dtype)
    x, values = x.to(wide), values.to(wide)
    if site.kind == "linear":
        return add_scaled(y, remade.linear(dense, x, values, None), 1.0)
    return add_scaled(y, site.call(x, dense(values)), 1.0)
