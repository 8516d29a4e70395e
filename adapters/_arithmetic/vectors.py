"""Adapters as vectors: inner products, angles, differences and projections of the changes that they make.

All from the factors: `<s B A, t D C> = s t <B^T D, A C^T>`, so that no change of a weight is formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchgraft.functional import UnsupportedConfig

from .combine import combine, combined
from .given import Chosen, check_adapters
from .mixing import Mixing, Scalar
from .products import Adapter, Product, products

SIDES = ("input", "output")


def negate(adapter: Adapter) -> Adapter:
    """Return the adapter that undoes another: `-s B A` at each module.

    >>> from torchgraft.adapters import LoraConfig
    >>> config, params = LoraConfig(r=1, target_modules=["0"]), {"0": {"lora_A": torch.ones(1, 2)}}
    >>> params["0"]["lora_B"] = torch.ones(3, 1)
    >>> negate((config, params))[1]["0"]["lora_A"]
    tensor([[-8., -8.]])
    """
    return combine([adapter], [-1.0])


def difference(first: Adapter, second: Adapter) -> Adapter:
    """Return the adapter that leads from the second to the first: `combine([first, second], [1, -1])`, exact.

    Raises:
        UnsupportedConfig, ValueError: As `combine`.
    """
    return combine([first, second], [1.0, -1.0])


def interpolate(first: Adapter, second: Adapter, share: Scalar, how: str = "cat", rank: int | None = None) -> Adapter:
    """Return an adapter between two, `(1 - share)` of the first and `share` of the second.

    Args:
        first: The adapter at 0.
        second: The adapter at 1.
        share: A number, also beyond these, or a tensor without axes, to which gradients flow.
        how: As for `combine`: `"cat"` is exact, `"svd"` cuts the rank, `"linear"` mixes factors.
        rank: The rank for `"svd"`.

    Raises:
        UnsupportedConfig, ValueError: As `combine`.
    """
    mixing = Mixing(how, rank)
    mixing.check()
    given = check_adapters([first, second], "interpolate")
    return combined(given, Chosen([1 - share, share], 2, "interpolate"), mixing, whole=True)


def gram(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Return the inner products of the changes that adapters make, `"n n"` for each module; differentiable.

    The sum over modules is that of whole adapters; the diagonal has squared norms. An adapter that is not on a module
    has zeros there.

    Args:
        adapters: Pairs `(config, params)` of LoRA.

    Raises:
        UnsupportedConfig, ValueError: As `combine`; sizes that differ, which name the path.

    >>> from torchgraft.adapters import LoraConfig
    >>> config = LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    >>> one = config, {"0": {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(3, 1)}}
    >>> gram([one, negate(one)])["0"]
    tensor([[ 6., -6.],
            [-6.,  6.]])
    """
    found = _products(adapters, "gram")
    return {path: _gram([one.get(path) for one in found], path) for path in _paths(found)}


def cosine(first: Adapter, second: Adapter) -> dict[str, Tensor]:
    """Return the cosine of the angle between the changes of two adapters, for each module, and under `"*"` as a whole.

    `<dW, dV> / (|dW| |dV|)`, with matrices as vectors; a change that is zero has a cosine of zero to any.

    Args:
        first: A pair `(config, params)` of LoRA.
        second: Another; ranks and modules may differ.

    Raises:
        UnsupportedConfig, ValueError: As `gram`.

    >>> from torchgraft.adapters import LoraConfig
    >>> config = LoraConfig(r=1, target_modules=["0"])
    >>> one = config, {"0": {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(3, 1)}}
    >>> cosine(one, negate(one))
    {'*': tensor(-1.), '0': tensor(-1.)}
    """
    by_path = gram([first, second])
    whole = torch.stack([*by_path.values()]).sum(0)
    return {path: _cosine(each) for path, each in {"*": whole, **by_path}.items()}


def subspace_similarity(
    first: Adapter, second: Adapter, rank: int | None = None, side: str = "input"
) -> dict[str, Tensor]:
    """Return how far the subspaces that two adapters read, or write, overlap: from 0 to 1, by module.

        |U^T V|_F^2 / min(i, j)

    for orthonormal bases `U` of `i` directions and `V` of `j`: the top singular vectors of the two changes (Hu et al.,
    *LoRA*, section 7.2). 1 is one space within the other, 0 are spaces at right angles; signs and sizes do not count.

    Args:
        first: A pair `(config, params)` of LoRA.
        second: Another.
        rank: Number of directions of each, from the largest; by default those whose singular value is not zero.
        side: `"input"` compares what changes read (right singular vectors), `"output"` what they write.

    Raises:
        UnsupportedConfig, ValueError: As `gram`; another side; a change that is zero, which has no directions.

    >>> from torchgraft.adapters import LoraConfig
    >>> config = LoraConfig(r=1, target_modules=["0"])
    >>> one = config, {"0": {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(3, 1)}}
    >>> round(float(subspace_similarity(one, negate(one))["0"]), 4)
    1.0
    """
    if side not in SIDES:
        raise ValueError(f"subspace_similarity: side is {side!r}, expected 'input' or 'output'")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"subspace_similarity: rank is {rank!r}, expected a positive integer, or None")
    found = _products([first, second], "subspace_similarity")
    similar = {}
    for path in _paths(found):
        if all(path in one for one in found):
            u, v = (_directions(one[path], rank, side, path) for one in found)
            if u.shape[-2] != v.shape[-2]:
                raise ValueError(f"subspace_similarity: {path} has {u.shape[-2]} and {v.shape[-2]} {side}s")
            similar[path] = (u.mT @ v).square().sum() / min(u.shape[-1], v.shape[-1])
    return similar


def project_out(adapter: Adapter, others: Sequence[Adapter], *, by_module: bool = True) -> Adapter:
    """Return an adapter without what it has in common with others: the part of its change at right angles to theirs.

        dW - sum_i c_i dW_i,    with c such that the rest has no inner product with any dW_i

    So the rest is what negating or adding the others does not touch, to first order.

    Args:
        adapter: A pair `(config, params)` of LoRA.
        others: Pairs of what to take out; where they depend on each other, the least coefficients are taken.
        by_module: Whether each module has coefficients of its own; if not, adapters are vectors as a whole.

    Returns:
        `(config, params)`; ranks add up, `combine(..., how="svd")` cuts them.

    Raises:
        UnsupportedConfig, ValueError: As `gram`.
    """
    given = [adapter, *check_adapters(others, "project_out")]
    by_path = gram(given)
    if by_module:
        weights = {path: _rest(each) for path, each in by_path.items()}
        return combine(given, weights)
    return combine(given, _rest(torch.stack([*by_path.values()]).sum(0)))


def _rest(inner: Tensor) -> Tensor:
    """Return the weights of the first vector's rest: 1, and minus the coefficients of its projection."""
    coefficients = torch.linalg.pinv(inner[1:, 1:], hermitian=True) @ inner[1:, 0]
    return torch.cat([inner.new_ones(1), -coefficients])


def _products(adapters: Sequence[Adapter], what: str) -> list[dict[str, Product]]:
    given = check_adapters(adapters, what)
    found = [products(config, tree, f"{what}: adapters[{i}]") for i, (config, tree) in enumerate(given)]
    for path, product in ((path, product) for one in found for path, product in one.items()):
        product.check_whole(path, what)
        if product.a.is_complex():
            raise UnsupportedConfig(f"{what}: {path} has complex factors, whose angles are not real; compare real ones")
    return found


def _paths(found: Sequence[dict[str, Product]]) -> list[str]:
    return sorted(frozenset().union(*found))


def _gram(here: Sequence[Product | None], path: str) -> Tensor:
    some = next(product for product in here if product is not None)
    rows = [[_inner(one, other, path) for other in here] for one in here]
    return torch.stack([torch.stack([some.a.new_zeros(()) if x is None else x for x in row]) for row in rows])


def _inner(first: Product | None, second: Product | None, path: str) -> Tensor | None:
    """Return the inner product of two changes; `None` where one of them is not there."""
    if first is None or second is None:
        return None
    if first.a.shape[::2] != second.a.shape[::2] or first.b.shape[:2] != second.b.shape[:2]:
        raise ValueError(
            f"gram: {path} has factors of shapes {tuple(first.a.shape)}, {tuple(first.b.shape)} and "
            f"{tuple(second.a.shape)}, {tuple(second.b.shape)}, of different modules; compare adapters of one model"
        )
    return first.scaling * second.scaling * ((first.b.mT @ second.b) * (first.a @ second.a.mT)).sum()


def _cosine(inner: Tensor) -> Tensor:
    size = (inner[0, 0] * inner[1, 1]).sqrt()
    return torch.where(size == 0, 0.0, inner[0, 1] / torch.where(size == 0, 1.0, size))


def _directions(product: Product, rank: int | None, side: str, path: str) -> Tensor:
    """Return an orthonormal basis of what a change reads or writes, `"blocks*size i"`, the largest first."""
    if product.layout.blocks > 1:
        raise ValueError(
            f"subspace_similarity: {path} has {product.layout.blocks} matrices, expected a module with one"
        )
    q, r = torch.linalg.qr(product.b[0])
    p, s = torch.linalg.qr(product.a[0].mT)
    u, sizes, v = torch.linalg.svd(product.scaling * (r @ s.mT), full_matrices=False)
    known = int((sizes > sizes[0] * max(product.b.shape[-2], product.a.shape[-1]) * torch.finfo(sizes.dtype).eps).sum())
    if not known:
        raise ValueError(f"subspace_similarity: {path} changes nothing in one of the adapters, so has no directions")
    count = known if rank is None else min(rank, known)
    directions: Tensor = p @ v.mT[:, :count] if side == "input" else q @ u[:, :count]
    return directions
