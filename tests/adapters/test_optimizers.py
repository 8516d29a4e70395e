"""LoRA+ and LoRA-FA: PEFT's groups and numbers over several steps, in a model and on trees, and what cannot be."""

import copy

import optree
import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, lorafa
from torch import nn
from torch.func import grad, vmap

from torchgraft import adapters
from torchgraft.adapters import IA3Config, LoraConfig, LoraFA, lora_fa_gradients, lora_plus_groups
from torchgraft.functional import bind, stack, unstack, value_and_grad


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.norm(self.second(torch.tanh(self.first(self.embed(ids))))))


IDS = torch.tensor([[0, 3, 5], [6, 2, 2]])
LINEAR = ["first", "second"]


def both(**fields):
    """Two equal models with equal adapters, where nothing vanishes."""
    torch.manual_seed(0)
    model = Net().double()
    mine = adapters.inject_adapter_in_model(LoraConfig(**fields), copy.deepcopy(model))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields), autocast_adapter_dtype=False)
    own, other = dict(mine.named_parameters()), dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
                other[f"base_model.model.{name}"].copy_(parameter)
    return mine, theirs


def train(model, optimizer, steps=5):
    torch.manual_seed(1)
    target, losses = torch.randn(2, 3, 3).double(), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(IDS) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same_parameters(mine, theirs):
    other = dict(theirs.named_parameters())
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter, other[f"base_model.model.{name}"], rtol=1e-7, atol=1e-9, msg=name)


PLUS = [
    {"target_modules": LINEAR},
    {"target_modules": ["embed", *LINEAR], "use_dora": True, "modules_to_save": ["head", "norm"]},
    {"target_modules": LINEAR, "lora_bias": True},
]


@pytest.mark.parametrize("fields", PLUS, ids=str)
def test_lora_plus_is_pefts(fields):
    mine, theirs = both(**fields)
    groups = lora_plus_groups(mine, 1e-2, 8, weight_decay=0.1, embedding_lr=3e-3)
    other = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8, loraplus_weight_decay=0.1, loraplus_lr_embedding=3e-3
    )
    names = {id(p): name for name, p in mine.named_parameters()}
    expected = {id(p): name.removeprefix("base_model.model.") for name, p in theirs.named_parameters()}
    for group, theirs_group in zip(groups, other.param_groups, strict=True):
        assert (group["lr"], group["weight_decay"]) == (theirs_group["lr"], theirs_group["weight_decay"])
        assert {names[id(p)] for p in group["params"]} == {expected[id(p)] for p in theirs_group["params"]}
    assert train(mine, torch.optim.AdamW(groups)) == pytest.approx(train(theirs, other), rel=1e-9)
    same_parameters(mine, theirs)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_lora_plus_on_trees_is_that_on_models(fields):
    mine, _ = both(target_modules=LINEAR, **fields)
    rates = {
        name: (group["name"], group["lr"])
        for group in lora_plus_groups(mine, 1e-2, 8)
        for name, p in mine.named_parameters()
        if any(p is one for one in group["params"])
    }
    graft = bind(Net(), LoraConfig(target_modules=LINEAR, **fields))
    params = graft.init()
    for tree in (params, {"adapter": params}, stack([params, params])):
        own = {
            id(t): (group["name"], group["lr"]) for group in lora_plus_groups(tree, 1e-2, 8) for t in group["params"]
        }
        leaves = tree.get("adapter", tree)
        for name, rate in rates.items():
            path, leaf, _, part = name.split(".")
            assert own[id(leaves[path]["lora_B_bias" if part == "bias" else leaf])] == rate
        assert len(own) == len(rates)


def test_lora_plus_says_what_is_wrong():
    mine, _ = both(target_modules=LINEAR)
    with pytest.raises(ValueError, match="lora_plus_groups: ratio is 0, expected a positive number"):
        lora_plus_groups(mine, 1e-2, 0)
    adapters.set_requires_grad(mine, "default", False)
    with pytest.raises(ValueError, match="none of the 0 trained tensors is LoRA's A or B; inject or bind a LoraConfig"):
        lora_plus_groups(mine, 1e-2, 8)
    with pytest.raises(TypeError, match="params is of type list, expected a model or a parameter tree"):
        lora_plus_groups([], 1e-2, 8)


@pytest.fixture
def exact(monkeypatch):
    """PEFT's correction in the dtype of the parameters, not in bfloat16."""
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "alpha_pattern": {"first": 3}}], ids=str)
def test_lora_fa_is_pefts(fields, exact):
    mine, theirs = both(r=2, lora_alpha=5, target_modules=LINEAR, modules_to_save=["head"], **fields)
    optimizer = LoraFA(mine, lr=1e-2, weight_decay=0.1)
    other = create_lorafa_optimizer(theirs, r=2, lora_alpha=5, lr=1e-2, weight_decay=0.1)
    a = mine.first.lora_A["default"].weight.clone()
    losses = train(mine, optimizer)
    assert losses == pytest.approx(train(theirs, other), rel=1e-7) and losses[-1] < losses[0]
    same_parameters(mine, theirs)
    assert torch.equal(mine.first.lora_A["default"].weight, a)
    again, _ = both(r=2, lora_alpha=5, target_modules=LINEAR, modules_to_save=["head"], **fields)
    again.load_state_dict(mine.state_dict())
    resumed = LoraFA(again, lr=1e-2, weight_decay=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(again, resumed) == pytest.approx(train(mine, optimizer), rel=1e-9)


def test_lora_fa_is_the_nearest_change_of_the_weight():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6)).double(), torch.randn(5, 4).double()
    graft = bind(model, LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    params = optree.tree_map(lambda t: torch.randn_like(t), graft.init())
    grads = grad(lambda params: graft(params, x).square().sum())(params)
    weight = (model[0].weight + 1.5 * params["0"]["lora_B"] @ params["0"]["lora_A"]).detach().requires_grad_()
    (full,) = torch.autograd.grad(nn.functional.linear(x, weight, model[0].bias).square().sum(), weight)
    # The change of B that makes s dB A the least-squares fit of the gradient of the weight.
    best = torch.linalg.lstsq(1.5 * params["0"]["lora_A"].mT, full.mT).solution.mT
    corrected = lora_fa_gradients(graft, params, grads)
    torch.testing.assert_close(corrected["0"]["lora_B"], best, rtol=1e-6, atol=1e-8)
    assert not corrected["0"]["lora_A"].any()


def test_lora_fa_on_stacks_and_under_transforms():
    torch.manual_seed(0)
    model = Net().double()
    configs = [LoraConfig(r=r, lora_alpha=r + 1, target_modules=LINEAR) for r in (1, 3)]
    graft = bind(model, configs)
    trees = [optree.tree_map(torch.randn_like, graft.member(i).init()) for i in range(2)]
    grads = [optree.tree_map(torch.randn_like, tree) for tree in trees]
    expected = [lora_fa_gradients(graft.member(i), trees[i], grads[i]) for i in range(2)]
    many = graft.unstack(lora_fa_gradients(graft, graft.stack(trees), graft.stack(grads)))
    torch.testing.assert_close(many, expected, rtol=1e-6, atol=1e-8)
    graft = graft.member(1)
    together = stack([trees[1], grads[1]])
    for f in (
        lambda p, g: lora_fa_gradients(graft, p, g),
        vmap(lambda p, g: lora_fa_gradients(graft, p, g)),
        torch.compile(lambda p, g: lora_fa_gradients(graft, p, g), fullgraph=True, backend="aot_eager"),
    ):
        both = unstack(f(together, together))
        torch.testing.assert_close(both[0], lora_fa_gradients(graft, trees[1], trees[1]))


def test_lora_fa_leaves_other_methods_and_magnitudes_alone():
    configs = {
        "l": LoraConfig(use_dora=True, target_modules=LINEAR),
        "i": IA3Config(target_modules=LINEAR, feedforward_modules=[]),
    }
    graft = bind(Net(), configs)
    params = graft.init()
    _, grads = value_and_grad(lambda params: graft(params, IDS).square().sum())(params)
    corrected = lora_fa_gradients(graft, params, grads)
    assert corrected["i"] is grads["i"]
    assert corrected["l"]["first"]["lora_magnitude_vector"] is grads["l"]["first"]["lora_magnitude_vector"]


def test_lora_fa_says_what_is_wrong():
    embedding = bind(Net(), LoraConfig(target_modules=["embed"]))
    params = embedding.init()
    with pytest.raises(ValueError, match="embed: LoRA-FA trains B with the A there is, and an embedding's A starts at"):
        lora_fa_gradients(embedding, params, params)
    with pytest.raises(ValueError, match="embed: LoRA-FA"):
        LoraFA(adapters.inject_adapter_in_model(LoraConfig(target_modules=["embed"]), Net()))
    convolution = bind(nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), LoraConfig(target_modules=["0"]))
    params = convolution.init()
    with pytest.raises(ValueError, match="0: LoRA-FA has no correction for a convolution with 2 groups"):
        lora_fa_gradients(convolution, params, params)
    linear = bind(Net(), LoraConfig(target_modules=LINEAR))
    params = linear.init()
    with pytest.raises(KeyError, match="grads has other sites or leaves than params"):
        lora_fa_gradients(linear, params, {"first": params["first"]})
    with pytest.raises(TypeError, match="graft is of type Net"):
        lora_fa_gradients(Net(), params, params)
    fixed = bind(Net(), LoraConfig(r=2, init_lora_weights="mica", target_modules=LINEAR))
    params = fixed.init()
    with pytest.raises(ValueError, match=r"first: LoRA-FA trains B, and this adapter's B is fixed \(mica\)"):
        lora_fa_gradients(fixed, params, params)
    with pytest.raises(ValueError, match="LoraFA: the model has no trained LoRA adapter"):
        LoraFA(Net())
    model = adapters.inject_adapter_in_model(LoraConfig(target_modules=LINEAR), Net())
    with pytest.raises(ValueError, match="LoraFA: lr is -1, expected 0 or more"):
        LoraFA(model, lr=-1)
    with pytest.raises(ValueError, match="LoraFA: betas is"):
        LoraFA(model, betas=(1.0, 0.9))
