"""Complex layers: autograd of the dense formula is the oracle, and no imaginary part is lost on the way."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchgraft.adapters import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_peft_model_state_dict,
    unmerge_adapter,
)
from torchgraft.functional import bind, merge, route, stack

PLAIN = [
    LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_bias=True, use_rslora=True),
    IA3Config(target_modules=["0"], init_ia3_weights=False),
    IA3Config(target_modules=["0"], init_ia3_weights=False, feedforward_modules=["0"]),
    LoHaConfig(r=1, target_modules=["0"], init_weights=False),
    LoHaConfig(r=2, target_modules=["0"], init_weights=False),
    VeraConfig(r=2, target_modules=["0"], init_weights=False),
]


def model_and_input(dtype=torch.complex128):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, dtype=dtype)), torch.randn(4, 3, 6, dtype=dtype)


def drawn(graft, seed=0):
    torch.manual_seed(seed)
    params = graft.init()
    return {"0": {leaf: torch.randn_like(t).requires_grad_() for leaf, t in params["0"].items()}}


@pytest.mark.parametrize("config", PLAIN, ids=lambda c: c.method.name)
def test_values_and_gradients_are_those_of_the_dense_formula(config):
    model, x = model_and_input()
    x.requires_grad_()
    graft = bind(model, config)
    params = drawn(graft)
    assert all(t.dtype == torch.complex128 for t in graft.init()["0"].values())
    asked = [x, *params["0"].values()]
    dense = merge(graft, params)
    expected = F.linear(x, dense["0.weight"], dense["0.bias"])
    g = torch.randn_like(expected)
    many = stack([params, drawn(graft, 1)])
    for found in (graft(params, x), graft(route(many, torch.zeros(4, dtype=torch.long)), x)):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, asked, g, retain_graph=True),
            torch.autograd.grad(expected, asked, g, retain_graph=True),
        )

    def loss(*leaves):
        return graft({"0": dict(zip(params["0"], leaves[1:], strict=True))}, leaves[0]).abs().square().sum()

    assert torch.autograd.gradgradcheck(loss, asked)


@pytest.mark.parametrize("config", PLAIN, ids=lambda c: c.method.name)
@pytest.mark.filterwarnings("error")
def test_in_place_and_in_files_nothing_is_lost(config, tmp_path):
    model, x = model_and_input(torch.complex64)
    graft = bind(model, config)
    params = {"0": {leaf: t.detach() for leaf, t in drawn(graft)["0"].items()}}
    expected = graft(params, x)
    injected = inject_adapter_in_model(config, copy.deepcopy(model), params=params)
    torch.testing.assert_close(injected(x), expected)
    merge_adapter(injected)
    torch.testing.assert_close(injected(x), expected)
    unmerge_adapter(injected)
    other = inject_adapter_in_model(config, copy.deepcopy(model))
    assert all(p.dtype == torch.complex64 for p in other.parameters() if p.requires_grad)
    state = get_peft_model_state_dict(injected)
    set_peft_model_state_dict(other, state)
    torch.testing.assert_close(other(x), expected)
    save_adapter(injected, tmp_path)
    torch.testing.assert_close(load_adapter(copy.deepcopy(model), tmp_path)(x), expected)
    torch.testing.assert_close(graft(load_adapter(graft, tmp_path), x), expected)

    real = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(ValueError, match="is complex, torch.complex64, and the model takes torch.float32"):
        load_adapter(copy.deepcopy(real), tmp_path)
    target = inject_adapter_in_model(config, copy.deepcopy(real))
    before = {name: t.clone() for name, t in target.state_dict().items()}
    with pytest.raises(RuntimeError, match="is complex, .* no imaginary part; nothing was loaded"):
        set_peft_model_state_dict(target, state)
    assert all(torch.equal(t, before[name]) for name, t in target.state_dict().items())
    with pytest.raises(TypeError, match="complex parameters .* meets a layer of torch.float32"):
        bind(real, config)(params, x.real)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (LoraConfig(target_modules=["0"], use_dora=True), "LORA with use_dora"),
        (LoraConfig(target_modules=["0"], init_lora_weights="pissa"), "LORA with init_lora_weights='pissa'"),
        (OFTConfig(target_modules=["0"], r=0, oft_block_size=2), "OFT"),
        (AdaLoraConfig(target_modules=["0"], total_step=10), "ADALORA"),
    ],
)
def test_methods_made_for_real_weights_say_so(config, what):
    model, _ = model_and_input()
    for start in (bind, lambda model, config: inject_adapter_in_model(config, model)):
        with pytest.raises(ValueError, match=rf"0: the weight is complex, torch.complex128, and {what} is made for"):
            start(model, config)
    assert type(model[0]) is nn.Linear


def test_a_real_adapter_on_a_complex_layer():
    model, x = model_and_input()
    graft = bind(model, PLAIN[0])
    params = graft.init(dtype=torch.float64)
    dense = merge(graft, params)
    torch.testing.assert_close(graft(params, x), F.linear(x, dense["0.weight"], dense["0.bias"]))
    y = graft({"0": {leaf: t.requires_grad_() for leaf, t in params["0"].items()}}, x)
    assert all(g.dtype == torch.float64 for g in torch.autograd.grad(y.abs().sum(), list(params["0"].values())))


def test_dropout_of_a_complex_layer_is_what_torch_says_of_it():
    model, x = model_and_input()
    graft = bind(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_dropout=0.5))
    with pytest.raises(NotImplementedError, match="not implemented for 'ComplexDouble'"):
        graft(graft.init(), x)
    params = graft.init()
    dense = merge(graft, params)
    torch.testing.assert_close(graft.view(params).eval()(x), F.linear(x, dense["0.weight"], dense["0.bias"]))
