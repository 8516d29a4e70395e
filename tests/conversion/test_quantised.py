"""Merging into quantised bases: into the numbers that they stand for, and quantised again."""

import pytest
import torch
from torch import nn

from tests.functional.test_quantised import BASES, CONFIG, dynamic, filled
from tests.functional.test_quantised import pytestmark as _marks
from torchgraft.adapters import LoHaConfig, LoraConfig, requantized, to_lora
from torchgraft.functional import bind, dequantized, merge

pytestmark = _marks[1:]  # without the parameters


def base(quantise):
    torch.manual_seed(0)
    return quantise(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)))


def numbers(layer, dtype):
    """The weight and bias that a quantised layer stands for, told by calling it."""
    eye = torch.eye(32, dtype=dtype)
    shift = layer(torch.zeros_like(eye[:1]))
    return (layer(eye) - shift).mT, shift[0]


@pytest.mark.parametrize("quantise", BASES)
def test_merged_into_the_numbers_that_a_base_stands_for(quantise):
    model = base(quantise)
    before = {name: str(tensor) for name, tensor in model.state_dict().items()}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    graft = bind(model, CONFIG)
    params = filled(graft)
    state = merge(graft, params, dequantize=True)
    assert list(state) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    plain = dequantized(model)
    for path in ("0", "2"):
        weight, bias = numbers(model[int(path)], dtype)
        torch.testing.assert_close(plain.state_dict()[f"{path}.weight"].float(), weight.float(), rtol=0.05, atol=0.02)
        torch.testing.assert_close(state[f"{path}.bias"].float(), bias.float(), rtol=0.05, atol=0.02)
        own = plain.get_submodule(path).weight
        change = 4 * params[path]["lora_B"] @ params[path]["lora_A"]
        expected = (own.float() + change).to(own.dtype)
        torch.testing.assert_close(state[f"{path}.weight"], expected)
    merged = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).to(state["0.weight"].dtype)
    merged.load_state_dict(state)
    x = torch.randn(4, 32, dtype=state["0.weight"].dtype)
    torch.testing.assert_close(merged(x).float(), graft(params, x.to(dtype)).float(), rtol=0.1, atol=0.2)
    assert {name: str(tensor) for name, tensor in model.state_dict().items()} == before  # the user's own


@pytest.mark.parametrize("quantise", BASES)
def test_other_methods_are_converted_over_the_dequantised_base(quantise):
    model = dequantized(base(quantise))
    graft = bind(model, LoHaConfig(r=2, target_modules=["0", "2"]))
    params = filled(graft)
    config, lora, report = to_lora(graft, params)
    assert config.r == 4 and report.relative < 1e-5
    expected, actual = merge(graft, params), merge(bind(model, config), lora)
    torch.testing.assert_close(actual["0.weight"].float(), expected["0.weight"].float(), rtol=1e-2, atol=1e-2)


def test_plain_lora_needs_no_weight_of_the_base():
    graft = bind(base(dynamic), CONFIG)
    config, _, report = to_lora(graft, filled(graft), 1)
    assert config.r == 1 and 0 < report.relative < 1
    dora = bind(dequantized(graft.model), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    assert to_lora(dora, filled(dora))[2].relative < 1e-5


@pytest.mark.parametrize("quantise", BASES[:3])
def test_quantised_again_with_its_error(quantise):
    model = base(quantise)
    graft = bind(model, CONFIG)
    params = filled(graft)
    new, report = requantized(graft, params, quantise)
    assert type(new[0]) is type(model[0]) and type(getattr(new[0], "weight", 0)) is type(getattr(model[0], "weight", 0))
    assert sorted(report.modules) == ["0", "2"] and 0 < report.relative < 0.15
    state, after = merge(graft, params, dequantize=True), dequantized(new).state_dict()
    for path, error in report.modules.items():
        merged = state[f"{path}.weight"].double()
        assert error.norm == pytest.approx(float(merged.norm()))
        assert error.error == pytest.approx(float((after[f"{path}.weight"].double() - merged).norm()))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    x = torch.randn(4, 32, dtype=dtype)
    torch.testing.assert_close(new(x).float(), graft(params, x).float(), rtol=0.3, atol=2.0)


def test_errors():
    graft = bind(base(dynamic), CONFIG)
    params = filled(graft)
    with pytest.raises(TypeError, match=r"0: its weight is packed.*merge\(graft, params, dequantize=True\)"):
        merge(graft, params)
    with pytest.raises(ValueError, match="quantize left no layer quantised"):
        requantized(graft, params, lambda model: None)
    with pytest.raises(TypeError, match="quantize returned int, expected a model, or None"):
        requantized(graft, params, lambda model: 3)
    with pytest.raises(TypeError, match="dequantized: model is of type int, expected a torch.nn.Module"):
        dequantized(3)
