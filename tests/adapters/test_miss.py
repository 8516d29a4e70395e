"""MiSS: its three forms, shards that are cut, dropout, and what it keeps for the backward."""

import copy

import peft
import pytest
import torch
from torch import nn

from torchgraft.adapters import MissConfig, extract_config, inject_adapter_in_model
from torchgraft.functional import bind

FORMS = {
    "default": {},
    "random": {"init_weights": False},
    "mini": {"init_weights": "mini", "mini_r": 4},
    "bat": {"init_weights": "bat"},
}


def model(inputs=8, outputs=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs)).double()


def config(form, **fields):
    return MissConfig(**{"r": 4, "target_modules": ["0"], **FORMS[form], **fields})


def moved(graft):
    return {"0": {"miss_block": torch.randn_like(graft.init()["0"]["miss_block"])}}


@pytest.mark.parametrize("inputs", [8, 11, 4])
@pytest.mark.parametrize("form", ["default", "mini"])
def test_a_shard_that_is_cut_is_pefts(inputs, form):
    base, x = model(inputs), torch.randn(3, 2, inputs, dtype=torch.float64)
    graft = bind(base, config(form))
    params = moved(graft)
    theirs = peft.inject_adapter_in_model(
        peft.MissConfig(r=4, target_modules=["0"], **FORMS[form]), copy.deepcopy(base)
    )
    theirs[0].miss_block["default"].data = params["0"]["miss_block"].clone()
    torch.testing.assert_close(graft(params, x), theirs(x))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_as_large_as_the_weight_is_kept_for_the_backward(form):
    base = nn.Sequential(nn.Linear(256, 320)).requires_grad_(False)
    graft = bind(base, config(form, r=16))
    params, x = moved(graft), torch.randn(8, 256, requires_grad=True)
    params["0"]["miss_block"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = graft(params, x)
    assert not [t for t in kept if t.numel() >= 256 * 320 and t.data_ptr() != base[0].weight.data_ptr()]
    y.sum().backward()
    expected = torch.func.grad(lambda p: graft(p, x.detach()).sum())(
        {"0": {"miss_block": params["0"]["miss_block"].detach()}}
    )
    torch.testing.assert_close(params["0"]["miss_block"].grad, expected["0"]["miss_block"], rtol=1e-4, atol=1e-3)


def test_dropout_is_on_the_input_of_the_block():
    base = model().train()
    graft = bind(base, config("default", miss_dropout=0.5))
    params, x = moved(graft), torch.randn(5, 8, dtype=torch.float64)
    torch.manual_seed(1)
    y = graft(params, x)
    torch.manual_seed(1)
    folded = nn.functional.dropout(x, 0.5).view(5, 2, 4).sum(1)
    torch.testing.assert_close(y, base(x) + folded @ params["0"]["miss_block"])


def test_bat_has_no_dropout_and_says_so():
    with pytest.warns(UserWarning, match=r"miss_dropout is 0.5, and the form 'bat' has no dropout; set 0.0"):
        graft = bind(model().train(), config("bat", miss_dropout=0.5))
    params, x = moved(graft), torch.randn(5, 8, dtype=torch.float64)
    assert torch.equal(graft(params, x), graft(params, x))


def test_a_second_bat_acts_on_the_weight_of_the_first():
    base, x = model(), torch.randn(5, 8, dtype=torch.float64)
    graft = bind(base, {"a": config("bat"), "b": config("bat")})
    blocks = {name: torch.randn(3, 4, 4, dtype=torch.float64) for name in "ab"}
    weight = base[0].weight.detach().view(3, 4, 2, 4)
    for block in blocks.values():
        weight = weight + torch.einsum("panj,pjk->pank", weight, block) + block.unsqueeze(2)
    y = graft({name: {"0": {"miss_block": block}} for name, block in blocks.items()}, x)
    torch.testing.assert_close(y, x @ weight.reshape(12, 8).T + base[0].bias)


@pytest.mark.parametrize("form", FORMS)
def test_the_size_of_shards_is_found_in_tensors(form):
    state = {"0.miss_block": torch.zeros(bind(model(), config(form, r=2)).init()["0"]["miss_block"].shape)}
    injected = inject_adapter_in_model(config(form), model(), state_dict=state)
    assert extract_config(injected).r == 2 and injected[0].miss_r["default"] == 2


def test_forms_do_not_stack():
    with pytest.raises(ValueError, match="form"):
        bind(model(), [config("default"), config("bat")])
