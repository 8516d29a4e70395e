"""Nested tensors go through adapted layers as their rows do."""

import copy

import pytest
import torch
from torch import nn

from torchgraft.adapters import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, VeraConfig, inject_adapter_in_model
from torchgraft.functional import bind, route, stack

CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_dora=True),
    "lora_bias": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_bias=True),
    "ia3": IA3Config(target_modules=["0"], init_ia3_weights=False),
    "feedforward": IA3Config(target_modules=["0"], init_ia3_weights=False, feedforward_modules=["0"]),
    "vera": VeraConfig(r=2, target_modules=["0"], init_weights=False),
    "adalora": AdaLoraConfig(target_modules=["0"], total_step=10, init_lora_weights=False),
    "oft": OFTConfig(r=0, oft_block_size=2, target_modules=["0"], init_weights=False),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")


def nested(parts, layout):
    return torch.nested.as_nested_tensor(list(parts), layout=layout)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("method", CONFIGS)
def test_values_and_gradients_are_those_of_the_rows(method, layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    config = CONFIGS[method]
    graft = bind(model, config)
    params = {"0": {leaf: t.requires_grad_() for leaf, t in graft.init()["0"].items()}}
    leaves = list(params["0"].values())
    parts = [torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)]
    expected = [graft(params, part) for part in parts]
    gradients = torch.autograd.grad(sum(y.square().sum() for y in expected), [*parts, *leaves])
    injected = inject_adapter_in_model(config, copy.deepcopy(model), params=params)
    y = graft(params, nested(parts, layout))
    assert y.layout == layout and y.is_nested
    torch.testing.assert_close(list(y.unbind()), expected)
    found = torch.autograd.grad(sum(one.square().sum() for one in y.unbind()), [*parts, *leaves])
    torch.testing.assert_close(found, gradients)
    torch.testing.assert_close(list(injected(nested(parts, layout)).unbind()), expected)


def test_lengths_stay_those_of_the_input():
    model = nn.Sequential(nn.Linear(8, 8))
    graft = bind(model, CONFIGS["lora"])
    x = nested([torch.randn(3, 8), torch.randn(5, 8)], torch.jagged)
    assert (x + graft(graft.init(), x)).shape == x.shape


def test_dropout_and_embeddings():
    model = nn.Sequential(nn.Linear(8, 8))
    graft = bind(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_dropout=0.5))
    x = nested([torch.randn(3, 8), torch.randn(5, 8)], torch.jagged)
    params = graft.init()
    assert not torch.equal(graft(params, x).values(), graft(params, x).values())
    words = bind(nn.Sequential(nn.Embedding(9, 4)), CONFIGS["lora"])
    params, ids = words.init(), nested([torch.arange(3), torch.arange(5)], torch.jagged)
    torch.testing.assert_close(words(params, ids).values(), words(params, ids.values()))


def test_what_torch_cannot_run_is_an_error():
    convolution = bind(nn.Sequential(nn.Conv1d(8, 8, 1)), CONFIGS["lora"])
    x = nested([torch.randn(3, 8), torch.randn(5, 8)], torch.jagged)
    with pytest.raises(TypeError, match="0: the input is a nested tensor .* a conv1d"):
        convolution(convolution.init(), x)
    graft = bind(nn.Sequential(nn.Linear(8, 8)), CONFIGS["lora"])
    with pytest.raises(TypeError, match="0: the input is a nested tensor .* lengths are of axis 2, expected axis 1"):
        graft(graft.init(), x.transpose(1, 2))
    many = stack([graft.init(), graft.init()])
    with pytest.raises(TypeError, match="0: the input is a nested tensor, whose rows"):
        graft(route(many, torch.tensor([0, 1]), batch_dim=0), x)
