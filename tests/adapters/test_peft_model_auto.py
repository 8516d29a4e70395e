"""`AutoPeftModel` and its kin beside PEFT's: the base that a config names, its tokenizer's size, what is refused."""

import json
import sys
import warnings

import peft
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import torchgraft.adapters as ours

BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 20}
BASES = {
    "CAUSAL_LM": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), "AutoPeftModelForCausalLM"),
    "SEQ_2_SEQ_LM": (lambda: T5ForConditionalGeneration(T5Config(**T5)), "AutoPeftModelForSeq2SeqLM"),
    "SEQ_CLS": (lambda: BertForSequenceClassification(BertConfig(**BERT)), "AutoPeftModelForSequenceClassification"),
    "TOKEN_CLS": (lambda: BertForTokenClassification(BertConfig(**BERT)), "AutoPeftModelForTokenClassification"),
    "QUESTION_ANS": (lambda: BertForQuestionAnswering(BertConfig(**BERT)), "AutoPeftModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": (lambda: BertModel(BertConfig(**BERT)), "AutoPeftModelForFeatureExtraction"),
    None: (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), "AutoPeftModel"),
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore:fan_in_fan_out is set to False"
)


def saved(folder, task="CAUSAL_LM"):
    """A base model and an adapter for it, as files; the adapted model."""
    torch.manual_seed(0)
    make, _ = BASES[task]
    make().save_pretrained(folder / "base")
    base = make().from_pretrained(folder / "base")
    config = ours.LoraConfig(r=2, init_lora_weights=False, task_type=task)
    model = ours.get_peft_model(base, config).eval()
    model.save_pretrained(folder / "adapter")
    return model


def result(model):
    ids = torch.arange(6).view(2, 3)
    with torch.no_grad():
        inputs = {"decoder_input_ids": ids} if "T5" in type(model.get_base_model()).__name__ else {}
        return model(ids, **inputs)[0]


@pytest.mark.parametrize("task", BASES)
def test_the_base_and_the_adapter_come_back_as_with_peft(task, tmp_path):
    model = saved(tmp_path, task)
    name = BASES[task][1]
    for library in (ours, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = getattr(library, name).from_pretrained(str(tmp_path / "adapter"))
        assert type(again).__name__ == type(model).__name__ and not again.training
        assert type(again.get_base_model()).__name__ == type(model.get_base_model()).__name__
        torch.testing.assert_close(result(again), result(model))
        assert not [name for name, one in again.named_parameters() if one.requires_grad and "original" not in name]
    again = getattr(ours, name).from_pretrained(tmp_path / "adapter", "mine", is_trainable=True, dtype=torch.float64)
    assert again.active_adapters == ["mine"] and again.base_model_torch_dtype == torch.float64
    assert [name for name, one in again.named_parameters() if one.requires_grad]
    with pytest.raises(KeyError, match="lacks"):
        getattr(ours, name).from_pretrained(tmp_path / "adapter", key_mapping={"lora_A": "lora_Z"})


@pytest.mark.parametrize("tokens", [20, 24])
def test_a_larger_tokenizer_resizes_the_base(tokens, tmp_path):
    saved(tmp_path)
    made = Tokenizer(WordLevel({f"w{i}": i for i in range(tokens)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0").save_pretrained(tmp_path / "adapter")
    for library in (ours, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = library.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
        assert again.get_input_embeddings().weight.shape == (tokens, 8)


def test_a_base_in_the_hubs_cache_and_one_that_is_not_there(tmp_path, monkeypatch):
    saved(tmp_path)
    edited(tmp_path, base_model_name_or_path="who/base")
    with pytest.raises(FileNotFoundError, match="who/base: no such directory, and revision 'main' is not in the Hub's"):
        ours.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", cache_dir=tmp_path / "hub")
    cached = tmp_path / "hub" / "models--who--base"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots").mkdir()
    (tmp_path / "base").rename(cached / "snapshots" / "abc")
    model = ours.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", cache_dir=tmp_path / "hub")
    assert model.get_base_model().name_or_path == "who/base"
    assert model.peft_config["default"].base_model_name_or_path == "who/base"


def edited(folder, **fields):
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


WRONG = {
    "another task": ({}, "AutoPeftModelForSeq2SeqLM", "task_type is 'CAUSAL_LM'; use AutoPeftModelForCausalLM"),
    "a task": ({}, "AutoPeftModel", "AutoPeftModel: the config's task_type is 'CAUSAL_LM'; use AutoPeftModelForCausal"),
    "no base": ({"base_model_name_or_path": None}, "AutoPeftModelForCausalLM", "has no base_model_name_or_path; load"),
    "no class": (
        {"task_type": None},
        "AutoPeftModelForCausalLM",
        "the config has no task_type, and auto_mapping is None, so the class of the base model is not known; load the",
    ),
    "a library": (
        {"task_type": None, "auto_mapping": {"parent_library": "os.path", "base_model_class": "join"}},
        "AutoPeftModel",
        r"asks to import 'os.path', which is none of \['diffusers', .*pass import_allowlist=\['os.path'\]",
    ),
    "no model": (
        {"task_type": None, "auto_mapping": {"parent_library": "transformers", "base_model_class": "AutoConfig"}},
        "AutoPeftModel",
        "auto_mapping names transformers.AutoConfig, expected a model with from_pretrained",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case, tmp_path):
    fields, name, message = WRONG[case]
    saved(tmp_path)
    edited(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        getattr(ours, name).from_pretrained(tmp_path / "adapter")


def test_a_library_that_is_named_may_be_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "of_mine.py").write_text("from transformers import GPT2LMHeadModel as Mine\n")
    saved(tmp_path)
    edited(tmp_path, task_type=None, auto_mapping={"parent_library": "of_mine", "base_model_class": "Mine"})
    with pytest.raises(ValueError, match=r"pass import_allowlist=\['of_mine'\]"):
        ours.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert "of_mine" not in sys.modules
    model = ours.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["of_mine"])
    assert isinstance(model.get_base_model(), GPT2LMHeadModel)


def test_without_transformers_it_says_what_to_do(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="loads the base model with transformers, which is not installed; install it"):
        ours.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match=r"AutoPeftModel is made by AutoPeftModel.from_pretrained\(path\)"):
        ours.AutoPeftModel()
