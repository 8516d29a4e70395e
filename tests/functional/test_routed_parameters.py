"""Rows of one batch with adapters of their own on bare parameters and experts: each is that row alone, merged."""

import copy

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

from torchgraft.adapters import LoraConfig
from torchgraft.functional import UnsupportedCall, bind, merge, route, stack, value_and_grad

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
ROWS = torch.tensor([2, 0, -1, 2, 1])
SIZE, WIDE, EXPERTS = 4, 6, 3


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, dtype=torch.float64)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape, dtype=torch.float64) * 0.5)


class Matrix(nn.Module):
    """A bare matrix, around a layer that may have an adapter too."""

    def __init__(self):
        super().__init__()
        self.up, self.inner = parameter(SIZE, WIDE), linear(SIZE, SIZE)

    def forward(self, x):
        return (self.inner(x) @ self.up).tanh()


class Experts(nn.Module):
    """Experts that get the tokens of all rows, sorted and weighted, as `transformers`' do."""

    def __init__(self):
        super().__init__()
        self.up, self.down = parameter(EXPERTS, WIDE, SIZE), parameter(EXPERTS, SIZE, WIDE)

    def forward(self, tokens, index, weights):
        y = torch.zeros_like(tokens)
        for expert in index.unique().tolist():
            token, place = torch.where(index == expert)
            hidden = F.linear(F.linear(tokens[token], self.up[expert]).relu(), self.down[expert])
            y = y.index_add(0, token, hidden * weights[token, place, None])
        return y


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts, self.last = linear(SIZE, EXPERTS), Experts(), linear(SIZE, WIDE)

    def forward(self, x):
        tokens = x.reshape(-1, SIZE)
        weights, index = self.gate(tokens).softmax(-1).topk(2)
        return self.last(x + self.experts(tokens, index, weights).view(x.shape))


class Outer(nn.Module):
    """A model in which rows are folded, and on the second axis, before they reach the parameter."""

    def __init__(self, inner, sequence_first=False):
        super().__init__()
        self.first, self.m, self.sequence_first = linear(SIZE, SIZE), inner, sequence_first

    def forward(self, x):
        x = self.first(x)
        return self.m(x.transpose(0, 1)).transpose(0, 1) if self.sequence_first else self.m(x)


def matrix():
    return Outer(Matrix()), LoraConfig(r=2, target_modules=["first", "inner"], target_parameters=["m.up"])


def second_axis():
    return Outer(Matrix(), True), LoraConfig(r=2, target_modules=["first"], target_parameters=["m.up"])


def whole():
    """The parameter is the model's own, so that all of it is run in groups."""
    return Matrix(), LoraConfig(r=2, target_modules=["inner"], target_parameters=["up"])


def weight():
    return Outer(linear(SIZE, WIDE)), LoraConfig(r=2, target_parameters=["m.weight"])


def experts():
    targets = ["experts.up", "experts.down"]
    return Outer(Mixture()), LoraConfig(r=2, target_modules=["first", "last"], target_parameters=targets)


def gate():
    return Mixture(), LoraConfig(r=2, target_modules=["last"], target_parameters=["gate.weight", "experts.down"])


def recurrent():
    model = nn.LSTM(SIZE, WIDE, batch_first=True, dtype=torch.float64)
    return model, LoraConfig(r=2, target_parameters=["weight_ih_l0", "weight_hh_l0"])


class Twice(Outer):
    """Runs the module on folded rows, then on rows along the second axis."""

    def forward(self, x):
        y = self.m(self.first(x).flatten(0, 1)).unflatten(0, x.shape[:2])[..., :SIZE]
        return self.m(y.transpose(0, 1)).transpose(0, 1)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = parameter(8, SIZE)

    def forward(self, ids):
        return F.embedding(ids, self.table)


class Positions(nn.Module):
    """Adds a table that all rows share."""

    def __init__(self):
        super().__init__()
        self.positions, self.first = Table(), linear(SIZE, SIZE)

    def forward(self, x):
        return self.first(x + self.positions(torch.arange(x.shape[1]).unsqueeze(0)))


def shared():
    return Positions(), LoraConfig(r=2, target_modules=["first"], target_parameters=["positions.table"])


def twice():
    return Twice(Matrix()), LoraConfig(r=2, target_modules=["first"], target_parameters=["m.up"])


MODELS = [matrix, shared, twice, second_axis, whole, weight, experts, gate]


class Case:
    def __init__(self, make, x=(5, 3, SIZE)):
        torch.manual_seed(0)
        self.model, self.config = make()
        self.x = torch.randn(x, dtype=torch.float64)
        self.graft = bind(self.model, self.config)
        self.trees = [random_tree(self.graft, seed) for seed in range(3)]
        self.many = stack(self.trees)

    def alone(self, row, tree=None, x=None):
        """A row's output: the model with the adapter's weights merged into it, on that row."""
        given = (self.x if x is None else x)[row : row + 1]
        if tree is None:
            tree = self.trees[int(ROWS[row])] if ROWS[row] >= 0 else None
        state = {} if tree is None else merge(self.graft, tree)
        return torch.func.functional_call(self.model, state, (given,))


def random_tree(graft, seed):
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(
        lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype) * 0.5, graft.init(dtype=torch.float64)
    )


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def case(request):
    return Case(request.param)


def test_each_row_is_that_row_alone_merged(case):
    y = case.graft(route(case.many, ROWS), case.x)
    for row in range(len(ROWS)):
        torch.testing.assert_close(y[row : row + 1], case.alone(row), **CLOSE)


def test_a_row_without_adapter_is_the_bases_bit_for_bit(case):
    case.model.requires_grad_(False)  # torch multiplies a trained weight by another kernel
    base = case.model(case.x)
    assert torch.equal(case.graft(route(case.many, ROWS), case.x)[2], base[2])
    assert torch.equal(case.graft(route(case.many, torch.full((5,), -1)), case.x), base)


def test_equal_parts_without_looking_at_rows(case):
    y = case.graft(route(case.many), case.x[:3])
    for row in range(3):
        torch.testing.assert_close(y[row : row + 1], case.alone(row, case.trees[row]), **CLOSE)


def test_gradients_are_those_of_each_row_alone(case):
    def routed(many):
        return case.graft(route(many, ROWS), case.x).square().sum()

    def alone(many):
        each = [optree.tree_map(lambda leaf, i=i: leaf[i], many) for i in range(3)]
        return sum(case.graft(each[r], case.x[i : i + 1]).square().sum() for i, r in enumerate(ROWS.tolist()) if r >= 0)

    expected = grad(alone)(case.many)
    for given in (grad(routed)(case.many), value_and_grad(routed)(case.many)[1]):
        optree.tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10), given, expected)


def test_nan_stays_in_its_row(case):
    x = case.x.clone()
    x[1] = float("nan")
    y = case.graft(route(case.many, ROWS), x)
    for row in (0, 2, 3, 4):
        torch.testing.assert_close(y[row : row + 1], case.alone(row), **CLOSE)
    case.graft(route(case.many, ROWS), case.x)

    def loss(many):
        return case.graft(route(many, ROWS), x)[[0, 2, 3, 4]].square().sum()

    optree.tree_map(lambda leaf: leaf[1:].isfinite().all() or pytest.fail("NaN"), grad(loss)(case.many))


def test_a_broken_adapter_stays_in_its_rows(case):
    many = optree.tree_map(torch.clone, case.many)
    optree.tree_map(lambda leaf: leaf[0].fill_(float("nan")), many)
    y = case.graft(route(many, ROWS), case.x)
    for row in (0, 2, 3, 4):
        torch.testing.assert_close(y[row : row + 1], case.alone(row), **CLOSE)
    assert y[1].isnan().all()


def test_views_and_proofs_of_every_call(case):
    y = case.graft(route(case.many, ROWS), case.x)
    torch.testing.assert_close(case.graft.view(route(case.many, ROWS))(case.x), y, **CLOSE)
    torch.testing.assert_close(case.graft(route(case.many, ROWS, check=True), case.x), y, **CLOSE)
    torch.testing.assert_close(case.graft(route(case.many, ROWS[[1, 0, 2, 3, 4]]), case.x)[2:], y[2:], **CLOSE)


def test_under_a_transform_of_the_rows(case):
    y = case.graft(route(case.many, ROWS), case.x)
    if not isinstance(case.model, Mixture) and not isinstance(getattr(case.model, "m", None), Mixture):
        given = vmap(lambda rows: case.graft(route(case.many, rows), case.x))(torch.stack([ROWS, ROWS.flip(0)]))
        torch.testing.assert_close(given[0], y, **CLOSE)
        torch.testing.assert_close(given[1], case.graft(route(case.many, ROWS.flip(0)), case.x), **CLOSE)


def test_other_sizes_than_those_that_were_looked_at(case):
    case.graft(route(case.many, ROWS), case.x)
    rows, x = ROWS.repeat_interleave(2), torch.randn(10, 2, SIZE, dtype=torch.float64)
    y = case.graft(route(case.many, rows), x)
    for i, r in enumerate(rows.tolist()):
        expected = case.model(x[i : i + 1]) if r < 0 else case.graft(case.trees[r], x[i : i + 1])
        torch.testing.assert_close(y[i : i + 1], expected, **CLOSE)
    if not isinstance(case.model, Positions):  # a table that all rows share grows to as many rows as there are indices
        beams = case.graft.view(route(case.many, ROWS))(x)
        torch.testing.assert_close(beams, y, **CLOSE)


def test_named_adapters_routed_and_plain(case):
    graft = bind(case.model, {"a": case.config, "b": case.config})
    other = [random_tree(case.graft, seed) for seed in (7, 8)]
    rows = torch.tensor([0, 1, -1, -1, 0])
    y = graft({"a": route(case.many, ROWS), "b": route(stack(other), rows)}, case.x)
    plain = graft({"a": route(case.many, ROWS), "b": other[0]}, case.x)
    for i, (a, b) in enumerate(zip(ROWS.tolist(), rows.tolist(), strict=True)):
        first = {"a": case.trees[a]} if a >= 0 else {}
        x = case.x[i : i + 1]
        torch.testing.assert_close(y[i : i + 1], graft(first | ({"b": other[b]} if b >= 0 else {}), x), **CLOSE)
        torch.testing.assert_close(plain[i : i + 1], graft(first | {"b": other[0]}, x), **CLOSE)


@pytest.mark.parametrize("make", [matrix, second_axis, whole, weight], ids=lambda make: make.__name__)
def test_compiled_in_one_piece(make):
    case = Case(make)
    for rows in (ROWS, ROWS.flip(0)):
        y = case.graft(route(case.many, rows), case.x)
        run = torch.compile(lambda rows, x: case.graft(route(case.many, rows), x), backend="eager", fullgraph=True)
        torch.testing.assert_close(run(rows, case.x), y, **CLOSE)
    equal = torch.compile(lambda x: case.graft(route(case.many), x), backend="eager", fullgraph=True)
    torch.testing.assert_close(equal(case.x[:3]), case.graft(route(case.many), case.x[:3]), **CLOSE)


def test_a_view_is_copied(case):
    view = case.graft.view(route(case.many, ROWS))
    y = view(case.x)
    torch.testing.assert_close(copy.deepcopy(view)(case.x), y, **CLOSE)


REPLACED = {
    "beside it": (
        lambda: Outer(linear(SIZE, WIDE)),
        {"target_parameters": ["m.weight"], "bias": "all"},
    ),
    "within": (lambda: Outer(Matrix()), {"target_modules": ["first", "inner"], "bias": "all"}),
    "within, as a whole": (lambda: Outer(Matrix()), {"modules_to_save": ["inner"]}),
}


@pytest.mark.parametrize("place", REPLACED)
def test_tensors_that_are_replaced_row_by_row_too(place):
    model, fields = REPLACED[place]
    case = Case(lambda: (model(), LoraConfig(r=2, **{"target_parameters": ["m.up"], **fields})))
    y = case.graft(route(case.many, ROWS), case.x)
    for row in range(len(ROWS)):
        torch.testing.assert_close(y[row : row + 1], case.alone(row), **CLOSE)


def test_declared():
    case = Case(matrix)
    y = case.graft(route(case.many, ROWS), case.x)
    fresh = bind(case.model, case.config)
    torch.testing.assert_close(fresh(route(case.many, ROWS, batch_dim=0), case.x), y, **CLOSE)
    with pytest.raises(ValueError, match=r"route\(\.\.\., batch_dim=1\) asks for 5 rows"):
        fresh(route(case.many, ROWS, batch_dim=1), case.x)


def test_a_stack_of_different_configs():
    torch.manual_seed(0)
    model = Outer(Matrix())
    configs = [
        LoraConfig(r=2, target_modules=["first"], target_parameters=["m.up"]),
        LoraConfig(r=3, lora_alpha=5, target_modules=["first"], target_parameters=["m.up"]),
        LoraConfig(r=1, target_modules=["first"]),
    ]
    graft = bind(model, configs)
    trees = [random_tree(graft.member(i), i) for i in range(3)]
    x = torch.randn(5, 3, SIZE, dtype=torch.float64)
    y = graft(route(graft.stack(trees), ROWS), x)
    for i, r in enumerate(ROWS.tolist()):
        expected = graft.member(r)(trees[r], x[i : i + 1]) if r >= 0 else model(x[i : i + 1])
        torch.testing.assert_close(y[i : i + 1], expected, **CLOSE)


def test_several_arguments_and_outputs_with_rows_on_different_axes():
    case = Case(recurrent)
    state = tuple(torch.randn(1, 5, WIDE, dtype=torch.float64) for _ in range(2))
    y, (h, c) = case.graft(route(case.many, ROWS), case.x, state)
    for i, r in enumerate(ROWS.tolist()):
        own = case.x[i : i + 1], tuple(t[:, i : i + 1] for t in state)
        given, (a, b) = case.graft(case.trees[r], *own) if r >= 0 else case.model(*own)
        for left, right in ((y[i : i + 1], given), (h[:, i : i + 1], a), (c[:, i : i + 1], b)):
            torch.testing.assert_close(left, right, **CLOSE)


# -- errors ---------------------------------------------------------------------------------------------------------


class Mixing(Matrix):
    def forward(self, x):
        return (self.inner(x) @ self.up).softmax(0)


class Turning(Matrix):
    def forward(self, x):
        return super().forward(x.flip(0))


@pytest.mark.parametrize("cls", [Mixing, Turning])
def test_a_module_whose_rows_meet_is_an_error(cls):
    case = Case(lambda: (Outer(cls()), LoraConfig(r=2, target_parameters=["m.up"])))
    with pytest.raises(ValueError, match=r"m\.up \(behind its module\).*reorders, selects, mixes or shares rows"):
        case.graft(route(case.many, ROWS), case.x)


def test_a_parameter_that_another_module_reads_is_an_error():
    class Reading(Outer):
        def forward(self, x):
            return self.first(x) @ self.m.up

    case = Case(lambda: (Reading(Matrix()), LoraConfig(r=2, target_parameters=["m.up"])))
    with pytest.raises(UnsupportedCall, match=r"m\.up: .* read outside of the forward of its module.*torch\.vmap"):
        case.graft(route(case.many, ROWS), case.x)


def test_an_argument_that_cannot_be_cut_is_an_error():
    class Held:
        def __init__(self, x):
            self.x = x

    class Within(Matrix):
        def forward(self, x):
            return super().forward(x.x)

    class Around(Outer):
        def forward(self, x):
            return self.m(Held(self.first(x)))

    case = Case(lambda: (Around(Within()), LoraConfig(r=2, target_parameters=["m.up"])))
    with pytest.raises(UnsupportedCall, match=r"m\.up: .*its module gets a Held, which has no rows to cut; use torch"):
        case.graft(route(case.many, ROWS), case.x)


def test_rows_that_are_dropped_later_are_an_error():
    class Dropping(Matrix):
        def forward(self, x):
            y = super().forward(x)
            return y if len(y) < 2 else y[:-1]

    class Around(Outer):
        def forward(self, x):
            y = self.m(self.first(x))
            return torch.cat([y, x.new_zeros(len(x) - len(y), *y.shape[1:])])

    case = Case(lambda: (Around(Dropping()), LoraConfig(r=2, target_parameters=["m.up"])))
    with pytest.raises(ValueError, match=r"m\.up"):
        case.graft(route(case.many, ROWS), case.x)
    with pytest.raises(ValueError, match=r"m\.up.*returns a tensor of shape .* for 2 of them.*use torch\.vmap"):
        case.graft(route(case.many, ROWS, batch_dim=0), case.x)


def test_a_buffer_that_is_written_is_an_error():
    class Counting(Matrix):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return super().forward(x)

    case = Case(lambda: (Outer(Counting()), LoraConfig(r=2, target_parameters=["m.up"])))
    with pytest.raises(UnsupportedCall, match=r"m\.up: .*its module writes to a buffer, which each group"):
        case.graft(route(case.many, ROWS), case.x)
