"""The input projections of an attention, one linear map: `"3*dim in"`, or blocks on a diagonal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .site import Kind, Site, add_kind
from .tensors import Dense


@dataclasses.dataclass(frozen=True)
class ProjectionSlice:
    """Some of the outputs of a projection, from some of its inputs; `name` is the weight that has them."""

    name: str
    rows: slice
    columns: slice
    whole: bool = False


def _call(site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _joined(site: Site, stored: Sequence[Tensor]) -> Tensor:
    return stored[0] if len(stored) == 1 else torch.block_diag(*stored)


def _split(site: Site, weight: Tensor) -> Mapping[str, Tensor]:
    if not site.blocks:
        return {site.weight_names[0]: weight}
    parts = weight.chunk(len(site.blocks), 0)
    return {name: parts[i].split(site.blocks, 1)[i] for i, name in enumerate(site.weight_names)}


ATTENTION = add_kind(Kind("attention", _call, features=1, joined=_joined, split=_split))


def describe_attention(path: str, module: nn.MultiheadAttention) -> Site:
    """Describe the input projections of torch's attention."""
    dim, has_bias = module.embed_dim, module.in_proj_bias is not None
    sizes = (dim, module.kdim, module.vdim)
    packed = module._qkv_same_embed_dim
    names = ("in_proj_weight",) if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return Site(
        path,
        "attention",
        dim if packed else sum(sizes),
        3 * dim,
        has_bias,
        weight_names=names,
        bias_name="in_proj_bias",
        blocks=() if packed else sizes,
    )


def slices_of(site: Site, alike: int) -> list[ProjectionSlice]:
    """Return the slices that project queries, keys and values with as few products as their identity allows.

    Args:
        site: The projections.
        alike: How many of the three, from the last, are one input: 1, 2 or 3.

    >>> site = Site("", "attention", 4, 12, weight_names=("in_proj_weight",))
    >>> [part.rows for part in slices_of(site, 2)]
    [slice(0, 4, None), slice(4, None, None)]
    """
    dim = site.out_features // 3
    if site.blocks:
        ends = [sum(site.blocks[:i]) for i in range(4)]
        return [
            ProjectionSlice(name, slice(i * dim, (i + 1) * dim), slice(ends[i], ends[i + 1]))
            for i, name in enumerate(site.weight_names)
        ]
    name, columns = site.weight_names[0], slice(None)
    if alike == 3:
        return [ProjectionSlice(name, columns, columns, whole=True)]
    rows = [slice(i * dim, (i + 1) * dim) for i in range(3 - alike)]
    return [ProjectionSlice(name, part, columns) for part in (*rows, slice((3 - alike) * dim, None))]


def read_slice(site: Site, module: Any, part: ProjectionSlice) -> Dense:
    """Return the weight and bias of a slice; a weight of its own is read whole."""
    weight, bias = getattr(module, part.name), module.in_proj_bias
    return weight if site.blocks else weight[part.rows], None if bias is None else bias[part.rows]
