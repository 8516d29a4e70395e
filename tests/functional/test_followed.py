"""Experts in one grouped product for rows with adapters of their own: what is followed, and what is not."""

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind, merge, route, stack, value_and_grad
from torchgraft.functional._skeleton.entries import Entries

pytestmark = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product")

CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # float32, the only wide dtype that torch's grouped product takes
SIZE, WIDE, EXPERTS, TOP = 8, 16, 4, 2
ROWS = torch.tensor([2, 0, -1, 2, 1])
CONFIG = {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}


class Experts(nn.Module):
    """Experts that sort the tokens of all rows and multiply them in groups."""

    runs = 0

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDE, SIZE) * 0.4)
        self.down = nn.Parameter(torch.randn(EXPERTS, SIZE, WIDE) * 0.4)

    def sort(self, tokens, order):
        return tokens[order // TOP]

    def forward(self, tokens, index, weights):
        Experts.runs += 1
        experts, order = index.reshape(-1).sort()
        ends = torch.bincount(experts, minlength=EXPERTS).cumsum(0, dtype=torch.int32)
        hidden = F.grouped_mm(self.sort(tokens, order), self.up.transpose(1, 2), offs=ends)
        hidden = F.grouped_mm(F.silu(hidden), self.down.transpose(1, 2), offs=ends)
        hidden = hidden * weights.reshape(-1)[order, None]
        return hidden[order.argsort()].view(len(tokens), TOP, SIZE).sum(1)


class Mixture(nn.Module):
    def __init__(self, experts=Experts):
        super().__init__()
        self.gate, self.experts = nn.Linear(SIZE, EXPERTS), experts()

    def forward(self, x):
        tokens = x.reshape(-1, SIZE)
        weights, index = self.gate(tokens).softmax(-1).topk(TOP)
        return x + self.experts(tokens, index, weights).view(x.shape)


def oracle(model, state, x):
    """The equation in float64, token by token: `x + sum of w_k down_k silu(up_k x)`."""
    up, down = (state.get(f"experts.{name}", getattr(model.experts, name)).double() for name in ("up", "down"))
    weights, index = (t.flatten(0, -2) for t in model.gate(x).softmax(-1).topk(TOP))
    rows = []
    for token, chosen, scales in zip(x.reshape(-1, SIZE).double(), index, weights.double(), strict=True):
        parts = [s * (down[e] @ F.silu(up[e] @ token)) for e, s in zip(chosen.tolist(), scales, strict=True)]
        rows.append(token + sum(parts))
    return torch.stack(rows).view(x.shape).float()


class Case:
    def __init__(self, experts=Experts, config=None):
        torch.manual_seed(0)
        self.model = Mixture(experts).requires_grad_(False)
        self.graft = bind(self.model, config or LoraConfig(r=2, **CONFIG))
        self.trees = [random_tree(self.graft, seed) for seed in range(3)]
        self.many, self.x = stack(self.trees), torch.randn(5, 6, SIZE)

    def runs(self, params):
        """Call the graft; return its output and how often it ran the experts."""
        self.graft(params, self.x)  # looks where rows are
        before = Experts.runs
        return self.graft(params, self.x), Experts.runs - before

    def alone(self, row):
        state = merge(self.graft, self.trees[ROWS[row]]) if ROWS[row] >= 0 else {}
        return oracle(self.model, state, self.x[row])


def random_tree(graft, seed):
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: torch.randn(t.shape, generator=generator) * 0.5, graft.init())


def test_each_row_is_the_equation_with_its_own_adapter_in_one_run():
    case = Case()
    y, runs = case.runs(route(case.many, ROWS))
    for row in range(5):
        torch.testing.assert_close(y[row], case.alone(row), **CLOSE)
    assert runs == 1
    assert torch.equal(y[2], case.model(case.x)[2]), "a row without adapter is the base's bit for bit"
    y, runs = case.runs(route(case.many, ROWS, check=True))
    torch.testing.assert_close(y[3], case.alone(3), **CLOSE)


@pytest.mark.parametrize("rows", [[0, 1, 2, 0, 1], [-1, -1, 0, 1, -1]])
def test_gradients_are_those_of_each_row_alone(rows):
    case = Case()

    def routed(many):
        return case.graft(route(many, torch.tensor(rows)), case.x).square().sum()

    def alone(many):
        each = [optree.tree_map(lambda leaf, i=i: leaf[i], many) for i in range(3)]
        return sum(case.graft(each[r], case.x[i]).square().sum() for i, r in enumerate(rows) if r >= 0)

    expected = value_and_grad(alone)(case.many)[1]
    optree.tree_map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4),
        value_and_grad(routed)(case.many)[1],
        expected,
    )


def test_nothing_of_a_broken_row_or_adapter_reaches_others():
    case = Case()
    broken, many = case.x.clone(), optree.tree_map(torch.clone, case.many)
    broken[1] = float("nan")
    y = case.graft(route(case.many, ROWS), broken)
    optree.tree_map(lambda leaf: leaf[0].fill_(float("nan")), many)
    z, runs = case.runs(route(many, ROWS))
    for row in (0, 2, 3, 4):
        torch.testing.assert_close(y[row], case.alone(row), **CLOSE)
        torch.testing.assert_close(z[row], case.alone(row), **CLOSE)
    assert runs == 1 and z[1].isnan().any()

    def loss(many):
        return case.graft(route(many, ROWS), broken)[[0, 2, 3, 4]].square().sum()

    grads = value_and_grad(loss)(case.many)[1]
    optree.tree_map(lambda leaf: leaf[1:].isfinite().all() or pytest.fail("NaN in another adapter"), grads)


def test_named_adapters_beside_each_other():
    case = Case()
    config = LoraConfig(r=2, **CONFIG)
    graft = bind(case.model, {"a": config, "b": config})
    first, second = torch.tensor([0, 1, -1, -1, 2]), torch.tensor([1, 1, 0, -1, -1])
    for b in (route(stack(case.trees[1:]), second), case.trees[1]):
        y = graft({"a": route(case.many, first), "b": b}, case.x)
        for i, (u, v) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            trees = {"a": case.trees[u]} if u >= 0 else {}
            if isinstance(b, dict):
                trees["b"] = b
            elif v >= 0:
                trees["b"] = case.trees[1 + v]
            torch.testing.assert_close(y[i], oracle(case.model, merge(graft, trees), case.x[i]), **CLOSE)


def test_scalings_that_differ_along_a_stack():
    case = Case()
    configs = [LoraConfig(r=2, lora_alpha=alpha, **CONFIG) for alpha in (8, 5, 2)]
    graft = bind(case.model, configs)
    trees = [random_tree(graft.member(i), i) for i in range(3)]
    y = graft(route(graft.stack(trees), ROWS), case.x)
    for i, r in enumerate(ROWS.tolist()):
        state = merge(graft.member(r), trees[r]) if r >= 0 else {}
        torch.testing.assert_close(y[i], oracle(case.model, state, case.x[i]), **CLOSE)


class Turned(Experts):
    """Turns the tokens round by a function that nobody follows, and picks accordingly."""

    def sort(self, tokens, order):
        return tokens.flip(0)[len(tokens) - 1 - order // TOP]


class Written(Experts):
    """Writes tokens over others through a tensor that shares their memory."""

    def sort(self, tokens, order):
        picked = tokens[order // TOP]
        wrong = picked.flip(0).clone()[: len(picked)]
        kept, alias = picked.clone(), wrong.view(-1, SIZE)
        picked = tokens[(order // TOP).flip(0)]
        picked.view(-1, SIZE).copy_(kept)
        return picked if alias is not None else wrong


class Single(Experts):
    """Reads the experts one by one where a product fails, and catches what that raises."""

    def sort(self, tokens, order):
        try:
            self.up[0].sum()
        except Exception:
            return tokens[order // TOP] * 0
        return tokens[order // TOP]


@pytest.mark.parametrize("experts", [Turned, Written, Single])
def test_what_is_not_followed_runs_once_for_each_adapter(experts):
    case = Case(experts)
    y, runs = case.runs(route(case.many, ROWS))
    for row in range(5):
        torch.testing.assert_close(y[row], case.alone(row), **CLOSE)
    assert runs == 4, "three adapters and the base"


class Swapping(Experts):
    """Gives each token to the row of another one."""

    def sort(self, tokens, order):
        return tokens[(order // TOP + 6) % len(tokens)]


def test_rows_that_meet_are_an_error():
    case = Case(Swapping)
    with pytest.raises(ValueError, match=r"experts\.up \(behind its module\).*reorders, selects, mixes or shares rows"):
        case.graft(route(case.many, ROWS), case.x)


X, OF = torch.randn(4, 6), torch.tensor([0, 0, 1, 1])

FOLLOWED = {
    "picked": (lambda x: x[torch.tensor([3, 0])], [1, 0]),
    "by a mask": (lambda x: x[torch.tensor([True, False, True, False])], [0, 1]),
    "selected": (lambda x: x.index_select(0, torch.tensor([2, 1])), [1, 0]),
    "repeated": (lambda x: x.repeat_interleave(2, dim=0), [0, 0, 0, 0, 1, 1, 1, 1]),
    "folded": (lambda x: x.view(-1, 3), [0, 0, 0, 0, 1, 1, 1, 1]),
    "a part": (lambda x: x.chunk(2, dim=-1)[1], [0, 0, 1, 1]),
    "every other": (lambda x: x[..., ::2], [0, 0, 1, 1]),
    "columns": (lambda x: x[:, 1:3], [0, 0, 1, 1]),
    "gated": (lambda x: F.silu(x[:, :3]) * x[:, 3:], [0, 0, 1, 1]),
    "scaled": (lambda x: 2 * x.double() / torch.ones(6) + torch.ones(1, 6), [0, 0, 1, 1]),
    "in place": (lambda x: F.relu(x.clone(), inplace=True), [0, 0, 1, 1]),
}

LOST = {
    "turned": lambda x: x.flip(0),
    "added up": lambda x: x.cumsum(0),
    "transposed": lambda x: x[:, :4].T,
    "merged": lambda x: x.view(2, 12),
    "split": lambda x: x.chunk(2)[0],
    "another's": lambda x: x + torch.ones(4, 6),
    "otherwise sorted": lambda x: x * x[torch.tensor([1, 0, 3, 2])],
    "a range": lambda x: x[1:3],
    "broadcast": lambda x: x[:, 0] * torch.ones(4, 4),
    "written": lambda x: x.clone().copy_(torch.ones(4, 6)),
    "out": lambda x: torch.mul(x, 2, out=x[torch.arange(4)]),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_followed(name):
    change, expected = FOLLOWED[name]
    with Entries([(X, OF)]) as entries:
        y = change(X)
    assert entries.rows_of(y).tolist() == expected


@pytest.mark.parametrize("name", LOST)
def test_not_followed(name):
    with Entries([(X, OF)]) as entries:
        y = LOST[name](X)
    assert entries.rows_of(y) is None


def test_what_shares_memory_with_a_tensor_that_is_written_is_not_followed():
    with Entries([(X, OF)]) as entries:
        y = X.clone()
        view, other = y.view(4, 2, 3), y.detach()
        other[0] = y[3].clone()
    assert entries.rows_of(y) is None and entries.rows_of(view) is None and entries.rows_of(X) is OF


@pytest.mark.parametrize("write", [lambda x: setattr(x, "data", X.flip(0)), lambda x: torch.ops.aten.zero_.default(x)])
def test_what_writes_without_a_method(write):
    with Entries([(X, OF)]) as entries:
        y = X.clone()
        write(y)
    assert entries.rows_of(y) is None
