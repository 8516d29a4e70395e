"""Experts in a bank: adapters on their stacked weights are what they are alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchgraft.adapters import Bank, LoraConfig, sgd
from torchgraft.functional import bind

SIZE, WIDE, EXPERTS = 4, 6, 3


class Experts(nn.Module):
    """Experts that get the tokens of all rows, as those of `transformers` do."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDE, SIZE, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(EXPERTS, SIZE, WIDE, dtype=torch.float64))

    def forward(self, tokens: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(tokens)
        for expert in index.unique().tolist():
            token, place = torch.where(index == expert)
            hidden = F.linear(F.linear(tokens[token], self.up[expert]).relu(), self.down[expert])
            y = y.index_add(0, token, hidden * weights[token, place, None])
        return y


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gate = (nn.Linear(SIZE, width, dtype=torch.float64) for width in (SIZE, EXPERTS))
        self.experts, self.last = Experts(), nn.Linear(SIZE, WIDE, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.first(x).flatten(0, 1)
        weights, index = self.gate(tokens).softmax(-1).topk(2)
        y: torch.Tensor = self.last(x + self.experts(tokens, index, weights).view(x.shape))
        return y


def config(r: int, *modules: str) -> LoraConfig:
    targets = ["experts.up", "experts.down"]
    return LoraConfig(
        r=r, lora_alpha=3 + r, target_modules=[*modules], target_parameters=targets, init_lora_weights=False
    )


def test_experts_in_a_bank_are_what_they_are_alone() -> None:
    model = Mixture()
    bank = Bank(bind(model, config(3, "first", "last")), slots=3, optimizer=sgd(lr=1e-4))
    x, given = torch.randn(4, 5, SIZE, dtype=torch.float64), ["a", "b", "a", "b"]
    for name in "ab":
        bank.add(name, config(3, "first", "last"))
    alone = {name: bank.tensors(name) for name in "ab"}
    for _ in range(3):
        with bank.rows(given) as adapted:
            y = adapted(x)
            y.square().sum().backward()
        bank.step(["a", "b"])
        for name, params in alone.items():
            leaves = [leaf.requires_grad_() for own in params.values() for leaf in own.values()]
            rows = [one == name for one in given]
            own = bind(model, bank.config(name))(params, x[rows])
            torch.testing.assert_close(y.detach()[rows], own.detach(), rtol=1e-10, atol=1e-12)
            for leaf, gradient in zip(leaves, torch.autograd.grad(own.square().sum(), leaves), strict=True):
                leaf.data.sub_(gradient, alpha=1e-4)
            torch.testing.assert_close(bank.tensors(name), params, rtol=1e-10, atol=1e-12)


def test_experts_of_another_rank_are_refused() -> None:
    bank = Bank(bind(Mixture(), config(3)), slots=3)
    with pytest.raises(
        ValueError,
        match=r"'a' .* \(3, 6\) at 'experts.down'.* for a parameter of 3 experts has leaves of all.*give it the rank.* "
        r"\(r is 1, there 3, ",
    ):
        bank.add("a", config(1))
    with pytest.raises(ValueError, match="or the bank with a config that is as large"):
        bank.add("a", config(4))
    assert bank.names == []
