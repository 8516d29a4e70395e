"""Modules that compute with `child.weight` instead of calling the child: adapted, and as cheap as before else."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from torchgraft import adapters
from torchgraft.adapters import LoraConfig, inject_adapter_in_model
from torchgraft.adapters._inplace.layer.active import ActiveAdapters
from torchgraft.functional import bind

CONFIGS = {
    "lora": LoraConfig(r=2, init_lora_weights=False),
    "dora": LoraConfig(r=2, use_dora=True, init_lora_weights=False),
    "lora bias": LoraConfig(r=2, lora_bias=True, init_lora_weights=False),
    "ia3": adapters.IA3Config(init_ia3_weights=False),
    "adalora": adapters.AdaLoraConfig(init_r=2, target_r=2, total_step=5, init_lora_weights=False),
    "oft": adapters.OFTConfig(oft_block_size=2, init_weights=False),
    "vera": adapters.VeraConfig(r=2, init_weights=False),
}


def helper(x, module):
    return F.linear(x, module.weight, module.bias)


def direct(self, x):
    return F.linear(x, self.proj.weight, self.proj.bias)


def local(self, x):
    proj = self.proj
    weight, bias = proj.weight, getattr(proj, "bias")  # noqa: B009
    return x @ weight.T + bias


def by_helper(self, x):
    return helper(x, self.proj)


def called_too(self, x):
    return F.linear(torch.tanh(self.proj(x)), self.proj.weight)


def of_a_grandchild(self, x):
    return F.linear(x, self.inner[0].weight) + self.proj(x)


def transposed(self, x):
    return (self.proj.weight @ x.T).T


WAYS = [direct, local, by_helper, called_too, of_a_grandchild, transposed]


def built(way):
    torch.manual_seed(0)
    cls = type("Reader", (nn.Module,), {"forward": way})
    model = cls()
    model.proj, model.inner = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
    return model.double(), torch.randn(3, 4, dtype=torch.float64)


def targeted(name):
    config = copy.deepcopy(CONFIGS[name])
    config.target_modules = ["proj", "0"]
    return config


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_who_reads_a_weight_gets_the_adapted_one(name, way):
    model, x = built(way)
    base, config = model(x), targeted(name)
    graft = bind(model, config, allow_unreached=True)
    mine = inject_adapter_in_model(config, copy.deepcopy(model))
    y = mine(x)
    assert not torch.allclose(y, base)
    torch.testing.assert_close(y, graft(adapters.extract_params(mine), x))
    y.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in mine.named_parameters() if "proj." in n)
    for each in (mine.proj, mine.inner[0]):
        assert each.weight is each.base_layer.weight and each.bias is each.base_layer.bias
    with adapters.disable_adapter(mine):
        torch.testing.assert_close(mine(x), base)
    adapters.merge_adapter(mine)
    torch.testing.assert_close(mine(x), y)
    adapters.unmerge_adapter(mine)
    torch.testing.assert_close(mine(x), y)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_also_under_compile(way):
    torch._dynamo.reset()
    model, x = built(way)
    inject_adapter_in_model(targeted("lora"), model)
    expected, counter = model(x), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    with torch.no_grad():
        model.proj.lora_B["default"].weight.mul_(2)
    torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


class Reader(nn.Module):
    """A forward of its own name, for calls that go around `__call__`."""

    def forward(self, x):
        return F.linear(x, self.proj.weight, self.proj.bias)


def test_a_forward_that_is_called_by_its_name():
    model, x = Reader(), torch.randn(3, 4)
    model.proj = nn.Linear(4, 4)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False), model)
    torch.testing.assert_close(model.forward(x), model(x))


def asks(self, x):
    weight = self.proj.weight
    assert weight is not None
    return self.proj(x)


def facts(self, x):
    if self.proj.weight is None or not isinstance(self.proj.weight, torch.Tensor) or not hasattr(self.proj, "weight"):
        return x
    x = x.to(self.proj.weight.dtype).to(device=self.proj.weight.device)
    size = self.proj.weight.shape[0] + self.proj.weight.size(0) + self.proj.weight.dim() + self.proj.weight.numel()
    y = self.proj(x) * size
    return y if self.proj.bias is not None else -y


def test_facts_cost_nothing(monkeypatch):
    model, x = built(facts)
    inject_adapter_in_model(targeted("lora"), model)
    dense, calls = ActiveAdapters.dense, []
    monkeypatch.setattr(ActiveAdapters, "dense", lambda self, *args: calls.append(args) or dense(self, *args))
    torch.testing.assert_close(model(x), model.proj(x) * 26)
    assert not calls
    other, x = built(asks)
    inject_adapter_in_model(targeted("lora"), other)
    other(x)
    assert len(calls) == 1


def test_a_weight_that_has_no_sum_says_so_where_it_is_computed_with():
    model = type("Reader", (nn.Module,), {"forward": lambda self, x: F.conv1d(x, self.proj.weight, groups=2)})()
    model.proj, x = nn.Conv1d(4, 4, 3, groups=2), torch.randn(1, 4, 5)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj"]), model)
    with pytest.raises(ValueError, match=r"proj: LoRA on a convolution with 2 groups .* no grouped"):
        model(x)
    asks = type("Asks", (nn.Module,), {"forward": lambda self, x: self.proj(x.to(self.proj.weight.dtype))})()
    asks.proj = model.proj
    assert asks(x).shape == (1, 4, 3)


def test_several_adapters_one_of_them_merged():
    model, x = built(direct)
    for name in ("a", "b"):
        inject_adapter_in_model(targeted("dora"), model, name)
    adapters.set_adapter(model, ["a", "b"])
    expected = model(x)
    adapters.merge_adapter(model, ["a"])
    torch.testing.assert_close(model(x), expected)
    adapters.merge_adapter(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore")
def test_mamba_and_t5():
    ids = torch.arange(6)[None]
    mamba = T.MambaForCausalLM(T.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=20, state_size=4)).eval()
    t5 = T.T5Model(T.T5Config(d_model=16, d_ff=24, d_kv=4, num_heads=4, num_layers=1, vocab_size=20)).eval()
    for model, names, inputs in (
        (mamba, ["dt_proj", "x_proj", "in_proj", "out_proj"], {"input_ids": ids}),
        (t5, ["wo", "q"], {"input_ids": ids, "decoder_input_ids": ids}),
    ):
        base, config = model(**inputs)[0], LoraConfig(r=2, target_modules=names, init_lora_weights=False)
        graft = bind(copy.deepcopy(model), config)
        inject_adapter_in_model(config, model)
        y = model(**inputs)[0]
        assert not torch.allclose(y, base)
        torch.testing.assert_close(graft(adapters.extract_params(model), **inputs)[0], y, rtol=1e-4, atol=1e-5)
        adapters.merge_adapter(model)
        torch.testing.assert_close(model(**inputs)[0], y, rtol=1e-4, atol=1e-5)
