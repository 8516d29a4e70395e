"""DoRA: low-rank adaptation of a weight's direction, beside its magnitude.

    W' = m (W + s B A) / |W + s B A|,    one magnitude m and one norm for each output

Over other adapters, whose output is `y`, it is `b + g (y - b + s B A x)` with `g = m / |W + s B A|`, where `W` and `b`
are the base's own: each adapter's norms are those that it was made with, whichever others are active. That is what
PEFT's forward computes, and what it merges, but for a bias that other adapters add (`lora_bias`), to which its merge
does not apply `g`.

Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, 2024, arXiv:2402.09353. The norm is a constant of the
gradient (section 4.3 there). Names and shapes are those of PEFT's `tuners/lora/dora.py`. `lora.py` makes the
factors; this file says what the magnitude does with them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import Layer, PerAdapter, Rows, Site, widen
from torchgraft.functional.extending import Dense, add_scaled

from ..shared.called import Called, Dropout, Holder
from ..shared.embedding_grad import as_embedding
from ..shared.low_rank import Scaling

MAGNITUDE = "lora_magnitude_vector"
"""The leaf that holds `m`."""


def shape(site: Site) -> tuple[int, ...]:
    """`"out"`, for a convolution `"1 out *ones"`."""
    return (1, site.out_features, *(1 for _ in site.kernel_size)) if site.kernel_size else (site.out_features,)


def initial(site: Site, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Return the magnitude that leaves `W + s B A` as it is: its norms.

    Args:
        site: The site, with its scaling factor.
        a: `A`, as the site's leaves have it.
        b: `B`.
        weight: The base's canonical weight.
    """
    a, b = a.to(weight.device), b.to(weight.device)
    return norms(site, a, b, weight, site.constants.scaling).reshape(shape(site))


def norms(site: Site, a: Tensor, b: Tensor, weight: Tensor, scaling: Scaling | PerAdapter) -> Tensor:
    """`|W + s B A|` of each output, without a gradient, in float32 or wider.

    The sum is never formed: `|w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b` for each row `w` of `W` and `b` of
    `B`. Where `B` is zero, this is `|w|`, bit for bit. A row that the product cancels to less than about a thousandth
    of its norm loses digits.

    For a convolution in groups it is what PEFT divides by: the product of `A` and `B`, both as matrices with `r`
    columns or rows, in the layout of the weight.

    Args:
        site: The site.
        a: `"... r in *kernel"`; leading axes are adapters.
        b: `"... out r/groups *ones"`.
        weight: `"out in/groups *kernel"`.
        scaling: `s`, of all adapters or of each.

    Returns:
        `"... out"`.

    >>> from torchgraft.functional.extending import describe
    >>> norms(describe("", nn.Linear(2, 1)), torch.ones(1, 2), torch.ones(1, 1), torch.tensor([[2.0, 3.0]]), 1.0)
    tensor([5.])
    """
    dtype = _wide(weight, a, b)
    with torch.autocast(weight.device.type, enabled=False):
        weight, a, b = (tensor.detach().to(dtype) for tensor in (weight, a, b))
        if isinstance(scaling, PerAdapter):
            scaling = scaling.values.unsqueeze(-1)
        if isinstance(scaling, Tensor):
            scaling = scaling.detach().to(dtype)
        if site.groups > 1:
            product = b.reshape(-1, len(a)) @ a.flatten(1)
            result: Tensor = torch.linalg.vector_norm((weight + scaling * product.view_as(weight)).flatten(1), dim=1)
            return result
        if site.kernel_size:
            weight, a, b = weight.flatten(1), a.flatten(1), b.flatten(1)
        across = (b.mT * F.linear(a, weight)).sum(-2)
        own = (b @ (a @ a.mT) * b).sum(-1)
        # The root of a square is exact, so that a product of zero leaves the norm of the weight.
        square = torch.linalg.vector_norm(weight, dim=-1).square() + 2 * scaling * across + scaling * scaling * own
        result = square.clamp(min=0).sqrt()
        return result


def gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """`m / norm` in float32 or wider, and one where the norm is zero: such an output has no direction to scale.

    The norm is rounded to the magnitude's dtype, so that a magnitude in half precision still starts as the identity.

    Args:
        magnitude: `"... out"`.
        norm: `"... out"`.

    >>> gain(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 0.0]))
    tensor([1.5000, 1.0000])
    """
    norm, wide = norm.to(magnitude.dtype), torch.promote_types(magnitude.dtype, torch.float32)
    empty = norm == 0
    return torch.where(empty, 1.0, magnitude.to(wide) / torch.where(empty, 1.0, norm).to(wide))


@dataclasses.dataclass(frozen=True)
class DoraTerms:
    """One site's DoRA as a call has it.

    Attributes:
        site: The site, with its scaling factor.
        leaves: Its leaves, of one adapter or of a stack.
        a: `A` of the product, a tensor or a module.
        b: `B`.
        base: The layer below.
    """

    site: Site
    leaves: Mapping[str, Any]
    a: Any
    b: Any
    base: Layer

    def rescale(self, y: Tensor, dropped: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the base's share of the output, and the `B` of the product that is to be added to it.

        With `g = m / |W + s B A|`, the output is `g (W x + s B A x) + bias`. Dropout, in training, is on the adapter's
        own input `d`, which is the second `x` of `base(x) + (g - 1) W x + g s B A x`; that takes `W d` beside `W x`, as
        in PEFT. Without dropout, and in evaluation mode, the base runs once. `W` and the bias are those of the base
        beneath all adapters.

        Args:
            y: The base's output.
            dropped: Its input after dropout; `None` where there is no dropout.

        Returns:
            `(share, g B)`: the output is `share + s (g B) A d`. The share is in float32 or wider.
        """
        own = self.base.original
        weight, bias = own.weight, own.bias
        each, b = self._gains(weight)
        scale = _over_features(self.site, each)
        bias = None if bias is None else _over_features(self.site, bias)
        return self._share(y, scale, weight, bias, dropped), b

    def rescale_rows(self, y: Tensor, dropped: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """`rescale` for rows with adapters of their own; a row without one keeps the base's output.

        Args:
            y: The base's output, `"rows*k ... out"`.
            dropped: Its input after dropout; `None` where there is no dropout.
            rows: The adapter of each row.
        """
        groups, own = rows.groups(), self.base.original
        weight = own.weight
        each, b = self._gains(weight)
        scale = groups.mask(groups.pick(each).unsqueeze(1), 1.0)
        if dropped is not None:
            dropped = dropped.reshape(groups.size, -1, dropped.shape[-1])
        share = self._share(y.reshape(groups.size, -1, y.shape[-1]), scale, weight, own.bias, dropped)
        return share.view(y.shape), b

    def add_called(self, y: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
        """Return the output where the magnitude is a module, which returns what is added to the base's output.

        That is `(g - 1) W d + g s B(A(d))`; of an embedding it returns `g` and `g s B A d`. So it is in PEFT, and what
        is attached to the module sees and changes the same.

        Args:
            y: The base's output.
            x: The input.
            dropout: A module; not called where it is known to do nothing.
        """
        site, base, magnitude = self.site, self.base, self.leaves[MAGNITUDE]
        weight, bias, scaling = base.original.weight, base.original.bias, site.constants.scaling
        if site.kind == "embedding":
            found = magnitude.with_weight(x, lambda x, m: self._embedded(x, gain(m, self._norms_called(weight))))
            wide, each, added = widen(y, *found)
            return torch.addcmul(added, wide, each).to(y.dtype)
        a, b = self.a, self.b
        d, dropped = a.cast(x), False
        if isinstance(dropout, Called) and base.training and not isinstance(dropout.module, nn.Identity):
            d, dropped = dropout(d), True

        def more(d: Tensor, m: Tensor) -> Tensor:
            each = _over_features(site, gain(m.reshape(-1), self._norms_called(weight)))
            own = site.call(*widen(d, weight)) if dropped else y
            if bias is not None and not dropped:
                own = torch.sub(*widen(own, _over_features(site, bias)))
            own, up, each = widen(own, b(a(d)), each)
            return torch.addcmul((each - 1) * own, each * scaling, up)

        return add_scaled(y, magnitude.with_weight(d, more), 1.0)

    def _embedded(self, ids: Tensor, each: Tensor) -> tuple[Tensor, Tensor]:
        """`g`, and `g s B A d` of an embedding."""
        a, b, each = widen(self.a, self.b, each)
        down = as_embedding(self.site, ids, F.embedding(ids, a.mT))
        return each, F.linear(down, b) * (each * self.site.constants.scaling)

    def _norms_called(self, weight: Tensor) -> Tensor:
        """`|W + s B A|` where `A` and `B` may be modules.

        Sharded ones are whole only while they are called. So the product of two linear maps is what they make of the
        identity, as in PEFT.
        """
        site, a, b, scaling = self.site, self.a, self.b, self.site.constants.scaling
        with torch.no_grad():
            if not isinstance(a, Called):
                return norms(site, a, b, weight, scaling)
            if site.kernel_size:
                return norms(site, a.read(), b.read(), weight, scaling)
            with torch.autocast(weight.device.type, enabled=False):
                identity = torch.eye(site.in_features, device=weight.device, dtype=weight.dtype)
                product = b(a(a.cast(identity))).mT
                wide = weight.to(_wide(weight, product))
                result: Tensor = torch.linalg.vector_norm(add_scaled(wide, product, scaling), dim=1)
                return result

    def gains(self, weight: Tensor) -> Tensor:
        """`g`, `"... out"`: computed, or what a view that is said to be constant keeps."""
        known: Tensor | None = self.site.constants.gains
        if known is not None:
            return known
        magnitude = self.leaves[MAGNITUDE]
        m = magnitude.reshape(-1) if self.site.kernel_size else magnitude
        return gain(m, norms(self.site, self.a, self.b, weight, self.site.constants.scaling))

    def _gains(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`g`, `"... out"`, and `g B`."""
        each, b = self.gains(weight), self.b
        return each, (b * each.view(*each.shape, *(1,) * (b.ndim - each.ndim))).to(b.dtype)

    def _share(self, y: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, dropped: Tensor | None) -> Tensor:
        """`g W x + bias`, or `W x + bias + (g - 1) W d`; exactly `y` where `g` is one."""
        if dropped is not None:
            return torch.addcmul(y, self.site.call(*widen(dropped, weight)), scale - 1)
        return y * scale if bias is None else torch.addcmul(bias * (1 - scale), y, scale)


def _wide(*tensors: Tensor) -> torch.dtype:
    """Float32, or the wider dtype of some tensors."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def _over_features(site: Site, vector: Tensor) -> Tensor:
    """Return a vector over the outputs, to be broadcast over an output of the site."""
    return vector.view(-1, *(1 for _ in site.kernel_size))


def merge(magnitude: Tensor, product: Tensor, below: Dense, own: Dense) -> Dense:
    """Return the dense meaning: `g (V + s B A)` and `b + g (c - b)`, with `g = m / |W + s B A|`.

    Args:
        magnitude: `m`.
        product: `s B A`, like the weights.
        below: Weight `V` and bias `c` with the adapters beneath in.
        own: Weight `W` and bias `b` of the base.

    >>> dense = torch.tensor([[1.0, 0.0]]), None
    >>> merge(torch.tensor([10.0]), torch.tensor([[2.0, 4.0]]), dense, dense)[0]
    tensor([[6., 8.]])
    """
    (weight, bias), (own_weight, own_bias) = below, own
    norm = torch.linalg.vector_norm((own_weight + product).detach().flatten(1), dim=1)
    each = gain(magnitude.reshape(-1), norm)
    if bias is not None and own_bias is not None and bias is not own_bias:
        bias = own_bias + (bias - own_bias) * each
    return (weight + product) * each.view(-1, *(1,) * (weight.ndim - 1)), bias


class Magnitude(Holder):
    """Holds the magnitude of an injected adapter where PEFT has it, as a module's weight.

    Called with the adapter's input, it returns what the adapter adds to the base's output; of an embedding, the gain
    and what is added then.
    """

    def __init__(self, site: Site):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape(site), device="meta"))

    def extra_repr(self) -> str:
        return str(tuple(self.weight.shape))
