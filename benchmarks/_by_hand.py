"""LoRA written by hand, for one place: with two plain products, and with the library's kernel and nothing around it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.adapters._methods.shared.fused import linear


class Plain(nn.Module):
    """A frozen linear layer with `A` and `B`, and no way to switch, route, merge or exchange them."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float, p: float):
        super().__init__()
        self.weight, self.scaling, self.p = base.weight, scaling, p
        self.a = nn.Parameter(0.02 * torch.randn(rank, base.in_features))
        self.b = nn.Parameter(0.02 * torch.randn(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """`W x + s B A dropout(x)`, as anybody would write it in torch."""
        dropped = F.dropout(x, self.p) if self.p else x
        return F.linear(x, self.weight) + self.scaling * F.linear(F.linear(dropped, self.a), self.b)


class Kernel(Plain):
    """The same with the kernel that the library's layers run: what is left of their cost."""

    def forward(self, x: Tensor) -> Tensor:
        """`W x + s B A dropout(x)`, as one step of autograd."""
        return linear(x, self.weight, None, self.a, self.b, self.scaling, self.p)


def by_hand(
    layer: type[Plain], model: nn.Module, targets: Sequence[str], rank: int, scaling: float, p: float = 0.0
) -> Any:
    """Return a copy of a model with its targets replaced by layers of a kind."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in targets and isinstance(child, nn.Linear):
                setattr(module, name, layer(child, rank, scaling, p))
    return model
