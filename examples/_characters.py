"""A small language model over characters, in plain PyTorch, and a text to train it on: what serve.py adapts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

ALPHABET = "".join(map(chr, range(32, 128)))
CONTEXT, WINDOW = 128, 96


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.dim, self.heads = dim, heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, bias: Tensor, position: Tensor | None, memory: Tensor | None) -> Tensor:
        q, kv = self.qkv(self.norm1(x)).split([self.dim, 2 * self.dim], -1)
        if memory is not None:
            memory[torch.arange(len(x)), position] = kv[:, 0]
            kv = memory
        k, v = kv.unflatten(-1, (2, self.heads, -1)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q.unflatten(-1, (self.heads, -1)).transpose(1, 2), k, v, attn_mask=bias)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Characters to logits of the next: `"batch time"` to `"batch time alphabet"`.

    With a `memory` (keys and values, written in place), `ids` holds one character of each row, the one at its
    `position`, `"batch"`. Positions enter as penalties on distance (Press et al., *Train Short, Test Long*, 2021).
    """

    def __init__(self, dim: int, heads: int = 4, depth: int = 3):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(len(ALPHABET), dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, len(ALPHABET))

    def forward(self, ids: Tensor, position: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        queries = torch.arange(ids.shape[1])[None] if position is None else position[:, None]
        keys = torch.arange(ids.shape[1] if memory is None else memory.shape[2])
        slopes = 4.0 ** -torch.arange(self.heads)[:, None, None]
        distance = (queries[:, :, None] - keys)[:, None]
        bias = torch.where(distance < 0, -torch.inf, -slopes * distance)
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            x = block(x, bias, position, None if memory is None else memory[i])
        return self.head(self.norm(x))


def empty_memory(model: Any, rows: int) -> Tensor:
    """Keys and values of all blocks, `"block rows context 2*dim"`."""
    return torch.zeros(len(model.blocks), rows, CONTEXT, 2 * model.embed.embedding_dim)


def read_prose() -> list[str]:
    """The paragraphs of Python's help topics that are mostly words, each in one line of plain characters."""
    plain = str.maketrans("\u201c\u201d\u2018\u2019\u2013\u2014", "\"\"''--")
    blocks = [" ".join(block.split()) for text in topics.values() for block in text.translate(plain).split("\n\n")]
    wordy = [block for block in blocks if sum(c.isalpha() or c == " " for c in block) > 0.93 * len(block)]
    return [block for block in wordy if len(block) > 80 and set(block) <= set(ALPHABET)]


def encode(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def minimise(loss: Callable[[], Tensor], leaves: Sequence[Tensor], steps: int, rate: float, what: str) -> None:
    """Take some steps of AdamW, which works element by element: stacked adapters stay independent."""
    optimizer = torch.optim.AdamW(leaves, betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    progress = tqdm(range(steps), desc=what, unit="step")
    for _ in progress:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix_str(f"loss {value:.2f}")


def train_base(model: Transformer, prose: Sequence[str], steps: int, seed: int) -> None:
    """Ordinary training; leaves the model frozen."""
    text, choose = torch.tensor(encode(" ".join(prose))), seeded(seed)

    def loss() -> Tensor:
        x = text[torch.randint(len(text) - WINDOW, (24, 1), generator=choose) + torch.arange(WINDOW + 1)]
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    minimise(loss, list(model.parameters()), steps, 6e-3, "base model ")
    model.requires_grad_(False).eval()
