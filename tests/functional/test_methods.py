"""What a method's author meets: a toy method whose sites share what they train, and the errors of the interface."""

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from torchgraft.adapters import AdapterConfig, LoraConfig
from torchgraft.functional import (
    Constants,
    Method,
    SharesLeaves,
    TakesComplex,
    Varying,
    bind,
    functional_call,
    merge,
    route,
    stack,
    unstack,
    value_and_grad,
)
from torchgraft.functional.rows import Groups


@dataclasses.dataclass(kw_only=True)
class BankConfig(AdapterConfig):
    """`y = base(x) + s sum_k mix_k bank_k x`, the bank trained by all sites of a size together."""

    size: int = 3
    alpha: float = 1.0
    method: ClassVar[Method]


@dataclasses.dataclass(frozen=True, eq=False)
class BankConstants(Constants):
    scaling: Varying[float]


def apply(config, site, leaves, base, x):
    weight = torch.einsum("k,koi->oi", leaves["mix"], leaves["bank"])
    scaling = site.constants.scaling
    return base(x) + (x @ weight.mT) * (scaling.to(x.dtype) if isinstance(scaling, Tensor) else scaling)


def merge_bank(config, site, leaves, weight, bias):
    return weight + site.constants.scaling * torch.einsum("k,koi->oi", leaves["mix"], leaves["bank"]), bias


def bank_of(site) -> str:
    return f"bank.{site.out_features}x{site.in_features}"


def draw(config, sites, generator, weights) -> dict[str, Any]:
    made: dict[str, Any] = {"*": {}}
    for site in sites:
        made[site.path] = {"mix": torch.zeros(config.size)}
        shape = (config.size, site.out_features, site.in_features)
        made["*"].setdefault(bank_of(site), torch.randn(shape, generator=generator))
    return made


METHOD = {
    "name": "BANK",
    "config": BankConfig,
    "kinds": frozenset({"linear"}),
    "plan": lambda config, sites, weights: {site.path: BankConstants(config.alpha / config.size) for site in sites},
    "shapes": lambda config, site: {"mix": (config.size,)},
    "init": draw,
    "apply": apply,
    "merge": merge_bank,
    "constants": BankConstants,
    "varying": frozenset({"alpha"}),
    "abilities": (
        SharesLeaves(
            lambda config, sites: {site.path: {"bank": bank_of(site)} for site in sites},
            lambda config, sites: {bank_of(s): (config.size, s.out_features, s.in_features) for s in sites},
        ),
    ),
}
BankConfig.method = Method(**METHOD)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CONFIG = {"target_modules": ["first", "second", "out"]}


def made(**fields):
    return bind(Model().double(), BankConfig(**CONFIG, **fields))


def away(graft, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = graft.init(generator)
    return {
        path: {leaf: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for leaf, t in leaves.items()}
        for path, leaves in params.items()
    }


def dense(model, params, scaling=1 / 3):
    """The formula, written apart from the method."""
    twin = Model().double()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for path in CONFIG["target_modules"]:
            layer = twin.get_submodule(path)
            bank = params["*"][f"bank.{layer.out_features}x{layer.in_features}"]
            for mix, matrix in zip(params[path]["mix"], bank, strict=True):
                layer.weight += scaling * mix * matrix
    return twin


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


def test_adapters_of_a_stack_with_scalings_of_their_own():
    graft = bind(Model().double(), [BankConfig(**CONFIG, alpha=alpha) for alpha in (1.0, 3.0)])
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
