"""Adapters on stacked experts, merged into files that keep the experts apart, as those on the Hub do."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchgraft.adapters import LoraConfig, merge_files, save_adapter
from torchgraft.functional import bind, merge

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "qwen3": lambda: transformers.Qwen3MoeConfig(
        **SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=6
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=3),
}
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def saved(kind, folder, **fields):
    """A model in a folder, and the folder of an adapter; the state dict of the two merged."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    model.save_pretrained(folder / "base")
    graft = bind(model, LoraConfig(**{"r": 2, "target_parameters": STACKED, "init_lora_weights": False, **fields}))
    params = graft.init(torch.Generator().manual_seed(1))
    return folder / "base", save_adapter(graft, folder / "adapter", params=params), merge(graft, params)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "fields", [{"target_modules": ["q_proj"]}, {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 5.0}}]
)
def test_a_merged_model_is_the_one_of_its_state_dict(kind, fields, tmp_path):
    base, adapter, expected = saved(kind, tmp_path, **fields)
    before = load_file(base / "model.safetensors")
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in before), (
        "experts are apart in files"
    )
    out = merge_files(base, adapter, tmp_path / "out")
    after = load_file(out / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert len(changed) == 2 * 3 * 3 + (2 if "target_modules" in fields else 0)
    read = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(read[name], tensor, rtol=1e-6, atol=1e-6)


def test_experts_of_which_one_is_missing_are_no_stack(tmp_path):
    base, adapter, _ = saved("qwen3", tmp_path)
    file = base / "model.safetensors"
    held = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp.experts.1.up_proj" not in name}
    save_file(held, file, {"format": "pt"})
    with pytest.raises(KeyError, match=r"layers.1.mlp.experts.base_layer.lora_A.weight', which is neither"):
        merge_files(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
