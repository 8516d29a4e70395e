"""LoRA: its equation in float64, PEFT's numbers, and what its options mean."""

import contextlib
import copy
import math
import re

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap
from transformers.pytorch_utils import Conv1D

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind, merge

LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), lambda: torch.randn(3, 4)),
    "conv1d of transformers": (lambda: Conv1D(6, 4), lambda: torch.randn(3, 4)),
    "embedding": (lambda: nn.Embedding(5, 4), lambda: torch.randint(0, 5, (3, 2))),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=1), lambda: torch.randn(2, 4, 6, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: torch.randn(2, 4, 3, 4, 5)),
}
OPTIONS = [
    {},
    {"use_rslora": True, "lora_alpha": 3},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": False},
    {"rank_pattern": {"layer": 4}, "alpha_pattern": {"^layer": 5}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_init_and_output_are_pefts(kind, options):
    make, inputs = LAYERS[kind]
    model = nn.Sequential()
    model.add_module("layer", make())
    x = inputs()
    fields = {"r": 2, "target_modules": ["layer"], **options}
    graft = bind(model, LoraConfig(**fields))
    torch.manual_seed(5)
    params = graft.init()
    torch.manual_seed(5)
    fan_in_fan_out = kind == "conv1d of transformers"
    with pytest.warns(UserWarning, match="groups") if "grouped" in kind else contextlib.nullcontext():
        injected = peft.inject_adapter_in_model(
            peft.LoraConfig(**fields, fan_in_fan_out=fan_in_fan_out), copy.deepcopy(model)
        )
    state = peft.get_peft_model_state_dict(injected)
    own = params["layer"]
    peft_own = {key.removeprefix("layer.").removesuffix(".weight"): value for key, value in state.items()}
    assert sorted(own) == sorted(peft_own)
    for leaf in own:
        assert torch.equal(own[leaf], peft_own[leaf]), f"{leaf} is drawn as PEFT draws it, bit for bit"
    moved = {"layer": {leaf: torch.randn_like(tensor) for leaf, tensor in own.items()}}
    peft.set_peft_model_state_dict(
        injected, {key: moved["layer"][key.removeprefix("layer.").removesuffix(".weight")] for key in state}
    )
    torch.testing.assert_close(graft(moved, x), injected(x), rtol=1e-5, atol=1e-5)


def test_linear_equation():
    layer, x = nn.Linear(4, 6).double(), torch.randn(3, 4).double()
    graft = bind(layer, LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"))
    a, b = torch.randn(2, 4).double(), torch.randn(6, 2).double()
    expected = x @ (layer.weight + 3 / 2 * b @ a).T + layer.bias
    torch.testing.assert_close(graft({"": {"lora_A": a, "lora_B": b}}, x), expected)
    graft = bind(layer, LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules="all-linear"))
    expected = x @ (layer.weight + 3 / math.sqrt(2) * b @ a).T + layer.bias
    torch.testing.assert_close(graft({"": {"lora_A": a, "lora_B": b}}, x), expected)


def test_dropout_is_on_the_adapters_input_only():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 8)), torch.randn(5, 64)
    graft = bind(model, LoraConfig(r=2, lora_dropout=0.5, target_modules=["0"]))
    params = {"0": {"lora_A": torch.randn(2, 64), "lora_B": torch.randn(8, 2)}}
    torch.manual_seed(1)
    given = graft(params, x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    expected = model(x) + 4 * dropped @ params["0"]["lora_A"].T @ params["0"]["lora_B"].T
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    model.eval()
    torch.testing.assert_close(graft(params, x), F.linear(x, *merge(graft, params).values()), rtol=1e-4, atol=1e-4)
    model.train()
    many = {"0": {leaf: t.expand(3, *t.shape) for leaf, t in params["0"].items()}}
    ys = vmap(graft, in_dims=(0, None), randomness="different")(many, x)
    assert not torch.equal(ys[0], ys[1])
    ys = vmap(graft, in_dims=(0, None), randomness="same")(many, x)
    assert torch.equal(ys[0], ys[1])


def test_half_precision_base_rounds_once():
    torch.manual_seed(0)
    layer = nn.Linear(32, 16).bfloat16()
    x = torch.randn(8, 32).bfloat16()
    graft = bind(layer, LoraConfig(r=2, target_modules="all-linear"))
    params = {"": {"lora_A": torch.randn(2, 32), "lora_B": torch.randn(16, 2)}}
    a, b = params[""]["lora_A"].double(), params[""]["lora_B"].double()
    once = {"rtol": 2**-8 + 1e-6, "atol": 1e-5}  # half a unit in the last place, and what float32 leaves of the delta
    for given, base, delta in (
        (graft(params, x), layer(x), 4 * x.double() @ a.T @ b.T),
        (merge(graft, params)["weight"], layer.weight, 4 * b @ a),
    ):
        torch.testing.assert_close(given.double(), base.double() + delta, **once)
        assert not torch.allclose((base + delta.bfloat16()).double(), base.double() + delta, **once), "rounded twice"


def test_autocast():
    layer, x = nn.Linear(32, 16), torch.randn(8, 32)
    graft = bind(layer, LoraConfig(r=2, target_modules="all-linear"))
    params = {"": {"lora_A": torch.randn(2, 32), "lora_B": torch.randn(16, 2)}}
    with torch.autocast("cpu", torch.bfloat16):
        y = graft(params, x)
        assert y.dtype == layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), graft(params, x), rtol=0.05, atol=0.5)


def test_double_base_with_float_leaves_loses_nothing_of_the_input():
    layer, x = nn.Linear(4, 4).double(), torch.randn(3, 4).double()
    graft = bind(layer, LoraConfig(r=2, target_modules="all-linear"))
    a, b = torch.randn(2, 4), torch.randn(4, 2)
    expected = layer(x) + 4 * x @ a.double().T @ b.double().T
    torch.testing.assert_close(graft({"": {"lora_A": a, "lora_B": b}}, x), expected, rtol=1e-12, atol=1e-12)


def test_a_grouped_convolution_runs_and_says_why_it_cannot_merge():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    graft = bind(model, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"0: LoRA on a convolution with 2 groups sees all channels through A"):
        merge(graft, graft.init())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora_dropout": 1.5}, "LoraConfig: lora_dropout is 1.5, expected 0 <= p < 1"),
        (
            {"init_lora_weights": "magic"},
            "LoraConfig: init_lora_weights is 'magic', expected True, False, 'gaussian' or one of ('pissa', ",
        ),
        ({"r": -1}, "LoraConfig: r is -1 at 0, expected a positive integer"),
        ({"r": 2.0}, "LoraConfig: r is 2.0, expected int"),
        ({"rank_pattern": {"0": 0}}, "LoraConfig: r is 0 at 0, expected a positive integer"),
        ({"r": 3}, "LoraConfig: r is 3 at 0, a convolution with 2 groups; expected a multiple of the groups"),
    ],
)
def test_bad_configs(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        bind(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), LoraConfig(target_modules=["0"], **fields))
