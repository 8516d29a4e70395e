"""PEFT's `convert_to_lora`, `save_as_lora` and `supports_lora_conversion`: its arguments and numbers."""

import inspect

import pytest
import torch
from torch import nn

from torchgraft.adapters import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    as_peft,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    load_adapter,
    save_as_lora,
    set_peft_model_state_dict,
    supports_lora_conversion,
)

peft = pytest.importorskip("peft")


def net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10, bias=bias), nn.Tanh(), nn.Linear(10, 8, bias=bias))


def moved(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("rank", [3, 0.8, 1.0])
@pytest.mark.parametrize("wrapped", [True, False])
def test_numbers_are_pefts(rank, wrapped):
    fields = {"r": 2, "target_modules": ["0", "2"]}
    if wrapped:
        ours = moved(get_peft_model(net(), LoHaConfig(**fields)))
        theirs = moved(peft.get_peft_model(net(), peft.LoHaConfig(**fields)))
    else:
        ours = moved(inject_adapter_in_model(LoHaConfig(**fields), net()))
        theirs = moved(peft.inject_adapter_in_model(peft.LoHaConfig(**fields), net()))
    (own, state), (other, expected) = convert_to_lora(ours, rank), peft.convert_to_lora(theirs, rank)
    assert state.keys() == expected.keys()
    for key in state:
        if "lora_A" in key:
            at = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(state[at] @ state[key], expected[at] @ expected[key], rtol=1e-4, atol=1e-5)
            if rank != 1.0:  # where theirs has directions of rounding errors too
                assert state[key].shape == expected[key].shape
    assert own.lora_alpha == own.r and other.peft_type == own.peft_type


def test_arguments_are_pefts():
    for ours, theirs in ((convert_to_lora, peft.convert_to_lora), (save_as_lora, peft.save_as_lora)):
        own, other = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
        assert list(own) == list(other)
        assert [one.default for one in own.values()] == [one.default for one in other.values()]


def test_miss_is_exact():
    ours = moved(inject_adapter_in_model(MissConfig(r=2, target_modules=["0"]), net()))
    x = torch.randn(5, 12)
    config, state = convert_to_lora(ours, 2)
    lora = inject_adapter_in_model(config, net())
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(lora(x), ours(x), rtol=1e-5, atol=1e-5)


def test_a_saved_one_is_read_by_peft_and_here(tmp_path):
    ours = moved(get_peft_model(net(), OFTConfig(oft_block_size=2, target_modules=["0"])))
    x = torch.randn(5, 12)
    save_as_lora(tmp_path / "new", ours, 10)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "new")
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-4)
    into = net()
    load_adapter(into, tmp_path / "new")
    torch.testing.assert_close(into(x), ours(x), rtol=1e-4, atol=1e-4)


def test_whatever_merges_and_leaves_the_bias_is_supported():
    for config, bias, expected in [
        (LoHaConfig(r=2, target_modules=["0"]), True, True),
        (OFTConfig(oft_block_size=2, target_modules=["0"]), True, True),
        (LoraConfig(r=2, target_modules=["0"], use_dora=True), True, True),
        (IA3Config(target_modules=["0"], feedforward_modules=[]), True, False),
        (IA3Config(target_modules=["0"], feedforward_modules=[]), False, True),
        (IA3Config(target_modules=["0"], feedforward_modules=["0"]), True, True),
    ]:
        model = moved(inject_adapter_in_model(config, net(bias)))
        assert supports_lora_conversion(model) is expected is model[0].supports_lora_conversion()
        assert not supports_lora_conversion(model, "other")
        wrapped = get_peft_model(net(), config)
        assert wrapped.supports_lora_conversion() and wrapped.base_model.supports_lora_conversion()
        if expected:
            convert_to_lora(model, 2) if not getattr(config, "use_dora", 0) else None
        else:
            with pytest.raises(ValueError, match=r"0 has a bias that its adapters change"):
                convert_to_lora(model, 2)


def test_under_pefts_name():
    with as_peft():
        import peft as alias
        from peft.tuners.lora.conversion import save_as_lora as saved

        assert alias.convert_to_lora is convert_to_lora and saved is save_as_lora
        assert alias.tuners.lora.convert_to_lora is convert_to_lora


def test_errors_and_warnings():
    model = inject_adapter_in_model(LoHaConfig(r=2, target_modules=["0"]), net())
    with pytest.raises(TypeError, match=r"no layer with the adapter 'style'; it has the adapters \['default'\]"):
        convert_to_lora(model, 2, "style")
    with pytest.raises(TypeError, match="no layer with the adapter 'default'"):
        convert_to_lora(net(), 2)
    with pytest.raises(ValueError, match="rank is 11, and 0 has a weight of 10 x 12, so 10 is the most"):
        convert_to_lora(model, 11)
    with pytest.raises(ValueError, match="rank is 0, expected at least 1"):
        convert_to_lora(model, 0)
    with pytest.raises(ValueError, match=r"energy is 1.5, expected 0 < energy <= 1"):
        convert_to_lora(model, 1.5)
    with pytest.raises(TypeError, match="rank is '4', expected an integer"):
        convert_to_lora(model, "4")
    with pytest.warns(UserWarning, match="adapter 'default' is a LoRA already"):
        convert_to_lora(inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), net()), 1)
