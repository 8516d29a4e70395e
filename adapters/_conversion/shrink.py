"""LoRA of a lower rank, and LoRA in a form of which there is one: from the factors alone, no model is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from torchgraft.functional.extending import Tree, sort

from .._arithmetic.given import check_adapter
from .._arithmetic.products import Adapter, Product, config_of_ranks, products
from .._arithmetic.truncated import truncate
from .._calibration.initial.configs import PLAIN
from .._methods.lora.forward import BIAS
from .._methods.lora.lora import LoraConfig
from .report import ConversionReport, ModuleError
from .wanted import Wanted

Found = Mapping[str, tuple[Tensor, Tensor]]
"""Factors `A`, `"blocks r in"`, and `B`, `"blocks out r"`, of each module; the scaling factor is one."""


def shrink(
    config: LoraConfig, params: Tree, rank: int | None = None, *, energy: float | None = None
) -> tuple[LoraConfig, Tree, ConversionReport]:
    """Return the LoRA of a lower rank whose change of each weight is nearest, and its errors.

    From the factors alone: with `B = Q R` and `A^T = P S`, the singular values of `B A` are those of `R S^T`.

    Args:
        config: The config of a plain LoRA.
        params: Its tree.
        rank: The rank; modules whose change has less get less.
        energy: In place of `rank`, the share of each module's energy (the sum of squared singular values) to keep, with
            as little rank as that takes. With neither, all is kept that is no rounding error.

    Returns:
        `(config, params, report)`: a LoRA whose scaling factor is one. What is trained as a whole stays.

    Raises:
        TypeError, ValueError: No LoRA's config and tree, or a rank or energy out of range.
        UnsupportedConfig: DoRA, or a start such as PiSSA; says what to do first.

    >>> from torchgraft.functional import bind
    >>> config = LoraConfig(r=8, target_modules=["0"])
    >>> graft = bind(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
    >>> config, params, report = shrink(config, graft.init(), 2)
    >>> config.r, params["0"]["lora_A"].shape, report.relative
    (2, torch.Size([2, 16]), 0.0)
    """
    wanted = Wanted(rank, energy)
    wanted.check("shrink")
    given = _products(config, params, "shrink")
    found = {path: _cut(product, wanted) for path, product in given.items()}
    new, tree = _with_factors(config, params, given, found)
    errors = {path: error_of(product, *_read(tree[path], product)) for path, product in given.items()}
    return new, tree, ConversionReport(errors)


def canonical(config: LoraConfig, params: Tree) -> Adapter:
    """Return an adapter's canonical form, which is equal for adapters that change the weights equally.

    `B A = (B M)(M^-1 A)` for any invertible `M`, so that adapters which do the same may have nothing alike in their
    numbers. Here `B A = U S V^T`: `A` is `V^T`, whose rows are orthonormal, with the largest entry of each positive,
    and `B` is `s U S`, with the scaling factor in it. So adapters can be compared entry by entry, averaged, or learned
    from. Directions that change nothing, up to rounding errors, are zero in both. The form is one where the singular
    values differ; between equal ones any rotation of their directions does the same.

    Args:
        config: The config of a plain LoRA.
        params: Its tree.

    Returns:
        `(config, params)` of the same ranks (or the module's own size, where that is less) and a scaling factor of 1.

    Raises:
        TypeError, ValueError, UnsupportedConfig: As for `shrink`.

    >>> from torchgraft.functional import bind
    >>> config = LoraConfig(r=2, target_modules=["0"])
    >>> graft = bind(torch.nn.Sequential(torch.nn.Linear(3, 3)), config)
    >>> tree = {"0": {"lora_A": torch.randn(2, 3), "lora_B": torch.randn(3, 2)}}
    >>> m = torch.randn(2, 2)
    >>> same = {"0": {"lora_A": m.inverse() @ tree["0"]["lora_A"], "lora_B": tree["0"]["lora_B"] @ m}}
    >>> (_, one), (_, other) = canonical(config, tree), canonical(config, same)
    >>> torch.allclose(one["0"]["lora_A"], other["0"]["lora_A"], atol=1e-3)
    True
    """
    given = _products(config, params, "canonical")
    found = {path: _signed(*truncate(p.scaling * p.a, p.b, p.a.shape[-2])) for path, p in given.items()}
    return _with_factors(config, params, given, found)[:2]


def _products(config: LoraConfig, params: Tree, what: str) -> dict[str, Product]:
    adapter = check_adapter((config, params), f"{what}: (config, params)")
    with torch.no_grad():
        found = products(*adapter, f"{what}: the adapter")
    if not found:
        raise ValueError(f"{what}: params has no factors of LoRA; give the tree that goes with the config")
    for path, product in found.items():
        product.check_whole(path, what)
        if not all(bool(torch.isfinite(factor).all()) for factor in (product.a, product.b)):
            raise ValueError(f"{what}: {path} has factors with values that are not finite; check its leaves")
    return {path: _wide(product) for path, product in found.items()}


def _wide(product: Product) -> Product:
    """Return a product in float64, in which cutting adds no error of its own."""
    wide = torch.promote_types(product.a.dtype, torch.float64)
    return dataclasses.replace(product, a=product.a.detach().to(wide), b=product.b.detach().to(wide))


def _cut(product: Product, wanted: Wanted) -> tuple[Tensor, Tensor]:
    def rank(singular: Tensor) -> int:
        floor = torch.finfo(singular.dtype).eps * max(product.a.shape[-1], product.b.shape[-2]) * float(singular.max())
        return wanted.of(singular, float(singular.square().sum()), floor)

    if wanted.rank is not None and product.layout.kind == "groups":
        wanted = Wanted(max(1, wanted.rank // product.layout.blocks))
    return truncate(product.scaling * product.a, product.b, rank)


def _signed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Make the largest entry of each row of `A` positive, and directions without a length zero."""
    lengths = torch.linalg.vector_norm(b, dim=-2)
    floor = torch.finfo(b.dtype).eps * max(a.shape[-1], b.shape[-2]) * lengths.amax(-1, keepdim=True)
    largest = a.gather(-1, a.abs().argmax(-1, keepdim=True))
    signs = torch.where(lengths > floor, largest[..., 0].sgn(), 0)
    return a * signs[..., None].conj(), b * signs[..., None, :]


def _with_factors(
    config: LoraConfig, params: Tree, given: Mapping[str, Product], found: Found
) -> tuple[LoraConfig, Tree]:
    """Return a config and a tree with other factors, whose scaling factor is one."""
    tree, ranks = {path: dict(leaves) for path, leaves in params.items()}, {}
    for path, product in given.items():
        a, b = found[path]
        leaves = product.layout.leaves(a.to(product.dtype), b.to(product.dtype))
        tree[path].update(leaves)
        ranks[path] = product.layout.rank(a)
        if product.bias is not None:
            tree[path][BIAS] = (product.bias * product.scaling).to(product.dtype)
    return dataclasses.replace(config, **{**PLAIN, **config_of_ranks(ranks)}), sort(tree)


def _read(leaves: Mapping[str, Tensor], product: Product) -> tuple[Tensor, Tensor]:
    """Return factors as leaves hold them, rounded to their dtype."""
    a, b = (leaves[name].to(product.a.dtype).flatten(1) for name in product.layout.names)
    blocks = product.layout.blocks
    b = (
        b.unflatten(1, (-1, blocks)).movedim(-1, 0)
        if product.layout.kind == "experts"
        else b.unflatten(0, (blocks, -1))
    )
    return a.unflatten(0, (blocks, -1)), b


def error_of(product: Product, a: Tensor, b: Tensor) -> ModuleError:
    """Return how far a product is from another, of which neither is multiplied out."""
    error = _norm(torch.cat([product.scaling * product.a, -a], -2), torch.cat([product.b, b], -1))
    norm = _norm(product.scaling * product.a, product.b)
    return ModuleError(product.layout.rank(a), norm, error)


def _norm(a: Tensor, b: Tensor) -> float:
    """Return the norm of `b a`: that of the small product of their triangular parts."""
    small = torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT
    return float(torch.linalg.vector_norm(small))
