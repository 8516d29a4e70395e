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
    trees = drawn(graft, 3)
    return graft, trees, stack(trees)


def drawn(graft, count):
    generator = torch.Generator().manual_seed(0)
    return [
        optree.tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator).to(t), graft.init())
        for _ in range(count)
    ]


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


def stacked(model):
    """A graft of a model's `proj`, four adapters, and their stack."""
    graft = bind(model, LoraConfig(r=2, target_modules=["proj"]))
    trees = drawn(graft, 4)
    return graft, trees, stack(trees)


class Packed(nn.Module):
    """Sorts its rows by their lengths, the longest first, and may ask that there is one of a length."""

    def __init__(self, back=True, least=None):
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.back, self.least = nn.Linear(6, 6), back, least

    def forward(self, x, lengths):
        if self.least is not None and not bool((lengths >= self.least).all()):
            raise IndexError("a row is too short")
        order = lengths.argsort(descending=True, stable=True)
        y = self.proj(x[order])
        return y[order.argsort()] if self.back else y


LENGTHS = {
    "lengths": (torch.tensor([5, 5, 5]), torch.tensor([2, 3, 5])),
    "none": (torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2])),
    "shares": (torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.1, 0.5, 1.0])),
    "flags": (torch.tensor([False, False, False]), torch.tensor([False, True, True])),
}


@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize(("lengths", "least"), [*((lengths, None) for lengths in LENGTHS), ("lengths", 2)])
def test_what_was_equal_in_all_rows_of_a_look_and_differs_later_is_looked_at_again(lengths, back, least):
    equal, others = LENGTHS[lengths]
    graft, trees, many = stacked(Packed(back, least))
    x, rows = torch.randn(3, 6), torch.tensor([0, 1, 2])
    y = torch.stack([graft(trees[i], x, equal)[i] for i in range(3)])
    for _ in range(3):
        torch.testing.assert_close(graft(route(many, rows), x, equal), y)
    with pytest.raises(ValueError, match="proj.*reorders, selects, mixes or shares rows"):
        graft(route(many, rows), x, others)
    torch.testing.assert_close(graft(route(many, rows), x, equal), y)


def test_a_compiled_call_takes_no_word_of_a_look_at_equal_rows_that_would_not_hold_for_others():
    graft, _, many = stacked(Packed())
    x, rows = torch.randn(3, 6), torch.tensor([0, 1, 2])
    graft(route(many, rows), x, torch.tensor([5, 5, 5]))
    compiled = torch.compile(lambda lengths: graft(route(many, rows), x, lengths), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="whose rows differ"):
        compiled(torch.tensor([5, 2, 3]))


def test_a_mask_of_ones_is_looked_at_once_for_all_masks():
    runs = []

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6)

        def forward(self, x, mask):
            runs.append(len(x))
            return (self.proj(x) * mask.unsqueeze(-1)).sum(1)

    graft, trees, many = stacked(Masked())
    x, rows, mask = torch.randn(4, 5, 6), torch.tensor([0, 1, 2, 3]), torch.ones(4, 5, dtype=torch.long)
    graft(route(many, rows), x, mask)
    runs.clear()
    mask = (torch.arange(5) < torch.tensor([[1], [5], [3], [2]])).long()
    y = graft(route(many, rows), x, mask)
    assert runs == [4]
    torch.testing.assert_close(y, torch.stack([graft(trees[i], x, mask)[i] for i in range(4)]))
