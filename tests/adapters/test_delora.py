"""DeLoRA against its equation and against PEFT: its bound, the norms that it keeps, dropout, starts."""

import copy

import peft
import pytest
import torch
from torch import nn

from torchgraft.adapters import (
    DeloraConfig,
    delete_adapter,
    extract_graft,
    extract_params,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    save_adapter,
    set_adapter,
    set_requires_grad,
)
from torchgraft.functional import bind, merge, value_and_grad

FIELDS = {"r": 3, "delora_lambda": 2, "target_modules": ["0"]}


def made(layer=lambda: nn.Linear(12, 8), dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(layer()).to(dtype)


def randomised(params, seed=1):
    torch.manual_seed(seed)
    return {path: {leaf: torch.randn_like(p) for leaf, p in leaves.items()} for path, leaves in params.items()}


def theirs_of(model, **fields):
    torch.manual_seed(3)
    return peft.inject_adapter_in_model(peft.DeloraConfig(**{**FIELDS, **fields}), copy.deepcopy(model))


def mine_of(model, **fields):
    torch.manual_seed(3)
    return inject_adapter_in_model(DeloraConfig(**{**FIELDS, **fields}), copy.deepcopy(model))


@pytest.mark.parametrize("seed", range(3))
def test_the_change_relative_to_the_norms_of_columns_is_at_most_lambda(seed):
    model = made()
    params = randomised(bind(model, DeloraConfig(**FIELDS)).init(), seed)
    params["0"]["delora_lambda"].fill_(0.7)
    weight = model[0].weight.detach()
    moved = (merge(bind(model, DeloraConfig(**FIELDS)), params)["0.weight"] - weight) / weight.norm(dim=0)
    assert 0.05 < moved.norm() <= 0.7
    one = bind(model, DeloraConfig(**{**FIELDS, "r": 1}))  # of rank 1 it is lambda
    leaves = {leaf: t[:1] if leaf == "delora_A" else t[..., :1] for leaf, t in params["0"].items()}
    moved = (merge(one, {"0": leaves})["0.weight"] - weight) / weight.norm(dim=0)
    torch.testing.assert_close(moved.norm().item(), 0.7)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_matrices_and_nothing_else(groups):
    model = made(lambda: nn.Conv2d(4, 6, (2, 3), stride=2, padding=1, groups=groups, padding_mode="circular"))
    graft = bind(model, DeloraConfig(**FIELDS))
    params, x = randomised(graft.init()), torch.randn(3, 4, 6, 7).double()
    weight, a, b = model[0].weight.detach(), params["0"]["delora_A"], params["0"]["delora_B"]
    delta = (b / b.norm(dim=0)) @ (a / a.norm(dim=1, keepdim=True)) * params["0"]["delora_lambda"] / 3
    expected = weight + (delta * weight.flatten(1).norm(dim=0)).view(weight.shape)
    torch.testing.assert_close(graft(params, x), torch.func.functional_call(model, {"0.weight": expected}, (x,)))


@pytest.mark.parametrize(
    "fields", [{}, {"init_weights": False}, {"lambda_pattern": {"0": 5}, "rank_pattern": {"0": 2}}]
)
def test_starts_gradients_and_training_mode_are_pefts(fields):
    model, x = made(dtype=torch.float32), torch.randn(5, 12)
    mine, theirs = mine_of(model, **fields), theirs_of(model, **fields)
    state, expected = get_peft_model_state_dict(mine), peft.get_peft_model_state_dict(theirs)
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    grads = []
    for one in (mine, theirs):
        one(x).square().sum().backward()
        grads.append([getattr(one[0], f"delora_{leaf}")["default"].grad for leaf in ("A", "B", "lambda")])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


def test_dropout_is_pefts():
    model, x = made(dtype=torch.float32), torch.randn(64, 12)
    mine, theirs = (make(model, module_dropout=0.4, init_weights=False).train() for make in (mine_of, theirs_of))
    outputs = []
    for one in (mine, theirs):
        torch.manual_seed(5)
        outputs.append(one(x))
    torch.testing.assert_close(*outputs)
    assert isinstance(mine[0].delora_dropout["default"], nn.Dropout) and mine[0].delora_dropout["default"].p == 0.4
    assert isinstance(mine_of(model)[0].delora_dropout["default"], nn.Identity)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))
    mine[0].delora_dropout["default"].register_forward_hook(lambda module, args, y: 0 * y)
    torch.testing.assert_close(mine(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_right_where_norms_are_small(dtype):
    model, x = made(dtype=dtype), torch.randn(5, 12, dtype=dtype)
    mine = mine_of(model, delora_lambda=1000.0)
    assert mine[0].delora_A["default"].dtype == dtype
    assert torch.equal(mine(x), model(x))
    with torch.no_grad():  # PEFT divides by the product of both norms, which is 0 in float16
        for leaf in ("delora_A", "delora_B"):
            getattr(mine[0], leaf)["default"].copy_(2e-4 * torch.randn_like(getattr(mine[0], leaf)["default"]))
    merged = merge(
        bind(made(), DeloraConfig(**FIELDS)), {"0": {k: t.double() for k, t in extract_params(mine)["0"].items()}}
    )
    expected = x.double() @ merged["0.weight"].T + merged["0.bias"]
    torch.testing.assert_close(mine(x).double(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_norms_are_constants_that_no_one_trains():
    model = made()
    mine = mine_of(model)
    assert torch.equal(mine[0].delora_w_norm["default"], model[0].weight.detach().norm(dim=0))
    inject_adapter_in_model(DeloraConfig(**FIELDS), mine, "other")
    norms = [name for name, _ in mine.named_buffers()]
    assert norms == ["0.delora_w_norm.default", "0.delora_w_norm.other"]  # as in PEFT
    set_adapter(mine, "other")
    set_requires_grad(mine, ["default", "other"])
    trained = {name for name, p in mine.named_parameters() if p.requires_grad}
    leaves = ("delora_A", "delora_B", "delora_lambda")
    assert trained == {f"0.{leaf}.{name}" for leaf in leaves for name in ("default", "other")}
    assert set(extract_params(mine)["0"]) == set(leaves)
    set_adapter(mine, "default")
    delete_adapter(mine, "other")
    assert [name for name, _ in copy.deepcopy(mine).named_buffers()] == norms[:1]
    graft = bind(model, DeloraConfig(**FIELDS))
    assert graft.init().keys() == {"0"} and set(graft.init()["0"]) == set(leaves)


def test_norms_are_the_files_not_the_models(tmp_path):
    model, other, x = made(), made(), torch.randn(3, 12).double()
    with torch.no_grad():
        other[0].weight.mul_(2)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.DeloraConfig(**FIELDS, init_weights=False))
    theirs.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    mine = copy.deepcopy(other)
    load_adapter(mine, tmp_path)
    torch.testing.assert_close(mine(x), loaded(x))
    with pytest.raises(ValueError, match=r"0\.delora_w_norm' is not what this graft has made of the base's weights"):
        load_adapter(bind(other, DeloraConfig(**FIELDS)), tmp_path)
    graft = extract_graft(mine)
    torch.testing.assert_close(graft(extract_params(mine), x), loaded(x))
    save_adapter(mine, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "again")
    torch.testing.assert_close(again(x), loaded(x))


def test_norms_of_a_model_without_values_are_an_error_or_the_files(tmp_path):
    model, x = made(), torch.randn(3, 12).double()
    filled = inject_adapter_in_model(DeloraConfig(**FIELDS, init_weights=False), copy.deepcopy(model))
    save_adapter(filled, tmp_path)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(12, 8)).double()
    later = copy.deepcopy(empty)
    graft = bind(later, DeloraConfig(**FIELDS))
    later.load_state_dict(model.state_dict(), assign=True)
    params = extract_params(filled)
    with pytest.raises(ValueError, match="0: the weight was on the meta device when DeLoRA's norms were taken of it"):
        graft(params, x)
    load_adapter(empty, tmp_path)
    empty[0].base_layer.load_state_dict(model[0].state_dict(), assign=True)
    torch.testing.assert_close(empty(x), filled(x))


def test_it_trains():
    torch.manual_seed(0)
    model, x = made(dtype=torch.float32), torch.randn(32, 12)
    graft = bind(model, DeloraConfig(**FIELDS))
    goal, params = graft(randomised(graft.init()), x), randomised(graft.init(), 2)

    def loss(params):
        return (graft(params, x) - goal).square().mean()

    first = loss(params).item()
    for _ in range(200):
        _, grads = value_and_grad(loss)(params)
        params = {p: {leaf: t - 1.0 * grads[p][leaf] for leaf, t in own.items()} for p, own in params.items()}
    assert loss(params) < first / 4
