"""What adapters change at each site, as matrices in float64, from their dense meaning.

change of W = merge(W) - W
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from torchgraft.functional import Graft, Site
from torchgraft.functional.extending import BaseWithTensors, Tree, adapted_layers, merged, modules_of

from .._arithmetic.products import Layout
from .._methods.lora.forward import names


@dataclasses.dataclass(frozen=True)
class Change:
    """What changes at a site.

    Attributes:
        site: The site.
        weight: The change of its weight, `"blocks out in"`: a block for each expert, and each group of a convolution.
        bias: The bias with the adapters in, `"out"`, if there is one.
        moves_bias: Whether that is another one than the base's.
        floor: Singular values up to this are rounding errors.
    """

    site: Site
    weight: Tensor
    bias: Tensor | None
    moves_bias: bool
    floor: float


class _Wide(BaseWithTensors):
    """A base whose weight and bias are in float64, so that a small change is not lost in the base's precision."""

    __slots__ = ()

    def dense(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().dense()
        wide = torch.promote_types(weight.dtype, torch.float64)
        return weight.detach().to(wide), None if bias is None else bias.detach().to(wide)


def changes(graft: Graft, active: dict[str, Tree]) -> Iterator[Change]:
    """Yield what trees change at each site, one after the other.

    Args:
        graft: A graft.
        active: Its trees, by adapter name.

    Raises:
        ValueError: A base without values; names the path.
    """
    given = merged(modules_of(graft.model), graft.binding.replaced, active)
    for site, layer in adapted_layers(graft.binding, active, given, _Wide):
        base, base_bias = layer.original.dense()
        if base.is_meta:
            raise ValueError(f"{site.path}: the base's weight is on the meta device, without values; load it first")
        weight, bias = layer.dense()
        moved = bias is not None and (base_bias is None or not torch.equal(bias, base_bias))
        blocks = in_blocks(site, weight - base)
        yield Change(site, blocks, bias, moved, rounding_floor(in_blocks(site, weight), weight.dtype))


def in_blocks(site: Site, weight: Tensor) -> Tensor:
    """Return a canonical weight as matrices, `"blocks out in"`.

    >>> in_blocks(Site("", "linear", 2, 3), torch.zeros(3, 2)).shape
    torch.Size([1, 3, 2])
    """
    return weight if site.experts else weight.flatten(1).unflatten(0, (site.groups, -1))


def rounding_floor(weight: Tensor, dtype: torch.dtype) -> float:
    """Return about the largest singular value of the errors that rounding makes of the entries of a weight.

    Independent errors whose sizes are those of the entries have no more than the largest norm of a row and that of a
    column together (Bandeira and van Handel, 2016, arXiv:1408.6185).

    Args:
        weight: `"blocks out in"`.
        dtype: What it is rounded to.

    >>> rounding_floor(torch.ones(1, 2, 2), torch.float32) < 1e-6
    True
    """
    across = (float(torch.linalg.vector_norm(weight, dim=axis).max()) for axis in (-1, -2))
    return torch.finfo(dtype).eps * sum(across)


def leaves_of(site: Site, a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """Return a LoRA's leaves at a site, and their rank.

    `A` of a convolution in groups sees all channels, so that a group's has zeros for the others.

    Args:
        site: The site.
        a: `"blocks r in"`.
        b: `"blocks out r"`.
        dtype: Dtype of the leaves.
    """
    kind = "experts" if site.experts else "groups" if site.groups > 1 else "matrix"
    blocks, per_group = len(a), site.in_features // site.groups
    if kind == "groups":
        own = a.unflatten(-1, (per_group, -1))
        a = own.new_zeros(blocks, a.shape[1], site.in_features, own.shape[-1])
        for group in range(blocks):
            a[group, :, group * per_group : (group + 1) * per_group] = own[group]
        a = a.flatten(2)
    layout = Layout(names(site), kind, blocks, (site.in_features, *site.kernel_size), (1,) * len(site.kernel_size))
    return layout.leaves(a.to(dtype), b.to(dtype)), layout.rank(a)
