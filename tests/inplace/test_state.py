"""State dicts, trees and grafts of injected adapters."""

import copy

import pytest
import torch
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import (
    LoraConfig,
    extract_graft,
    extract_params,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    merge_adapter,
    set_adapter,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from torchgraft.functional import bind, value_and_grad

from .models import SIZES, configs, inject, inputs, net, randomise


@pytest.mark.parametrize("method", SIZES)
def test_trees_share_storage_and_grafts_compute_the_same(method):
    model, x = randomise(inject(net(), method)), inputs()
    params, graft = extract_params(model), extract_graft(model)
    own = {p.data_ptr() for p in model.parameters()}
    assert all(leaf.data_ptr() in own for leaves in params.values() for leaf in leaves.values())
    torch.testing.assert_close(graft(params, x), model(x), rtol=1e-12, atol=1e-12)
    randomise(model, seed=8)
    torch.testing.assert_close(graft(params, x), model(x), rtol=1e-12, atol=1e-12)  # both see the new numbers
    base = {p.data_ptr() for p in graft.model.parameters()}
    assert base <= own


@pytest.mark.parametrize("method", SIZES)
def test_a_tree_that_was_trained_functionally_is_planted(method):
    config, x = configs(method)[0], inputs()
    graft = bind(net(), config)
    params = graft.init(torch.Generator().manual_seed(2))
    for leaves in params.values():
        for leaf in leaves.values():
            leaf.add_(0.1)
    model = inject_adapter_in_model(config, net(), params=params)
    torch.testing.assert_close(model(x), graft(params, x))
    own = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert own == {leaf.data_ptr() for leaves in params.values() for leaf in leaves.values()}


def test_gradients_are_the_same_in_both_worlds():
    model, x = randomise(inject(net(), "LORA")), inputs()
    graft, params = extract_graft(model), extract_params(model)
    _, grads = value_and_grad(lambda params: graft(params, x).square().sum())(params)
    model(x).square().sum().backward()
    for path, leaves in grads.items():
        for leaf, gradient in leaves.items():
            injected = getattr(model.get_submodule(path), leaf)["default"].weight.grad
            assert torch.allclose(gradient, injected, rtol=0, atol=1e-12)


def test_a_graft_of_one_of_several_adapters_with_its_own_copy_of_a_module():
    model, x = net(), inputs()
    for name, where in (("a", ["first"]), ("b", ["second"])):
        randomise(inject(model, "LORA", name, target_modules=where, modules_to_save=["head"]), seed=ord(name))
    for name in "ab":
        set_adapter(model, name)
        before = repr(model)
        graft = extract_graft(model, name)
        assert list(extract_params(model, name)) == sorted([*graft.sites[""], *graft.binding.replaced[""]])
        assert torch.equal(graft(extract_params(model, name), x), model(x)) and repr(model) == before


def test_base_state_dicts_have_the_original_keys():
    model, plain = randomise(inject(net(), "LORA", modules_to_save=["head"])), net().state_dict()
    assert list(get_base_model_state_dict(model)) == list(plain)
    merge_adapter(model)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in get_base_model_state_dict(model).items())
    adapters.unmerge_adapter(model)
    other = {name: tensor + 1 for name, tensor in plain.items()}
    assert set_base_model_state_dict(model, other) == ([], [])
    assert torch.equal(model.first.base_layer.weight, other["first.weight"])
    assert torch.equal(model.head.original_module.weight, other["head.weight"])
    with pytest.raises(RuntimeError, match="Unexpected key.*third"):
        set_base_model_state_dict(model, {**other, "third": torch.ones(1)})
    partly = {"first.weight": plain["first.weight"], "third": torch.ones(1)}
    result = set_base_model_state_dict(model, partly, strict=False)
    assert "first.bias" in result.missing_keys and result.unexpected_keys == ["third"]


def test_a_whole_state_dict_goes_to_a_model_with_the_same_adapters():
    model = randomise(inject(inject(net(), "LORA", "a"), "LORA", "b"))
    other, x = inject(inject(net(), "LORA", "a"), "LORA", "b"), inputs()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    randomise(other, seed=8)
    expected = bind(net(), configs("LORA")[0])(extract_params(other, "b"), x)
    assert torch.allclose(other(x), expected, rtol=0, atol=1e-12)


def test_an_adapter_is_taken_from_a_gathered_state_dict():
    model = randomise(inject(net(), "LORA", modules_to_save=["head"]))
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = get_peft_model_state_dict(model)
    for prefix in ("", "_orig_mod."):
        whole = {f"{prefix}{name}": tensor for name, tensor in gathered.items()}
        taken = get_peft_model_state_dict(model, state_dict=whole)
        assert taken.keys() == own.keys() and all(torch.equal(taken[key], own[key]) for key in own)
        assert not {t.data_ptr() for t in taken.values()} & {t.data_ptr() for t in own.values()}
    with pytest.raises(KeyError, match="state_dict lacks 'first.lora_A.default.weight', expected the state dict of"):
        get_peft_model_state_dict(model, state_dict={})


def test_values_share_storage_with_the_model():
    model = inject(net(), "LORA")
    state = get_peft_model_state_dict(model)
    assert state["first.lora_A.weight"].data_ptr() == model.first.lora_A["default"].weight.data_ptr()
    assert not any(tensor.requires_grad for tensor in state.values())


def test_loading_keeps_the_parameters_and_assigning_replaces_them():
    model = inject(net(), "LORA")
    state = {key: tensor.float() + 1 for key, tensor in get_peft_model_state_dict(model).items()}
    old = model.first.lora_A["default"].weight
    set_peft_model_state_dict(model, state)
    assert model.first.lora_A["default"].weight is old and torch.equal(old, state["first.lora_A.weight"].double())
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    new = model.first.lora_A["default"].weight
    assert new is not old and new.dtype == torch.float64 and new.requires_grad


def test_planting_and_loading_under_another_name():
    source, x = randomise(inject(net(), "LORA", "a")), inputs()
    model = inject_adapter_in_model(configs("LORA")[0], net(), "b", params=extract_params(source, "a"))
    torch.testing.assert_close(model(x), source(x))
    third = inject(net(), "LORA", "c")
    assert set_peft_model_state_dict(third, get_peft_model_state_dict(source, adapter_name="a"), "c") == ([], [])
    torch.testing.assert_close(third(x), source(x))


class Reads(nn.Module):
    """A child whose name looks like an adapter's."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.Linear(4, 4)
        self.a = nn.ModuleDict({"default": nn.Linear(4, 4)})

    def forward(self, x):
        return self.a["default"](self.lora_A(x))


def test_names_of_the_users_modules_that_look_like_ours():
    model, x = Reads(), torch.randn(2, 4)
    base = model(x)
    inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules=["lora_A", "default"]), model)
    state = get_peft_model_state_dict(model)
    assert sorted(state) == [
        "a.default.lora_A.weight",
        "a.default.lora_B.weight",
        "lora_A.lora_A.weight",
        "lora_A.lora_B.weight",
    ]
    other = adapters.inject_adapter_in_model(LoraConfig(r=2), Reads(), state_dict=state)
    set_base_model_state_dict(other, get_base_model_state_dict(model))
    assert set_peft_model_state_dict(other, state) == ([], [])
    torch.testing.assert_close(other(x), model(x))
    assert not torch.allclose(model(x), base)
