"""transformers' own adapter integration, running on torchgraft under PEFT's name."""

import pytest
import torch
import transformers

from torchgraft.adapters import (
    BaseTunerLayer,
    as_peft,
    enable_adapter_layers,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    merge_and_unload,
    unload,
)

METHODS = ["lora", "ia3", "adalora", "oft"]


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def same(state, other):
    assert state.keys() == other.keys()
    for key, tensor in state.items():
        assert torch.equal(tensor, other[key]), key


@pytest.mark.usefixtures("alias")
class TestAdapters:
    """Each call of the integration, on each architecture."""

    def test_added_adapter_starts_as_the_identity_and_is_trained(self, family):
        model = family.model()
        before = family.logits(model)
        model.add_adapter(family.config_of())
        assert torch.equal(family.logits(model), before)
        assert trained(model)
        assert all(".lora_" in name for name in trained(model))
        assert isinstance(model, family.cls)
        with pytest.raises(ValueError, match="already exists"):
            model.add_adapter(family.config_of())

    def test_active_adapters(self, family):
        model = family.model()
        outputs = []
        for name in ("one", "two"):
            model.add_adapter(family.config_of(), name)
            family.randomise(model)
            outputs.append(family.logits(model))
        assert model.active_adapters() == ["two"]
        model.set_adapter("one")
        assert model.active_adapters() == ["one"]
        assert torch.equal(family.logits(model), outputs[0])
        assert all(".one." in name for name in trained(model))
        model.set_adapter(["one", "two"])
        assert model.active_adapters() == ["one", "two"]
        both = family.logits(model)
        assert not any(torch.allclose(both, output, atol=1e-5) for output in outputs)
        with pytest.raises(ValueError, match="three"):
            model.set_adapter("three")

    def test_disable_and_enable(self, family):
        model = family.model()
        base = family.logits(model)
        model.add_adapter(family.config_of())
        on = family.logits(family.randomise(model))
        model.disable_adapters()
        assert torch.equal(family.logits(model), base)
        model.enable_adapters()
        assert torch.equal(family.logits(model), on)
        assert not torch.allclose(on, base, atol=1e-4)

    def test_delete_adapter(self, family):
        model = family.model()
        base = family.logits(model)
        model.add_adapter(family.config_of(), "one")
        one = family.logits(family.randomise(model))
        model.add_adapter(family.config_of(), "two")
        model.set_adapter("one")
        model.delete_adapter("two")
        assert list(model.peft_config) == ["one"]
        assert torch.equal(family.logits(model), one)
        assert not any(".two" in name for name in model.state_dict())
        model.delete_adapter("one")
        assert torch.equal(family.logits(model), base)
        with pytest.raises(ValueError, match="No adapter loaded"):
            model.active_adapters()
        model.add_adapter(family.config_of(), "one")
        assert model.active_adapters() == ["one"]

    def test_load_from_config_and_state_dict(self, family):
        model = family.adapted()
        state = model.get_adapter_state_dict()
        assert all(".lora_" in key and "default" not in key for key in state)
        for given in (state, {f"base_model.model.{key}": tensor for key, tensor in state.items()}):
            other = family.model()
            info = other.load_adapter(peft_config=family.config_of(), adapter_state_dict=given, adapter_name="other")
            assert not info.missing_keys
            assert not info.unexpected_keys
            torch.testing.assert_close(family.logits(other), family.logits(model))
            same(other.get_adapter_state_dict("other"), state)
            assert not trained(other)

    def test_saved_directory_loads(self, family, tmp_path):
        model = family.adapted()
        model.save_pretrained(tmp_path)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
        other = family.model()
        info = other.load_adapter(str(tmp_path), is_trainable=True)
        assert not info.missing_keys
        assert not info.unexpected_keys
        torch.testing.assert_close(family.logits(other), family.logits(model))
        assert trained(other) == trained(model)

    def test_from_pretrained_takes_a_directory_with_an_adapter(self, family, tmp_path):
        family.model().save_pretrained(tmp_path / "base")
        model = family.cls.from_pretrained(tmp_path / "base").eval()
        model.add_adapter(family.config_of())
        family.randomise(model).save_pretrained(tmp_path / "adapter")
        again = family.cls.from_pretrained(tmp_path / "adapter").eval()
        assert isinstance(again, family.cls)
        assert again.active_adapters() == ["default"]
        torch.testing.assert_close(family.logits(again), family.logits(model))
        same(get_base_model_state_dict(again), family.model().state_dict())


@pytest.mark.usefixtures("alias")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_saves_and_loads(llama, method, tmp_path):
    model = llama.adapted(method, "other")
    model.save_pretrained(tmp_path)
    again = llama.model()
    info = again.load_adapter(tmp_path)
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert not info.mismatched_keys
    torch.testing.assert_close(llama.logits(again), llama.logits(model))


@pytest.mark.usefixtures("alias")
def test_auto_classes_take_a_directory_with_an_adapter(llama, tmp_path):
    llama.model().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model.add_adapter(llama.config_of())
    llama.randomise(model).save_pretrained(tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(llama.logits(again.eval()), llama.logits(model))


@pytest.mark.usefixtures("alias")
def test_modules_to_save(llama, tmp_path):
    model = llama.adapted(modules_to_save=["lm_head"])
    assert "lm_head.modules_to_save.default.weight" in trained(model)
    model.save_pretrained(tmp_path)
    again = llama.model()
    info = again.load_adapter(tmp_path)
    assert not info.missing_keys
    torch.testing.assert_close(llama.logits(again), llama.logits(model))


@pytest.mark.usefixtures("alias")
def test_transformers_does_not_enable_modules_to_save_again(llama):
    """Its `disable_adapters` reaches them and its `enable_adapters` does not, with PEFT too; ours reaches both."""
    model = llama.adapted(modules_to_save=["lm_head"])
    before = llama.logits(model)
    model.disable_adapters()
    model.enable_adapters()
    assert model.lm_head.disable_adapters
    enable_adapter_layers(model)
    assert torch.equal(llama.logits(model), before)


@pytest.mark.usefixtures("alias")
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_forward_that_is_compiled_right_after_loading_has_the_loaded_values(llama, method):
    model = llama.adapted(method)
    state = model.get_adapter_state_dict()
    again = llama.model()
    again.load_adapter(peft_config=llama.config_of(method), adapter_state_dict=state)
    torch._dynamo.reset()
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(llama.logits(compiled), llama.logits(model))


@pytest.mark.usefixtures("alias")
def test_the_base_is_saved_under_its_own_names_after_the_adapter_has_gone(family, tmp_path):
    model = family.model()
    state = family.adapted().get_adapter_state_dict()
    model.load_adapter(peft_config=family.config_of(), adapter_state_dict=state)
    unload(model)
    model._hf_peft_config_loaded = False
    model.save_pretrained(tmp_path)
    same(family.cls.from_pretrained(tmp_path).state_dict(), family.model().state_dict())


@pytest.mark.usefixtures("alias")
def test_hotswap_replaces_values_in_place(llama):
    model, other = llama.adapted(), llama.adapted()
    llama.randomise(other)
    state = other.get_adapter_state_dict()
    config = llama.config_of()
    model.load_adapter(peft_config=config, adapter_state_dict=state, adapter_name="default", hotswap=True)
    assert list(model.peft_config) == ["default"]
    torch.testing.assert_close(llama.logits(model), llama.logits(other))


@pytest.mark.usefixtures("alias")
def test_wrong_shapes_and_foreign_keys_are_reported(llama):
    state = llama.adapted().get_adapter_state_dict()
    key = next(iter(state))
    with pytest.raises(RuntimeError, match="size mismatch|mismatch"):
        llama.model().load_adapter(peft_config=llama.config_of(), adapter_state_dict={**state, key: torch.zeros(1, 1)})
    more = {**state, "x.lora_A.weight": state[key]}
    info = llama.model().load_adapter(peft_config=llama.config_of(), adapter_state_dict=more)
    assert info.unexpected_keys == {"x.lora_A.default.weight"}
    del state[key]
    info = llama.model().load_adapter(peft_config=llama.config_of(), adapter_state_dict=state)
    assert len(info.missing_keys) == 1


def test_adapters_stay_when_the_alias_ends(llama):
    with as_peft():
        model = llama.adapted()
        before = llama.logits(model)
    assert torch.equal(llama.logits(model), before)
    assert any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert get_peft_model_state_dict(model)
    merge_and_unload(model)
    torch.testing.assert_close(llama.logits(model), before)
