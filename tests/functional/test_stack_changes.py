"""Stacks that adapters join and leave, and the names of these: each stays what it is alone."""

import copy
import pickle
import re

import optree
import pytest
import torch
from torch import nn

from torchgraft.adapters import AdaLoraConfig, LoraConfig, VeraConfig
from torchgraft.functional import StackedGraft, bind, route, stack, trainable

X = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "lora": [
        LoraConfig(r=1, lora_alpha=3, target_modules=["0", "2"]),
        LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=["2"]),
        LoraConfig(r=2, rank_pattern={"0": 3}, target_modules=["0", "2"]),
    ],
    "adalora": [AdaLoraConfig(init_r=r, target_modules=targets) for r, targets in ((1, ["0"]), (3, ["2"]), (2, ["0"]))],
    "vera": [VeraConfig(r=2 + i, projection_prng_key=i, target_modules=["0", "2"]) for i in range(3)],
}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def trees_of(graft):
    fresh = [graft.member(i).init(torch.Generator().manual_seed(i)) for i in range(len(graft.members))]
    return [optree.tree_map(lambda t: t + 0.3 * torch.randn_like(t), tree) for tree in fresh]


def alike(a, b):
    return optree.tree_structure(a) == optree.tree_structure(b) and optree.tree_all(optree.tree_map(torch.equal, a, b))


@pytest.mark.parametrize("method", CONFIGS)
def test_what_joins_and_leaves_is_as_if_bound_so(method):
    configs, model = CONFIGS[method], mlp()
    graft = bind(model, configs)
    trees = trees_of(graft)
    few = bind(model, configs[:2])
    grown, many = few.append(few.stack(trees[:2]), configs[2], trees[2])
    assert alike(many, graft.stack(trees)) and len(few.members) == 2
    rows = torch.tensor([2, 0, -1, 1])
    torch.testing.assert_close(grown(route(many, rows), X), graft(route(many, rows), X), rtol=0, atol=0)
    shrunk, rest = grown.remove(many, 1)
    expected = bind(model, [configs[0], configs[2]])
    assert alike(rest, expected.stack([trees[0], trees[2]]))
    rows = torch.tensor([1, 0, -1, 1])
    torch.testing.assert_close(shrunk(route(rest, rows), X), expected(route(rest, rows), X), rtol=0, atol=0)
    for i, own in enumerate(shrunk.unstack(rest)):
        assert alike(own, trees[2 * i]) and torch.equal(shrunk.member(i)(own, X), graft.member(2 * i)(trees[2 * i], X))


def test_joining_and_leaving_are_differentiable_and_trained_under_no_grad():
    graft = bind(mlp(), CONFIGS["lora"])
    trees = trees_of(graft)
    leaves = [leaf for tree in trees for leaf in trainable(tree)]
    few, two = graft.remove(graft.stack(trees), -1)
    assert two["2"]["lora_A"].grad_fn is not None
    again, many = few.append(two, CONFIGS["lora"][2], trees[2])
    again(route(many), X[:3]).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    with torch.no_grad():
        trainable(few.append(two, CONFIGS["lora"][2], trees[2])[1])


def test_names_are_places():
    graft = bind(mlp(), CONFIGS["lora"][:2], names=["poems", "code"])
    trees = trees_of(graft)
    many = graft.stack(trees)
    y = graft(route(many, graft.rows(["code", None, "poems", "code"])), X)
    torch.testing.assert_close(y[1], graft.model(X)[1], rtol=0, atol=0)
    torch.testing.assert_close(y[3], graft.member("code")(trees[1], X)[3])
    assert graft.member("code") is graft.member(1) is graft.member(-1)
    padded = optree.tree_map(lambda t: t[1], many)
    torch.testing.assert_close(graft.at("code")(padded, X), graft.member(1)(trees[1], X))
    more, stacked = graft.append(many, CONFIGS["lora"][2], bind(mlp(), CONFIGS["lora"][2]).init(), "songs")
    fewer, _ = more.remove(stacked, "poems")
    assert (more.names, fewer.names) == (("poems", "code", "songs"), ("code", "songs"))
    assert fewer.rows(["songs", "code"]).tolist() == [1, 0]


def test_one_unstack_is_right_for_both_kinds():
    model = mlp()
    one = bind(model, CONFIGS["lora"][0])
    trees = [one.init(), one.init()]
    assert all(alike(*pair) for pair in zip(one.unstack(stack(trees)), trees, strict=True))
    named = bind(model, {"a": CONFIGS["lora"][0]})
    both = [named.init(), named.init()]
    assert all(alike(*pair) for pair in zip(named.unstack(named.stack(both)), both, strict=True))
    with pytest.raises(ValueError, match="their leading axes must be equal: the number of adapters"):
        one.unstack(trees[0])
    with pytest.raises(KeyError, match="unknown site 'x'"):
        one.stack([{"x": {}}])


def test_modes_are_those_of_members_too():
    model = nn.Sequential(mlp(), nn.Dropout())
    graft = bind(model, [LoraConfig(r=r, target_modules=["0.0"]) for r in (1, 2)]).in_mode(training=False)
    config = LoraConfig(r=3, target_modules=["0.0"])
    tree = graft.member(0).init()
    assert model.training and torch.equal(graft.member(0)(tree, X), model[0](X))
    grown, many = graft.append(graft.init(), config, bind(model, config).init())
    assert torch.equal(grown(route(many), X[:3]), model[0](X[:3])) and grown.member(2) is not graft.member(1)


def test_copies_have_their_own_members():
    graft = bind(mlp(), CONFIGS["lora"], names=["a", "b", "c"])
    graft.member(0)
    for other in (copy.deepcopy(graft), pickle.loads(pickle.dumps(graft))):
        assert isinstance(other, StackedGraft) and other.names == graft.names
        assert other.member(0).model is other.model is not graft.model


def test_repr_says_how_many_what_ranks_and_what_padding_costs():
    graft = bind(mlp(), [LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0", "2"]) for r in (1, 16)])
    said = "StackedGraft(Sequential, LORA on 2 sites: 2 adapters, lora_alpha 2 to 32, r 1 to 16, padded to 1.9 times"
    assert repr(graft).startswith(said)
    alike = bind(mlp(), [LoraConfig(r=2, target_modules=["0"])] * 2)
    assert repr(alike) == "StackedGraft(Sequential, LORA on 1 sites: 2 adapters)"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g, m: g.member(3), IndexError, "index is 3, and the stack has adapters 0 to 2"),
        (lambda g, m: g.member("a"), IndexError, "have no names, got 'a': bind(..., names=[...])"),
        (lambda g, m: g.rows("ab"), TypeError, "rows: names is 'ab', expected a list with a name for each row"),
        (lambda g, m: g.append(m, CONFIGS["lora"][0], {}, "a"), ValueError, "a name is given, and this stack has none"),
        (lambda g, m: g.append(m, LoraConfig(use_dora=True), {}), ValueError, "bind: configs[3].use_dora is True and"),
        (
            lambda g, m: g.append(m, CONFIGS["vera"][0], {}),
            TypeError,
            "configs[3] is a VeraConfig and configs[0] a Lora",
        ),
        (lambda g, m: g.append(m, CONFIGS["lora"][0], {}), KeyError, "trees[3] lacks site '0'"),
        (lambda g, m: g.remove(g.remove(m, 0)[1], 0), ValueError, "has shape (2, 3, 4), expected (3, 3, 4)"),
    ],
)
def test_wrong_calls_say_what_is_there(call, error, words):
    graft = bind(mlp(), CONFIGS["lora"])
    with pytest.raises(error, match=re.escape(words)):
        call(graft, graft.init())


def test_wrong_names_say_what_is_there():
    one = CONFIGS["lora"][:1]
    graft = bind(mlp(), one, names=["a"])
    with pytest.raises(IndexError, match=r"no adapter of the stack has the name 'b'; they are \['a'\]"):
        graft.rows(["a", "b"])
    with pytest.raises(ValueError, match="the only adapter of the stack, and no stack is empty"):
        graft.remove(graft.init(), "a")
    with pytest.raises(ValueError, match="no name is given, and the adapters of this stack have names"):
        graft.append(graft.init(), one[0], {})
    with pytest.raises(ValueError, match="names has 'a' twice"):
        graft.append(graft.init(), one[0], {}, "a")
    with pytest.raises(ValueError, match="names has 2 names, expected one for each of the 1 adapters"):
        bind(mlp(), one, names=["a", "b"])
    with pytest.raises(TypeError, match="names is 'a', expected a list of names"):
        bind(mlp(), one, names="a")
    with pytest.raises(TypeError, match=r"bind: names are for the adapters of a stack, bind\(model, \[config, ...\]"):
        bind(mlp(), one[0], names=["a"])


def test_tokens_have_names_too():
    graft = bind(
        torch.nn.Linear(4, 3), [LoraConfig(r=r, target_modules="all-linear") for r in (1, 2)], names=["a", "b"]
    )
    assert graft.rows([["b", "b", None], ["a", "b", "a"]]).tolist() == [[1, 1, -1], [0, 1, 0]]
