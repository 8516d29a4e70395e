"""Real PEFT beside torchgraft under its name: files, weights and tokens go both ways."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers.utils.import_utils import is_peft_available, is_peft_greater_or_equal

from torchgraft.adapters import as_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:AdaLoraConfig. unknown fields:UserWarning"),  # those it inherits and never uses
]
METHODS = ["lora", "ia3", "adalora", "oft"]


class TestRealPeft:
    """Files, weights and tokens go both ways; real PEFT runs outside of the alias."""

    @pytest.mark.parametrize("method", METHODS)
    def test_its_directory_loads(self, family, method, tmp_path):
        theirs = family.randomise(peft.get_peft_model(family.model(), family.config_of(method, real=True))).eval()
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
            ours = family.adapted(method, base_model_name_or_path="somewhere")
            ours.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(family.model(), tmp_path)
        assert type(theirs).__module__.startswith("peft.")
        torch.testing.assert_close(family.logits(theirs), family.logits(ours), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("side", ["ours first", "theirs first"])
    def test_modules_to_save(self, llama, side, tmp_path):
        more = {"modules_to_save": ["lm_head"]}
        if side == "ours first":
            with as_peft():
                ours = llama.adapted(**more)
                ours.save_pretrained(tmp_path)
            theirs = peft.PeftModel.from_pretrained(llama.model(), tmp_path)
        else:
            theirs = llama.randomise(peft.get_peft_model(llama.model(), llama.config_of(real=True, **more))).eval()
            theirs.save_pretrained(tmp_path)
            with as_peft():
                ours = llama.model()
                ours.load_adapter(tmp_path)
        torch.testing.assert_close(llama.logits(theirs), llama.logits(ours), rtol=1e-5, atol=1e-5)

    def test_generates_the_same_tokens(self, llama):
        theirs = llama.randomise(peft.inject_adapter_in_model(llama.config_of(real=True), llama.model()), 1.0).eval()
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        tokens = theirs.generate(**llama.inputs, **settings)
        state = peft.get_peft_model_state_dict(theirs)
        with as_peft():
            ours = llama.model()
            ours.load_adapter(peft_config=llama.config_of(), adapter_state_dict=state)
            assert torch.equal(ours.generate(**llama.inputs, **settings), tokens)
            ours.disable_adapters()
            assert not torch.equal(ours.generate(**llama.inputs, **settings), tokens)

    def test_is_too_old_for_this_transformers_and_the_alias_is_not(self, llama):
        with pytest.raises(ValueError, match="version of PEFT"):
            llama.model().add_adapter(llama.config_of(real=True))
        assert not is_peft_greater_or_equal("0.22.0")
        with as_peft():
            assert is_peft_greater_or_equal("0.22.0")
            with pytest.raises(TypeError, match="PeftConfig"):
                llama.model().add_adapter(llama.config_of(real=True))
        assert not is_peft_greater_or_equal("0.22.0")
        assert importlib.metadata.version("peft") == peft.__version__


def test_the_projections_of_vera_come_from_its_seed(llama, tmp_path):
    """transformers' loader has no place for tensors that all layers share; those of the seed are the same."""
    fields = {"r": 4, "target_modules": llama.targets}
    theirs = llama.randomise(peft.get_peft_model(llama.model(), peft.VeraConfig(**fields))).eval()
    theirs.save_pretrained(tmp_path)
    with as_peft():
        ours = llama.model()
        info = ours.load_adapter(tmp_path)
    assert info.unexpected_keys == {"base_model.vera_A", "base_model.vera_B"}
    torch.testing.assert_close(llama.logits(ours), llama.logits(theirs), rtol=1e-5, atol=1e-5)


WITHOUT_PEFT = """
import sys
from without_peft import hide_peft

hide_peft()

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
    programs = Path(__file__).parent / "programs"
    run = subprocess.run([sys.executable, "-c", WITHOUT_PEFT], cwd=programs, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["fine"]


def test_transformers_sees_the_real_one_again():
    with as_peft():
        assert is_peft_available()
    assert is_peft_available()
    assert sys.modules["peft"] is peft
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
    assert transformers.trainer_utils._is_peft_model(model)
