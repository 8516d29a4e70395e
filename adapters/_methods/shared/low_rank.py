"""The step that low-rank methods share: adding a product of thin matrices to the base's output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.functional import Layer, PerAdapter, Rows, Site, widen
from torchgraft.functional.extending import add_scaled, is_folded

from . import fused
from .called import Called, Dropout, dropped

_MANY_TOKENS = 16
"""Tokens of one adapter from which copying its matrices costs less than sorting the tokens."""

Scaling = float | Tensor


def add_product(y: Tensor, down: Tensor, up: Tensor, scaling: Scaling) -> Tensor:
    """`y + scaling * down up^T`, in one kernel where the dtypes allow it and it pays.

    Args:
        y: The base's output, `"... out"`.
        down: The input on `r` coordinates, `"... r"`.
        up: `"out r"`.
        scaling: Factor of the product.

    >>> add_product(torch.ones(1, 2), torch.ones(1, 1), torch.ones(2, 1), 2.0)
    tensor([[3., 3.]])
    """
    if isinstance(scaling, Tensor):
        down, scaling = down * scaling.to(down.dtype), 1.0
    if y.dtype == down.dtype and y.ndim > 1 and fused.pays(y):
        return torch.addmm(y.flatten(0, -2), down.flatten(0, -2), up.mT, alpha=scaling).view(y.shape)
    return add_scaled(y, F.linear(down, up), scaling)


def add_to_linear(base: Layer, x: Tensor, a: Tensor, b: Tensor, scaling: Scaling, dropout: Dropout) -> Tensor:
    """`base(x) + s b a dropout(x)` for a linear layer, the sum in the wider dtype and rounded once to the base's.

    Args:
        base: The layer.
        x: Its input, `"... in"`.
        a: `"r in"`.
        b: `"out r"`.
        scaling: `s`.
        dropout: Probability of dropout, in training mode, or a module.
    """
    if not isinstance(dropout, Called):
        p = dropout if base.training else 0.0
        linear = None if torch.compiler.is_compiling() else base.as_linear
        if linear is not None and not isinstance(scaling, Tensor):
            if not p and fused.composes(x, linear[0], a, b) and not is_folded(x, *linear):
                return fused.composed(x, *linear, a, b, scaling)
            if fused.fits(x, linear[0], a, b):
                return fused.linear(x, *linear, a, b, scaling, p)
    y = base(x)
    x, a, b = widen(dropped(x, dropout, base.training), a, b)
    return add_product(y, F.linear(x, a), b, scaling)


def add_to_site(site: Site, base: Layer, x: Tensor, a: Tensor, b: Tensor, dropout: Dropout) -> Tensor:
    """`base(x) + b a dropout(x)` for any kind of layer, rounded once; embeddings ignore dropout.

    The product is a weight that is made for convolutions in groups alone.

    Args:
        site: The site.
        base: The layer.
        x: Its input.
        a: `"r in/groups*kernel"`, for the weight as a matrix.
        b: `"out r"`.
        dropout: Probability of dropout, in training mode, or a module.
    """
    if site.kind == "linear":
        return add_to_linear(base, x, a, b, 1.0, dropout)
    y = base(x)
    if site.kind == "embedding":
        return add_product(y, F.embedding(x, a.mT), b, 1.0)
    x, a, b = widen(dropped(x, dropout, base.training), a, b)
    if site.groups > 1:
        return add_scaled(y, site.call(x, (b @ a).reshape(site.weight_shape)), 1.0)
    down = site.convolve(x, a.unflatten(1, site.weight_shape[1:]))
    return add_scaled(y, site.pointwise(down, b[(..., *(None for _ in site.kernel_size))]), 1.0)


def add_called(y: Tensor, x: Tensor, a: Any, b: Any, scaling: Scaling, dropout: Dropout) -> Tensor:
    """`y + s b(a(dropout(x)))` with maps that are modules, for every kind of layer.

    Args:
        y: The base's output.
        x: The input.
        a: A module of the input.
        b: A module of what comes out of `a`; it may add a bias.
        scaling: `s`.
        dropout: A module.
    """
    return add_scaled(y, b(a(dropped(a.cast(x), dropout, training=True))), scaling)


def route_to_linear(
    base: Layer, x: Tensor, a: Tensor, b: Tensor, scaling: float | PerAdapter, p: float, rows: Rows
) -> Tensor:
    """`base(x) + s b a dropout(x)` for a linear layer, each row with its own `s`, `a` and `b`.

    Args:
        base: The layer.
        x: Its input, `"rows*k ... in"`.
        a: `"N r in"`.
        b: `"N out r"`.
        scaling: `s`, of all adapters or of each.
        p: Probability of dropout, in training mode.
        rows: The adapter of each row.
    """
    p = p if base.training else 0.0
    linear = None if torch.compiler.is_compiling() else base.as_linear
    fits = linear is not None and fused.fits(x, linear[0], a, b)
    if linear is not None and fits and not (p and rows.noise) and choose(rows, x, a, b) == "equal groups":
        groups = rows.groups()
        if isinstance(scaling, PerAdapter):
            b, scaling = b * scaling.values.to(b.dtype).view(-1, 1, 1), 1.0
        a, b = groups.pick(a), groups.pick(b)
        return fused.linear(x, *linear, a, b, scaling, p)
    y = base(x)
    if p:
        x = rows.dropout(x, p, fused.draw if fits else None)
    x, a, b = widen(x, a, b)
    return add_routed(y, x, a, b, scaling, rows)


def add_routed(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float | PerAdapter, rows: Rows) -> Tensor:
    """`y + s b a x`, each row with its own `s`, `a` and `b`, all of the rows at once.

    Args:
        y: The base's output, `"rows*k ... out"`.
        x: The input, `"rows*k ... in"`.
        a: `"N r in"`.
        b: `"N out r"`.
        scaling: `s`, of all adapters or of each.
        rows: The adapter of each row.

    >>> a, b = torch.ones(2, 1, 3), torch.ones(2, 1, 1)
    >>> add_routed(torch.zeros(2, 1), torch.ones(2, 3), a, b, 1.0, Rows(torch.tensor([-1, 0]), 2))
    tensor([[0.],
            [3.]])
    """
    way = choose(rows, x, a, b)
    if way == "equal groups":
        groups = rows.groups()
        down = x.reshape(groups.size, -1, x.shape[-1]) @ groups.pick(a).mT
        return add_to_groups(y, down, b, scaling, rows)
    per_row = x.reshape(rows.size, -1, x.shape[-1])
    if way == "padded groups":
        return add_scaled(y, _in_slots(per_row, a, b, scaling, rows).view(y.shape), _common(scaling))
    order, known = rows.order(), rows.known()
    assert known is not None
    tokens = per_row.shape[1]
    sorted_x = per_row.index_select(0, order).flatten(0, 1)
    if isinstance(scaling, PerAdapter):
        b, scaling = b * scaling.values.to(b.dtype).view(-1, 1, 1), 1.0
    if way == "grouped product":
        ends = rows.ends(tokens)
        up = F.grouped_mm(F.grouped_mm(sorted_x, a.mT, offs=ends), b.mT, offs=ends)
    else:
        parts = sorted_x.split([count * tokens for count in known.counts])
        up = torch.cat(
            [part @ own_a.mT @ own_b.mT for part, own_a, own_b in zip(parts, a, b, strict=True) if len(part)]
        )
    wide, up = widen(y.reshape(rows.size, -1), up.reshape(len(order), -1))
    return wide.index_add(0, order, up, alpha=scaling).to(y.dtype).view(y.shape)


def _in_slots(per_row: Tensor, a: Tensor, b: Tensor, scaling: float | PerAdapter, rows: Rows) -> Tensor:
    """`b a x` by rows, times each adapter's own scaling; zero for rows without adapter."""
    slots = rows.slots()
    sorted_x = slots.fill(per_row).view(slots.groups, -1, per_row.shape[-1])
    down = sorted_x @ slots.pick(a).mT
    if isinstance(scaling, PerAdapter):
        down = down * slots.pick(scaling.values).to(down.dtype).view(-1, 1, 1)
    up = (down @ slots.pick(b).mT).view(slots.groups * slots.width, per_row.shape[1], -1).index_select(0, slots.place)
    return up if slots.active is None else torch.where(slots.active, up, 0)


def _common(scaling: float | PerAdapter) -> float:
    return 1.0 if isinstance(scaling, PerAdapter) else scaling


def add_to_groups(y: Tensor, down: Tensor, b: Tensor, scaling: float | PerAdapter, rows: Rows) -> Tensor:
    """`y + s b down`, with the input already on each adapter's coordinates.

    Args:
        y: The base's output, `"rows*k ... out"`.
        down: `"groups tokens r"`, over `rows.groups()`.
        b: `"N out r"`.
        scaling: `s`, of all adapters or of each.
        rows: The adapter of each row.
    """
    groups = rows.groups()
    if isinstance(scaling, PerAdapter):
        down, scaling = down * groups.pick(scaling.values).to(down.dtype).view(-1, 1, 1), 1.0
    down, up = groups.mask(down), groups.pick(b)
    if y.dtype == down.dtype:
        per_group = y.reshape(groups.size, -1, y.shape[-1])
        return torch.baddbmm(per_group, down, up.mT, alpha=scaling).view(y.shape)
    return add_scaled(y, (down @ up.mT).view(y.shape), scaling)


def choose(rows: Rows, x: Tensor, a: Tensor, b: Tensor) -> str:
    """Return the fastest way to multiply each row with its own matrices.

    `"equal groups"` is one batched product over the largest equal runs of one adapter; where these are not the
    adapters in order it copies matrices, which pays for many tokens. The other ways sort the rows by adapter, which
    takes values to sort by: `"padded groups"` for one batched product, where that leaves few slots empty, `"grouped
    product"` for one grouped kernel, `"segments"` for a loop over adapters.

    >>> many = torch.zeros(2, 4, 8), torch.zeros(2, 8, 4)
    >>> choose(Rows(torch.tensor([0, 0, 1, 1]), 2), torch.zeros(4, 8), *many)
    'equal groups'
    >>> choose(Rows(torch.tensor([0, 1, 1, -1]), 2), torch.zeros(4, 8), *many)
    'padded groups'
    >>> choose(Rows(torch.tensor([0, 1, 0, 0, 0, 0, 0]), 2), torch.zeros(7, 8), *many)
    'grouped product'
    >>> choose(Rows(torch.tensor([0, 1, 0, 0, 0, 0, 0]), 2), torch.zeros(7, 8).double(), *many)
    'segments'
    """
    known = rows.known()
    if known is None or known.groups.index is None or known.groups.size == 1 or not any(known.counts):
        return "equal groups"
    if x.numel() >= _MANY_TOKENS * x.shape[-1] * known.groups.size:
        return "equal groups"
    present = sum(map(bool, known.counts))
    if 2 * present * max(known.counts) <= 3 * sum(known.counts):
        return "padded groups"
    return "grouped product" if _can_group(x, a, b) else "segments"


def _can_group(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """`F.grouped_mm` has no float64, no batching rule, and wants strides of whole 16 bytes."""
    if not hasattr(F, "grouped_mm") or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if torch._C._functorch.maybe_current_level() is not None or not (x.dtype == a.dtype == b.dtype):
        return False
    aligned = all(size * x.itemsize % 16 == 0 for size in (*a.shape[1:], *b.shape[1:]))
    return aligned and _is_aligned(a) and _is_aligned(b) and (x.is_cpu or x.dtype == torch.bfloat16)


def _is_aligned(matrices: Tensor) -> bool:
    """Return whether rows of matrices, which may be views of more, begin at whole 16 bytes."""
    begins = (matrices.storage_offset(), *matrices.stride()[:-1])
    return matrices.stride(-1) == 1 and all(begin * matrices.itemsize % 16 == 0 for begin in begins)
