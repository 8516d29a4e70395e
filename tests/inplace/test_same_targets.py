"""A config means the same adapter for `bind` and for `inject_adapter_in_model`, however it names its targets."""

import copy
import functools

import hypothesis.strategies as st
import pytest
import torch
import transformers as T
from hypothesis import given, settings
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import LoraConfig, extract_params, inject_adapter_in_model
from torchgraft.functional import bind

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"intermediate_size": 24, "vocab_size": 20}


class Block(nn.Module):
    """One of each kind of layer that carries adapters."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 8), nn.Linear(8, 6)
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(2))
        self.conv = nn.Conv1d(8, 8, 1)
        self.tables = nn.ParameterDict({"table": torch.randn(8, 8)})


MODELS = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "tied": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "classifier": lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**SIZES)),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**SIZES, num_local_experts=2)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20)),
    "bert": lambda: T.BertModel(
        T.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=20)
    ),
    "block": Block,
}
NAMES = ["q_proj", "v_proj", "down_proj", "w1", "w3", "gate", "embed_tokens", "lm_head", "score", "c_attn", "query"]
NAMES += ["output.dense", "model.layers.0.self_attn.q_proj", "0", "layers.0", "embed", "head", "conv", "nothing"]
EXPRESSIONS = ["all-linear", "ALL-LINEAR", r".*\.(q_proj|v_proj|query|c_attn)", r".*layers\.1\..*_proj", r".*(w1|w3)"]
EXPRESSIONS += [r".*dense", "layers.0", "nothing"]
PARAMETERS = ["experts.down_proj", "experts.gate_up_proj", "gate.weight", "table", "q_proj.weight", "nothing"]
SOME = functools.partial(st.lists, unique=True, max_size=3)
FIELDS = {
    "target_modules": st.none() | SOME(st.sampled_from(NAMES)) | st.sampled_from(EXPRESSIONS),
    "target_parameters": st.none() | SOME(st.sampled_from(PARAMETERS)),
    "exclude_modules": st.none() | SOME(st.sampled_from(NAMES)) | st.sampled_from(EXPRESSIONS[2:]),
    "layers_to_transform": st.none() | st.sampled_from([0, [1], []]),
    "layers_pattern": st.none() | st.sampled_from(["layers", "h"]),
    "modules_to_save": st.none() | st.sampled_from([["lm_head"], ["head"], ["norm"], ["layers.1"]]),
    "bias": st.sampled_from(["none", "none", "all", "lora_only"]),
    "task_type": st.sampled_from([None, "SEQ_CLS"]),
    "rank_pattern": st.sampled_from([{}, {"q_proj": 3, "gate_up_proj": 5}]),
    "use_rslora": st.booleans(),
}


@functools.lru_cache
def model(name):
    torch.manual_seed(0)
    return MODELS[name]()


def shapes(make):
    """The shapes of a tree, or the error; with the constants of each site."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        return type(error), str(error)


def by_bind(config, name):
    graft = bind(model(name), config, allow_unreached=True)
    tree = {path: {leaf: tuple(t.shape) for leaf, t in leaves.items()} for path, leaves in graft.init().items()}
    return tree, {path: site.constants.scaling for path, site in graft.sites[""].items()}, graft.configs[""]


def by_injecting(config, name, first=None):
    injected = copy.deepcopy(model(name))
    if first is not None:
        inject_adapter_in_model(first, injected, "first")
    inject_adapter_in_model(config, injected)
    tree = {
        path: {leaf: tuple(t.shape) for leaf, t in leaves.items()} for path, leaves in extract_params(injected).items()
    }
    return tree, scalings(injected), injected.peft_config["default"]


def scalings(injected):
    return {
        path: layer.scaling["default"]
        for path, layer in adapters._inplace.walk.layers(injected).items()
        if "default" in layer.scaling
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150)
@given(name=st.sampled_from(list(MODELS)), fields=st.fixed_dictionaries(FIELDS))
def test_bind_and_inject_agree(name, fields):
    try:
        config = LoraConfig(r=2, **fields)
    except ValueError:
        return
    bound, injected = (shapes(lambda way=way: way(config, name)) for way in (by_bind, by_injecting))
    assert bound == injected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": [], "target_parameters": PARAMETERS},
        {"target_modules": r".*(proj|query|attn|conv|0)"},
    ],
    ids=str,
)
def test_also_on_a_model_with_adapters(name, fields):
    config = LoraConfig(r=2, **fields)
    first = LoraConfig(r=3, target_modules="all-linear")
    bound = shapes(lambda: by_bind(config, name))
    injected = shapes(lambda: by_injecting(config, name, first))
    if isinstance(injected[0], type):  # what the first adapter is on may be taken
        assert bound == injected or "another adapter is on" in injected[1]
    else:
        assert bound == injected


OTHERS = [
    adapters.IA3Config(),
    adapters.IA3Config(target_modules="all-linear"),
    adapters.AdaLoraConfig(target_r=2, init_r=2, total_step=5),
    adapters.OFTConfig(oft_block_size=4),
    adapters.VeraConfig(r=2),
    adapters.VeraConfig(r=2, target_modules="all-linear"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", OTHERS, ids=lambda config: f"{config.method.name}-{config.target_modules}")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "block"])
def test_other_methods_agree_too(name, config):
    def by_bind():
        tree = bind(model(name), config, allow_unreached=True).init()
        return {path: {leaf: tuple(t.shape) for leaf, t in leaves.items()} for path, leaves in tree.items()}

    def by_injecting():
        tree = extract_params(inject_adapter_in_model(config, copy.deepcopy(model(name))))
        return {path: {leaf: tuple(t.shape) for leaf, t in leaves.items()} for path, leaves in tree.items()}

    assert shapes(by_bind) == shapes(by_injecting)
