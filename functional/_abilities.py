"""Abilities: optional functions of a method beyond the required ones, each a small object in `Method.abilities`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ._sites.site import Site
from ._sites.tensors import Dense

Leaves = dict[str, Tensor]
Original = Callable[[], Dense]
"""The base's own canonical weight and bias, beneath all adapters; computed when asked for."""

Step = Callable[[Tensor, Tensor, Tensor | None, Leaves, bool], Tensor | None]
"""`(x, weight, bias, leaves, training) -> y`, or `None` where a call has to take `apply`.

Leaves of other shapes than the method's are `None` too, or an error of torch's.
"""


@dataclasses.dataclass(frozen=True)
class RunsInOneStep:
    """A forward that is one function of the input, a linear layer's weight and bias, and the leaves.

    What `apply` finds out about config and site in each call is decided once. Both give the same bits.

    Attributes:
        decide: `(config, site) -> step`; `None` where all calls take `apply`.
    """

    decide: Callable[[Any, Site], Step | None]


@dataclasses.dataclass(frozen=True)
class SplitsProjection:
    """The ability to adapt a slice of a linear map, some outputs from some inputs: for sites of the kind `"attention"`.

    Attributes:
        split: `(config, site, leaves, rows, columns) -> leaves`; leaves may be stacked.
    """

    split: Callable[[Any, Site, Leaves, slice, slice], Leaves]


@dataclasses.dataclass(frozen=True)
class AddsProduct:
    """The ability to be added to a bare parameter as `scaling * up @ down`, multiplied out only where a model needs it.

    Attributes:
        factors: `(config, site, leaves) -> (up, down, scaling)`, `"[experts] out r"` and `"[experts] r in"`.
    """

    factors: Callable[[Any, Site, Leaves], tuple[Tensor, Tensor, float | Tensor]]


@dataclasses.dataclass(frozen=True)
class PadsInBlocks:
    """The ability to be stacked with other ranks at sites whose leaves are made of pieces (`Site.pieces`).

    The first axis of some leaves has a block for each expert or group, and a smaller rank has zeros behind each block.
    What `apply` and the other functions make of such a tree is what the smaller one means.

    Attributes:
        blocks: `(config, site) -> {leaf: number}` of those that have more than one; others are padded at their ends.
    """

    blocks: Callable[[Any, Site], Mapping[str, int]]


@dataclasses.dataclass(frozen=True)
class AddsLeafwise:
    """A change of the weight that is linear in the leaves, so that adapters of one config add up leaf by leaf.

    Attributes:
        identity: The number that leaves which change nothing have; the change is linear in the distance from it.
    """

    identity: float = 0.0


@dataclasses.dataclass(frozen=True)
class MergesOver:
    """A dense meaning that depends on the base's own weight, also where other adapters are merged beneath.

    Attributes:
        merge: `(config, site, leaves, weight, bias, original) -> (weight, bias)`.
    """

    merge: Callable[[Any, Site, Leaves, Tensor, Tensor | None, Original], Dense]


@dataclasses.dataclass(frozen=True)
class Precomputes:
    """Constants computed from the leaves and the base's weight alone, once for a view that is said to be constant.

    Attributes:
        compute: `(config, site, leaves, base) -> constants`, which `apply` then finds among the site's.
    """

    compute: Callable[[Any, Site, Leaves, Any], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class KeepsDtype:
    """Leaves that `merge` gets in their own dtype, because what they were rounded to counts.

    Attributes:
        leaves: Their names.
    """

    leaves: frozenset[str]


@dataclasses.dataclass(frozen=True)
class DrawsNoise:
    """A forward that draws noise in training, beside dropout: with torch's functions, from torch's generator."""


@dataclasses.dataclass(frozen=True)
class TakesComplex:
    """The ability to adapt complex weights.

    Attributes:
        refuses: `config -> description` of what of a config has none; `None` for nothing.
    """

    refuses: Callable[[Any], str | None] = lambda config: None


@dataclasses.dataclass(frozen=True)
class SharesLeaves:
    """Leaves that several sites train together; they stand under `"*"` beside the paths of a tree.

    `apply`, `merge` and the rest find them among a site's own leaves. A site that has none of its own is not in a tree.

    Attributes:
        uses: `(config, sites) -> {path: {leaf: name}}`: by which name under `"*"` a site's leaf goes.
        shapes: `(config, sites) -> {name: shape}`. `init` returns them under `"*"`.
    """

    uses: Callable[[Any, list[Site]], Mapping[str, Mapping[str, str]]]
    shapes: Callable[[Any, list[Site]], Mapping[str, tuple[int, ...]]]
