"""A small transformer that writes character by character, and two kinds of real text that ship with Python.

It knows nothing of adapters; the examples that need a language model share it.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pydoc_data.topics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

CONTEXT, SYMBOLS = 64, 96
BITS = 1 / math.log(2)
LEARN = "argparse ast configparser difflib inspect optparse pdb subprocess tarfile threading typing"
HOLD_OUT = "dataclasses functools shutil statistics textwrap"


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Writer(nn.Module):
    """Symbols `"batch time"` to logits of the next one, `"batch time symbols"`.

    The last three symbols are embedded together, which spares attention from learning to look back by one.
    """

    def __init__(self, dim: int, depth: int, heads: int = 4):
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(SYMBOLS, dim) for _ in range(3))
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        time = symbols.shape[1]
        last = (embed(F.pad(symbols, (back, 0))[:, :time]) for back, embed in enumerate(self.embed))
        return self.head(self.norm(self.blocks(sum(last, self.position[:time]))))


def encode(text: str) -> Tensor:
    """Newline is symbol 0, printable ASCII the rest; anything else becomes a question mark."""
    return torch.tensor([0 if c == "\n" else ord(c) - 31 if " " <= c <= "~" else 32 for c in text])


def decode(symbols: Tensor) -> str:
    return "".join("\n" if s == 0 else chr(s + 31) for s in symbols.tolist())


def reference() -> tuple[Tensor, Tensor]:
    """The language reference, as `help()` has it: to learn from, and every 20th topic held out."""
    topics = list(pydoc_data.topics.topics.values())
    held_out = topics[::20]
    return encode("\n".join(topic for topic in topics if topic not in held_out)), encode("\n".join(held_out))


def source(modules: str) -> Tensor:
    """The source code of modules of the standard library."""
    return encode("\n".join(inspect.getsource(importlib.import_module(name)) for name in modules.split()))


def draw_rows(text: Tensor, count: int, choose: torch.Generator) -> Tensor:
    """Pieces of the text with one symbol more than the context, `"count time+1"`."""
    start = torch.randint(len(text) - CONTEXT, (count, 1), generator=choose)
    return text[start + torch.arange(CONTEXT + 1)]


def spread_rows(text: Tensor, count: int) -> Tensor:
    """Pieces at equal distances over the whole text."""
    start = torch.linspace(0, len(text) - CONTEXT - 1, count).long()
    return text[start[:, None] + torch.arange(CONTEXT + 1)]


@torch.no_grad()
def write(run: Callable[[Tensor], Tensor], prompt: str, seed: int, length: int = 48) -> str:
    """Continue a line of text to its end, or to some length."""
    choose, symbols = torch.Generator().manual_seed(seed), encode(f"\n{prompt}")
    written = len(symbols)
    while len(symbols) <= length and 0 not in symbols[written:]:
        likely = (run(symbols[None, -CONTEXT:])[0, -1] / 0.5).softmax(-1)
        symbols = torch.cat([symbols, torch.multinomial(likely, 1, generator=choose)])
    return decode(symbols[written:]).rstrip()


def loss_by_row(logits: Tensor, rows: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)


@torch.no_grad()
def bits_per_character(run: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """The mean over rows of text, `"count time+1"`."""
    losses = [loss_by_row(run(few[:, :-1]), few) for few in rows.split(64)]
    return float(torch.cat(losses).mean()) * BITS


def train_base(model: nn.Module, text: Tensor, steps: int) -> None:
    """Ordinary training."""
    choose = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="base model   ", unit="step"):
        rows = draw_rows(text, 16, choose)
        optimizer.zero_grad()
        loss_by_row(model(rows[:, :-1]), rows).mean().backward()
        optimizer.step()
        schedule.step()
