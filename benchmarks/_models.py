"""The models and trees that the benchmarks share."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 2048


def llama(hidden: int, layers: int, heads: int = 8, **fields: Any) -> nn.Module:
    """A frozen Llama with random weights, in training mode, without cache."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=int(hidden * 2.6875),
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        use_cache=False,
        **fields,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def tokens(batch: int, length: int) -> Tensor:
    """A batch of random tokens."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def trained(tree: Any) -> list[Tensor]:
    """The leaves of a tree, made to require gradients in place."""
    return [leaf.requires_grad_() for leaf in optree.tree_leaves(tree)]


def lively(tree: Any, seed: int = 2) -> Any:
    """A tree of small random numbers instead of an adapter's initial ones."""
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: 0.02 * torch.randn(t.shape, generator=generator, dtype=t.dtype), tree)
