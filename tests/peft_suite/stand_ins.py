"""Small random models in a Hub cache, for the names that PEFT's tests look up: `stand_ins.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers as hf

INNER = "peft-internal-testing/tiny-random-"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 128}
WIDE = {**LLAMA, "head_dim": 8}
BERT = {**SIZES, "vocab_size": 1124, "num_hidden_layers": 3, "intermediate_size": 37, "max_position_embeddings": 128}
OPT = {"vocab_size": 50265, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 6, "num_attention_heads": 4}
OPT |= {"max_position_embeddings": 100, "word_embed_proj_dim": 16}
GPT2 = {"vocab_size": 1024, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
T5 = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 3, "num_heads": 4}
BART = {"vocab_size": 1024, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 100}
TOKENS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
EXPERTS = {"num_local_experts": 4}
OPTS = ("peft-internal-testing/opt-125m", "facebook/opt-125m", "facebook/opt-350m", f"{INNER}OPTForCausalLM")
OPTS += ("hf-internal-testing/tiny-random-OPTForCausalLM", f"{INNER}OPTForCausalLM-extended-vocab")
LLAMAS = tuple(
    f"{owner}/tiny-random-LlamaForCausalLM"
    for owner in ("trl-internal-testing", "peft-internal-testing", "hf-internal-testing", "HuggingFaceH4")
)
GPT2S = (f"{INNER}gpt2", f"{INNER}GPT2LMHeadModel", "hf-internal-testing/tiny-random-gpt2", "gpt2")
T5S = (f"{INNER}t5", f"{INNER}T5ForConditionalGeneration", "google/flan-t5-small", "google/flan-t5-base")

MODELS: tuple[tuple[tuple[str, ...], str, str, dict[str, Any]], ...] = (
    (OPTS, "OPTForCausalLM", "OPTConfig", OPT),
    (LLAMAS, "LlamaForCausalLM", "LlamaConfig", LLAMA),
    (("hf-internal-testing/tiny-random-MistralForCausalLM",), "MistralForCausalLM", "MistralConfig", LLAMA),
    (GPT2S, "GPT2LMHeadModel", "GPT2Config", GPT2),
    ((f"{INNER}BloomForCausalLM",), "BloomForCausalLM", "BloomConfig",
     {"vocab_size": 1024, "hidden_size": 32, "n_layer": 5, "n_head": 4}),
    ((f"{INNER}GPTNeoXForCausalLM",), "GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZES, "vocab_size": 1024}),
    ((f"{INNER}GPTJForCausalLM",), "GPTJForCausalLM", "GPTJConfig", {**GPT2, "rotary_dim": 4}),
    ((f"{INNER}BertModel",), "BertModel", "BertConfig", BERT),
    ((f"{INNER}BertForSequenceClassification",), "BertForSequenceClassification", "BertConfig", BERT),
    ((f"{INNER}RobertaModel",), "RobertaModel", "RobertaConfig", BERT),
    ((f"{INNER}RobertaForSequenceClassification",), "RobertaForSequenceClassification", "RobertaConfig", BERT),
    ((f"{INNER}DebertaModel",), "DebertaModel", "DebertaConfig", BERT),
    ((f"{INNER}DebertaV2Model",), "DebertaV2Model", "DebertaV2Config", BERT),
    (T5S, "T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}),
    ((f"{INNER}BartForConditionalGeneration",), "BartForConditionalGeneration", "BartConfig", BART),
    (("trl-internal-testing/tiny-Qwen3ForCausalLM",), "Qwen3ForCausalLM", "Qwen3Config", WIDE),
    (("trl-internal-testing/tiny-Qwen2ForCausalLM-2.5",), "Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    (("trl-internal-testing/tiny-Qwen3MoeForCausalLM",), "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
     {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    (("trl-internal-testing/tiny-GptOssForCausalLM",), "GptOssForCausalLM", "GptOssConfig",
     {**WIDE, **EXPERTS, "num_experts_per_tok": 2}),
    (("trl-internal-testing/tiny-Llama4ForCausalLM",), "Llama4ForCausalLM", "Llama4TextConfig",
     {**WIDE, **EXPERTS, **TOKENS, "intermediate_size_mlp": 64}),
    (("hf-internal-testing/Mixtral-tiny",), "MixtralForCausalLM", "MixtralConfig", {**LLAMA, **EXPERTS}),
    (("hf-internal-testing/tiny-random-Gemma3ForCausalLM",), "Gemma3ForCausalLM", "Gemma3TextConfig",
     {**WIDE, **TOKENS}),
    (("trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",), "LlamaForSequenceClassification",
     "LlamaConfig", {**LLAMA, "pad_token_id": 1}),
    ((f"{INNER}ResNetForImageClassification",), "ResNetForImageClassification", "ResNetConfig",
     {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 8, "num_labels": 3, "layer_type": "basic"}),
)  # fmt: skip
"""Names on the Hub, the class of the model, that of its config, and the config's fields."""


def main(home: Path) -> None:
    """Write every model where the Hub's client looks for it."""
    torch.manual_seed(0)
    for names, model, config, fields in MODELS:
        made = getattr(hf, model)(getattr(hf, config)(**fields))
        for name in names:
            folder = home / "hub" / f"models--{name.replace('/', '--')}"
            (folder / "refs").mkdir(parents=True, exist_ok=True)
            (folder / "refs" / "main").write_text("0" * 40)
            made.save_pretrained(folder / "snapshots" / ("0" * 40))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
