"""Initialisations in place: PEFT's outputs, tensors and files, with a base that stays what it was."""

import copy
import re

import peft
import pytest
import torch

from torchgraft import adapters
from torchgraft.adapters import LoraConfig, load_adapter, save_adapter
from torchgraft.functional import bind, merge

from .models import configs, inject, inputs, layers, net, parameters, peft_state, trained

NAMES = ["pissa", "olora", "mica", "orthogonal"]


def pair(name, kind="linear", dtype=torch.float32, **fields):
    """Two models of equal weights, with an adapter from the same seed, by torchgraft and by PEFT."""
    fields = {"r": 2, "lora_alpha": 3, "init_lora_weights": name, **fields}
    ours, theirs = configs("LORA", **fields)
    if kind == "transposed":
        theirs.fan_in_fan_out = True
    models = []
    for config, do in ((ours, adapters.inject_adapter_in_model), (theirs, peft.inject_adapter_in_model)):
        torch.manual_seed(7)
        models.append(do(config, net(kind, dtype)))
    models[1].eval()
    return models


def nudge(model, seed=3):
    """Trained a little: everything that is trained, from where it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if ".lora_" in name and parameter.requires_grad:
                parameter.add_(0.1 * noise.to(parameter))
    return model


CASES = [(name, "linear") for name in NAMES] + [(name, "transposed") for name in NAMES if name != "olora"]
CASES += [("mica", "embedding")]
cases = pytest.mark.parametrize(("name", "kind"), CASES)


@cases
def test_starts_and_computes_as_in_peft(name, kind):
    mine, theirs = pair(name, kind)
    assert trained(mine) == trained(theirs)
    assert parameters(mine).keys() == parameters(theirs).keys()
    for key, p in parameters(theirs).items():
        if ".lora_" in key:
            torch.testing.assert_close(parameters(mine)[key].abs(), p.abs(), rtol=1e-5, atol=1e-6, msg=key)
    x = inputs(kind, torch.float32)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-4, atol=1e-5)
    nudge(theirs)
    assert adapters.set_peft_model_state_dict(mine, peft_state(theirs)) == ([], [])
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-4, atol=1e-5)
    seed = torch.randn_like(mine(x))
    for model in (mine, theirs):
        (model(x) * seed).sum().backward()
    for key, p in parameters(theirs).items():
        own = parameters(mine)[key]
        assert (own.grad is None) == (p.grad is None), key
        if p.grad is not None:
            torch.testing.assert_close(own.grad, p.grad, rtol=1e-4, atol=1e-4, msg=key)
    adapters.merge_adapter(mine)
    for layer in layers(theirs):
        layer.merge()
    for own, other in zip(layers(mine), layers(theirs), strict=True):
        torch.testing.assert_close(own.base_layer.weight, other.base_layer.weight, rtol=1e-4, atol=1e-5)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_base_stays_and_the_start_is_the_identity(name, kind, dtype):
    model, x = net(kind, dtype), inputs(kind, dtype)
    before, start = copy.deepcopy(model), model(x)
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=name, target_modules=["first", "second"])
    adapters.inject_adapter_in_model(config, model)
    if name != "orthogonal":
        assert torch.equal(model(x), start)
    nudge(model)
    assert not torch.equal(model(x), start)
    with adapters.disable_adapter(model):
        assert torch.equal(model(x), start)
    factored = model(x)
    adapters.merge_adapter(model)
    close = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(model(x), factored, rtol=close, atol=close)
    adapters.unmerge_adapter(model)
    adapters.inject_adapter_in_model(LoraConfig(target_modules=["first"]), model, "plain")
    assert torch.equal(model(x), start)
    adapters.set_adapter(model, "default")
    torch.testing.assert_close(model(x), factored, rtol=0, atol=0)
    adapters.delete_adapter(model, "plain")
    adapters.delete_adapter(model, "default")
    assert torch.equal(model(x), start)
    adapters.unload(model)
    assert all(torch.equal(t, before.state_dict()[key]) for key, t in model.state_dict().items())


@cases
def test_to_the_functional_style_and_back(name, kind):
    mine = inject(net(kind), "LORA", r=2, lora_alpha=3, init_lora_weights=name)
    nudge(mine)
    x = inputs(kind)
    graft, tree = adapters.extract_graft(mine), adapters.extract_params(mine)
    torch.testing.assert_close(graft(tree, x), mine(x))
    bound = bind(net(kind), configs("LORA", r=2, lora_alpha=3, init_lora_weights=name)[0])
    torch.testing.assert_close(bound(tree, x), mine(x))
    planted = adapters.inject_adapter_in_model(bound.configs[""], net(kind), params=tree)
    torch.testing.assert_close(planted(x), mine(x))
    torch.testing.assert_close(merge(bound, tree), merge(graft, tree))


@cases
def test_files_both_ways(name, kind, tmp_path):
    mine, _ = pair(name, kind)
    nudge(mine)
    x = inputs(kind, torch.float32)
    save_adapter(mine, tmp_path / "ours")
    torch.testing.assert_close(load_adapter(net(kind, torch.float32), tmp_path / "ours")(x), mine(x))
    graft = bind(net(kind, torch.float32), mine.peft_config["default"])
    torch.testing.assert_close(graft(load_adapter(graft, tmp_path / "ours"), x), mine(x))
    theirs = peft.PeftModel.from_pretrained(net(kind, torch.float32), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(x), mine(x), rtol=1e-4, atol=1e-5)
    nudge(theirs, seed=5)
    for parameter_name, parameter in theirs.named_parameters():
        parameter.requires_grad_(".lora_" in parameter_name)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    loaded = load_adapter(net(kind, torch.float32), tmp_path / "theirs")
    torch.testing.assert_close(loaded(x), theirs(x), rtol=1e-4, atol=1e-5)
    tree = load_adapter(graft, tmp_path / "theirs")
    torch.testing.assert_close(graft(tree, x), theirs(x), rtol=1e-4, atol=1e-5)
    save_adapter(graft, tmp_path / "again", params=tree)
    again = load_adapter(net(kind, torch.float32), tmp_path / "again", is_trainable=True)
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert trained(again) == trained(pair(name, kind)[0])


def test_micas_b_is_the_files_not_the_models(tmp_path):
    mine, _ = pair("mica")
    nudge(mine)
    for layer in layers(mine):
        parameter = layer.lora_B["default"].weight
        with torch.no_grad():
            parameter.mul_(-1)
    x = inputs(dtype=torch.float32)
    save_adapter(mine, tmp_path)
    loaded = load_adapter(net(dtype=torch.float32), tmp_path)
    torch.testing.assert_close(loaded(x), mine(x))
    torch.testing.assert_close(adapters.extract_graft(loaded)(adapters.extract_params(loaded), x), mine(x))
    graft = bind(net(dtype=torch.float32), mine.peft_config["default"])
    words = "first.lora_B.weight' is not what this graft has made of the base's weights"
    with pytest.raises(ValueError, match=re.escape(words)):
        load_adapter(graft, tmp_path)
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if "lora_B" in n)


def test_micas_b_stays_frozen_whatever_is_switched():
    mine, _ = pair("mica")
    adapters.set_requires_grad(mine, "default", True)
    adapters.set_adapter(mine, "default")
    adapters.disable_adapter_layers(mine)
    adapters.enable_adapter_layers(mine)
    again = copy.deepcopy(mine)
    for model in (mine, again):
        flags = trained(model)
        assert not any(flag for name, flag in flags.items() if "lora_B" in name)
        assert all(flag for name, flag in flags.items() if "lora_A" in name)


def test_parameters_on_the_meta_device_take_what_is_loaded():
    mine, _ = pair("mica")
    nudge(mine)
    config = mine.peft_config["default"]
    other = adapters.inject_adapter_in_model(config, net(dtype=torch.float32), low_cpu_mem_usage=True)
    state = adapters.get_peft_model_state_dict(mine)
    assert adapters.set_peft_model_state_dict(other, state, low_cpu_mem_usage=True) == ([], [])
    x = inputs(dtype=torch.float32)
    torch.testing.assert_close(other(x), mine(x))
    assert trained(other) == trained(mine)


@pytest.mark.slow
def test_compiles_and_does_not_compile_again():
    mine, _ = pair("pissa")
    torch._dynamo.reset()
    x = inputs(dtype=torch.float32)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mine(x))
    with torch._dynamo.config.patch(error_on_recompile=True):
        nudge(mine)
        torch.testing.assert_close(compiled(x), mine(x))
