"""A small causal transformer written twice, in PyTorch and in JAX, from the same tensors and with the same maths."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch.nn.functional as F
from torch import Tensor, nn

LINEARS = ["q", "k", "v", "o", "gate", "up", "down"]


class Block(nn.Module):
    """Attention and a gated feed-forward part, each after a root-mean-square norm."""

    o: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        inner = int(hidden * 2.6875)
        sizes = dict.fromkeys("qkvo", (hidden, hidden)) | {"gate": (hidden, inner), "up": (hidden, inner)}
        for name, (i, o) in (sizes | {"down": (inner, hidden)}).items():
            self.add_module(name, nn.Linear(i, o, bias=False))
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=1e-6), nn.RMSNorm(hidden, eps=1e-6)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (getattr(self, name)(h).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for name in "qkv")
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Transformer(nn.Module):
    """Embedding, blocks, norm, head; no positions, which neither side needs to be timed."""

    def __init__(self, hidden: int, layers: int, heads: int, vocabulary: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def to_jax(tree: Any) -> Any:
    """Tensors of a nested dict as JAX arrays."""
    if isinstance(tree, dict):
        return {key: to_jax(value) for key, value in tree.items()}
    return jnp.asarray(tree.detach().numpy())


def jax_loss(base: dict[str, Any], adapter: dict[str, Any], ids: Any, scaling: float, heads: int) -> Any:
    """The next token's mean cross-entropy of `Transformer` with one LoRA adapter."""

    def linear(path: str, x: Any) -> Any:
        y = x @ base[f"{path}.weight"].T
        return y + scaling * ((x @ adapter[path]["lora_A"].T) @ adapter[path]["lora_B"].T) if path in adapter else y

    def norm(path: str, x: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * base[f"{path}.weight"]

    x = base["embed.weight"][ids]
    mask = jnp.tril(jnp.ones((ids.shape[-1], ids.shape[-1]), bool))
    for index in range(sum(name.endswith("norm1.weight") for name in base)):
        at = f"blocks.{index}"
        h = norm(f"{at}.norm1", x)
        q, k, v = (jnp.moveaxis(linear(f"{at}.{n}", h).reshape(*h.shape[:-1], heads, -1), -2, -3) for n in "qkv")
        scores = jnp.einsum("...qd,...kd->...qk", q, k) / jnp.sqrt(q.shape[-1]).astype(q.dtype)
        mixed = jnp.einsum("...qk,...kd->...qd", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1), v)
        x = x + linear(f"{at}.o", jnp.moveaxis(mixed, -3, -2).reshape(x.shape))
        h = norm(f"{at}.norm2", x)
        x = x + linear(f"{at}.down", jax.nn.silu(linear(f"{at}.gate", h)) * linear(f"{at}.up", h))
    logits = linear("head", norm("norm", x))[..., :-1, :]
    chosen = jnp.take_along_axis(logits, ids[..., 1:, None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)
