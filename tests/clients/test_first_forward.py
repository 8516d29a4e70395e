"""transformers installs what records hidden states in the first forward that is asked for them."""

import copy

import pytest
import torch
import transformers

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50,
}  # fmt: skip
VISION = {key: value for key, value in TEXT.items() if key != "vocab_size"} | {"image_size": 28, "patch_size": 14}
IDS = torch.arange(5, 19).view(2, 7)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 28 * 28).view(2, 3, 28, 28)


def llava():
    vision = transformers.CLIPVisionConfig(**VISION)
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, image_token_id=3)
    return transformers.LlavaForConditionalGeneration(config)


def t5():
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48, "vocab_size": 50}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def mixtral():
    config = transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **TEXT)
    return transformers.MixtralForCausalLM(config)


CASES = {
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)), {"input_ids": IDS}, ["q_proj"]),
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**TEXT)), {"input_ids": IDS}, ["query"]),
    "vit": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**VISION)), {"pixel_values": IMAGES}, r".*q_proj|.*query",
    ),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS}, ["q"]),
    "llava": (
        llava,
        {"input_ids": torch.cat([torch.full((2, 4), 3), IDS], 1), "pixel_values": IMAGES},
        ["q_proj"],
    ),
    "mixtral": (mixtral, {"input_ids": IDS, "output_router_logits": True}, ["q_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_recorded_outputs_of_a_model_that_has_not_run(name):
    make, inputs, targets = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation("eager")
    inputs = {**inputs, "output_hidden_states": True, "output_attentions": True}
    expected = copy.deepcopy(model)(**inputs)
    graft = bind(model, LoraConfig(r=2, target_modules=targets))
    params = graft.init()
    view = graft.view(params)
    given = [graft(params, **inputs), graft(params, **inputs), view(**inputs), view(**inputs)]
    for key in (key for key in expected if isinstance(expected[key], tuple)):
        for output in given:
            assert len(output[key]) == len(expected[key]), key
            torch.testing.assert_close(output[key], expected[key])
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("_output_capturing_hooks_installed" in vars(module) for module in model.modules())
