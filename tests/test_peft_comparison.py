"""What the README says of PEFT, shown on PEFT itself, and the same here."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from torchgraft.adapters import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, VeraConfig
from torchgraft.functional import bind, merge, stack

FIELDS = {"target_modules": ["0", "2"]}
CONFIGS = {
    "lora": (peft.LoraConfig(r=2, **FIELDS), LoraConfig(r=2, **FIELDS)),
    "ia3": (peft.IA3Config(feedforward_modules=[], **FIELDS), IA3Config(**FIELDS)),
    "vera": (peft.VeraConfig(r=2, **FIELDS), VeraConfig(r=2, **FIELDS)),
    "adalora": (peft.AdaLoraConfig(total_step=9, **FIELDS), AdaLoraConfig(total_step=9, **FIELDS)),
    "oft": (peft.OFTConfig(oft_block_size=2, **FIELDS), OFTConfig(oft_block_size=2, **FIELDS)),
}
X = torch.linspace(-1, 1, 8).view(2, 4)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def over_adapters_with_peft(config):
    model = peft.inject_adapter_in_model(config, mlp())
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    many = {name: torch.stack([p, p + 0.1]) for name, p in params.items()}

    def loss(params):
        return functional_call(model, params, (X,)).square().sum()

    return grad(loss)(params), vmap(loss)(many)


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_peft_under_torch_func_where_it_works(name):
    grads, losses = over_adapters_with_peft(copy.deepcopy(CONFIGS[name][0]))
    assert grads and losses.shape == (2,)


@pytest.mark.parametrize("name", ["adalora", "oft"])
def test_peft_under_vmap_where_it_fails(name):
    with pytest.raises(RuntimeError, match="vmap|broadcast shape"):
        over_adapters_with_peft(copy.deepcopy(CONFIGS[name][0]))


def test_peft_has_no_low_level_vera():
    with pytest.raises(ValueError, match="does not support PeftType.VERA"):
        peft.inject_adapter_in_model(copy.deepcopy(CONFIGS["vera"][0]), mlp())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_here_under_vmap(name):
    graft = bind(mlp(), CONFIGS[name][1])
    params = graft.init()
    many = stack([params, params])
    assert vmap(graft, in_dims=(0, None))(many, X).shape == (2, 2, 4)


def test_unmerging_leaves_other_bits_in_peft():
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).bfloat16()
    before = model[0].weight.detach().clone()
    config = LoraConfig(r=2, init_lora_weights=False, **FIELDS)
    graft = bind(model, config)
    merge(graft, graft.init())
    assert torch.equal(model[0].weight, before)
    injected = peft.inject_adapter_in_model(peft.LoraConfig(r=2, init_lora_weights=False, **FIELDS), model)
    injected[0].merge()
    injected[0].unmerge()
    assert not torch.equal(injected[0].base_layer.weight, before)


def test_oft_on_a_convolution_is_no_identity_in_peft():
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3)), torch.randn(1, 4, 6, 6)
    fields = {"oft_block_size": 4, "target_modules": ["0"]}
    base = model(x)
    graft = bind(model, OFTConfig(**fields))
    assert torch.equal(graft(graft.init(), x), base)
    injected = peft.inject_adapter_in_model(peft.OFTConfig(**fields), model)
    assert not torch.allclose(injected(x), base, atol=0.1)
