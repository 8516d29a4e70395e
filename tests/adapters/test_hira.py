"""HiRA against its equation and against PEFT: what is kept, single tokens, embeddings' settings, initial numbers."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from torchgraft.adapters import (
    HiraConfig,
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    save_adapter,
)
from torchgraft.functional import bind, merge, route, stack


def moved(tree, seed):
    """Return a tree with noise added."""
    torch.manual_seed(seed)
    return {path: {leaf: t + 0.3 * torch.randn_like(t) for leaf, t in leaves.items()} for path, leaves in tree.items()}


LAYERS = {
    "linear": lambda: (nn.Linear(24, 20), (3, 5, 24)),
    "linear (no bias)": lambda: (nn.Linear(24, 20, bias=False), (7, 24)),
    "linear (one token)": lambda: (nn.Linear(24, 20), (1, 1, 24)),
    "vector": lambda: (nn.Linear(24, 20), (24,)),
    "conv1d": lambda: (nn.Conv1d(12, 20, 5, stride=2, padding=2, padding_mode="replicate"), (3, 12, 9)),
    "conv2d (groups)": lambda: (nn.Conv2d(12, 20, 3, groups=4, dilation=2), (2, 12, 6, 6)),
    "conv2d (depthwise)": lambda: (nn.Conv2d(12, 24, 3, groups=12, padding="same"), (2, 12, 5, 5)),
    "conv3d (groups)": lambda: (nn.Conv3d(4, 6, 2, groups=2), (2, 4, 3, 3, 3)),
}


def made(name, dtype=torch.float64, **fields):
    """Return a graft of one layer, parameters away from the initial ones, and an input."""
    torch.manual_seed(0)
    layer, shape = LAYERS[name]()
    graft = bind(nn.Sequential(layer).to(dtype), HiraConfig(r=3, target_modules=["0"], **fields))
    return graft, moved(graft.init(), 1), torch.randn(shape, dtype=dtype)


def entries(leaves, weight):
    """Return the adapted weight, one entry after the other."""
    a, b = leaves["hira_A"].flatten(1), leaves["hira_B"].flatten(1)
    flat = weight.flatten(1).clone()
    for out, place in torch.cartesian_prod(*map(torch.arange, flat.shape)).tolist():
        flat[out, place] *= 1 + sum(b[out, k] * a[k, place] for k in range(len(a)))
    return flat.reshape(weight.shape)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_merged_weights_are_the_equation(name):
    graft, params, x = made(name)
    expected = entries(params["0"], graft.model[0].weight.detach())
    torch.testing.assert_close(merge(graft, params)["0.weight"], expected)
    y = functional_call(graft.model, {"0.weight": expected}, (x,))
    torch.testing.assert_close(graft(params, x), y)
    training = copy.deepcopy(params)
    for leaf in training["0"].values():
        leaf.requires_grad_()
    torch.testing.assert_close(graft(training, x), y)


# -- what is made, and what is kept ----------------------------------------------------------------------------------


def kept_by(call):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_weight_is_kept_but_the_bases(base_dtype, adapter_dtype, dropout):
    graft, params, x = made("linear", base_dtype, hira_dropout=dropout)
    graft.model.train()
    params = {"0": {leaf: t.to(adapter_dtype).requires_grad_() for leaf, t in params["0"].items()}}
    kept = kept_by(lambda: graft(params, x.requires_grad_()))
    weight = graft.model[0].weight
    assert [t for t in kept if t.shape in ((24, 20), (20, 24)) and t.data_ptr() != weight.data_ptr()] == []


def test_a_weight_that_is_trained_has_gradients_of_both_orders():
    graft, params, x = made("linear")
    leaves = [x, *graft.model.parameters(), *params["0"].values()]

    def call(x, weight, bias, a, b):
        base = {"0.weight": weight, "0.bias": bias}
        return torch.func.functional_call(graft.view({"0": {"hira_A": a, "hira_B": b}}), base, (x,))

    def dense(x, weight, bias, a, b):
        return F.linear(x, weight * (1 + b @ a), bias)

    def orders(f):
        own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        first = torch.autograd.grad(f(*own).sin().sum(), own, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), own)]

    base = {"0.weight": leaves[1].detach(), "0.bias": leaves[2].detach()}
    torch.testing.assert_close(graft(params, x), dense(x, *base.values(), *params["0"].values()))
    torch.testing.assert_close(orders(call), orders(dense))


def test_changes_below_the_precision_of_the_weight_are_not_lost():
    graft, params, x = made("linear", torch.bfloat16)
    small = {"0": {leaf: t.float() * 0.01 for leaf, t in params["0"].items()}}
    weight = graft.model[0].weight.detach()
    assert torch.equal(merge(graft, small)["0.weight"], weight)
    y, expected = graft(small, x) - graft.model(x), graft.model(x).clone()
    delta = F.linear(x.double(), entries(small["0"], weight.double()) - weight.double())
    assert torch.equal(graft(small, x), (expected.float() + delta.float()).bfloat16())
    assert y.abs().sum() > 0


def test_a_single_token_makes_no_weight():
    graft, params, x = made("linear (one token)")
    params["0"]["hira_A"].requires_grad_()
    assert {t.numel() for t in kept_by(lambda: graft(params, x))} <= {24, 20, 3 * 20, 3 * 24, 20 * 24}
    weight = graft.model[0].weight
    kept = kept_by(lambda: graft(params, x))
    assert all(t.data_ptr() == weight.data_ptr() for t in kept if t.numel() == 480)


# -- beside others ---------------------------------------------------------------------------------------------------


def test_the_weight_that_is_rescaled_is_the_bases_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    configs = {"low": LoraConfig(r=2, target_modules=["0"]), "high": HiraConfig(r=2, target_modules=["0"])}
    graft = bind(model, configs)
    params = {name: moved(tree, 3) for name, tree in graft.init().items()}
    low, high = params["low"]["0"], params["high"]["0"]
    weight = model[0].weight.detach()
    expected = weight + 4 * low["lora_B"] @ low["lora_A"] + weight * (high["hira_B"] @ high["hira_A"])
    torch.testing.assert_close(merge(graft, params)["0.weight"], expected)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(graft(params, x), F.linear(x, expected, model[0].bias))


# -- embeddings ------------------------------------------------------------------------------------------------------


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


@pytest.mark.parametrize("how", [{}, {"padding_idx": 2, "scale_grad_by_freq": True}], ids=str)
@pytest.mark.parametrize("cls", [nn.Embedding, Scaled])
def test_embeddings_are_their_merged_form_with_the_gradients_of_the_module(cls, how):
    torch.manual_seed(0)
    model = nn.Sequential(cls(7, 4, **how)).double()
    graft = bind(model, HiraConfig(r=2, target_modules=["0"]))
    trees = [moved(graft.init(), seed) for seed in range(2)]
    for tree in trees:
        for leaf in tree["0"].values():
            leaf.requires_grad_()
    ids, seed = torch.tensor([[0, 2, 5], [5, 5, 1]]), torch.randn(2, 3, 4, dtype=torch.float64)

    def expected(tree, ids, seed):
        a, b = tree["0"]["hira_embedding_A"], tree["0"]["hira_embedding_B"]
        weight = model[0].weight.detach() * (1 + (b @ a).T)
        y = functional_call(model, {"0.weight": weight}, (ids,))
        return y, torch.autograd.grad((y * seed).sum(), (a, b))

    y, grads = expected(trees[0], ids, seed)
    torch.testing.assert_close(graft(trees[0], ids), y)
    found = torch.autograd.grad((graft(trees[0], ids) * seed).sum(), list(trees[0]["0"].values()))
    torch.testing.assert_close(found, grads)
    many = stack(trees)
    rows = torch.tensor([1, 1, 0, 1])
    more, seeds = torch.cat([ids, ids.flip(0)]), torch.cat([seed, seed + 1])
    routed = graft(route(many, rows), more)
    found = torch.autograd.grad((routed * seeds).sum(), [leaf for tree in trees for leaf in tree["0"].values()])
    each = [expected(tree, more[rows == i], seeds[rows == i])[1] for i, tree in enumerate(trees)]
    torch.testing.assert_close(found, (*each[0], *each[1]))


# -- beside PEFT -----------------------------------------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 8), nn.Conv1d(5, 6, 3, padding=1), nn.Linear(8, 4))


@pytest.mark.parametrize("init_weights", [True, False, None, "gaussian", "Gaussian"], ids=str)
def test_initial_numbers_outputs_and_what_is_trained_are_pefts(init_weights):
    fields = {"r": 3, "hira_dropout": 0.1, "init_weights": init_weights, "target_modules": ["0", "1", "2"]}
    torch.manual_seed(3)
    theirs = peft.get_peft_model(net(), peft.HiraConfig(**fields)).eval()
    torch.manual_seed(3)
    mine = inject_adapter_in_model(HiraConfig(**fields), net()).eval()
    expected = {key.removeprefix("base_model.model."): t for key, t in peft.get_peft_model_state_dict(theirs).items()}
    state = get_peft_model_state_dict(mine)
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    trained = {name.removeprefix("base_model.model."): p.requires_grad for name, p in theirs.named_parameters()}
    assert {name: p.requires_grad for name, p in mine.named_parameters()} == trained
    ids = torch.randint(9, (2, 5))
    torch.testing.assert_close(mine(ids), theirs(ids))


def test_ranks_by_pattern_count_and_are_found_from_tensors(tmp_path):
    config = HiraConfig(r=3, rank_pattern={"2": 2}, target_modules=["0", "2"])
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    source = inject_adapter_in_model(config, copy.deepcopy(model))
    assert [source[i].r["default"] for i in (0, 2)] == [3, 2]
    state = get_peft_model_state_dict(source)
    again = inject_adapter_in_model(HiraConfig(r=3, target_modules=["0", "2"]), copy.deepcopy(model), state_dict=state)
    assert [again[i].r["default"] for i in (0, 2)] == [3, 2]
    save_adapter(source, tmp_path)
    graft = bind(model, load_config(tmp_path))
    x = torch.randn(2, 4)
    torch.testing.assert_close(graft(load_adapter(graft, tmp_path), x), source(x))
    with pytest.warns(RuntimeWarning, match=r"HiraConfig: \['third'\] in rank_pattern match none"):
        bind(model, HiraConfig(target_modules=["0"], rank_pattern={"third": 2}))


def test_dropout_is_on_the_adapters_input_alone():
    graft, params, x = made("linear", hira_dropout=0.5)
    graft.model.train()
    torch.manual_seed(5)
    y = graft(params, x)
    torch.manual_seed(5)
    weight = graft.model[0].weight.detach()
    part = F.linear(F.dropout(x, 0.5), entries(params["0"], weight) - weight)
    torch.testing.assert_close(y, graft.model(x) + part)
