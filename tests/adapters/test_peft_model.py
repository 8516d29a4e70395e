"""`PeftModel` beside PEFT's own: names, keys, numbers, files both ways, and which adapter is active and trained."""

import copy
import io
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import torchgraft.adapters as ours
from torchgraft.functional import UnsupportedCall

BOTH = pytest.mark.parametrize("library", [ours, peft], ids=["ours", "peft"])


def causal():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16)).eval()


def classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=20, max_position_embeddings=16)).eval()


TASKS = {
    "CAUSAL_LM": (causal, {"target_modules": ["c_attn"]}),
    "SEQ_CLS": (classifier, {"target_modules": ["query"]}),
}
IDS = torch.arange(12).view(2, 6)


def wrapped(library, task="CAUSAL_LM", adapter_name="default", **fields):
    make, targets = TASKS[task]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about fan_in_fan_out
        config = library.LoraConfig(r=2, init_lora_weights=False, task_type=task, **targets, **fields)
        model = make()
        torch.manual_seed(1)
        return library.get_peft_model(model, config, adapter_name)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("task", TASKS)
def test_names_keys_numbers_and_what_is_trained_are_pefts(task):
    one, two = (wrapped(library, task) for library in (ours, peft))
    assert type(one).__name__ == type(two).__name__ and type(one.base_model).__name__ == "LoraModel"
    assert one.state_dict().keys() == two.state_dict().keys() and trained(one) == trained(two)
    torch.testing.assert_close(logits(one), logits(two))
    assert one.get_nb_trainable_parameters() == two.get_nb_trainable_parameters()
    assert one.modules_to_save == two.modules_to_save
    mine, theirs = (library.get_peft_model_state_dict(m) for library, m in ((ours, one), (peft, two)))
    assert mine.keys() == theirs.keys()


def test_it_prints_what_peft_prints(capsys):
    wrapped(ours).print_trainable_parameters()
    mine = capsys.readouterr().out
    wrapped(peft).print_trainable_parameters()
    assert mine == capsys.readouterr().out


@BOTH
def test_a_second_adapter_rests_until_it_is_set(library):
    model = wrapped(library)
    first = trained(model)
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", library.LoraConfig(r=3, init_lora_weights=False, target_modules=["c_attn", "c_fc"]))
    assert model.active_adapters == ["default"] and trained(model) == first
    assert torch.equal(logits(model), before)
    model.set_adapter("second")
    assert model.active_adapter == "second" and len(trained(model)) == 8
    assert not torch.equal(logits(model), before)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(causal()))
    with pytest.warns(UserWarning, match="second"):
        model.delete_adapter("second")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("writer", "reader"), [(ours, peft), (peft, ours), (ours, ours)], ids=["out", "in", "own"])
def test_directories_go_both_ways(task, writer, reader, tmp_path):
    model = wrapped(writer, task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", writer.LoraConfig(r=1, init_lora_weights=False, **TASKS[task][1]))
        model.save_pretrained(tmp_path)
        again = reader.PeftModel.from_pretrained(TASKS[task][0](), tmp_path)
        result = again.load_adapter(tmp_path / "second", "second")
    assert type(again).__name__ == type(model).__name__ and trained(again) == []
    assert not result.unexpected_keys and again.active_adapters == ["default"]
    for name in ("default", "second"):
        model.set_adapter(name), again.set_adapter(name)
        torch.testing.assert_close(logits(again), logits(model))
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


def test_loading_into_an_adapter_that_is_there(tmp_path):
    model, other = wrapped(ours), wrapped(ours)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    other.save_pretrained(tmp_path)
    assert model.load_adapter(tmp_path, "default") == ([], [])
    assert torch.equal(logits(model), logits(other)) and trained(model) == trained(other)


def test_keys_that_are_mapped_and_a_config_of_ones_own(tmp_path):
    model = wrapped(ours)
    model.save_pretrained(tmp_path)
    tensors = ours.load_peft_weights(tmp_path, key_mapping={r"\.h\.": ".layers."})
    assert all(".layers." in key and ".h." not in key for key in tensors)
    with pytest.raises(KeyError, match=r"for adapter 'default' it lacks .*; is it of this model"):
        ours.PeftModel.from_pretrained(causal(), tmp_path, key_mapping={r"\.h\.": ".layers."})
    config = ours.LoraConfig(r=2, target_modules=["c_attn"], lora_alpha=16)
    again = ours.PeftModel.from_pretrained(causal(), tmp_path, config=config)
    assert again.peft_config["default"].lora_alpha == 16 and not torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("mapping", [{"lora_A": "lora_Z"}, {"(": "x"}], ids=["keys", "pattern"])
def test_a_load_that_fails_leaves_the_model_as_it_was(tmp_path, mapping):
    wrapped(ours).save_pretrained(tmp_path)
    model, whole = causal(), wrapped(ours)
    for target, load in (
        (model, lambda: ours.PeftModel.from_pretrained(model, tmp_path, key_mapping=mapping)),
        (whole, lambda: whole.load_adapter(tmp_path, "second", key_mapping=mapping)),
        (whole, lambda: whole.load_adapter(tmp_path, "default", key_mapping=mapping)),
    ):
        before, trained_before = copy.deepcopy(target.state_dict()), trained(target)
        with pytest.raises((KeyError, ValueError), match="it lacks|no regular expression: missing"):
            load()
        after = target.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
        assert trained(target) == trained_before
    assert list(whole.peft_config) == ["default"] and not hasattr(model, "peft_config")


def test_functions_of_a_model_look_through_the_wrapper(tmp_path):
    model = wrapped(ours, "SEQ_CLS")
    ours.save_adapter(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    assert files[0].keys() == files[1].keys()
    params, graft = ours.extract_params(model), ours.extract_graft(model)
    assert next(iter(params)).startswith("bert.") and torch.equal(graft(params, IDS).logits, logits(model))
    assert ours.summary(model).rows == ours.summary(model.get_base_model()).rows
    again = ours.get_peft_model_state_dict(model, model.state_dict())
    assert all(torch.equal(tensor, again[key]) for key, tensor in ours.get_peft_model_state_dict(model).items())
    assert ours.set_peft_model_state_dict(model, again) == ([], [])
    with pytest.raises(TypeError, match="already; call its load_adapter"):
        ours.PeftModel.from_pretrained(model, tmp_path / "a")


def test_a_pickled_wrapper_comes_back():
    model, file = wrapped(ours), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again.base_model) is type(model.base_model) and torch.equal(logits(again), logits(model))


def test_merging_and_unloading_return_the_users_model():
    model, base = wrapped(ours), causal()
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    unloaded, original = model.unload().state_dict(), base.state_dict()
    assert unloaded.keys() == original.keys() and all(torch.equal(unloaded[key], original[key]) for key in original)
    model = wrapped(ours)
    merged = model.merge_and_unload()
    assert type(merged) is GPT2LMHeadModel
    torch.testing.assert_close(logits(merged), expected)


def test_attributes_and_generate_are_the_models():
    model = wrapped(ours)
    assert model.config is model.get_base_model().config and model.base_model.model is model.get_base_model()
    assert torch.equal(model.generate(IDS, max_new_tokens=2), model.get_base_model().generate(IDS, max_new_tokens=2))
    with pytest.raises(AttributeError, match="nothing_such"):
        model.nothing_such  # noqa: B018


def test_status_is_pefts_where_both_say_it():
    one, two = wrapped(ours), wrapped(peft)
    mine, theirs = one.get_model_status(), two.get_model_status()
    for name in ("base_model_type", "adapter_model_type", "trainable_params", "total_params", "num_adapter_layers"):
        assert getattr(mine, name) == getattr(theirs, name)
    for name in ("enabled", "active_adapters", "merged_adapters", "requires_grad", "available_adapters", "devices"):
        assert getattr(mine, name) == getattr(theirs, name)
    for a, b in zip(one.get_layer_status(), two.get_layer_status(), strict=True):
        assert b.name.endswith(a.name) and a.requires_grad == b.requires_grad and a.devices == b.devices
    one.get_base_model().transformer.h[0].attn.c_attn.set_adapter([])
    assert one.get_model_status().active_adapters == "irregular"
    with pytest.raises(ValueError, match="the model has no layers with adapters; inject one first"):
        ours.get_layer_status(causal())


def test_half_precision_is_widened_unless_told():
    for cast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        config = ours.LoraConfig(r=2, target_modules=["0"])
        model = ours.get_peft_model(nn.Sequential(nn.Linear(4, 4).bfloat16()), config, autocast_adapter_dtype=cast)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}


def test_names_on_the_hub_are_found_in_the_local_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model = wrapped(ours)
    model.save_pretrained(tmp_path / "models--who--what" / "snapshots" / "abc")
    (tmp_path / "models--who--what" / "refs").mkdir()
    (tmp_path / "models--who--what" / "refs" / "main").write_text("abc")
    again = ours.PeftModel.from_pretrained(causal(), "who/what")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(FileNotFoundError, match="revision 'main' is not in the Hub's cache .*: hf download who/else"):
        ours.PeftModel.from_pretrained(causal(), "who/else")
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory, and no name of a repository"):
        ours.PeftModel.from_pretrained(causal(), "nowhere")
    with pytest.raises(ValueError, match=r"subfolder is '../x', expected a name within who/what"):
        ours.PeftModel.from_pretrained(causal(), "who/what", subfolder="../x")


def test_what_is_refused(tmp_path):
    with pytest.raises(TypeError, match="peft_config is"):
        ours.get_peft_model(causal(), {"r": 4})
    model = wrapped(ours)
    with pytest.raises(TypeError, match=r"is a PeftModelForCausalLM already; call its add_adapter"):
        ours.get_peft_model(model, ours.LoraConfig())
    with pytest.raises(UnsupportedCall, match="safe_serialization is False; files are safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UnsupportedCall, match="save_embedding_layers is True"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"selected_adapters has 'x'; the model has \['default'\]"):
        model.save_pretrained(tmp_path, selected_adapters=["x"])
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        model.add_adapter("default", ours.LoraConfig(target_modules=["c_attn"]))
    assert not list(tmp_path.iterdir())


def test_the_config_passed_in_is_not_changed():
    config = ours.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    before = json.dumps(config.to_dict())
    model = ours.get_peft_model(classifier(), config)
    assert json.dumps(config.to_dict()) == before and model.peft_config["default"].modules_to_save == [
        "classifier",
        "score",
    ]


def test_a_copy_is_a_model_of_its_own():
    model = wrapped(ours)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    other.set_adapter([])
    assert model.active_adapters == ["default"] and other.active_adapters == []
