"""Bottleneck adapters: where the papers put them, what cannot be had of them, and that their files are their own."""

import copy
import re

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from torchgraft import adapters
from torchgraft.adapters import BottleneckConfig, inject_adapter_in_model, merge_adapter
from torchgraft.functional import UnsupportedConfig, bind, merge

WORDS = re.escape("0: a bottleneck adapter is a network after the module, which no weight computes")
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return BertModel(BertConfig(vocab_size=11, **sizes), add_pooling_layer=False).eval()


def test_each_sublayer_of_bert_gets_the_parameters_that_the_paper_counts():
    config = BottleneckConfig(r=3, target_modules=["attention.output.dense", "output.dense"])
    graft = bind(bert(), config)
    params = graft.init(torch.Generator().manual_seed(0))
    layers = {path: sum(leaf.numel() for leaf in leaves.values()) for path, leaves in params.items()}
    assert set(layers.values()) == {2 * 3 * 8 + 8 + 3}  # 2 m d + d + m: Houlsby et al., section 2.1
    assert len(layers) == 2 * 2 and all(path.endswith("output.dense") for path in layers)


def test_bert_computes_the_papers_layer():
    model, graft = bert(), bind(bert(), BottleneckConfig(r=3, target_modules=["layer.0.output.dense"]))
    params = graft.init(torch.Generator().manual_seed(0))
    params = {path: {name: torch.randn_like(leaf) for name, leaf in tree.items()} for path, tree in params.items()}
    (leaves,) = params.values()
    down, up = nn.Linear(8, 3), nn.Linear(3, 8)
    down.load_state_dict({"weight": leaves["bottleneck_down"], "bias": leaves["bottleneck_down_bias"]})
    up.load_state_dict({"weight": leaves["bottleneck_up"], "bias": leaves["bottleneck_up_bias"]})
    layer = model.encoder.layer[0].output
    layer.dense = nn.Sequential(layer.dense, Residual(nn.Sequential(down, nn.ReLU(), up)))
    expected = model(IDS).last_hidden_state
    torch.testing.assert_close(graft(params, IDS).last_hidden_state, expected)
    assert not torch.allclose(expected, bert()(IDS).last_hidden_state, atol=1e-2)


class Residual(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return x + self.network(x)


def test_the_papers_start_is_nearly_the_identity():
    config = BottleneckConfig(r=64, init_weights=False, target_modules=["0"])
    leaves = bind(nn.Sequential(nn.Linear(4, 300)), config).init(torch.Generator().manual_seed(0))["0"]
    for leaf in ("bottleneck_down", "bottleneck_up"):
        assert leaves[leaf].abs().max() <= 0.02 and 0.008 < leaves[leaf].std() < 0.01
    assert not leaves["bottleneck_down_bias"].any() and not leaves["bottleneck_up_bias"].any()


def test_what_no_weight_computes_is_an_error_that_says_so():
    config, model = BottleneckConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 4))
    graft = bind(model, config)
    with pytest.raises(UnsupportedConfig, match=WORDS + r".*; call the graft, or use graft\.view\(params\)"):
        merge(graft, graft.init())
    with pytest.raises(UnsupportedConfig, match=WORDS):
        _ = graft.view(graft.init())[0].weight
    injected = inject_adapter_in_model(config, copy.deepcopy(model))
    before = {name: tensor.clone() for name, tensor in injected.state_dict().items()}
    with pytest.raises(UnsupportedConfig, match=WORDS):
        merge_adapter(injected)
    assert all(torch.equal(before[name], tensor) for name, tensor in injected.state_dict().items())
    assert not injected[0].merged and torch.equal(injected(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_a_peft_model_of_a_method_that_peft_has_not(tmp_path):
    x, model = torch.randn(2, 4), nn.Sequential(nn.Linear(4, 4))
    wrapped = adapters.get_peft_model(
        copy.deepcopy(model), BottleneckConfig(r=2, init_weights=False, target_modules=["0"])
    )
    assert wrapped.peft_type == "BOTTLENECK"
    wrapped.save_pretrained(tmp_path)
    loaded = adapters.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.equal(loaded(x), wrapped(x)) and not torch.equal(wrapped(x), model(x))


def test_it_is_no_lora_and_no_conversion_makes_it_one():
    model = inject_adapter_in_model(BottleneckConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)))
    assert not adapters.supports_lora_conversion(model)
    with pytest.raises(UnsupportedConfig, match=WORDS):
        adapters.convert_to_lora(model, 2)
