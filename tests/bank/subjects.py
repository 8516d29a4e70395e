"""Models with configs of one method for a bank: what may differ between its adapters, and what stands beside layers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchgraft import adapters
from torchgraft.adapters import LNTuningConfig, LoraConfig, TrainableTokensConfig

from .alone import model


class Subject(NamedTuple):
    """A model, what it gets for some rows, and configs of one method that may be in one bank."""

    base: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    configs: list[Any]


class Words(nn.Module):
    """Embeddings, a norm, a linear layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.q, self.head = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.q(self.norm(self.embed(ids))).tanh())
        return y


class Kernels(nn.Module):
    """A convolution with groups, and experts of which each row meets all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.experts = nn.Conv1d(5, 6, 1), nn.Parameter(torch.empty(3, 4, 6))
        self.grouped = nn.Conv1d(6, 6, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(self.conv(x.unsqueeze(-1)).tanh()).squeeze(-1)
        return torch.stack([nn.functional.linear(y, self.experts[i]).tanh() for i in range(3)]).sum(0)


def started(made: nn.Module) -> nn.Module:
    """Return a model in float64 with numbers that are the same each time."""
    generator = torch.Generator().manual_seed(0)
    for parameter in made.double().parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def dense(*configs: Any) -> Subject:
    return Subject(model, lambda rows: torch.randn(rows, 5, dtype=torch.float64), [*configs])


def of_words(*configs: Any) -> Subject:
    return Subject(lambda: started(Words()), lambda rows: torch.randint(9, (rows, 6)), [*configs])


def of_kernels(*configs: Any) -> Subject:
    return Subject(lambda: started(Kernels()), lambda rows: torch.randn(rows, 5, dtype=torch.float64), [*configs])


ALL = {"target_modules": ["0", "2"]}
TOKENS = {"embed": [3, 5]}
SUBJECTS = {
    "ranks and alphas": dense(LoraConfig(r=1, lora_alpha=3, **ALL), LoraConfig(r=4, use_rslora=True, **ALL)),
    "dora": dense(*(LoraConfig(r=r, use_dora=True, **ALL) for r in (2, 4))),
    "starts": dense(*(LoraConfig(r=3, init_lora_weights=start, **ALL) for start in ("pissa", True, "olora"))),
    "patterns": dense(
        LoraConfig(r=4, **ALL), LoraConfig(r=2, rank_pattern={"0": 1}, alpha_pattern={"2": 9}, **ALL)
    ),
    "saved modules": dense(*(LoraConfig(r=r, target_modules=["0"], modules_to_save=["2"]) for r in (2, 4))),
    "biases": dense(*(LoraConfig(r=r, bias="all", **ALL) for r in (2, 4))),
    "ia3": dense(*(adapters.IA3Config(target_modules=t, feedforward_modules=[]) for t in (["0", "2"], ["2"]))),
    "vera": dense(*(adapters.VeraConfig(r=r, **ALL) for r in (2, 4))),
    "loha": dense(*(adapters.LoHaConfig(r=r, alpha=3, **ALL) for r in (2, 4))),
    "oft": dense(*[adapters.OFTConfig(r=1, oft_block_size=0, target_modules=["0"])] * 2),
    "c3a": dense(*[adapters.C3AConfig(block_size=1, target_modules=["0"])] * 2),
    "vblora": dense(*[adapters.VBLoRAConfig(r=2, vector_length=1, num_vectors=4, topk=2, **ALL)] * 2),
    "token rows": of_words(
        *(LoraConfig(r=r, target_modules=["q"], trainable_token_indices=TOKENS) for r in (1, 3))
    ),
    "saved embeddings": of_words(*(LoraConfig(r=r, target_modules=["q"], modules_to_save=["embed"]) for r in (1, 3))),
    "tokens": of_words(*[TrainableTokensConfig(token_indices=[5, 2], target_modules=["embed"])] * 2),
    "norms": of_words(*[LNTuningConfig(target_modules=["norm"], modules_to_save=["head"])] * 2),
    "experts and groups": of_kernels(
        *(LoraConfig(r=r, target_modules=t, target_parameters=["experts"])
          for r, t in ((2, ["grouped"]), (4, ["conv"]), (6, ["conv", "grouped"])))
    ),
}  # fmt: skip


def trained(tree: Any) -> Any:
    """Return a copy of a tree whose leaves require gradients."""
    return {path: {n: t.detach().clone().requires_grad_() for n, t in leaves.items()} for path, leaves in tree.items()}
