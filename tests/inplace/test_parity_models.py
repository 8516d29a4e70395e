"""Models of transformers with injected adapters, against PEFT."""

import copy

import peft
import pytest
import torch
import transformers

from torchgraft import adapters

from .models import quiet, randomise, trained

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 32}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, intermediate_size=24, num_key_value_heads=1, eos_token_id=None)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=32, bos_token_id=0, eos_token_id=None)
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, intermediate_size=24)),
    "t5": lambda: transformers.T5Model(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32)
    ),
}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "output.dense", "word_embeddings"],
    "t5": ["q", "v", "wo"],
}
ids = torch.arange(12).view(2, 6)


def run(model):
    extra = {"decoder_input_ids": ids} if model.config.model_type == "t5" else {}
    return model(input_ids=ids, **extra)[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "adalora"])
def test_models_of_transformers(name, method):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    where = [target for target in TARGETS[name] if method in ("lora", "dora") or "embeddings" not in target]
    fields = {"target_modules": where, "fan_in_fan_out": name == "gpt2"}
    classes = {"lora": "LoraConfig", "dora": "LoraConfig", "ia3": "IA3Config", "adalora": "AdaLoraConfig"}
    fields |= {
        "dora": {"use_dora": True},
        "ia3": {"feedforward_modules": where[-1:]},
        "adalora": {"total_step": 9},
    }.get(method, {})
    pair = []
    for lib in (adapters, peft):
        torch.manual_seed(1)
        config = getattr(lib, classes[method])(**copy.deepcopy(fields))
        pair.append(lib.inject_adapter_in_model(config, copy.deepcopy(model)).eval())
    mine, theirs = pair
    assert trained(mine) == trained(theirs)
    own, other = (dict(m.named_parameters()) for m in pair)
    assert all(torch.equal(own[key], other[key]) for key in own)
    torch.testing.assert_close(run(mine), run(model.requires_grad_(False)))
    randomise(mine)
    with quiet("Some weights"):
        peft.set_peft_model_state_dict(theirs, adapters.get_peft_model_state_dict(mine))
    assert torch.allclose(run(mine), run(theirs), rtol=0, atol=1e-10)
    adapted = run(mine)
    if name in ("llama", "gpt2"):
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(mine.generate(ids, **options), theirs.generate(ids, **options))
    adapters.merge_and_unload(mine)
    assert torch.allclose(run(mine), adapted, rtol=0, atol=1e-9) and repr(mine) == repr(model)
