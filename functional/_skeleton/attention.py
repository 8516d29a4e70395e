"""`nn.MultiheadAttention` under adapters: its packed projections as a linear layer, then torch's own attention.

    q, k, v = projection(query), projection(key), projection(value)
    y = out_proj(softmax(q k^T / sqrt(d) + mask) v)

torch's module hands its weights to one function. Here the projections are layers, so that adapters on them stay in
their factored form; what lies between is what that function does, step by step, with the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._sites.attention import slices_of

Masks = tuple[Tensor | None, bool]
"""What is added to the scores, and whether attention is causal instead."""


class AdaptedAttention:
    """A base class in front of `nn.MultiheadAttention`: its forward with adapters on the projections."""

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        runtime = self.__dict__["_runtime"]
        runtime.reach()
        if query.is_nested:  # torch has only its fused kernel for these, which reads the weights
            rest = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            result: tuple[Tensor, Tensor | None] = runtime.forward_class.forward(self, query, key, value, *rest)
            return result
        q, k, v = _project(runtime, query, key, value)
        first = query.ndim == 2 or self.batch_first
        q, k, v = (x.unsqueeze(0) if query.ndim == 2 else x if first else x.transpose(0, 1) for x in (q, k, v))
        masks = _masks(self, runtime.path, query, k.shape, key_padding_mask, need_weights, attn_mask, is_causal)
        y, weights = _attend(self, q, k, v, masks, need_weights)
        y = (y.transpose(1, 2) if first else y.permute(2, 0, 1, 3)).flatten(2).contiguous()  # of one head a view
        y = self.out_proj(y.squeeze(0) if query.ndim == 2 else y)
        if query.ndim == 3 and self.batch_first:  # in torch's layout, by which layers that follow choose their kernels
            y = y.transpose(0, 1).contiguous().transpose(0, 1)
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights.squeeze(0) if query.ndim == 2 else weights
        return y, weights


def _project(runtime: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Project queries, keys and values, with as few products as the identity of the inputs allows."""
    site = next(iter(runtime.entries.values())).site
    parts = slices_of(site, 1 if key is not value else 2 if query is not key else 3)
    *own, rest = [runtime.project(part, x) for part, x in zip(parts, (query, key, value), strict=False)]
    return (*own, *rest.chunk(4 - len(parts), -1)) if len(parts) < 3 else (*own, rest)


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, masks: Masks, need_weights: bool) -> Any:
    """Attend over `"batch length dim"` inputs: `"batch heads length size"`, and the weights where asked for."""
    batch, heads = len(q), module.num_heads
    if module.bias_k is not None:
        k = torch.cat([k, module.bias_k.expand(batch, -1, -1)], 1)
        v = torch.cat([v, module.bias_v.expand(batch, -1, -1)], 1)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if module.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(batch, heads, 1, x.shape[-1])], 2) for x in (k, v))
    mask, causal = masks
    dropout = module.dropout if module.training else 0.0
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
    q, k, v = (x.flatten(0, 1) for x in (q * math.sqrt(1.0 / q.shape[-1]), k, v))
    if mask is None:
        scores = torch.bmm(q, k.mT)
    else:
        every = mask if mask.shape[:2] == (1, 1) else mask.expand(batch, heads, -1, -1)
        scores = torch.baddbmm(every.flatten(0, 1), q, k.mT)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)
    return torch.bmm(weights, v).unflatten(0, (batch, heads)), weights.unflatten(0, (batch, heads))


def _masks(
    module: Any,
    path: str,
    query: Tensor,
    shape: torch.Size,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Masks:
    """Combine both masks into one to add, `"batch heads length source"` with ones in it; `shape` is the keys'."""
    if is_causal and attn_mask is None:
        raise RuntimeError(f"{path}: is_causal is a hint about attn_mask, which is None; give that mask too")
    if is_causal and key_padding_mask is None and not need_weights:
        return None, True
    batch, source = shape[:2]
    extra = (module.bias_k is not None) + module.add_zero_attn
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, "attn_mask", path, query.dtype)
        if mask.ndim not in (2, 3) or mask.shape[-1] != source:
            raise RuntimeError(
                f"{path}: attn_mask has shape {tuple(mask.shape)}, expected 'length source' or 'batch*heads length "
                f"source' with source {source}"
            )
        mask = mask.view(1, 1, *mask.shape) if mask.ndim == 2 else mask.unflatten(0, (batch, module.num_heads))
        mask = F.pad(mask, (0, extra)) if extra else mask
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, "key_padding_mask", path, query.dtype)
        if padding.shape not in ((batch, source), (source,) if query.ndim == 2 else ()):
            raise RuntimeError(
                f"{path}: key_padding_mask has shape {tuple(padding.shape)}, expected {(batch, source)}, 'batch source'"
            )
        padding = padding.view(batch, 1, 1, source)
        padding = F.pad(padding, (0, extra)) if extra else padding
        mask = padding if mask is None else mask + padding
    return mask, False


def _additive(mask: Tensor, name: str, path: str, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise TypeError(f"{path}: {name} has dtype {mask.dtype}, expected bool or one of floating point")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
