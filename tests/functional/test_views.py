"""What a view saves, loads, copies and counts: the adapted model, never the base without a word."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from torchgraft.adapters import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, VeraConfig
from torchgraft.functional import bind, merge, route, stack

CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    "lora_bias": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_bias=True),
    "dora": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_dora=True),
    "ia3": IA3Config(target_modules=["0"], init_ia3_weights=False),
    "vera": VeraConfig(r=2, target_modules=["0"], init_weights=False),
    "adalora": AdaLoraConfig(target_modules=["0"], total_step=10, init_lora_weights=False),
    "oft": OFTConfig(r=0, oft_block_size=2, target_modules=["0"], init_weights=False),
    "parameter": LoraConfig(r=2, target_parameters=["0.weight"], init_lora_weights=False),
    "beside": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, modules_to_save=["2"], bias="all"),
}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))


def bound(config, body=None):
    graft = bind(model() if body is None else body, config)
    params = graft.init()
    for path, leaves in params.items():
        for leaf in leaves:
            leaves[leaf] = leaves[leaf] + 0.1 if path != "*" else leaves[leaf]
    return graft, params


@pytest.mark.parametrize("method", CONFIGS)
def test_the_state_dict_is_the_adapted_models(method):
    graft, params = bound(CONFIGS[method])
    view, x = graft.view(params).eval(), torch.randn(3, 6)
    state, expected = view.state_dict(), merge(graft, params)
    assert list(state) == list(expected)
    torch.testing.assert_close(state, expected)
    fresh = model().eval()
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(x), view(x))
    part = view[0].state_dict()
    torch.testing.assert_close(part, {name: expected[f"0.{name}"] for name in part})
    assert not any(t.requires_grad for t in state.values())


def test_a_state_dict_of_live_tensors_is_differentiable():
    graft, params = bound(CONFIGS["lora"])
    leaf = params["0"]["lora_B"].requires_grad_()
    weight = graft.view(params).state_dict(keep_vars=True)["0.weight"]
    assert torch.autograd.grad(weight.sum(), leaf)[0].abs().sum() > 0


def test_named_adapters_and_one_switched_off():
    graft = bind(model(), {"a": CONFIGS["lora"], "b": CONFIGS["ia3"]})
    params = graft.init()
    torch.testing.assert_close(graft.view(params).state_dict(), merge(graft, params))
    only = {"b": params["b"]}
    torch.testing.assert_close(graft.view(only).state_dict(), merge(graft, only))
    torch.testing.assert_close(graft.view({}).state_dict(), dict(graft.model.state_dict()))


def test_a_view_of_rows_has_none():
    graft, params = bound(CONFIGS["lora"])
    view = graft.view(route(stack([params, params]), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match=r"0: each row has an adapter of its own .* merge\(graft, unstack"):
        view.state_dict()


def test_one_tensor_of_two_modules_of_which_one_is_adapted():
    body = model()
    body[2].weight = body[0].weight
    graft, params = bound(CONFIGS["lora"], body)
    with pytest.raises(
        ValueError, match="0: its weight is tied to 2.weight, which is not adapted.*save_adapter.*merge"
    ):
        graft.view(params).state_dict()


def test_a_computed_weight_has_no_entry():
    body = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    graft = bind(body, LoraConfig(target_modules="0"))
    with pytest.raises(ValueError, match="0: weight is computed .*save_adapter"):
        graft.view(graft.init()).state_dict()


def test_loading_into_a_view_is_refused():
    graft, params = bound(CONFIGS["lora"])
    view, other = graft.view(params), nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
    before = copy.deepcopy(graft.model.state_dict())
    for module, state in ((view, other.state_dict()), (view[2], other[2].state_dict())):
        for assign in (False, True):
            with pytest.raises(RuntimeError, match="a view shares its tensors with the user's model"):
                module.load_state_dict(state, assign=assign)
    torch.testing.assert_close(graft.model.state_dict(), before, rtol=0, atol=0)
    graft.model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("method", CONFIGS)
def test_copies_and_pickles_are_adapted(method):
    graft, params = bound(CONFIGS[method])
    view, x = graft.view(params).eval(), torch.randn(3, 6)
    file = io.BytesIO()
    torch.save(view, file)
    file.seek(0)
    for made in (copy.deepcopy(view), pickle.loads(pickle.dumps(view)), torch.load(file, weights_only=False)):
        torch.testing.assert_close(made(x), view(x))
        torch.testing.assert_close(made.state_dict(), view.state_dict())
        with pytest.raises(RuntimeError, match="a view shares"):
            made.load_state_dict(view.state_dict())


def test_parameters_are_the_frozen_bases():
    graft, params = bound(CONFIGS["lora"])
    view = graft.view(params)
    assert [name for name, _ in view.named_parameters()] == [name for name, _ in graft.model.named_parameters()]
    assert not any(p.requires_grad for p in view.parameters())
    with pytest.raises(AttributeError, match="not an nn.Parameter"):
        view.get_parameter("0.weight")


def replaced_data(model):
    model[0].weight.data = 2 * model[0].weight.data


def reassigned(model):
    model[2].bias = nn.Parameter(torch.ones(3))


def loaded(model):
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [replaced_data, reassigned, loaded, nn.Module.double], ids=lambda f: f.__name__)
def test_a_parameter_that_was_replaced_after_a_view_was_made_is_an_error(change):
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(2, 4)
    graft = bind(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    params = graft.init()
    view, constant = graft.view(params), graft.view(params, constant=True)
    copies = copy.deepcopy(view), pickle.loads(pickle.dumps(view))
    before = view(x)
    model[0].weight.data.mul_(1.0)  # a write is seen, and is no replacement
    torch.testing.assert_close(view(x), before, rtol=0, atol=0)
    change(model)
    with pytest.raises(RuntimeError, match=r"replaced or moved after this view of it was made .* take a new view"):
        view(x)
    for other in (constant, *copies):  # which promised that nothing changes, or share nothing
        torch.testing.assert_close(other(x), before, rtol=0, atol=0)
    y = graft.view(params)(x.to(model[0].weight.dtype))
    torch.testing.assert_close(y, graft(params, x.to(model[0].weight.dtype)), rtol=0, atol=0)


def test_given_base_tensors_are_a_views_own():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    graft = bind(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    params, base = graft.init(), {"0.weight": torch.randn(3, 4)}
    view = graft.view((base, params))
    before = view(x)
    model[0].weight.data = torch.zeros(3, 4)
    torch.testing.assert_close(view(x), before, rtol=0, atol=0)
