"""Trees in functional optimizers: torchopt, with a learning rate for each adapter of a stack."""

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind, route, stack, unstack, value_and_grad

torchopt = pytest.importorskip("torchopt")


def per_adapter(rates):
    """Multiply the updates of a stack by one rate for each adapter, along the leading axis of every leaf."""

    def update(updates, state, *, params=None, inplace=True):
        return optree.tree_map(lambda u: u * rates.to(u).view(-1, *(1,) * (u.ndim - 1)), updates), state

    return torchopt.base.GradientTransformation(lambda params: (), update)


def start():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    graft = bind(model, LoraConfig(r=2, target_modules="all-linear"))
    trees = [graft.init(torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(3)]
    return graft, trees, torch.randn(3, 5, 4, dtype=torch.float64), torch.randint(0, 3, (3, 5))


def steps(optimizer, loss, params, stacked, count=4):
    state = optimizer.init(params)
    for _ in range(count):
        _, grads = value_and_grad(loss, stacked=stacked)(params)
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return params


@pytest.mark.parametrize("make", [torchopt.sgd, torchopt.adam, torchopt.adamw], ids=lambda make: make.__name__)
def test_stack_with_a_learning_rate_each_is_each_alone_with_its_own(make):
    graft, trees, x, y = start()
    rates = torch.tensor([0.3, 0.03, 0.003], dtype=torch.float64)

    def losses(many):
        logits = graft(route(many), x.flatten(0, 1))
        return F.cross_entropy(logits, y.flatten(), reduction="none").view(3, -1).mean(1)

    together = steps(torchopt.chain(make(lr=1.0), per_adapter(rates)), losses, stack(trees), True)
    for index, (tree, given) in enumerate(zip(trees, unstack(together), strict=True)):

        def loss(params, index=index):
            return F.cross_entropy(graft(params, x[index]), y[index])

        alone = steps(torchopt.chain(make(lr=1.0), per_adapter(rates[index])), loss, tree, False)
        for ours, theirs in zip(*map(optree.tree_leaves, (given, alone)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
