"""Targeting rules: PEFT's, held against PEFT itself."""

import re
import warnings

import hypothesis.strategies as st
import peft
import pytest
import torch
import transformers
from hypothesis import given
from torch import nn

from torchgraft.adapters import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, VeraConfig
from torchgraft.adapters._config.matching import by_pattern
from torchgraft.functional import bind


def linear():
    return nn.Linear(2, 2)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.out = linear(), linear(), linear()
        self.experts = nn.ModuleList([nn.ModuleDict({"up": linear()}) for _ in range(2)])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.blocks = nn.ModuleList([Layer() for _ in range(2)])
        self.q_proj, self.my_q_proj = linear(), linear()


def ours(model, **fields):
    try:
        return sorted(bind(model, LoraConfig(**fields)).sites[""])
    except ValueError as error:
        return "nothing" if "matches" in str(error) else str(error)


def theirs(model, **fields):
    try:
        injected = peft.inject_adapter_in_model(peft.LoraConfig(**fields), model)
    except ValueError:
        return "nothing"
    return sorted(
        name for name, m in injected.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["layers.1.q_proj", "out"]},
        {"target_modules": "q_proj"},
        {"target_modules": r".*\.q_proj"},
        {"target_modules": r"layers\.[01]\.(q|v)_proj"},
        {"target_modules": ["proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r"layers.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["layers", "blocks"]},
        {"target_modules": ["up"], "layers_to_transform": [1]},
        {"target_modules": ["layers.0.q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [9]},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-linear", "exclude_modules": ["up"]},
        {"target_modules": ["embed", "v_proj"]},
    ],
    ids=str,
)
def test_matches_what_peft_matches(fields):
    assert ours(Model(), **fields) == theirs(Model(), **fields)


names = st.sampled_from(["q_proj", "v_proj", "layers.1.out", "up", "blocks.0.q_proj", "my_q_proj", "1.up", "nope"])


@pytest.mark.slow
@given(
    targets=st.lists(names, min_size=1, max_size=3, unique=True),
    exclude=st.none() | st.lists(names, max_size=2, unique=True),
    layers=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=2),
    pattern=st.none() | st.sampled_from(["layers", "blocks", "experts"]),
)
def test_any_combination_matches_what_peft_matches(targets, exclude, layers, pattern):
    fields = {"target_modules": targets, "exclude_modules": exclude, "layers_to_transform": layers}
    if pattern and layers is not None:
        fields["layers_pattern"] = pattern
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ours(Model(), **fields) == theirs(Model(), **fields)


def test_all_linear_leaves_the_output_layer_out():
    config = transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8
    )
    model = transformers.LlamaForCausalLM(config)
    sites = bind(model, LoraConfig(target_modules="all-linear")).sites[""]
    assert len(sites) == 7 and "lm_head" not in sites
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=8))
    assert sorted(bind(gpt2, LoraConfig(target_modules="all-linear")).sites[""]) == theirs(
        gpt2, target_modules="all-linear", fan_in_fan_out=True
    )


def test_what_matches_nothing_is_an_error_that_says_what_there_is():
    for fields, words in [
        ({}, "LoraConfig: target_modules is None; name the modules to adapt"),
        ({"target_modules": []}, "LoraConfig: target_modules is []; name the modules to adapt"),
        (
            {"target_modules": ["nope"]},
            "target_modules=['nope'] matches no module; a string has to match a whole name.",
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ".*"},
            "matches 6 modules, and exclude_modules='.*' excludes",
        ),
        (
            {"target_modules": ["up"], "layers_to_transform": [7]},
            "layers_to_transform=[7] and layers_pattern=None matches",
        ),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            bind(Model(), LoraConfig(**fields))
    with pytest.raises(ValueError, match=r"The model has 'embed', 'layers\.0\.q_proj', .* \(28 in all\)"):
        bind(Model(), LoraConfig(target_modules=["nope"]))


@pytest.mark.parametrize(
    ("config", "fields", "words"),
    [
        (LoraConfig, {"r": "8"}, "LoraConfig: r is '8', expected int"),
        (LoraConfig, {"r": True}, "LoraConfig: r is True, expected int"),
        (LoraConfig, {"lora_alpha": None}, "LoraConfig: lora_alpha is None, expected float"),
        (LoraConfig, {"lora_dropout": "a"}, "LoraConfig: lora_dropout is 'a', expected float"),
        (LoraConfig, {"use_rslora": "yes"}, "LoraConfig: use_rslora is 'yes', expected bool"),
        (LoraConfig, {"rank_pattern": [1]}, "LoraConfig: rank_pattern is [1], expected "),
        (LoraConfig, {"alpha_pattern": {"0": "a"}}, "LoraConfig: alpha_pattern is {'0': 'a'}, expected "),
        (LoraConfig, {"rank_pattern": {"(": 1}}, "LoraConfig: rank_pattern has '(', which is no regular expression"),
        (LoraConfig, {"target_modules": 3}, "LoraConfig: target_modules is 3, expected list[str] | "),
        (LoraConfig, {"target_modules": [3]}, "LoraConfig: target_modules is [3], expected list[str] | "),
        (LoraConfig, {"target_modules": "("}, "LoraConfig: target_modules has '(', which is no regular expression"),
        (LoraConfig, {"exclude_modules": "*"}, "LoraConfig: exclude_modules has '*', which is no regular expression"),
        (LoraConfig, {"layers_to_transform": ["a"]}, "LoraConfig: layers_to_transform is ['a'], expected list[int] | "),
        (LoraConfig, {"layers_pattern": "h"}, "LoraConfig: layers_pattern is 'h' without layers_to_transform"),
        (
            LoraConfig,
            {"target_modules": ".*", "layers_to_transform": 1},
            "layers_to_transform is 1, which applies to names in a list, and target_modules is the string '.*'",
        ),
        (IA3Config, {"feedforward_modules": "("}, "IA3Config: feedforward_modules has '(', which is no regular"),
        (IA3Config, {"init_ia3_weights": None}, "IA3Config: init_ia3_weights is None, expected bool"),
        (AdaLoraConfig, {"total_step": 2.5}, "AdaLoraConfig: total_step is 2.5, expected int | None"),
        (OFTConfig, {"oft_block_size": 2.5}, "OFTConfig: oft_block_size is 2.5, expected int"),
        (VeraConfig, {"d_initial": "a"}, "VeraConfig: d_initial is 'a', expected float"),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_an_error_that_names_it(config, fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        config(**{"target_modules": ["q_proj"], **fields})


def test_collections_of_names_and_integers_for_numbers_are_fine():
    for names in (["q_proj"], ("q_proj",), {"q_proj"}):
        assert "q_proj" in bind(Model(), LoraConfig(target_modules=names, lora_alpha=8, lora_dropout=0)).sites[""]


def test_a_partial_miss_is_a_warning_that_names_it():
    with pytest.warns(RuntimeWarning, match=r"LoraConfig: target_modules \['nope'\] match no module"):
        bind(Model(), LoraConfig(target_modules=["q_proj", "nope"]))


def test_a_pattern_that_matches_no_target_is_a_warning_that_names_it():
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.warns(
            RuntimeWarning, match=r"\['proj'\] in rank_pattern or alpha_pattern match none of the targeted"
        ):
            bind(Model(), LoraConfig(target_modules=["q_proj", "v_proj"], **{field: {"proj": 3, "v_proj": 2}}))


def test_an_exclusion_that_excludes_nothing_is_a_warning():
    with pytest.warns(UserWarning, match=r"exclude_modules=\['up'\] excludes none of the targets"):
        bind(Model(), LoraConfig(target_modules=["q_proj"], exclude_modules=["up"]))


def test_a_config_is_never_changed():
    for fields in (
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3}, "layers_to_transform": [0]},
    ):
        config = LoraConfig(**fields)
        before = repr(config)
        graft = bind(Model(), config)
        graft.init()
        assert repr(config) == before
        config.r = 3
        config.rank_pattern["v_proj"] = 1
        assert repr(graft.configs[""]) == before, "a graft keeps the config that it was bound with"


@given(
    patterns=st.dictionaries(
        st.sampled_from(["q_proj", "^q_proj", r"layers\.\d\.q_proj", "proj", ".*proj"]), st.integers(1, 9)
    ),
    path=st.sampled_from(["q_proj", "layers.0.q_proj", "my_q_proj", "v_proj", "a.b"]),
)
def test_patterns_pick_what_pefts_do(patterns, path):
    key = peft.utils.other.get_pattern_key(patterns, path)
    assert by_pattern(patterns, path, 0) == patterns.get(key, 0)


def test_rank_and_alpha_patterns_reach_the_sites():
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={r"layers\.0\.v_proj": 6},
    )
    graft = bind(Model(), config)
    sites = graft.sites[""]
    assert dict(sites["layers.0.v_proj"].constants.items()) == {"lora_alpha": 6, "r": 2, "scaling": 3.0}
    assert dict(sites["layers.1.v_proj"].constants.items()) == {"lora_alpha": 8, "r": 2, "scaling": 4.0}
    assert dict(sites["q_proj"].constants.items()) == {"lora_alpha": 8, "r": 4, "scaling": 2.0}
    assert graft.init()["layers.0.v_proj"]["lora_A"].shape == (2, 2)
    assert torch.get_default_dtype() == torch.float32
