"""LoRA written by hand: what the adapted layers cost where nothing but their kernels runs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.adapters.methods.shared.fused import linear


class ByHand(nn.Module):
    """A frozen linear layer with `A` and `B`, and no way to switch, route, merge or exchange them."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float, p: float):
        super().__init__()
        self.weight, self.scaling, self.p = base.weight, scaling, p
        self.a = nn.Parameter(0.02 * torch.randn(rank, base.in_features))
        self.b = nn.Parameter(0.02 * torch.randn(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """`W x + s B A dropout(x)`."""
        return linear(x, self.weight, None, self.a, self.b, self.scaling, self.p)


def by_hand(model: nn.Module, targets: Sequence[str], rank: int, scaling: float, p: float = 0.0) -> Any:
    """A copy of a model with its targets replaced."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in targets and isinstance(child, nn.Linear):
                setattr(module, name, ByHand(child, rank, scaling, p))
    return model
