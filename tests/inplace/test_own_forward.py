"""Wrapped modules of a class with its own forward: the adapter goes around the forward that they inherit."""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

from torchgraft.adapters import (
    IA3Config,
    LoraConfig,
    extract_graft,
    extract_params,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    merge_adapter,
    set_adapter,
    set_peft_model_state_dict,
    unmerge_adapter,
)

IDS = torch.arange(7)
LORA = {"r": 2, "target_modules": ["0", "1"], "init_lora_weights": False}


class Scaled(nn.Embedding):
    """As transformers' scaled embeddings are."""

    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def model():
    return nn.Sequential(Scaled(7, 4), Doubled(4, 3))


def injected(config=None, name="default"):
    return inject_adapter_in_model(config or LoraConfig(**LORA), model(), name)


def oracle(target, name="default"):
    """The dense meaning: the class's own forward with the adapted weight."""
    twin = model()
    for layer, plain in zip(target, twin, strict=True):
        plain.weight.data = layer.base_layer.weight.data + layer.get_delta_weight(name)
        if plain is twin[1]:
            plain.bias.data = layer.base_layer.bias.data
    return twin(IDS)


def test_called_merged_and_functional_agree():
    target = injected()
    expected = oracle(target)
    torch.testing.assert_close(target(IDS), expected)
    torch.testing.assert_close(extract_graft(target)(extract_params(target), IDS), expected)
    merge_adapter(target)
    torch.testing.assert_close(target(IDS), expected)
    unmerge_adapter(target)
    torch.testing.assert_close(target(IDS), expected)


def test_a_scaled_embedding_is_pefts():
    config = {**LORA, "target_modules": ["0"]}
    base = nn.Sequential(Scaled(7, 4))
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**config), copy.deepcopy(base))
    ours = inject_adapter_in_model(LoraConfig(**config), base)
    set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    torch.testing.assert_close(ours(IDS), theirs(IDS))


def test_several_adapters_switching_and_gradients():
    target = injected()
    inject_adapter_in_model(IA3Config(target_modules=["1"]), target, "scale")
    set_adapter(target, ["default", "scale"])
    with torch.no_grad():
        target[1].ia3_l["scale"].mul_(2)
    both = target(IDS)
    set_adapter(target, "default")
    torch.testing.assert_close(both, 2 * target(IDS))
    target(IDS).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in target.parameters() if p.requires_grad)


def test_what_changes_later_is_seen():
    target = injected()
    before = target(IDS)
    with torch.no_grad():
        target[0].base_layer.weight.mul_(2)
    assert not torch.allclose(target(IDS), before)
    target[0].base_layer.embed_scale = 1.0
    twin = oracle(target)
    assert not torch.allclose(target(IDS), twin), "the oracle scales by 3 still"
    target.eval()
    assert not target[0].base_layer.training
    target[0].base_layer.embed_scale = 3.0
    torch.testing.assert_close(target(IDS), twin)


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda target: pickle.loads(pickle.dumps(target))], ids=["copy", "pickle"]
)
def test_copies_are_apart(twin):
    target = injected()
    other = twin(target)
    torch.testing.assert_close(other(IDS), target(IDS))
    with torch.no_grad():
        other[0].lora_embedding_B["default"].mul_(0)
        other[1].base_layer.weight.mul_(0)
    torch.testing.assert_close(target(IDS), oracle(target))
    torch.testing.assert_close(other(IDS), oracle(other))


@pytest.mark.slow
def test_compiled_whole_without_recompiling():
    target = injected()
    inject_adapter_in_model(LoraConfig(**LORA), target, "other")
    torch._dynamo.reset()
    compiled = torch.compile(target, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), target(IDS))
    with torch._dynamo.config.patch(error_on_recompile=True):
        set_adapter(target, "default")
        torch.testing.assert_close(compiled(IDS), target(IDS))
        set_peft_model_state_dict(target, {k: 2 * t for k, t in get_peft_model_state_dict(target).items()})
        torch.testing.assert_close(compiled(IDS), target(IDS))
