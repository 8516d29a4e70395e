"""Bases whose weights no adapter can be added to: the adapter runs in factored form around the base's own forward."""

import copy
import importlib.util

import optree
import pytest
import torch
from torch import nn
from torch.func import grad

from torchgraft import adapters
from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind, merge, route, stack, value_and_grad

CONFIG = LoraConfig(r=2, target_modules=["0", "2"])


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def torchao(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.bfloat16(), Int8WeightOnlyConfig())
    return model


def torchao_four_bits(model):
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    # `Int4WeightOnlyConfig` packs for a GPU, or takes a library of kernels that this machine does not have.
    quantize_(model.bfloat16(), IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)))
    return model


def four_bits(model):
    import bitsandbytes

    return exchanged(model, bitsandbytes.nn.Linear4bit(32, 32), bitsandbytes.nn.Linear4bit(32, 32))


def eight_bits(model):
    import bitsandbytes

    layers = (bitsandbytes.nn.Linear8bitLt(32, 32, has_fp16_weights=False) for _ in range(2))
    return exchanged(model, *layers)


def exchanged(model, first, second):
    for index, layer in (("0", first), ("2", second)):
        layer.load_state_dict(model.get_submodule(index).state_dict())
        model._modules[index] = layer.to("cpu")
    return model


def missing(library):
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"needs {library}")


BASES = [
    pytest.param(dynamic, id="torch dynamic int8"),
    pytest.param(torchao, id="torchao int8", marks=missing("torchao")),
    pytest.param(torchao_four_bits, id="torchao int4", marks=missing("torchao")),
    pytest.param(four_bits, id="bitsandbytes 4 bits", marks=missing("bitsandbytes")),
    pytest.param(eight_bits, id="bitsandbytes 8 bits", marks=missing("bitsandbytes")),
]
pytestmark = [
    pytest.mark.parametrize("quantise", BASES),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:bitsandbytes"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch"),
]


@pytest.fixture
def case(quantise):
    torch.manual_seed(0)
    model = quantise(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return model, torch.randn(4, 32, dtype=dtype)


def filled(graft, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: 0.2 * torch.randn(t.shape, generator=generator), graft.init())


def close(a, b):
    torch.testing.assert_close(a.float(), b.float(), rtol=3e-2, atol=3e-2)


def test_functional(case):
    model, x = case
    graft = bind(model, CONFIG)
    initial = graft.init(torch.Generator().manual_seed(0))
    assert {t.dtype for t in optree.tree_leaves(initial)} == {torch.float32}
    assert torch.equal(graft(initial, x), model(x))
    params = filled(graft)
    hidden = model[0](x) + 4 * (x.float() @ params["0"]["lora_A"].mT @ params["0"]["lora_B"].mT).to(x.dtype)
    hidden = model[1](hidden)
    expected = model[2](hidden) + 4 * (hidden.float() @ params["2"]["lora_A"].mT @ params["2"]["lora_B"].mT).to(x.dtype)
    close(graft(params, x), expected)

    def loss(params):
        return graft(params, x).float().square().mean()

    value, grads = value_and_grad(loss)(params)
    close(value, loss(params))
    assert all(g.abs().sum() > 0 for g in optree.tree_leaves(grads))
    if not type(model[0]).__module__.startswith("bitsandbytes"):  # its functions refuse torch.func, loudly
        for a, b in zip(optree.tree_leaves(grads), optree.tree_leaves(grad(loss)(params)), strict=True):
            close(a, b)
    other = filled(graft, 1)
    given = graft(route(stack([params, other]), torch.tensor([1, -1, 0, 1])), x)
    rows = torch.stack([graft(other, x)[0], model(x)[1], graft(params, x)[2], graft(other, x)[3]])
    close(given, rows)
    close(graft.view(params)(x), graft(params, x))
    with pytest.raises(TypeError, match=r"0: its weight is .*merge into the model as it was before quantisation, or"):
        merge(graft, params)


def test_gradients_flow_through_the_base(case):
    """The gradient of a layer's adapter is that over a float model with the same, dequantised weights."""
    model, x = case
    graft = bind(model, CONFIG)
    params = filled(graft)
    eye = torch.eye(32, dtype=x.dtype)
    twin = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    with torch.no_grad():
        for theirs, own in ((model[0], twin[0]), (model[2], twin[2])):
            shift = theirs(torch.zeros_like(eye[:1]))
            own.weight.copy_((theirs(eye) - shift).mT)
            own.bias.copy_(shift[0])
    over_float = bind(twin, CONFIG)
    _, given = value_and_grad(lambda p: graft(p, x).float().square().mean())(params)
    _, expected = value_and_grad(lambda p: over_float(p, x.float()).square().mean())(params)
    for a, b in zip(optree.tree_leaves(given), optree.tree_leaves(expected), strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


def test_in_place(case, tmp_path):
    model, x = case
    plain = model(x)
    graft = bind(copy.deepcopy(model), CONFIG)
    params = filled(graft)
    expected = graft(params, x)
    injected = adapters.inject_adapter_in_model(CONFIG, copy.deepcopy(model))
    torch.testing.assert_close(injected(x), plain)
    injected = adapters.inject_adapter_in_model(CONFIG, copy.deepcopy(model), params=params)
    close(injected(x), expected)
    injected(x).float().sum().backward()
    assert all(p.grad is not None for name, p in injected.named_parameters() if "lora_" in name)
    adapters.save_adapter(injected, tmp_path)
    loaded = adapters.load_adapter(copy.deepcopy(model), tmp_path)
    close(loaded(x), expected)
    close(graft(adapters.load_adapter(graft, tmp_path), x), expected)
    with adapters.disable_adapter(injected):
        torch.testing.assert_close(injected(x), plain)
    with pytest.raises(ValueError, match=r"0: its weight is .*, so no adapter can be merged into it; leave"):
        adapters.merge_adapter(injected)
    close(injected(x), expected)
    bare = adapters.unload(injected)
    torch.testing.assert_close(bare(x), plain)


def test_low_cpu_mem_usage(case):
    model, x = case
    injected = adapters.inject_adapter_in_model(CONFIG, copy.deepcopy(model))
    state = adapters.get_peft_model_state_dict(injected)
    empty = adapters.inject_adapter_in_model(CONFIG, model, low_cpu_mem_usage=True)
    assert adapters.set_peft_model_state_dict(empty, state, low_cpu_mem_usage=True) == ([], [])
    torch.testing.assert_close(empty(x), injected(x))
