"""Functional optimizers in a bank: many adapters at once, each as torch's own optimizer steps it alone."""

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torchopt

from torchgraft.adapters import Bank, functional_optimizer
from torchgraft.functional import bind

from .alone import Alone, distance, lora, model

COUNT = 6
CLOSE = 1e-6
"""How far torchopt's optimizers may be from torch's, whose powers of betas are float64."""
RATES = [1e-3 * (1 + i) for i in range(COUNT)]


class Counted:
    """An optimizer of torchopt's that counts how often it is asked for updates."""

    calls = 0

    def __init__(self, make: Any, **hyper: Any):
        self.optimizer = make(**hyper)

    def init(self, params: Any) -> Any:
        return self.optimizer.init(params)

    def update(self, gradients: Any, state: Any, params: Any = None) -> Any:
        Counted.calls += 1
        return self.optimizer.update(gradients, state, params=params, inplace=False)


class Looks:
    """Descent that looks at numbers, which `vmap` does not let it."""

    def __init__(self, lr: float):
        self.lr = lr

    def init(self, params: Any) -> Any:
        return ()

    def update(self, gradients: Any, state: Any, params: Any = None) -> Any:
        leaves = optree.tree_leaves(gradients)
        rate = self.lr if all(leaf.norm().item() < 1e9 for leaf in leaves) else 0.0
        return optree.tree_map(lambda g: -rate * g, gradients), state


class Joins(Looks):
    """Descent that `vmap` lets join adapters: all get the largest rate."""

    def update(self, gradients: Any, state: Any, params: Any = None) -> Any:
        rate = torch.as_tensor(self.lr, dtype=torch.float64)
        while torch._C._functorch.is_functorch_wrapped_tensor(rate):
            rate = torch._C._functorch.get_unwrapped(rate)
        return optree.tree_map(lambda g: -rate.max().to(g) * g, gradients), state


def trained(make: Callable[..., Any], peer: Any, hyper: dict[str, Any], ranks: list[int]) -> list[float]:
    """Train adapters of some ranks for three steps, each with its own rate; returns how far each is from alone."""
    base = model()
    bank = Bank(bind(base, lora(4)), slots=COUNT, optimizer=functional_optimizer(make, name="tried", lr=0.5, **hyper))
    alone = {}
    for i, r in enumerate(ranks):
        alone[str(i)] = Alone(base, lora(r), (peer, {"lr": 0.5, **hyper}), i)
        bank.add(str(i), lora(r), generator=torch.Generator().manual_seed(i))
    x = torch.randn(2 * COUNT, 5, dtype=torch.float64)
    names = [*alone] * 2
    for _ in range(3):
        with bank.rows(names) as adapted:
            adapted(x).square().sum().backward()
        bank.step({name: {"lr": RATES[int(name)], "max_norm": 3.0} for name in alone})
        for name, one in alone.items():
            one.backward(x[[given == name for given in names]], torch.ones(2, dtype=torch.float64), 1)
            one.step({"lr": RATES[int(name)], "max_norm": 3.0}, False)
    return [distance(bank, name, one) for name, one in alone.items()]


@pytest.mark.parametrize(
    ("make", "peer", "hyper"),
    [
        (torchopt.adamw, torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.95)}),
        (torchopt.sgd, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
        (torchopt.rmsprop, torch.optim.RMSprop, {"alpha": 0.9}),
    ],
    ids=["adamw", "sgd", "rmsprop"],
)
def test_adapters_of_one_shape_are_stepped_at_once_with_rates_of_their_own(make: Any, peer: Any, hyper: Any) -> None:
    Counted.calls = 0
    assert max(trained(lambda **own: Counted(make, **own), peer, hyper, [2] * COUNT)) < CLOSE
    proved = 2 * COUNT  # the first step, each once more alone, with an optimizer that was called before
    assert Counted.calls <= proved + 3 * 2 + 1, "one call for all, and one before as each optimizer gets"


def test_adapters_of_other_shapes_are_stepped_apart() -> None:
    assert max(trained(torchopt.adamw, torch.optim.AdamW, {"weight_decay": 0.0}, [1, 2, 4, 2, 1, 2])) < CLOSE


@pytest.mark.parametrize("make", [Looks, Joins])
def test_what_does_not_vectorize_is_stepped_one_by_one(make: Any) -> None:
    assert max(trained(make, torch.optim.SGD, {}, [2] * COUNT)) < 1e-10
