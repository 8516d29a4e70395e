"""Older names of experts' layers, and "all-linear", on models of fused experts: what PEFT takes them to mean."""

import copy
import warnings

import peft
import pytest
import torch
import transformers as T
from torch import nn

from torchgraft.adapters import (
    IA3Config,
    LoraConfig,
    extract_params,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    save_adapter,
    set_peft_model_state_dict,
)
from torchgraft.adapters._config.experts import MIXTRAL, NEW_NAMES, QWEN
from torchgraft.functional import bind

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 48, "vocab_size": 50}
FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**SIZES, **FEW, head_dim=8, num_experts=4)),
    "dots1": lambda: T.Dots1ForCausalLM(
        T.Dots1Config(
            **SIZES, **FEW, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1
        )
    ),
    "olmoe": lambda: T.OlmoeForCausalLM(T.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": lambda: T.Qwen2MoeForCausalLM(
        T.Qwen2MoeConfig(**SIZES, **FEW, num_experts=4, shared_expert_intermediate_size=16)
    ),
    "gpt_oss": lambda: T.GptOssForCausalLM(T.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8)),
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES)),
}
TARGETS = {
    "all-linear": {"target_modules": "all-linear"},
    "all-linear without": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "names": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    "names of mixtral": {"target_modules": ["q_proj", "w1", "w2", "w3"]},
    "router": {"target_modules": ["q_proj", "mlp.gate"], "rank_pattern": {"q_proj": 3}},
    "expression": {"target_modules": r".*\.(q_proj|gate_proj|up_proj|w1|w3)"},
    "both": {"target_modules": ["q_proj", "gate_proj", "up_proj"], "target_parameters": ["experts.down_proj"]},
    "rank-stabilised": {"target_modules": ["gate_proj", "up_proj", "q_proj"], "use_rslora": True, "lora_alpha": 3},
    "parameters": {"target_parameters": ["mlp.experts.down_proj"]},
    "no modules": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
}
quiet = pytest.mark.filterwarnings("ignore")


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def by_peft(model, **fields):
    try:
        return peft.inject_adapter_in_model(peft.LoraConfig(r=2, **copy.deepcopy(fields)), model)
    except ValueError as error:
        return error


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("fields", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_targets_keys_and_outputs_are_pefts(name, fields):
    theirs, mine, ids = by_peft(build(name), **fields), build(name), torch.arange(6)[None]
    config = LoraConfig(r=2, **fields)
    if isinstance(theirs, ValueError) or (name == "llama" and "target_parameters" in fields):
        with pytest.raises(ValueError, match="target_modules|target_parameters"):
            inject_adapter_in_model(config, mine)
        with pytest.raises(ValueError, match="target_modules|target_parameters"):
            bind(build(name), config)
        return
    graft = bind(build(name), config)
    inject_adapter_in_model(config, mine)
    torch.manual_seed(1)
    state = {key: 0.3 * torch.randn_like(t) for key, t in peft.get_peft_model_state_dict(theirs).items()}
    own = get_peft_model_state_dict(mine)
    expected = {key: t.shape for key, t in state.items() if "base_layer.weight" not in key}
    assert {key: t.shape for key, t in own.items()} == expected
    assert {path: set(leaves) for path, leaves in extract_params(mine).items()} == {
        path: set(leaves) for path, leaves in graft.init().items()
    }
    peft.set_peft_model_state_dict(theirs, state)
    set_peft_model_state_dict(mine, state)
    torch.testing.assert_close(mine(ids).logits, theirs(ids).logits)
    torch.testing.assert_close(graft(extract_params(mine), ids).logits, theirs(ids).logits)


@quiet
@pytest.mark.parametrize("fields", [TARGETS["all-linear"], TARGETS["names"], TARGETS["parameters"]], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "dots1"])
def test_files_go_both_ways(name, fields, tmp_path):
    ids = torch.arange(6)[None]
    wrapped = peft.get_peft_model(build(name), peft.LoraConfig(r=2, init_lora_weights=False, **copy.deepcopy(fields)))
    wrapped.eval().save_pretrained(tmp_path / "theirs")
    mine = load_adapter(build(name), tmp_path / "theirs")
    torch.testing.assert_close(mine(ids).logits, wrapped(ids).logits)
    save_adapter(mine, tmp_path / "mine")
    again = peft.PeftModel.from_pretrained(build(name), tmp_path / "mine").eval()
    torch.testing.assert_close(again(ids).logits, wrapped(ids).logits)
    model = build(name)
    graft = bind(model, LoraConfig(r=2, **fields))
    params = load_adapter(graft, tmp_path / "theirs")
    torch.testing.assert_close(graft(params, ids).logits, wrapped(ids).logits)
    save_adapter(graft, tmp_path / "graft", params=params)
    again = peft.PeftModel.from_pretrained(build(name), tmp_path / "graft").eval()
    torch.testing.assert_close(again(ids).logits, wrapped(ids).logits)


def test_types_of_models_are_pefts():
    from peft.utils import transformers_weight_conversion as theirs
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    names = {}
    for kind in CONFIG_MAPPING_NAMES:
        pattern = theirs._MODEL_TO_CONVERSION_PATTERN.get(kind)
        if get_checkpoint_conversion_mapping(kind) is not None and pattern in theirs._MOE_TARGET_MODULE_MAPPING:
            names[kind] = theirs._MOE_TARGET_MODULE_MAPPING[pattern]
    assert names.items() <= NEW_NAMES.items()
    assert theirs._MOE_TARGET_MODULE_MAPPING == {"mixtral": MIXTRAL, "qwen2_moe": QWEN}


def test_an_expression_for_some_layers_keeps_its_meaning():
    targets = r"model\.layers\.1\..*\.(q_proj|gate_proj|up_proj)"
    graft = bind(build("qwen3_moe"), LoraConfig(r=2, target_modules=targets))
    assert list(graft.sites[""]) == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.experts.gate_up_proj"]
    assert graft.sites[""]["model.layers.1.mlp.experts.gate_up_proj"].constants.r == 4


def test_one_of_two_layers_that_were_fused_is_an_error():
    with pytest.raises(ValueError, match=r"names \['w1'\] of the experts without \['w3'\].*gate_up_proj"):
        bind(build("mixtral"), LoraConfig(target_modules=["w1", "w2"]))


def test_what_is_left_out_is_named():
    with pytest.warns(RuntimeWarning, match=r"mean the experts.*left out: model.layers.0.mlp.gate_proj.*shared_expert"):
        bind(build("dots1"), LoraConfig(target_modules="all-linear"))
    with pytest.warns(RuntimeWarning, match=r"leaves out the experts.*layers.0.mlp.experts.gate_up_proj.*name them"):
        bind(build("gpt_oss"), LoraConfig(target_modules="all-linear"))
    with pytest.warns(RuntimeWarning, match=r"leaves out the experts.*layers.1.mlp.experts.down_proj.*name them"):
        inject_adapter_in_model(LoraConfig(target_modules=["gate_proj", "down_proj"]), build("qwen2_moe"))
    with pytest.warns(RuntimeWarning, match=r"leaves out the experts.*use LoRA for these"):
        bind(build("mixtral"), IA3Config(target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bind(build("mixtral"), LoraConfig(target_modules="all-linear"))
        bind(build("gpt_oss"), LoraConfig(target_modules=["q_proj"]))
        bind(build("gpt_oss"), LoraConfig(target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"]))
