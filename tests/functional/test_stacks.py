"""Stacks of different adapters: as many steps on the stack are those steps of each adapter alone."""

import re

import optree
import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from torchgraft.adapters import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, VeraConfig
from torchgraft.functional import bind, clip_by_norm, merge, norms, route, value_and_grad

CONFIGS = {
    "lora": [
        LoraConfig(r=1, lora_alpha=3, target_modules=["0", "2"]),
        LoraConfig(r=4, lora_alpha=2, use_rslora=True, init_lora_weights="gaussian", target_modules=["2"]),
        LoraConfig(r=2, rank_pattern={"0": 3}, alpha_pattern={"2": 5}, target_modules=["0", "2"]),
    ],
    "adalora": [
        AdaLoraConfig(init_r=1, target_modules=["0", "2"]),
        AdaLoraConfig(init_r=3, lora_alpha=2, init_lora_weights=False, target_modules=["0"]),
        AdaLoraConfig(init_r=2, target_modules=["2"]),
    ],
    "vera": [
        VeraConfig(r=2, target_modules=["0", "2"]),
        VeraConfig(r=5, projection_prng_key=1, target_modules=["2"]),
        VeraConfig(r=3, d_initial=0.2, target_modules=["0"]),
    ],
    "ia3": [
        IA3Config(target_modules=["0", "2"]),
        IA3Config(target_modules=["0"]),
        IA3Config(target_modules=["2"], init_ia3_weights=False),
    ],
    "oft": [
        OFTConfig(oft_block_size=2, target_modules=["0", "2"]),
        OFTConfig(oft_block_size=2, target_modules=["0"]),
        OFTConfig(oft_block_size=2, target_modules=["2"], init_weights=False),
    ],
}
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 5, 4, dtype=torch.float64, generator=GENERATOR)
T = torch.randn(3, 5, 2, dtype=torch.float64, generator=GENERATOR)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def made(method):
    graft = bind(mlp(), CONFIGS[method])
    trees = [graft.member(i).init(torch.Generator().manual_seed(i)) for i in range(3)]
    return graft, trees


def leaves_of(tree):
    return [t.requires_grad_() for t in optree.tree_leaves(tree)]


@pytest.mark.parametrize("method", CONFIGS)
def test_stack_and_back(method):
    graft, trees = made(method)
    many = graft.stack(trees)
    for tree, back in zip(trees, graft.unstack(many), strict=True):
        assert optree.tree_structure(tree) == optree.tree_structure(back)
        assert optree.tree_all(optree.tree_map(torch.equal, tree, back))
    fresh = graft.init([torch.Generator().manual_seed(i) for i in range(3)])
    assert optree.tree_all(optree.tree_map(torch.equal, fresh, many))


@pytest.mark.parametrize("method", CONFIGS)
def test_route_and_vmap_are_each_adapter_alone(method):
    graft, trees = made(method)
    trees = [optree.tree_map(lambda t: t + 0.3 * torch.randn_like(t), tree) for tree in trees]
    many = graft.stack(trees)
    expected = torch.stack([graft.member(i)(tree, X[i]) for i, tree in enumerate(trees)])
    torch.testing.assert_close(graft(route(many), X), expected)
    torch.testing.assert_close(vmap(lambda i, p, x: graft.at(i)(p, x))(torch.arange(3), many, X), expected)
    rows = torch.tensor([2, 0, -1, 1, 2])
    x = X.flatten(0, 1)[:5]
    alone = [graft.member(i)(trees[i], x) if i >= 0 else graft.model(x) for i in rows.tolist()]
    y = graft(route(many, rows), x)
    torch.testing.assert_close(y, torch.stack([own[row] for row, own in enumerate(alone)]))
    torch.testing.assert_close(graft.view(route(many, rows))(x), y)
    some = optree.tree_map(lambda t: t[[2, 1]], many)
    y = graft(route(some, members=torch.tensor([2, 1])), X[1:].flip(0))
    torch.testing.assert_close(y, expected[1:].flip(0))
    seed = torch.randn_like(expected)
    grads = grad(lambda many: (graft(route(many), X) * seed).sum())(many)
    for i, own in enumerate(graft.unstack(grads)):
        alone = grad(lambda tree, i=i: (graft.member(i)(tree, X[i]) * seed[i]).sum())(trees[i])
        torch.testing.assert_close(own, alone)


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_compiles_once(method):
    graft, trees = made(method)
    many, x = graft.stack(trees), X.flatten(0, 1)[:5]
    torch._dynamo.reset()
    f = torch.compile(lambda many, rows: graft(route(many, rows), x), fullgraph=True, backend="aot_eager")
    graft.look(x)
    f(many, torch.tensor([2, 0, -1, 1, 2]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in ([0, 1, 2, 2, 2], [-1] * 5):
            rows = torch.tensor(rows)
            torch.testing.assert_close(f(many, rows), graft(route(many, rows), x))


OPTIMIZERS = {
    "sgd": lambda leaves: torch.optim.SGD(leaves, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda leaves: torch.optim.AdamW(leaves, lr=0.05, weight_decay=0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", ["route", "vmap"])
@pytest.mark.parametrize("method", CONFIGS)
def test_steps_on_the_stack_are_steps_of_each(method, optimizer, way, clip):
    graft, trees = made(method)
    many = optree.tree_map(torch.clone, graft.stack(trees))

    def losses(many):
        if way == "route":
            y = graft(route(many), X)
        else:
            y = vmap(lambda i, p, x: graft.at(i)(p, x))(torch.arange(3), many, X)
        return (y - T).square().mean((1, 2))

    leaves = leaves_of(many)
    stepper = OPTIMIZERS[optimizer](leaves)
    for _ in range(5):
        values, grads = value_and_grad(losses, stacked=True)(many)
        assert values.shape == (3,)
        if clip is not None:
            assert norms(grads).max() > clip
            grads = clip_by_norm(grads, clip)
        for leaf, g in zip(leaves, optree.tree_leaves(grads), strict=True):
            leaf.grad = g
        stepper.step()
    for i, tree in enumerate(trees):
        alone, own = graft.member(i), leaves_of(tree)
        stepper = OPTIMIZERS[optimizer](own)
        for _ in range(5):
            stepper.zero_grad()
            (alone(tree, X[i]) - T[i]).square().mean().backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(own, clip)
            stepper.step()
        torch.testing.assert_close(graft.unstack(many)[i], tree, rtol=1e-6, atol=1e-6)
    again = graft.stack(graft.unstack(many))
    assert optree.tree_all(optree.tree_map(torch.equal, again, many)), "padding stays zero"


def test_one_adapter_merges_from_its_member():
    graft, trees = made("lora")
    state = merge(graft.member(1), graft.unstack(graft.stack(trees))[1])
    assert set(state) == set(graft.model.state_dict())
    with pytest.raises(TypeError, match="params is a dict; this graft was bound with 3 configs"):
        merge(graft, trees[1])


def test_convolutions_of_several_ranks():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 1, groups=2)).double()
    graft = bind(model, [LoraConfig(r=r, target_modules=["0", "1"]) for r in (2, 6)])
    trees = [
        optree.tree_map(lambda t: t + torch.randn_like(t), graft.member(i).init(torch.Generator().manual_seed(i)))
        for i in range(2)
    ]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    y = graft(route(graft.stack(trees), torch.tensor([1, 0])), x)
    expected = torch.stack([graft.member(1)(trees[1], x)[0], graft.member(0)(trees[0], x)[1]])
    torch.testing.assert_close(y, expected)
    for i, tree in enumerate(graft.unstack(graft.stack(trees))):
        assert optree.tree_all(optree.tree_map(torch.equal, tree, trees[i]))
    with pytest.raises(ValueError, match=r"1: a convolution with 2 groups has parameters group by group.*one rank"):
        bind(model, [LoHaConfig(r=r, target_modules=["1"]) for r in (2, 4)])


@pytest.mark.parametrize(
    ("configs", "error", "words"),
    [
        ([], ValueError, "bind: got an empty list of configs; give at least one"),
        (
            [LoraConfig(target_modules=["0"]), IA3Config(target_modules=["0"])],
            TypeError,
            "bind: configs[1] is a IA3Config and configs[0] a LoraConfig; a stack has one method. Bind several",
        ),
        (
            [LoraConfig(target_modules=["0"]), LoraConfig(target_modules=["0"], lora_dropout=0.1)],
            ValueError,
            "bind: configs[1].lora_dropout is 0.1 and configs[0].lora_dropout is 0.0; the adapters of a LORA stack",
        ),
        (
            [IA3Config(target_modules=["0"]), IA3Config(target_modules=["0"], feedforward_modules=["0"])],
            ValueError,
            "0: the configs differ in 'feedforward', which the adapters of a IA3 stack share; bind them apart",
        ),
        (
            [OFTConfig(oft_block_size=2, target_modules=["0"]), OFTConfig(oft_block_size=4, target_modules=["0"])],
            ValueError,
            "bind: configs[1].oft_block_size is 4 and configs[0].oft_block_size is 2; the adapters of a OFT stack",
        ),
        ([LoraConfig(target_modules=["0"]), 3], TypeError, "bind: config[1] is 3, expected a config object"),
    ],
)
def test_configs_that_do_not_stack(configs, error, words):
    with pytest.raises(error, match=re.escape(words)):
        bind(mlp(), configs)


def test_stacks_that_do_not_fit():
    graft, trees = made("lora")
    many = graft.stack(trees)
    with pytest.raises(ValueError, match="stack: got 2 trees, expected one for each of the 3 configs"):
        graft.stack(trees[:2])
    with pytest.raises(KeyError, match=r"trees\[1\] has unknown site '0'"):
        graft.stack([trees[0], trees[0], trees[2]])
    with pytest.raises(ValueError, match=r"the stack\['0'\]\['lora_A'\] has shape \(2, 3, 4\), expected \(3, 3, 4\)"):
        graft.unstack(optree.tree_map(lambda t: t[:2], many))
    with pytest.raises(TypeError, match=r"this graft was bound with 3 configs: call it with route\(stacked, rows\)"):
        graft(many, X)
    with pytest.raises(ValueError, match=r"the stack has 2 adapters, and this graft was bound with 3 configs; say"):
        graft(route(optree.tree_map(lambda t: t[:2], many)), X[:2])
    with pytest.raises(ValueError, match="init: got 2 generators, expected one for each of the 3 adapters"):
        graft.init([None, None])
