"""Embeddings of the base in an adapter's files, as PEFT saves and loads them: those of a resized vocabulary."""

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import torchgraft.adapters as ours

IDS = torch.tensor([[1, 2, 22]])
TARGETS = {
    "no embedding": {"target_modules": ["q_proj"]},
    "input": {"target_modules": ["q_proj", "embed_tokens"]},
    "output": {"target_modules": ["q_proj", "lm_head"]},
    "an expression": {"target_modules": r".*(q_proj|embed_tokens)"},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 22]},
    "a copy": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}
SPARE = "modules_to_save.weight"
"""What PEFT writes twice."""

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:adapter 'default' is on what is tied:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return [made(folder / str(tied), tied) for tied in (False, True)]


@pytest.fixture
def base(bases):
    return bases[0]


def made(folder, tied):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 20}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


def resized(base, size=24):
    model = LlamaForCausalLM.from_pretrained(base)
    if size != 20:
        model.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.weight[20:].normal_()
    return model.eval()


def wrapped(library, base, name, size=24):
    torch.manual_seed(1)
    model = resized(base, size)
    config = library.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **TARGETS[name])
    return library.get_peft_model(model, config)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", TARGETS)
def test_a_resized_vocabulary_is_in_the_files_and_comes_back_both_ways(bases, tied, name, tmp_path):
    base = bases[tied]
    expected, files = {}, {}
    for library in (ours, peft):
        model = wrapped(library, base, name)
        expected[library] = logits(model)
        with pytest.warns(UserWarning, match="resized|as embedding layers found"):
            model.save_pretrained(tmp_path / library.__name__)
        files[library] = load_file(tmp_path / library.__name__ / "adapter_model.safetensors")
    torch.testing.assert_close(expected[ours], expected[peft])
    mine, theirs = files[ours], files[peft]
    lost = {key for key in mine if key.endswith(("embed_tokens.weight", "lm_head.weight"))} - theirs.keys()
    assert lost == ({"base_model.model.lm_head.weight"} if name in ("input", "an expression") else lost)
    twice = {key for key in theirs if key.endswith((SPARE, "lm_head.token_adapter.trainable_tokens_delta"))}
    assert mine.keys() - lost == theirs.keys() - twice
    assert all(torch.equal(mine[key], theirs[key]) for key in mine.keys() & theirs.keys())
    for writer, reader in ((ours, ours), (ours, peft), (peft, ours)):
        if writer is peft and lost:
            continue  # PEFT leaves out the rows of the output that were added
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* of the base is replaced by the one that came with the adapter")
            again = reader.PeftModel.from_pretrained(resized(base), tmp_path / writer.__name__)
        torch.testing.assert_close(logits(again), expected[writer])


def test_what_is_not_resized_is_not_written_unless_asked(base, tmp_path):
    model = wrapped(ours, base, "no embedding", size=20)
    model.save_pretrained(tmp_path)
    assert all("lora" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    theirs = peft.get_peft_model_state_dict(wrapped(peft, base, "no embedding", size=20), save_embedding_layers=True)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == theirs.keys()
    assert ours.get_peft_model_state_dict(model, save_embedding_layers=True).keys() == theirs.keys()
    other = wrapped(ours, base, "input", size=20)
    assert not any("base_layer" in key for key in ours.get_peft_model_state_dict(other, save_embedding_layers=False))
    with pytest.warns(UserWarning, match="an embedding is one of target_modules, so the base's is written"):
        assert any("base_layer" in key for key in ours.get_peft_model_state_dict(other))


def test_a_state_dict_that_is_given_has_them_too(base):
    model = wrapped(ours, base, "input")
    given = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    found = ours.get_peft_model_state_dict(model, given, save_embedding_layers=True)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert torch.equal(found[key], given[key]) and "base_model.model.lm_head.weight" in found


def test_a_merged_embedding_is_written_as_it_was(base):
    model = wrapped(ours, base, "input")
    before = ours.get_peft_model_state_dict(model, save_embedding_layers=True)
    model.merge_adapter()
    after = ours.get_peft_model_state_dict(model, save_embedding_layers=True)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_keys_that_are_mapped_bring_them_too(base, tmp_path):
    model = wrapped(ours, base, "no embedding")
    with pytest.warns(UserWarning, match="resized"):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="of the base was replaced by the one that came with the adapter"):
        again = ours.PeftModel.from_pretrained(resized(base), tmp_path, key_mapping={r"^nothing\.": ""})
    torch.testing.assert_close(logits(again), logits(model))


def test_other_sizes_are_refused_with_both(base, tmp_path):
    with pytest.warns(UserWarning, match="resized"):
        wrapped(ours, base, "no embedding").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weight' has shape \(24, 8\), expected \(20, 8\)"):
        ours.PeftModel.from_pretrained(resized(base, 20), tmp_path)


def test_what_is_said_where_nothing_is_known(base, tmp_path):
    model = wrapped(ours, base, "no embedding")
    model.peft_config["default"].base_model_name_or_path = "who/what"
    with pytest.warns(
        UserWarning, match="who/what, the base model, is not on this machine.*save_embedding_layers=True"
    ):
        model.save_pretrained(tmp_path)
    plain = ours.get_peft_model(nn.Sequential(nn.Linear(2, 2)), ours.LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="the model has no get_input_embeddings, so no embeddings"):
        ours.get_peft_model_state_dict(plain, save_embedding_layers=True)
    with pytest.raises(ValueError, match="save_embedding_layers is 'yes', expected True, False or 'auto'"):
        ours.get_peft_model_state_dict(plain, save_embedding_layers="yes")
    graft = ours.extract_graft(plain)
    with pytest.raises(TypeError, match="save_embedding_layers and state_dict go with a model"):
        ours.save_adapter(graft, tmp_path, params=ours.extract_params(plain), save_embedding_layers=True)
