"""Places of a stack: what is in one of them changes without binding again."""

import copy

import optree
import pytest
import torch
from torch import nn

from torchgraft.adapters import IA3Config, LoraConfig, VeraConfig
from torchgraft.functional import Graft, bind, route, stack


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


X = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROWS = torch.tensor([2, 0, -1, 1, 2])
BOTH = ["first", "second"]


def lora(r=4, alpha=8, targets=BOTH, **fields):
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=list(targets), **fields)


def drawn(graft, seed):
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator).to(t), graft.init())


def alone(model, config, seed):
    graft = bind(model, config)
    tree = drawn(graft, seed)
    return tree, graft(tree, X)


def test_a_place_gets_another_adapter_without_binding_again():
    model = Model().double()
    graft = bind(model, [lora()] * 3)
    configs = [lora(), lora(2, 3, ["second"]), None]
    found = [alone(model, config, i) for i, config in enumerate(configs) if config is not None]
    empty = optree.tree_map(torch.zeros_like, graft.member(0).init())
    many = stack([*(graft.pad(tree) for tree, _ in found), empty])
    places, bound = graft.places(configs), graft.binding
    outputs = [*(y for _, y in found), model(X)]

    def check():
        y = graft(route(many, ROWS, places=places), X)
        for row, place in enumerate(ROWS.tolist()):
            torch.testing.assert_close(y[row], outputs[place][row] if place >= 0 else model(X)[row])

    check()
    new = lora(1, 5, ["first"], use_rslora=True)
    tree, outputs[2] = alone(model, new, 7)
    for path, leaves in graft.pad(tree).items():
        for leaf, value in leaves.items():
            many[path][leaf][2] = value
    places = places.put(2, graft.places([new]))
    check()
    assert graft.binding is bound and len(places) == 3


def test_gradients_stay_in_their_place():
    model = Model().double()
    graft = bind(model, [lora()] * 2)
    many = optree.tree_map(
        lambda t: t.requires_grad_(), stack([graft.pad(drawn(graft.member(0), i)) for i in range(2)])
    )
    places = graft.places([lora(), None])
    graft(route(many, torch.tensor([0, 1, 0, 1, 1]), places=places), X).sum().backward()
    for leaf in optree.tree_leaves(many):
        assert leaf.grad[0].abs().sum() > 0 and not leaf.grad[1].any()


def test_compiled_calls_take_places_as_data():
    model = Model().double()
    graft = bind(model, [lora()] * 2)
    many = stack([graft.pad(drawn(graft.member(0), i)) for i in range(2)])
    count = 0

    def backend(module, inputs):
        nonlocal count
        count += 1
        return module.forward

    rows = torch.tensor([0, 1, 1, 0, -1])
    f = torch.compile(
        lambda places: graft(route(many, rows, places=places, batch_dim=0), X), backend=backend, fullgraph=True
    )
    for alpha in (8, 2):
        places = graft.places([lora(), lora(alpha=alpha)])
        torch.testing.assert_close(f(places), graft(route(many, rows, places=places), X))
    assert count == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lora(8), r"places: configs\[0\] has lora_A of shape \(8, 5\) at 'first'.*room for \(4, 5\); bind it with"),
        (lora(targets=["first", "third"]), "third"),
        (lora(use_dora=True), r"configs\[1\].use_dora is True"),
        (lora(init_lora_weights="pissa"), "first: a config differs in 'initial_A'.*bind them apart"),
    ],
)
def test_what_there_is_no_room_for_is_refused(config, words):
    model = Model()
    model.third = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=words):
        bind(model, [lora(), lora()]).places([config])


def test_other_methods_and_counts_are_refused():
    graft = bind(Model(), [lora(), lora()])
    with pytest.raises(TypeError, match="IA3Config"):
        graft.places([IA3Config(target_modules=["first"], feedforward_modules=[])])
    many = graft.init()
    with pytest.raises(ValueError, match="the stack has 2 adapters, and places of it are given for 1"):
        graft(route(many, ROWS.clamp(max=1), places=graft.places([lora()])), X.float())
    with pytest.raises(ValueError, match=r"pad: lora_A of 'first' has shape \(9, 5\).*room for \(4, 5\)"):
        graft.pad(bind(copy.deepcopy(graft.model), lora(9)).init())


def test_constants_that_are_tensors_are_in_places_too():
    model = Model().double()
    config = VeraConfig(r=4, target_modules=BOTH, projection_prng_key=0)
    other = VeraConfig(r=3, target_modules=BOTH, projection_prng_key=5)
    graft = bind(model, [config, config])
    (first, y), (second, z) = alone(model, config, 0), alone(model, other, 1)
    many, places = stack([graft.pad(first), graft.pad(second)]), graft.places([config, other])
    out = graft(route(many, torch.tensor([1, 0, 1, 0, 1]), places=places), X)
    torch.testing.assert_close(out, torch.stack([z[0], y[1], z[2], y[3], z[4]]))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda g: g.places().put(2, g.places([lora()])),
            IndexError,
            "put: index is 2, and the stack has places 0 to 1",
        ),
        (lambda g: g.places().put(-1, g.places([lora()])), IndexError, "put: index is -1"),
        (
            lambda g: g.places().put(0, bind(Model(), [lora(targets=["first"])]).places()),
            ValueError,
            "'second'.*same graft",
        ),
        (lambda g: g.places([]), ValueError, "places: got no configs"),
        (lambda g: g.places(["lora"]), TypeError, r"places: configs\[0\] is of type str"),
        (lambda g: route(g.init(), ROWS, places={}), TypeError, "route: places is of type dict"),
        (lambda g: Graft(g.model, lora()), TypeError, "Graft: binding is of type LoraConfig.*bind\\(model, config\\)"),
    ],
)
def test_what_is_no_place_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(bind(Model(), [lora(), lora()]))


def test_places_of_a_graft_of_one_config_are_refused():
    graft, places = bind(Model(), lora()), bind(Model(), [lora(), lora()]).places()
    with pytest.raises(ValueError, match="route: places are given.*bind it with one for each"):
        graft(route(stack([graft.init(), graft.init()]), ROWS.clamp(max=1), places=places), X.float())
    named = bind(Model(), {"a": lora()})
    with pytest.raises(ValueError, match="route: places are given"):
        named({"a": route(stack([graft.init(), graft.init()]), ROWS.clamp(max=1), places=places)}, X.float())


def test_numbers_in_places_keep_their_digits():
    graft = bind(Model(), [lora(), lora()])
    places = graft.places([lora(r=3, alpha=5), None])
    assert {float(values["scaling"][0]) for values in places.constants.values()} == {5 / 3}
    assert places.known == dict.fromkeys(places.present, (True, False))
    assert graft.places().put(0, graft.places([None])).known == dict.fromkeys(places.present, (False, True))
