"""Injected adapters against PEFT's: the same seed, names, flags, state dicts, outputs and merged weights."""

import copy

import pytest
import torch
from peft.functional import cast_adapter_dtype

from torchgraft import adapters

from .models import (
    EXACT,
    KINDS,
    LINEAR,
    SIZES,
    both,
    inputs,
    layers,
    parameters,
    peft_load,
    peft_state,
    randomise,
    trained,
)

LORA = [
    {},
    {"use_rslora": True, "lora_alpha": 5},
    {"lora_dropout": 0.4},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"rank_pattern": {"second": 2}, "alpha_pattern": {"^first": 3}},
    {"use_dora": True},
    {"use_dora": True, "lora_dropout": 0.4, "lora_alpha": 5},
    {"use_dora": True, "init_lora_weights": False},
]
PEFT_ON_BIASES = r"Adapter 'default'. \d LoRA tensor\(s\) have invalid shape"
"""PEFT takes the bias of `lora_B` for a part of a sharded weight."""
LORA_BIAS = [{"lora_bias": True}, {"lora_bias": True, "init_lora_weights": False, "lora_dropout": 0.4}]
CASES = [
    *(("LORA", kind, fields) for kind in KINDS for fields in LORA),
    *(
        ("LORA", kind, fields)
        for kind in KINDS
        if kind not in ("linear_without_bias", "embedding")
        for fields in LORA_BIAS
    ),
    ("LORA", "linear", {"exclude_modules": ["first"]}),
    ("LORA", "linear", {"target_modules": "all-linear"}),
    ("LORA", "linear", {"target_modules": ["first"], "modules_to_save": ["head"]}),
    ("LORA", "linear", {"inference_mode": True}),
    ("LORA", "linear", {"target_modules": ["first"], "modules_to_save": ["head"], "inference_mode": True}),
    *(
        ("IA3", kind, fields)
        for kind in (*LINEAR, "conv2d", "conv3d")
        for fields in ({}, {"feedforward_modules": ["second"]}, {"init_ia3_weights": False})
    ),
    *(
        ("ADALORA", kind, fields)
        for kind in (*LINEAR, "conv2d")
        for fields in ({}, {"lora_dropout": 0.4, "lora_alpha": 5}, {"init_lora_weights": False})
    ),
    *(
        ("LOHA", kind, fields)
        for kind in ("linear", "linear_without_bias", "conv1d", "conv2d")
        for fields in (
            {},
            {"use_effective_conv2d": True, "alpha": 5},
            {"init_weights": False, "rank_dropout": 0.4},
            {"module_dropout": 0.4, "inference_mode": True},
            {"rank_pattern": {"second": 2}, "alpha_pattern": {"^first": 3}, "use_effective_conv2d": True},
        )
    ),
    *(
        ("OFT", kind, fields)
        for kind in ("linear", "linear_without_bias", "embedding")
        for fields in (
            {},
            {"use_cayley_neumann": False},
            {"block_share": True},
            {"r": 2, "oft_block_size": 0},
            {"init_weights": False},
            {"num_cayley_neumann_terms": 3},
        )
    ),
    *(
        ("VERA", kind, fields)
        for kind in LINEAR
        for fields in ({}, {"projection_prng_key": 5, "d_initial": 0.3}, {"vera_dropout": 0.4}, {"init_weights": False})
    ),
    *(
        (method, kind, fields)
        for method, fields in (
            ("C3A", {}),
            ("C3A", {"init_weights": True, "block_size_pattern": {"second": 4}, "inference_mode": True}),
            ("C3A", {"init_weights": "gaussian", "block_size": 1}),
            ("DELORA", {}),
            ("DELORA", {"init_weights": False, "module_dropout": 0.4, "inference_mode": True}),
            ("DELORA", {"delora_lambda": 3, "rank_pattern": {"second": 2}, "lambda_pattern": {"first": 0.5}}),
            ("SHIRA", {}),
            ("SHIRA", {"r": 1, "random_seed": None, "init_weights": False}),
            ("SHIRA", {"inference_mode": True}),
        )
        for kind in ("linear", "linear_without_bias")
    ),
    ("DEFT", "linear_without_bias", {"decomposition_method": "qr", "alpha": 6, "deft_dropout": 0.4}),
    ("DEFT", "transposed", {"init_weights": False, "init_scale": 2.0}),
    ("DEFT", "linear", {"para": True, "inference_mode": True}),
    ("GLORA", "linear", {"config_A_B": "vector", "config_D_E": "vector"}),
    ("GLORA", "linear", {"config_A_B": "constant", "config_C": "vector", "init_weights": False}),
    ("PEANUT", "linear", {"act_fn": "silu", "scaling": 2.0}),
    ("PEANUT", "linear_without_bias", {"init_weights": False, "act_fn": "gelu"}),
    ("BEFT", "linear", {}),
    ("BEFT", "linear", {"init_weights": False, "inference_mode": True}),
]
IDS = ["-".join([method, kind, *map(str, fields)]) for method, kind, fields in CASES]
cases = pytest.mark.parametrize(("method", "kind", "fields"), CASES, ids=IDS)
warnings = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Invalid `oft_block_size`",
        "init_weights is set to False",
        "Initializing",
        PEFT_ON_BIASES,
    )
]
pytestmark = warnings


@cases
def test_starts_as_in_peft(method, kind, fields):
    mine, theirs = both(method, kind, torch.float32, **fields)
    assert parameters(mine).keys() == parameters(theirs).keys()
    for name, p in parameters(theirs).items():
        assert same(parameters(mine)[name], p), name
    assert trained(mine) == trained(theirs)
    x = inputs(kind, torch.float32)
    assert torch.allclose(mine(x), theirs(x), atol=1e-6)
    state, expected = adapters.get_peft_model_state_dict(mine), peft_state(theirs)
    assert set(state) == set(expected)
    assert all(same(state[key], expected[key]) for key in expected)


def same(mine, theirs):
    """Bit for bit; up to rounding where the norm of a random adapter was summed in another order."""
    return torch.equal(mine, theirs) or (
        mine.shape == theirs.shape and mine.min() > 0.1 and torch.allclose(mine, theirs, 1e-5)
    )


@cases
def test_computes_what_peft_computes(method, kind, fields):
    mine, theirs = both(method, kind, **fields)
    x = inputs(kind)
    randomise(theirs)
    state = peft_state(theirs)
    before = dict(state)
    assert adapters.set_peft_model_state_dict(mine, state) == ([], [])
    assert state.keys() == before.keys() and all(state[key] is before[key] for key in before)
    assert torch.allclose(mine(x), theirs(x), rtol=0, atol=EXACT.get(method, 1e-10))
    randomise(mine, seed=4)
    assert not peft_load(theirs, adapters.get_peft_model_state_dict(mine)).unexpected_keys
    assert torch.allclose(mine(x), theirs(x), rtol=0, atol=EXACT.get(method, 1e-10))
    outputs = []
    for model in (mine, theirs):
        torch.manual_seed(5)
        outputs.append(model.train()(x))
        model.eval()
    assert torch.allclose(*outputs, rtol=0, atol=EXACT.get(method, 1e-10))


@cases
def test_merges_what_peft_merges(method, kind, fields):
    mine, theirs = both(method, kind, **fields)
    x = inputs(kind)
    randomise(theirs)
    adapters.set_peft_model_state_dict(mine, peft_state(theirs))
    adapted, before = mine(x), copy.deepcopy(adapters.get_base_model_state_dict(mine))
    adapters.merge_adapter(mine)
    for layer in layers(theirs):
        layer.merge()
    for own, other in zip(layers(mine), layers(theirs), strict=True):
        assert own.merged and own.merged_adapters == other.merged_adapters == ["default"]
        assert torch.allclose(own.base_layer.weight, other.base_layer.weight, rtol=0, atol=EXACT.get(method, 1e-10))
        if getattr(own.base_layer, "bias", None) is not None:
            assert torch.allclose(own.base_layer.bias, other.base_layer.bias, rtol=0, atol=EXACT.get(method, 1e-10))
    assert torch.allclose(mine(x), adapted, rtol=0, atol=EXACT.get(method, 1e-10))
    adapters.unmerge_adapter(mine)
    after = adapters.get_base_model_state_dict(mine)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("method", "kind"),
    [(method, "linear") for method in SIZES] + [("LORA", kind) for kind in KINDS[2:]] + [("IA3", "conv2d")],
)
def test_computes_what_peft_computes_in_half_precision(method, kind, dtype):
    mine, theirs = both(method, kind, dtype)
    x = inputs(kind, dtype)
    randomise(theirs)
    assert {p.dtype for p in parameters(mine).values()} == {dtype}
    adapters.set_peft_model_state_dict(mine, peft_state(theirs))
    eps = torch.finfo(dtype).eps
    assert mine(x).dtype == dtype
    assert torch.allclose(mine(x).float(), theirs(x).float(), rtol=4 * eps, atol=4 * eps)
    adapters.cast_adapter_dtype(mine, "default")
    cast_adapter_dtype(theirs, "default")
    dtypes = [{name: p.dtype for name, p in parameters(model).items()} for model in (mine, theirs)]
    assert dtypes[0] == dtypes[1]
    assert trained(mine) == trained(theirs)
    assert torch.allclose(mine(x).float(), theirs(x).float(), rtol=2 * eps, atol=2 * eps)
