"""Random projections of gradients to few dimensions, which keep their inner products."""

from __future__ import annotations

import torch
from torch import Tensor

from ._method import Tree
from ._vectors import numbers_in, ravel

_GOLDEN, _MIX, _MIX_AGAIN = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
"""The constants of SplitMix64 (Steele, Lea and Flood, 2014), as signed numbers."""


def project(tree: Tree, size: int, seed: int, *, stacked: bool = False) -> Tensor:
    """Project all numbers of a tree to `size` dimensions, `y[h(i)] += s(i) x[i]`, with random `h` and `s` of the seed.

    Inner products are kept on average, `E <y, y'> = <x, x'>`, with a standard deviation of at most
    `|x| |x'| sqrt(2 / size)`, as for a matrix of Gaussian numbers: the count sketch (Charikar et al., 2002; Weinberger
    et al., 2009). It costs one addition for each number and needs no matrix. One seed is one projection, on all
    devices, so gradients that are to be compared need the same one.

    Args:
        tree: A tree of `P` numbers; with `stacked`, a stack of `N` such.
        size: Number of dimensions to project to.
        seed: Which projection.
        stacked: Whether the leading axis of leaves is the adapter or example, and stays one.

    Returns:
        `"size"`, with `stacked` `"N size"`, in float32 or the widest dtype of the leaves; linear and differentiable.

    Raises:
        TypeError: Leaves of integers or complex numbers; a seed that is no integer.
        ValueError: A size below 1; no leaves, or with `stacked` leaves that disagree on `N`.

    >>> x, y = {"a": torch.ones(1000)}, {"a": torch.arange(1000.0) / 500}
    >>> x["a"] @ y["a"], (project(x, 400, seed=0) @ project(y, 400, seed=0)).round()
    (tensor(999.), tensor(1039.))
    """
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"project: size is {size!r}, expected a positive number of dimensions")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise TypeError(f"project: seed is {seed!r}, expected an integer from 0 on")
    dtype, _ = numbers_in(tree, "project")
    if dtype.is_complex:
        raise TypeError(f"project: the leaves have dtype {dtype}, expected real numbers")
    vectors = ravel(tree, stacked=stacked).to(torch.promote_types(dtype, torch.float32))
    counter = torch.arange(vectors.shape[-1], device=vectors.device) * _GOLDEN
    bits = _mixed(counter + _mixed(torch.tensor(seed, device=vectors.device)))
    places, signs = (bits >> 1).remainder(size), 1 - 2 * (bits & 1).to(vectors.dtype)
    return vectors.new_zeros(*vectors.shape[:-1], size).index_add(-1, places, vectors * signs)


def _mixed(x: Tensor) -> Tensor:
    """Return 64 bits for each integer that look random: the mixing function of SplitMix64."""
    x = (x ^ _shifted(x, 30)) * _MIX
    x = (x ^ _shifted(x, 27)) * _MIX_AGAIN
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift to the right as if numbers had no sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
