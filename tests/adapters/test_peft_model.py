"""`PeftModel` beside PEFT's own: names, keys, numbers, files both ways, and which adapter is active and trained."""

import copy
import io
import json
import shlex
import subprocess
import sys
import warnings

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
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
    assert all(
        ".layers." in key for key in ours.load_peft_weights(tmp_path, key_mapping={r"^transformer\.h": "layers."})
    )
    with pytest.raises(KeyError, match=r"for adapter 'default' it lacks .*; is it of this model\? strict=False loads"):
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
    with pytest.raises(UnsupportedCall, match="adapter_names are given .*; give each row its adapter by graft"):
        model(IDS, adapter_names=["default", "__base__"])
    with pytest.raises(UnsupportedCall, match="safe_serialization is False; files are safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UnsupportedCall, match="push_to_hub is true; nothing is uploaded here: hf upload NAME folder"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(UnsupportedCall, match=r"push_to_hub: nothing is uploaded here; write the adapter by save_pre"):
        model.push_to_hub("who/what")
    with pytest.raises(TypeError, match=r"save_pretrained has no argument 'tokn'; did you mean 'token'\?"):
        model.save_pretrained(tmp_path, tokn="x")
    with pytest.raises(TypeError, match=r"PeftModel.from_pretrained has no argument 'device'"):
        ours.PeftModel.from_pretrained(causal(), tmp_path, device="cpu")
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


def test_what_is_missing_is_a_result_where_it_is_allowed(tmp_path):
    model = wrapped(ours)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = min(tensors)
    save_file({"other": tensors.pop(lost), **tensors}, file)
    with pytest.raises(KeyError, match="c_attn"):
        ours.PeftModel.from_pretrained(causal(), tmp_path)
    with pytest.warns(UserWarning, match=r"for adapter 'default' it (lacks|has what fits nothing,) \["):
        again = ours.PeftModel.from_pretrained(causal(), tmp_path, strict=False)
    for name in ("default", "new"):
        with pytest.warns(UserWarning, match="for adapter .* it (lacks|has what fits nothing,)"):
            result = again.load_adapter(tmp_path, name, strict=False)
        assert result == ([lost.removeprefix("base_model.model.")], ["other"])
    mine, theirs = (ours.get_peft_model_state_dict(one) for one in (again, model))
    assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == [lost]


def test_tensors_of_other_shapes_are_left_out_where_it_is_allowed(tmp_path):
    wrapped(ours).save_pretrained(tmp_path)
    config = ours.LoraConfig(r=3, target_modules=["c_attn"], init_lora_weights=False)
    model = ours.get_peft_model(causal(), config)
    before = logits(model)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes=True"):
        model.load_adapter(tmp_path, "default")
    with pytest.warns(UserWarning, match="tensors of another shape were left out"):
        model.load_adapter(tmp_path, "default", ignore_mismatched_sizes=True)
    assert torch.equal(logits(model), before)


def test_a_state_dict_that_is_given_is_what_is_written(tmp_path):
    model = wrapped(ours)
    averaged = {key: tensor * 0.5 for key, tensor in model.state_dict().items()}
    for library, one in ((ours, model), (peft, wrapped(peft))):
        one.save_pretrained(tmp_path / library.__name__, state_dict=averaged)
    mine, theirs = (load_file(tmp_path / one.__name__ / "adapter_model.safetensors") for one in (ours, peft))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_loading_for_use_ends_training(tmp_path):
    wrapped(ours).save_pretrained(tmp_path)
    for library in (ours, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for trainable in (False, True):
                model = library.PeftModel.from_pretrained(causal().train(), tmp_path, is_trainable=trainable)
                assert model.training == model.get_base_model().transformer.drop.training == trainable
            model.load_adapter(tmp_path, "second")
        assert not model.get_base_model().transformer.drop.training


@pytest.mark.parametrize("task", [*TASKS, None])
def test_the_card_has_the_fields_of_pefts(task, tmp_path):
    cards = []
    for library in (ours, peft):
        make, targets = TASKS[task or "CAUSAL_LM"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = make()
            base.config._name_or_path = base.name_or_path = "who/base"
            model = library.get_peft_model(base, library.LoraConfig(r=2, task_type=task, **targets))
        (tmp_path / "peft").mkdir(exist_ok=True)
        model.create_or_update_model_card(tmp_path / library.__name__)
        file = tmp_path / library.__name__ / "README.md"
        cards.append(yaml.safe_load(file.read_text().split("---")[1]))
    assert cards[0] == cards[1]


def test_the_base_is_named_in_the_config_and_another_is_a_warning():
    for library in (ours, peft):
        model = nn.Sequential(nn.Linear(2, 2))
        model.name_or_path = "who/base"
        config = library.LoraConfig(target_modules=["0"], base_model_name_or_path="other", revision="1")
        with pytest.warns(UserWarning, match="config") as found:
            made = library.get_peft_model(model, config, revision="2")
        assert len(found) == 2
        given = made.peft_config["default"]
        assert (given.base_model_name_or_path, given.revision) == ("who/base", "2")


def test_what_is_warned_of_as_in_peft():
    def twice(library):
        model = nn.Sequential(nn.Linear(2, 2))
        for name in ("a", "b"):
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            model = library.inject_adapter_in_model(library.LoraConfig(target_modules=["0"]), model, name)
        library.get_peft_model(model, library.LoraConfig(target_modules=["0"]), "c")

    def merged(library):
        model = wrapped(library)
        model.merge_adapter(), model.merge_adapter()

    def tied(library):
        library.get_peft_model(causal(), library.LoraConfig(target_modules=["lm_head"]))

    def other_modules(library):
        model = causal()
        state = {f"transformer.h.0.mlp.c_fc.lora_{one}.weight": torch.zeros(2, 8) for one in "AB"}
        state["transformer.h.0.mlp.c_fc.lora_B.weight"] = torch.zeros(32, 2)
        library.inject_adapter_in_model(library.LoraConfig(r=2, fan_in_fan_out=True), model, state_dict=state)

    said = {
        twice: r"the model has adapters already, \['a', 'b'\], and 'c' is added",
        merged: r"adapters \['default'\] are merged already, so nothing is left to do",
        tied: r"adapter 'default' is on what is tied: lm_head \(with transformer.wte\).*ensure_weight_tying=True",
        other_modules: "LoraConfig and state_dict name different modules; state_dict counts",
    }
    for program, words in said.items():
        for library, match in ((ours, words), (peft, "second time|already merged|tied|inconsistency")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                with pytest.warns((UserWarning, RuntimeWarning), match=match):
                    program(library)


def test_pickles_are_refused_with_the_line_that_converts_them(tmp_path):
    model = wrapped(peft)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(FileNotFoundError, match="adapter_model.bin, a pickle, which is never read here") as refused:
        ours.PeftModel.from_pretrained(causal(), tmp_path)
    line = str(refused.value).splitlines()[-1]
    assert line.startswith("python -c ")
    subprocess.run(shlex.split(line.replace("python", sys.executable, 1)), check=True)
    torch.testing.assert_close(logits(ours.PeftModel.from_pretrained(causal(), tmp_path)), logits(model))


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    wrapped(ours).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["lora", "lora_A", "weight", "base_layer"])
def test_an_adapter_may_have_any_name(name, tmp_path):
    model = wrapped(ours, adapter_name=name)
    model.save_pretrained(tmp_path)
    again = ours.PeftModel.from_pretrained(causal(), tmp_path / name, name)
    assert torch.equal(logits(again), logits(model)) and again.active_adapters == [name]


def test_switching_while_merged_is_exact():
    model = wrapped(ours)
    model.add_adapter("second", ours.LoraConfig(target_modules=["c_attn"]))
    before = logits(model)
    model.merge_adapter()
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(causal()))
    model.set_adapter("default")
    assert torch.equal(logits(model), before)
    model.merge_adapter(["second"])
    model.merge_adapter(["default"])
    torch.testing.assert_close(logits(model), before)
