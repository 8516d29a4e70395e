"""State dicts, modules to save, empty weights and injection from keys, against PEFT."""

import peft
import peft.functional
import pytest
import torch
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import LoraConfig

from .models import (
    EXACT,
    SIZES,
    both,
    configs,
    inject,
    inject_peft,
    inputs,
    layers,
    net,
    parameters,
    peft_load,
    peft_state,
    quiet,
    randomise,
    trained,
)

SAVED = {"target_modules": ["first"], "modules_to_save": ["head"]}


def same_outputs(mine, theirs, atol=1e-10):
    x = inputs(mine.kind)
    return torch.allclose(mine(x), theirs(x), rtol=0, atol=atol)


@pytest.mark.parametrize("method", SIZES)
def test_keys_with_pefts_prefix_load_too(method):
    mine, theirs = both(method)
    state = peft_state(randomise(theirs))
    prefixed = {key if key.startswith("base_model.") else f"base_model.model.{key}": t for key, t in state.items()}
    assert adapters.set_peft_model_state_dict(mine, prefixed) == ([], [])
    assert same_outputs(mine, theirs, EXACT.get(method, 1e-10))


@pytest.mark.parametrize("method", SIZES)
def test_missing_and_unexpected_keys_are_reported(method):
    mine, _ = both(method)
    state = adapters.get_peft_model_state_dict(randomise(mine))
    own = [key for key in state if key.startswith("first.")] or list(state)
    partly = {key: tensor for key, tensor in state.items() if key != own[0]} | {"third.lora_A.weight": torch.ones(1)}
    result = adapters.set_peft_model_state_dict(mine, partly)
    assert result.missing_keys == [own[0]] and result.unexpected_keys == ["third.lora_A.weight"]


@pytest.mark.parametrize("method", ["LORA", "IA3", "ADALORA", "LOHA", "OFT", "DELORA", "SHIRA"])
@pytest.mark.parametrize("ignore", [False, True])
def test_another_shape(method, ignore):
    mine, theirs = both(method)
    state = {key: tensor.clone() for key, tensor in peft_state(randomise(theirs)).items()}
    key = next(iter(state))
    state[key] = torch.ones(5, 5)
    before = {name: p.clone() for name, p in mine.named_parameters()}
    if not ignore:
        with pytest.raises(RuntimeError, match=rf"'{key}' has shape \(5, 5\), expected .* nothing was loaded"):
            adapters.set_peft_model_state_dict(mine, state)
        assert all(torch.equal(p, before[name]) for name, p in mine.named_parameters())
        return
    with pytest.warns(UserWarning, match="tensors of another shape were left out"):
        adapters.set_peft_model_state_dict(mine, state, ignore_mismatched_sizes=True)
    with quiet("Some weights of"):
        peft.set_peft_model_state_dict(inject_peft(net(), method), state, ignore_mismatched_sizes=True)
    after = adapters.get_peft_model_state_dict(mine)
    assert all(torch.equal(after[other], state[other]) for other in state if other != key)


@pytest.mark.parametrize("method", ["LORA", "IA3", "ADALORA", "LOHA", "OFT", "DELORA", "SHIRA"])
def test_empty_weights_are_filled_by_loading(method):
    state = peft_state(randomise(both(method)[1]))
    mine, theirs = net(), net()
    adapters.inject_adapter_in_model(configs(method)[0], mine, low_cpu_mem_usage=True)
    peft.inject_adapter_in_model(configs(method)[1], theirs, low_cpu_mem_usage=True)
    assert {n: p.device.type for n, p in parameters(mine).items()} == {
        n: p.device.type for n, p in parameters(theirs).items()
    }
    assert trained(mine) == trained(theirs)
    adapters.set_peft_model_state_dict(mine, state, low_cpu_mem_usage=True)
    peft.set_peft_model_state_dict(theirs, state, low_cpu_mem_usage=True)
    assert trained(mine) == trained(theirs)
    assert {p.device.type for p in mine.parameters()} == {"cpu"}
    assert same_outputs(mine, theirs.eval())


@pytest.mark.parametrize("method", ["LORA", "IA3", "ADALORA", "LOHA", "OFT", "DELORA", "SHIRA"])
def test_injection_from_keys(method):
    state = peft_state(both(method, target_modules=["second"])[1])
    fields = {"target_modules": ["second"]}
    mine, theirs = net(), net()
    for model, lib, config in zip((mine, theirs), (adapters, peft), configs(method, **fields), strict=True):
        torch.manual_seed(2)
        lib.inject_adapter_in_model(config, model, state_dict=state)
    assert parameters(mine).keys() == parameters(theirs).keys()
    assert all(torch.equal(p, parameters(theirs)[name]) for name, p in parameters(mine).items())
    prefixed = {f"_orig_mod.{key}": tensor for key, tensor in state.items()}
    assert parameters(adapters.inject_adapter_in_model(configs(method, **fields)[0], net(), state_dict=prefixed))


def test_injection_from_keys_of_a_config_that_names_others_warns_as_peft_does():
    state = peft_state(both("LORA", target_modules=["second"])[1])
    mine, theirs = configs("LORA", target_modules=["first"])
    with pytest.warns(RuntimeWarning, match="an inconsistency was discovered"):
        peft.inject_adapter_in_model(theirs, net(), state_dict=state)
    with pytest.warns(RuntimeWarning, match=r"Only the config has \['first'\], only state_dict has \['second'\]"):
        model = adapters.inject_adapter_in_model(mine, net(), state_dict=state)
    assert isinstance(model.second, adapters.BaseTunerLayer) and isinstance(model.first, nn.Linear)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("LORA", {"r": 2, "rank_pattern": {"second": 1}}),
        ("IA3", {"feedforward_modules": ["second"]}),
        ("ADALORA", {"init_r": 2}),
        ("LOHA", {"r": 2, "rank_pattern": {"second": 1}}),
        ("OFT", {"oft_block_size": 2}),
        ("VERA", {"r": 2}),
        ("C3A", {"block_size": 4, "block_size_pattern": {"second": 2}}),
        ("DELORA", {"r": 2, "rank_pattern": {"second": 1}}),
    ],
)
def test_ranks_are_taken_from_a_bare_state_dict(method, fields):
    source = randomise(inject(net(), method, **fields))
    state = adapters.get_peft_model_state_dict(source)
    bare = type(configs(method)[0])(**({"init_r": 2} if method == "ADALORA" else {}))
    mine = adapters.inject_adapter_in_model(bare, net(), state_dict=state)
    assert adapters.set_peft_model_state_dict(mine, state) == ([], [])
    after = adapters.get_peft_model_state_dict(mine)
    assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)


def test_modules_to_save_as_in_peft():
    mine, theirs = both("LORA", **SAVED)
    assert isinstance(mine.head, adapters.ModulesToSaveWrapper)
    for model in (mine, theirs):
        randomise(model)
    assert same_outputs(mine, theirs)
    for do, model in ((inject, mine), (inject_peft, theirs)):
        torch.manual_seed(8)
        do(model, "LORA", "other", **SAVED)
        randomise(model, seed=9).eval()
    # PEFT leaves the second copy frozen and inactive until it is set, while the second adapter runs without it.
    assert mine.head.active_adapters == ["other"] and theirs.head.active_adapters == []
    for name in ("default", "other"):
        adapters.set_adapter(mine, name)
        peft.functional.set_adapter(theirs, name)
        assert trained(mine) == trained(theirs) and same_outputs(mine, theirs)
        state, expected = adapters.get_peft_model_state_dict(mine, adapter_name=name), peft_state(theirs, name)
        assert set(state) == set(expected) and all(torch.equal(state[key], expected[key]) for key in state)
    fresh = inject(net(), "LORA", **SAVED)
    assert adapters.set_peft_model_state_dict(fresh, expected) == ([], [])
    assert same_outputs(fresh, theirs)
    assert not peft_load(inject_peft(net(), "LORA", **SAVED), state).unexpected_keys
    for model in (mine, theirs):
        for layer in layers(model):
            layer.enable_adapters(False)
        model.head.enable_adapters(False)
    assert trained(mine) == trained(theirs) and same_outputs(mine, theirs)
    torch.testing.assert_close(mine(inputs()), net()(inputs()))


def test_an_adapter_without_a_copy_leaves_the_users_module_in_place():
    mine, theirs = both("LORA", **SAVED)
    for do, model in ((inject, mine), (inject_peft, theirs)):
        randomise(model)
        torch.manual_seed(8)
        randomise(do(model, "LORA", "plain", target_modules=["first"]), seed=5).eval()
    assert trained(mine) == trained(theirs) and same_outputs(mine, theirs)
    assert mine.head.current is mine.head.original_module
    with pytest.raises(ValueError, match="choose"):
        inject(mine, "LORA", "plain")
    adapters.set_adapter(mine, ["default", "plain"])
    peft.functional.set_adapter(theirs, ["default", "plain"])
    assert trained(mine) == trained(theirs) and same_outputs(mine, theirs)


def test_a_name_in_modules_to_save_is_a_whole_word_where_peft_takes_any_end():
    """PEFT wraps `head` for the name `ad`."""
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["first"], modules_to_save=["ad"]), net())
    assert isinstance(model.head, peft.utils.ModulesToSaveWrapper)
    with pytest.raises(ValueError, match="modules_to_save has 'ad', which is no module of the model"):
        adapters.inject_adapter_in_model(LoraConfig(target_modules=["first"], modules_to_save=["ad"]), net())


def test_a_model_in_evaluation_mode_stays_there_where_pefts_new_layers_train():
    fields = {"target_modules": ["first"], "lora_dropout": 0.5, "init_lora_weights": False}
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**fields), net())
    assert not theirs.training and theirs.first.lora_dropout["default"].training
    mine = adapters.inject_adapter_in_model(LoraConfig(**fields), net())
    assert not any(module.training for module in mine.modules())
    assert torch.equal(mine(inputs()), mine(inputs()))
    mine = adapters.inject_adapter_in_model(LoraConfig(**fields), net().train())
    assert all(module.training for module in mine.modules())


def test_active_adapters_beside_merged_ones_count_where_peft_drops_them():
    mine, theirs = both("LORA")
    for do, model in ((inject, mine), (inject_peft, theirs)):
        do(model, "LORA", "other")
        randomise(model).eval()
    for model, lib in ((mine, adapters), (theirs, peft.functional)):
        lib.set_adapter(model, ["default", "other"])
    x = inputs()
    both_active = mine(x)
    for model in (mine, theirs):
        for layer in layers(model):
            layer.merge(adapter_names=["default"])
    assert torch.allclose(mine(x), both_active, rtol=0, atol=1e-10)
    assert not torch.allclose(theirs(x), both_active, rtol=0, atol=1e-2)


def test_a_convolution_with_oft_starts_as_the_identity_where_pefts_does_not():
    fields = {"target_modules": ["first"], "oft_block_size": 4}
    x = inputs("conv2d")
    base = net("conv2d")(x)
    torch.testing.assert_close(adapters.inject_adapter_in_model(adapters.OFTConfig(**fields), net("conv2d"))(x), base)
    theirs = peft.inject_adapter_in_model(peft.OFTConfig(**fields), net("conv2d")).eval()
    assert not torch.allclose(theirs(x), base, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_merged_rotations_compute_what_they_do_unmerged_where_pefts_differ(kind):
    """PEFT runs the first adapter's rotation first, and merges it last."""
    mine, theirs, x = net(kind), net(kind), inputs(kind)
    for name in "ab":
        for do, model in ((inject, mine), (inject_peft, theirs)):
            randomise(do(model, "OFT", name).eval(), seed=ord(name))
    adapters.set_adapter(mine, ["a", "b"])
    peft.functional.set_adapter(theirs, ["a", "b"])
    adapted = mine(x)
    assert same_outputs(mine, theirs)
    adapters.merge_adapter(mine)
    for layer in layers(theirs):
        layer.merge()
    assert torch.allclose(mine(x), adapted, rtol=0, atol=1e-10)
    assert torch.allclose(theirs(x), adapted, rtol=0, atol=1e-3) == (kind == "embedding")


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(3)])
        self.blocks = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2)])


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": 1, "layers_pattern": "blocks"},
        {"exclude_modules": ["layers.0.q"], "rank_pattern": {r"blocks\.\d\.q": 4}},
        {"target_modules": "all-linear", "modules_to_save": ["blocks.1.q"]},
    ],
)
def test_the_same_layers_get_the_same_parameters(fields):
    pair = []
    for lib in (adapters, peft):
        torch.manual_seed(0)
        config = lib.LoraConfig(**{"r": 2, "target_modules": ["q"], **fields})
        pair.append(lib.inject_adapter_in_model(config, nn.ModuleDict({"model": Stack()})))
    mine, theirs = (dict(model.named_parameters()) for model in pair)
    assert list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert trained(pair[0]) == trained(pair[1])
