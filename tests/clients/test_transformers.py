"""transformers' own adapter integration, running on torchgraft under PEFT's name, against real PEFT."""

import importlib.metadata
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from transformers.utils.import_utils import is_peft_available, is_peft_greater_or_equal

from torchgraft.adapters import (
    AdaLoraConfig,
    BaseTunerLayer,
    IA3Config,
    LoraConfig,
    OFTConfig,
    as_peft,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    merge_and_unload,
    unload,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:AdaLoraConfig. unknown fields:UserWarning"),  # those it inherits and never uses
]
METHODS = {
    "lora": (LoraConfig, peft.LoraConfig, {"r": 2, "lora_alpha": 3}),
    "ia3": (IA3Config, peft.IA3Config, {}),
    "adalora": (AdaLoraConfig, peft.AdaLoraConfig, {"init_r": 2, "target_r": 1, "total_step": 9}),
    "oft": (OFTConfig, peft.OFTConfig, {"oft_block_size": 2}),
}


def config_of(family, method="lora", real=False, **more):
    ours, theirs, fields = METHODS[method]
    if method == "ia3":
        more = {"feedforward_modules": family.targets[-1:], **more}
    return (theirs if real else ours)(target_modules=list(family.targets), **fields, **more)


def randomise(model, scale=0.3):
    """Other values for all that is trained, so that the adapter shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def adapted(family, method="lora", name=None, **more):
    """A model with an adapter that `add_adapter` put there."""
    model = family.model()
    model.add_adapter(config_of(family, method, **more), name)
    return randomise(model)


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
        model.add_adapter(config_of(family))
        assert torch.equal(family.logits(model), before)
        assert trained(model)
        assert all(".lora_" in name for name in trained(model))
        assert isinstance(model, family.cls)
        with pytest.raises(ValueError, match="already exists"):
            model.add_adapter(config_of(family))

    def test_active_adapters(self, family):
        model = family.model()
        outputs = []
        for name in ("one", "two"):
            model.add_adapter(config_of(family), name)
            randomise(model)
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
        model.add_adapter(config_of(family))
        on = family.logits(randomise(model))
        model.disable_adapters()
        assert torch.equal(family.logits(model), base)
        model.enable_adapters()
        assert torch.equal(family.logits(model), on)
        assert not torch.allclose(on, base, atol=1e-4)

    def test_delete_adapter(self, family):
        model = family.model()
        base = family.logits(model)
        model.add_adapter(config_of(family), "one")
        one = family.logits(randomise(model))
        model.add_adapter(config_of(family), "two")
        model.set_adapter("one")
        model.delete_adapter("two")
        assert list(model.peft_config) == ["one"]
        assert torch.equal(family.logits(model), one)
        assert not any(".two" in name for name in model.state_dict())
        model.delete_adapter("one")
        assert torch.equal(family.logits(model), base)
        with pytest.raises(ValueError, match="No adapter loaded"):
            model.active_adapters()
        model.add_adapter(config_of(family), "one")
        assert model.active_adapters() == ["one"]

    def test_load_from_config_and_state_dict(self, family):
        model = adapted(family)
        state = model.get_adapter_state_dict()
        assert all(".lora_" in key and "default" not in key for key in state)
        for given in (state, {f"base_model.model.{key}": tensor for key, tensor in state.items()}):
            other = family.model()
            info = other.load_adapter(peft_config=config_of(family), adapter_state_dict=given, adapter_name="other")
            assert not info.missing_keys
            assert not info.unexpected_keys
            assert torch.equal(family.logits(other), family.logits(model))
            same(other.get_adapter_state_dict("other"), state)
            assert not trained(other)

    def test_saved_directory_loads(self, family, tmp_path):
        model = adapted(family)
        model.save_pretrained(tmp_path)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
        other = family.model()
        info = other.load_adapter(str(tmp_path), is_trainable=True)
        assert not info.missing_keys
        assert not info.unexpected_keys
        assert torch.equal(family.logits(other), family.logits(model))
        assert trained(other) == trained(model)

    def test_from_pretrained_takes_a_directory_with_an_adapter(self, family, tmp_path):
        family.model().save_pretrained(tmp_path / "base")
        model = family.cls.from_pretrained(tmp_path / "base").eval()
        model.add_adapter(config_of(family))
        randomise(model).save_pretrained(tmp_path / "adapter")
        again = family.cls.from_pretrained(tmp_path / "adapter").eval()
        assert isinstance(again, family.cls)
        assert again.active_adapters() == ["default"]
        assert torch.equal(family.logits(again), family.logits(model))
        same(get_base_model_state_dict(again), family.model().state_dict())


@pytest.mark.usefixtures("alias")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_saves_and_loads(llama, method, tmp_path):
    model = adapted(llama, method, "other")
    model.save_pretrained(tmp_path)
    again = llama.model()
    info = again.load_adapter(tmp_path)
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert not info.mismatched_keys
    assert torch.equal(llama.logits(again), llama.logits(model))


@pytest.mark.usefixtures("alias")
def test_modules_to_save(llama, tmp_path):
    model = adapted(llama, modules_to_save=["lm_head"])
    assert "lm_head.modules_to_save.default.weight" in trained(model)
    model.save_pretrained(tmp_path)
    again = llama.model()
    info = again.load_adapter(tmp_path)
    assert not info.missing_keys
    assert torch.equal(llama.logits(again), llama.logits(model))


@pytest.mark.usefixtures("alias")
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_forward_that_is_compiled_right_after_loading_has_the_loaded_values(llama, method):
    model = adapted(llama, method)
    state = model.get_adapter_state_dict()
    again = llama.model()
    again.load_adapter(peft_config=config_of(llama, method), adapter_state_dict=state)
    torch._dynamo.reset()
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(llama.logits(compiled), llama.logits(model))


@pytest.mark.usefixtures("alias")
def test_the_base_is_saved_under_its_own_names_after_the_adapter_has_gone(family, tmp_path):
    model = family.model()
    state = adapted(family).get_adapter_state_dict()
    model.load_adapter(peft_config=config_of(family), adapter_state_dict=state)
    unload(model)
    model._hf_peft_config_loaded = False
    model.save_pretrained(tmp_path)
    same(family.cls.from_pretrained(tmp_path).state_dict(), family.model().state_dict())


@pytest.mark.usefixtures("alias")
def test_hotswap_replaces_values_in_place(llama):
    model, other = adapted(llama), adapted(llama)
    randomise(other)
    state = other.get_adapter_state_dict()
    config = config_of(llama)
    model.load_adapter(peft_config=config, adapter_state_dict=state, adapter_name="default", hotswap=True)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(llama.logits(model), llama.logits(other))


@pytest.mark.usefixtures("alias")
def test_wrong_shapes_and_foreign_keys_are_reported(llama):
    state = adapted(llama).get_adapter_state_dict()
    key = next(iter(state))
    with pytest.raises(RuntimeError, match="size mismatch|mismatch"):
        llama.model().load_adapter(peft_config=config_of(llama), adapter_state_dict={**state, key: torch.zeros(1, 1)})
    more = {**state, "x.lora_A.weight": state[key]}
    info = llama.model().load_adapter(peft_config=config_of(llama), adapter_state_dict=more)
    assert info.unexpected_keys == {"x.lora_A.default.weight"}
    del state[key]
    info = llama.model().load_adapter(peft_config=config_of(llama), adapter_state_dict=state)
    assert len(info.missing_keys) == 1


class TestRealPeft:
    """Files, weights and tokens go both ways; real PEFT runs outside of the alias."""

    @pytest.mark.parametrize("method", METHODS)
    def test_its_directory_loads(self, family, method, tmp_path):
        theirs = randomise(peft.get_peft_model(family.model(), config_of(family, method, real=True))).eval()
        theirs.save_pretrained(tmp_path)
        with as_peft():
            ours = family.model()
            info = ours.load_adapter(tmp_path)
            assert not info.missing_keys
            assert not info.unexpected_keys
            torch.testing.assert_close(family.logits(ours), family.logits(theirs), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("method", METHODS)
    def test_it_loads_a_directory_saved_through_transformers(self, family, method, tmp_path):
        with as_peft():
            ours = adapted(family, method, base_model_name_or_path="somewhere")
            ours.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(family.model(), tmp_path)
        assert type(theirs).__module__.startswith("peft.")
        torch.testing.assert_close(family.logits(theirs), family.logits(ours), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("side", ["ours first", "theirs first"])
    def test_modules_to_save(self, llama, side, tmp_path):
        more = {"modules_to_save": ["lm_head"]}
        if side == "ours first":
            with as_peft():
                ours = adapted(llama, **more)
                ours.save_pretrained(tmp_path)
            theirs = peft.PeftModel.from_pretrained(llama.model(), tmp_path)
        else:
            theirs = randomise(peft.get_peft_model(llama.model(), config_of(llama, real=True, **more))).eval()
            theirs.save_pretrained(tmp_path)
            with as_peft():
                ours = llama.model()
                ours.load_adapter(tmp_path)
        torch.testing.assert_close(llama.logits(theirs), llama.logits(ours), rtol=1e-5, atol=1e-5)

    def test_generates_the_same_tokens(self, llama):
        theirs = randomise(peft.inject_adapter_in_model(config_of(llama, real=True), llama.model()), 1.0).eval()
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        tokens = theirs.generate(**llama.inputs, **settings)
        state = peft.get_peft_model_state_dict(theirs)
        with as_peft():
            ours = llama.model()
            ours.load_adapter(peft_config=config_of(llama), adapter_state_dict=state)
            assert torch.equal(ours.generate(**llama.inputs, **settings), tokens)
            ours.disable_adapters()
            assert not torch.equal(ours.generate(**llama.inputs, **settings), tokens)

    def test_is_too_old_for_this_transformers_and_the_alias_is_not(self, llama):
        with pytest.raises(ValueError, match="version of PEFT"):
            llama.model().add_adapter(config_of(llama, real=True))
        assert not is_peft_greater_or_equal("0.22.0")
        with as_peft():
            assert is_peft_greater_or_equal("0.22.0")
            with pytest.raises(TypeError, match="PeftConfig"):
                llama.model().add_adapter(config_of(llama, real=True))
        assert not is_peft_greater_or_equal("0.22.0")
        assert importlib.metadata.version("peft") == peft.__version__


def test_adapters_stay_when_the_alias_ends(llama):
    with as_peft():
        model = adapted(llama)
        before = llama.logits(model)
    assert torch.equal(llama.logits(model), before)
    assert any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert get_peft_model_state_dict(model)
    merge_and_unload(model)
    torch.testing.assert_close(llama.logits(model), before)


WITHOUT_PEFT = """
import importlib.metadata, sys
from importlib.machinery import PathFinder

class WithoutPeft(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "peft" else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context=importlib.metadata.DistributionFinder.Context()):
        return (one for one in super().find_distributions(context) if one.metadata["Name"] != "peft")

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutPeft

import torch, transformers, transformers.trainer_utils
from transformers.utils.import_utils import is_peft_available
from torchgraft.adapters import LoraConfig, as_peft

assert not is_peft_available()
assert "peft" not in sys.modules
config = transformers.LlamaConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=11
)
model = transformers.LlamaForCausalLM(config)
with as_peft():
    assert is_peft_available()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.active_adapters() == ["default"]
    assert not transformers.trainer_utils._is_peft_model(model)
assert not is_peft_available()
assert "peft" not in sys.modules
try:
    import peft
except ModuleNotFoundError:
    print("fine")
"""


def test_works_where_peft_is_not_installed_and_transformers_has_noticed():
    run = subprocess.run([sys.executable, "-c", WITHOUT_PEFT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["fine"]


def test_transformers_sees_the_real_one_again():
    with as_peft():
        assert is_peft_available()
    assert is_peft_available()
    assert sys.modules["peft"] is peft
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
    assert transformers.trainer_utils._is_peft_model(model)
