"""What a method's author meets: a toy method whose sites share what they train, and the errors of the interface."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from torchgraft.adapters import LoraConfig
from torchgraft.functional import (
    Constants,
    Method,
    Site,
    TakesComplex,
    bind,
    functional_call,
    merge,
    route,
    stack,
    unstack,
    value_and_grad,
)
from torchgraft.functional._method import with_shared
from torchgraft.functional._rows import Groups

from .. import toy_methods
from ..toy_methods import CONFIG, METHOD, BankConfig, BankConstants, Model, X, dense


def made(**fields):
    return bind(Model().double(), BankConfig(**CONFIG, **fields))


def away(graft, seed=0):
    return toy_methods.away(graft.init(torch.Generator().manual_seed(seed)), seed)


def test_shared_leaves_stand_under_a_star():
    graft = made()
    params = graft.init(torch.Generator().manual_seed(0))
    assert list(params) == ["*", "first", "out", "second"]
    assert {name: tuple(t.shape) for name, t in params["*"].items()} == {"bank.2x5": (3, 2, 5), "bank.5x5": (3, 5, 5)}
    assert params["*"]["bank.5x5"].dtype == torch.float64
    assert torch.equal(graft(params, X), graft.model(X))


def test_calls_merging_and_views_are_the_formula():
    graft = made()
    params = away(graft)
    expected = dense(graft.model, params)
    torch.testing.assert_close(graft(params, X), expected(X))
    torch.testing.assert_close(graft.view(params)(X), expected(X))
    for name, tensor in merge(graft, params).items():
        torch.testing.assert_close(tensor, expected.state_dict()[name])


def test_gradients_of_a_shared_leaf_come_from_all_its_sites():
    graft = made()
    params = away(graft)

    def loss(params):
        return graft(params, X).square().sum()

    grads = grad(loss)(params)
    again = value_and_grad(loss)(params)[1]
    torch.testing.assert_close(grads["*"]["bank.5x5"], again["*"]["bank.5x5"])
    bank = params["*"]["bank.5x5"]
    for index in ((0, 0, 0), (2, 4, 1)):
        step = torch.zeros_like(bank)
        step[index] = 1e-6
        up, down = (loss({**params, "*": {**params["*"], "bank.5x5": bank + sign * step}}) for sign in (1, -1))
        torch.testing.assert_close(grads["*"]["bank.5x5"][index], (up - down) / 2e-6, rtol=1e-5, atol=1e-6)


def test_stacks_and_routes_have_a_bank_for_each_adapter():
    graft = made()
    trees = [away(graft, seed) for seed in range(3)]
    many = stack(trees)
    assert many["*"]["bank.5x5"].shape == (3, 3, 5, 5)
    torch.testing.assert_close(unstack(many)[1], trees[1])
    alone = torch.stack([graft(tree, X) for tree in trees])
    torch.testing.assert_close(vmap(graft, in_dims=(0, None))(many, X), alone)
    rows = torch.tensor([2, -1, 0, 2])
    expected = torch.stack([graft.model(X)[1] if i < 0 else alone[i][row] for row, i in enumerate(rows.tolist())])
    torch.testing.assert_close(graft(route(many, rows), X), expected)


def test_what_sites_share_is_picked_once_for_a_call(monkeypatch):
    graft, picked = made(), []
    many, rows = stack([away(graft, seed) for seed in range(3)]), torch.tensor([2, -1, 0, 2])
    graft(route(many, rows), X)
    pick = Groups.pick
    monkeypatch.setattr(Groups, "pick", lambda groups, leaf: picked.append(leaf.shape[1:]) or pick(groups, leaf))
    for _ in range(2):
        y = graft(route(many, rows), X)
        assert picked.count((3, 5, 5)) == 1 and picked.count((3,)) == 3  # two sites share a bank; three have a mix
        picked.clear()
    routed = route(many, rows)
    view = graft.view(routed)
    torch.testing.assert_close(view(X), y)
    with torch.no_grad():
        many["*"]["bank.5x5"].mul_(2)
        rows.copy_(torch.tensor([0, 1, 2, -1]))
    torch.testing.assert_close(view(X), graft(route(many, rows), X))


def test_named_adapters_have_banks_of_their_own():
    graft = bind(Model().double(), {"bank": BankConfig(**CONFIG), "lora": LoraConfig(target_modules=["first"])})
    params = graft.init(torch.Generator().manual_seed(0))
    assert "*" in params["bank"] and "*" not in params["lora"]
    params["bank"] = away(made())
    torch.testing.assert_close(graft(params, X), dense(graft.model, params["bank"])(X))


@pytest.mark.parametrize("fields", [{}, {"by_size": False}, {"mixed": False}], ids=str)
def test_adapters_of_a_stack_with_scalings_of_their_own(fields):
    graft = bind(Model().double(), [BankConfig(**CONFIG, **fields, alpha=alpha) for alpha in (1.0, 3.0)])
    trees = [away(graft.member(i), i) for i in range(2)]
    rows = torch.tensor([1, 0, 1, -1])
    y = graft(route(graft.stack(trees), rows), X)
    expected = [dense(graft.model, trees[1], 1.0), dense(graft.model, trees[0]), dense(graft.model, trees[1], 1.0)]
    torch.testing.assert_close(y, torch.stack([m(X)[i] for i, m in enumerate((*expected, graft.model))]))


def test_the_base_as_data_and_compiled_calls():
    graft = made()
    params = away(graft)
    base = {"first.weight": torch.ones(5, 5, dtype=torch.float64)}
    twin = Model().double()
    twin.load_state_dict({**graft.model.state_dict(), **base})
    torch.testing.assert_close(functional_call(graft, (base, params), (X,)), dense(twin, params)(X))
    compiled = torch.compile(graft, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(params, X), graft(params, X))


def test_a_module_of_that_name_is_refused():
    model = Model()
    model.add_module("*", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"'\*': the model has a module of this name.*rename the module"):
        bind(model, BankConfig(**CONFIG))


def test_trees_without_what_is_shared_are_refused():
    graft = made()
    params = graft.init()
    with pytest.raises(KeyError, match=r"\*"):
        graft({path: leaves for path, leaves in params.items() if path != "*"}, X.float())


def test_sites_without_a_leaf_of_their_own():
    graft = made(mixed=False)
    params = away(graft)
    assert list(params) == ["*"]
    expected = dense(graft.model, params)
    torch.testing.assert_close(graft(params, X), expected(X))
    torch.testing.assert_close(graft.view(params)(X), expected(X))
    torch.testing.assert_close(merge(graft, params)["out.weight"], expected.out.weight)
    many, rows = stack([params, away(graft, 1)]), torch.tensor([1, 0, -1, 0])
    torch.testing.assert_close(graft(route(many, rows), X)[[1, 3]], expected(X)[[1, 3]])
    torch.testing.assert_close(graft(route(many, rows), X)[2], graft.model(X)[2])


def test_shared_leaves_go_where_a_site_is():
    site, there = Site("a", "linear", 2, 2, shared={"bank": "bank.0"}), torch.device("meta")
    tree = {"a": {"mix": torch.ones(2, device=there)}, "*": {"bank.0": torch.ones(2)}}
    assert {leaf: tensor.device for leaf, tensor in with_shared(site, tree["a"], tree).items()} == {
        "mix": there,
        "bank": there,
    }


def test_what_no_config_has_cannot_vary():
    with pytest.raises(TypeError, match=r"BANK: varying names \['rank'\], which are no fields of BankConfig; it has"):
        Method(**{**METHOD, "varying": frozenset({"rank"})})


def test_abilities_are_of_different_kinds():
    with pytest.raises(TypeError, match="BANK: abilities has two objects of one type"):
        Method(**{**METHOD, "abilities": (TakesComplex(), TakesComplex())})


def test_constants_have_the_names_that_they_declare():
    assert BankConstants.varying() == {"scaling"}
    with pytest.raises(AttributeError):
        _ = BankConstants(1.0).rank
    with pytest.raises(TypeError, match="rank"):
        BankConstants(1.0).replace({"rank": 2})
    assert dataclasses.fields(Constants) == ()
