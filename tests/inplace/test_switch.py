"""Switching adapters off and on, and what a wrong call leaves behind: nothing."""

import copy

import pytest
import torch
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import (
    IA3Config,
    LoraConfig,
    cast_adapter_dtype,
    delete_adapter,
    disable_adapter,
    disable_adapter_layers,
    enable_adapter_layers,
    inject_adapter_in_model,
    merge_adapter,
    set_adapter,
    set_requires_grad,
    unload,
)

from .models import inject, inputs, layers, net, randomise

SAVED = {"target_modules": ["first"], "modules_to_save": ["head"]}


def flags(model):
    """Everything about a model that a call may change, values apart."""
    return (
        [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        [(layer.active_adapters, layer.merged_adapters, layer.disable_adapters) for layer in layers(model)],
        list(getattr(model, "peft_config", {})),
    )


@pytest.fixture
def two():
    return randomise(inject(inject(net(), "LORA", "a", **SAVED), "LORA", "b"))


def test_disabling_is_the_base_and_enabling_brings_all_back(two):
    x, base = inputs(), net()(inputs())
    set_adapter(two, ["a", "b"])
    adapted, before = two(x), flags(two)
    disable_adapter_layers(two)
    torch.testing.assert_close(two(x), base)
    assert not any(p.requires_grad for p in two.parameters())
    disable_adapter_layers(two)
    enable_adapter_layers(two)
    assert flags(two) == before and torch.equal(two(x), adapted)


@pytest.mark.parametrize("merged", [[], ["a"], ["b", "a"]])
def test_a_context_restores_everything_even_after_an_error(two, merged):
    x, base = inputs(), net()(inputs())
    set_adapter(two, ["a", "b"])
    set_requires_grad(two, "a", False)
    merge_adapter(two, merged)
    adapted, before, weight = two(x), flags(two), two.first.weight.clone()

    def fail_within():
        with disable_adapter(two), disable_adapter(two):
            torch.testing.assert_close(two(x), base)
            with disable_adapter(two):
                torch.testing.assert_close(two(x), base)
            torch.testing.assert_close(two(x), base)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_within()
    assert flags(two) == before and torch.equal(two(x), adapted) and torch.equal(two.first.weight, weight)


def test_a_context_object_can_be_nested_within_a_disabled_model(two):
    disable_adapter_layers(two)
    before = flags(two)
    with disable_adapter(two):
        enable_adapter_layers(two)
        set_adapter(two, "a")
    assert flags(two) == before


def test_what_was_removed_or_added_within_a_context(two):
    x = inputs()
    with disable_adapter(two):
        delete_adapter(two, "a")
        inject(two, "LORA", "late", target_modules=["second"])
        torch.testing.assert_close(two(x), net()(x))
    assert two.first.active_adapters == ["b"] and not two.second.disable_adapters
    with disable_adapter(two):
        unload(two)
    assert repr(two) == repr(net())
    torch.testing.assert_close(two(x), net()(x))


def test_an_adapter_injected_while_adapters_are_disabled_is_disabled_too():
    model, x = inject(net(), "LORA", "a", target_modules=["first"]), inputs()
    disable_adapter_layers(model)
    set_requires_grad(model, "a", True)
    randomise(inject(model, "LORA", "b", modules_to_save=["head"], target_modules=["second"]))
    torch.testing.assert_close(model(x), net()(x))
    assert all(p.requires_grad for name, p in model.named_parameters() if ".a." in name or ".b." in name)
    enable_adapter_layers(model)
    assert not torch.allclose(model(x), net()(x)) and model.head.current is not model.head.original_module


def test_modules_to_save_of_two_adapters(two):
    x = inputs()
    inject(two, "LORA", "c", **SAVED)
    randomise(two, seed=8)
    assert sorted(two.head.modules_to_save) == ["a", "c"] and two.head.active_adapters == ["c"]
    before = flags(two)
    with pytest.raises(ValueError, match=r"adapters \['a', 'c'\] each have a copy of Linear"):
        set_adapter(two, ["a", "c"])
    assert flags(two) == before
    expected = two.head.modules_to_save["a"]
    set_adapter(two, "a")
    assert two.head.current is expected and two.head.weight is expected.weight and two.head.in_features == 8
    assert expected.weight.requires_grad and not two.head.modules_to_save["c"].weight.requires_grad
    with pytest.warns(UserWarning, match="adapter 'a' was active; now 'b' is"):
        assert delete_adapter(two, "a") == ["b"]
    assert list(two.head.modules_to_save) == ["c"] and two.head.current is two.head.original_module
    assert two(x).shape == net()(x).shape


def test_several_active_adapters_of_different_methods_add_up():
    model, x = net(), inputs()
    for name, method in (("a", "LORA"), ("b", "IA3"), ("c", "OFT")):
        randomise(inject(model, method, name), seed=ord(name))
    set_adapter(model, ["a", "b", "c"])
    adapted = model(x)
    assert torch.allclose(adapters.merge_and_unload(copy.deepcopy(model))(x), adapted, rtol=0, atol=1e-10)
    set_adapter(model, "a")
    with pytest.warns(UserWarning, match="adapter 'a' was active; now 'b' is"):
        delete_adapter(model, "a")
    assert model.first.active_adapters == ["b"]


def test_casting_gives_new_float32_parameters():
    model = inject(net(dtype=torch.bfloat16), "LORA")
    old = model.first.lora_A["default"].weight
    cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
    assert model.first.lora_A["default"].weight is old
    cast_adapter_dtype(model, "default")
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert model.first.weight.dtype == torch.bfloat16 and model(inputs(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_training_modes_follow_the_model(two):
    two.train()
    assert all(module.training for module in two.modules())
    two.eval()
    inject(two, "LORA", "late", **SAVED)
    assert not any(module.training for module in two.modules())


class Hidden(nn.Module):
    """Keeps a module in a plain list too."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.kept = [self.first]
        self.call = self.first.forward


def lora(**fields):
    return LoraConfig(**{"target_modules": ["first"], **fields})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: inject_adapter_in_model(LoraConfig, m), TypeError, "peft_config is the class LoraConfig, expected"),
        (lambda m: inject_adapter_in_model({"r": 1}, m), TypeError, "of type dict, expected a config object"),
        (lambda m: inject_adapter_in_model(lora(), 3), TypeError, "of type int, expected a torch.nn.Module"),
        (lambda m: inject_adapter_in_model(lora(), m, "a"), ValueError, "has an adapter 'a' already .* choose another"),
        (lambda m: inject_adapter_in_model(lora(), m, "x.y"), ValueError, "'x.y', expected a name without dots"),
        (lambda m: inject_adapter_in_model(lora(), m, "keys"), ValueError, "'keys', .* no attribute of nn.ModuleDict"),
        (lambda m: inject_adapter_in_model(lora(target_modules=["z"]), m, "x"), ValueError, "matches no module"),
        (
            lambda m: inject_adapter_in_model(lora(target_modules=".*"), m, "x"),
            ValueError,
            "the model itself is|does not",
        ),
        (lambda m: inject_adapter_in_model(lora(r=0), m, "x"), ValueError, "r is 0 at first, expected a positive"),
        (
            lambda m: inject_adapter_in_model(lora(), m, "x", params={"first": {"lora_A": torch.ones(8, 8)}}),
            KeyError,
            r"params\['first'\] lacks leaf 'lora_B'",
        ),
        (lambda m: inject_adapter_in_model(lora(), m, "x", state_dict={}), ValueError, "has no key of LORA, expected"),
        (
            lambda m: inject_adapter_in_model(lora(), m, "x", state_dict={"third.lora_A.weight": torch.ones(2, 2)}),
            ValueError,
            "names modules that the model does not have: 'third'",
        ),
        (
            lambda m: inject_adapter_in_model(lora(), m, "x", state_dict={"a": 1}, params={}),
            ValueError,
            "state_dict and params are both given",
        ),
        (
            lambda m: inject_adapter_in_model(lora(modules_to_save=["nope"]), m, "x"),
            ValueError,
            "modules_to_save has 'nope', which is no module",
        ),
        (
            lambda m: inject_adapter_in_model(lora(target_modules=["head"]), m, "x"),
            ValueError,
            "head: head is one of modules_to_save, .* leave the one out of target_modules",
        ),
        (
            lambda m: inject_adapter_in_model(lora(modules_to_save=["second"]), m, "x"),
            ValueError,
            "second: second is one of modules_to_save",
        ),
        (lambda m: set_adapter(m, "x"), ValueError, r"no adapter 'x'; it has \['a', 'b'\]"),
        (lambda m: set_requires_grad(m, ["a", "x"]), ValueError, r"no adapter 'x'; it has \['a', 'b'\]"),
        (lambda m: delete_adapter(m, "x"), ValueError, r"no adapter 'x'; it has \['a', 'b'\]"),
        (lambda m: cast_adapter_dtype(m, "x"), ValueError, r"no adapter 'x'; it has \['a', 'b'\]"),
        (lambda m: adapters.get_peft_model_state_dict(m, adapter_name="x"), ValueError, r"no adapter 'x'; it has"),
        (lambda m: adapters.set_peft_model_state_dict(m, {"k": 1}, "a"), TypeError, "'k' is of type int, expected"),
        (lambda m: adapters.extract_params(m, "x"), ValueError, r"no adapter 'x'; it has"),
        (lambda m: m.first(), TypeError, "first: forward.. got no 'input'"),
        (lambda m: m.first.get_delta_weight("x"), KeyError, "x"),
        (lambda m: m.first.delete_adapter("a"), ValueError, "adapter 'a' is merged; call unmerge_adapter"),
    ],
)
def test_a_wrong_call_says_what_to_do_and_changes_nothing(two, call, error, words):
    merge_adapter(two, ["a"])
    before, tensors = flags(two), {name: p.detach().clone() for name, p in two.named_parameters()}
    with pytest.raises(error, match=words):
        call(two)
    assert flags(two) == before
    assert all(torch.equal(p, tensors[name]) for name, p in two.named_parameters())


@pytest.mark.parametrize("config", [lora(), IA3Config(target_modules=["1"], modules_to_save=["first"])])
def test_a_module_that_is_also_kept_in_a_plain_list_is_an_error(config):
    model = nn.Sequential(Hidden(), nn.Linear(2, 2)).eval()
    before = flags(model)
    with pytest.raises(ValueError, match=r"0.first: Hidden.(kept|call) keeps this module too.*use bind"):
        inject_adapter_in_model(config, model)
    assert flags(model) == before and not hasattr(model, "peft_config")


def test_a_root_that_is_targeted_cannot_be_replaced():
    with pytest.raises(ValueError, match="the model itself is targeted, which cannot be replaced in place"):
        inject_adapter_in_model(lora(target_modules="all-linear"), nn.Linear(2, 2))


def test_a_copy_within_a_copy_is_an_error():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="modules_to_save names 0.0, which is a part of 0; name one of them"):
        inject_adapter_in_model(IA3Config(target_modules=["1"], modules_to_save=["0"]), model)
