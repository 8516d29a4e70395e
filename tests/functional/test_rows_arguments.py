"""Arguments that decide which way a model takes its rows: numbers, and tensors within objects."""

import dataclasses
import types

import optree
import pytest
import torch
from torch import nn

from torchgraft.adapters import IA3Config, LoHaConfig, LoraConfig
from torchgraft.functional import bind, route, stack

ROWS = torch.tensor([0, 1, 2, 0])
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
runs: list[int] = []


@dataclasses.dataclass
class Batch:
    lengths: torch.Tensor


@dataclasses.dataclass(slots=True)
class Slots:
    lengths: torch.Tensor


class Model(nn.Module):
    """Takes its rows in the order that `order` gives, and puts them back."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.order = nn.Linear(6, 6).double(), order

    def forward(self, x, argument):
        runs.append(len(x))
        order = self.order(x, argument)
        return self.proj(x[order])[order.argsort()]


def by_lengths(x, argument):
    return argument.lengths.argsort(descending=True, stable=True)


def turned(x, argument):
    order = torch.arange(len(x))
    return order.flip(0) if argument == 3 else order


def made(order, config=LoraConfig):
    graft = bind(Model(order), config(target_modules=["proj"], **({} if config is IA3Config else {"r": 2})))
    generator = torch.Generator().manual_seed(0)
    trees = [
        optree.tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator).to(t), graft.init())
        for _ in range(3)
    ]
    return graft, trees, stack(trees)


def looped(graft, trees, argument):
    return torch.stack([graft(trees[i], X, argument)[row] for row, i in enumerate(ROWS.tolist())])


@pytest.mark.parametrize("within", [Batch, Slots, lambda t: types.SimpleNamespace(lengths=t)])
@pytest.mark.parametrize("style", ["call", "view"])
def test_tensors_within_objects_that_were_equal_are_looked_at_again(within, style):
    graft, trees, many = made(by_lengths)
    routed = route(many, ROWS)
    run = graft.view(routed) if style == "view" else lambda *inputs: graft(routed, *inputs)
    equal = within(torch.tensor([3, 3, 3, 3]))
    torch.testing.assert_close(run(X, equal), looped(graft, trees, equal))
    with pytest.raises(ValueError, match="proj.*reorders, selects, mixes or shares rows"):
        run(X, within(torch.tensor([1, 4, 2, 3])))


@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig, IA3Config])
@pytest.mark.parametrize("number", [int, float, torch.tensor])
def test_a_number_that_a_model_branches_on_is_looked_at_anew(number, config):
    graft, trees, many = made(turned, config)
    torch.testing.assert_close(graft(route(many, ROWS), X, number(0)), looped(graft, trees, number(0)))
    with pytest.raises(ValueError, match="proj.*reorders, selects, mixes or shares rows"):
        graft(route(many, ROWS), X, number(3))


def test_compiled_calls_do_not_take_the_word_of_another_number():
    graft, trees, many = made(turned)
    graft(route(many, ROWS), X, 0)
    compiled = torch.compile(lambda k: graft(route(many, ROWS), X, k), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(0), looped(graft, trees, 0))
    with pytest.raises(Exception, match="not known where"):
        compiled(3)


def test_numbers_that_show_the_same_are_looked_at_a_few_times_only():
    graft, trees, many = made(lambda x, argument: torch.arange(len(x)))
    for step in range(20):
        runs.clear()
        y = graft(route(many, ROWS), X, 0.1 * step)
        assert (len(runs) == 1) == (step >= 8)
        torch.testing.assert_close(y, looped(graft, trees, 0.1 * step))
