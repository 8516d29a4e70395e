"""Injected LoRA on `nn.MultiheadAttention`, against PEFT where PEFT is right."""

import copy

import peft
import pytest
import torch
from peft.utils import set_peft_model_state_dict as peft_set
from torch import nn

from torchgraft import adapters
from torchgraft.functional import bind

from .models import parameters, peft_state, randomise, trained


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(8, 2, **options), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attn(x, x, x)[0])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x)


X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pair(dtype=torch.float64, cls=Net, target="attn", heads=("head",), **fields):
    """The same model with the same adapter, injected here and by PEFT."""
    torch.manual_seed(0)
    models = [cls().to(dtype).eval()]
    models.append(copy.deepcopy(models[0]))
    for model, lib in zip(models, (adapters, peft), strict=True):
        torch.manual_seed(2)
        lib.inject_adapter_in_model(lib.LoraConfig(r=3, target_modules=[target, *heads], **fields), model)
    return models


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_starts_as_in_peft(init):
    mine, theirs = pair(torch.float32, init_lora_weights=init, rank_pattern={"attn": 2})
    assert parameters(mine).keys() == parameters(theirs).keys()
    for name, p in parameters(theirs).items():
        assert torch.equal(parameters(mine)[name], p), name
    assert trained(mine) == trained(theirs)
    assert list(mine.state_dict()) == list(mine.state_dict())
    assert set(mine.state_dict()) == set(theirs.state_dict())


def test_output_projection_once_where_peft_adds_it_twice():
    mine, theirs = pair()
    randomise(theirs)
    state = peft_state(theirs)
    assert "attn.base_layer.out_proj.lora_A.weight" in state
    assert adapters.set_peft_model_state_dict(mine, state) == ([], [])
    base = adapters.get_base_model_state_dict(mine)
    in_proj = mine.attn.get_delta_weight("default")
    out_proj = mine.attn.out_proj.get_delta_weight("default")
    head = mine.head.get_delta_weight("default")

    def dense(times):
        net = Net().double().eval()
        weights = {"attn.in_proj_weight": in_proj, "attn.out_proj.weight": times * out_proj, "head.weight": head}
        net.load_state_dict({name: base[name] + weights.get(name, 0) for name in base})
        return net(X)

    torch.testing.assert_close(mine(X), dense(1))
    torch.testing.assert_close(theirs(X), dense(2))
    with torch.no_grad():
        for model in (mine, theirs):
            model.get_parameter("attn.base_layer.out_proj.lora_B.default.weight").zero_()
    torch.testing.assert_close(mine(X), theirs(X))


def test_merging_and_back():
    mine, _ = pair()
    randomise(mine)
    before, expected = copy.deepcopy(adapters.get_base_model_state_dict(mine)), mine(X)
    adapters.merge_adapter(mine)
    torch.testing.assert_close(mine(X), expected)
    adapters.unmerge_adapter(mine)
    after = adapters.get_base_model_state_dict(mine)
    assert all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(mine(X), expected, rtol=0, atol=0)
    with adapters.disable_adapter(mine):
        base = Net().double().eval()
        base.load_state_dict(before)
        torch.testing.assert_close(mine(X), base(X))
    merged = adapters.merge_and_unload(copy.deepcopy(mine))
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    torch.testing.assert_close(merged(X), expected)
    plain = adapters.unload(mine)
    assert all(torch.equal(plain.state_dict()[name], before[name]) for name in before)


def test_trains_and_switches():
    mine, _ = pair()
    mine.train()
    loss = mine(X).square().mean()
    loss.backward()
    grads = [name for name, p in mine.named_parameters() if p.grad is not None]
    assert set(grads) == {name for name, required in trained(mine).items() if required}
    adapters.inject_adapter_in_model(adapters.LoraConfig(r=2, target_modules=["attn"]), mine, "other")
    randomise(mine)
    with_other = mine(X)
    adapters.set_adapter(mine, "default")
    assert not torch.allclose(mine(X), with_other)
    adapters.delete_adapter(mine, "other")
    assert not any("other" in name for name in mine.state_dict())


@pytest.mark.parametrize("grad", [True, False])
def test_inside_a_transformer_whose_fast_path_reads_the_weights(grad):
    mine, _ = pair(cls=Encoder, target="self_attn", heads=())
    randomise(mine)
    with torch.set_grad_enabled(grad):
        adapted = mine(X)
    adapters.merge_adapter(mine)
    torch.testing.assert_close(adapted, mine(X))
    adapters.unmerge_adapter(mine)
    params, graft = adapters.extract_params(mine), adapters.extract_graft(mine)
    torch.testing.assert_close(graft(params, X), adapted)


@pytest.mark.slow
def test_compiles_whole():
    torch._dynamo.reset()
    mine, _ = pair()
    randomise(mine)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), mine(X))
    with torch._dynamo.config.patch(error_on_recompile=True):
        randomise(mine, seed=7)
        torch.testing.assert_close(compiled(X), mine(X))


def test_files_go_both_ways(tmp_path):
    mine, theirs = pair(torch.float32)
    randomise(mine)
    x = X.float()
    adapters.save_adapter(mine, tmp_path / "mine")
    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(Net().eval(), tmp_path / "mine")
    state = peft_state(model)
    own = adapters.get_peft_model_state_dict(mine)
    assert {key.removeprefix("base_model.model."): 0 for key in state}.keys() == own.keys()
    assert all(torch.equal(state[key], own[key.removeprefix("base_model.model.")]) for key in state)
    model.save_pretrained(tmp_path / "theirs")
    torch.manual_seed(0)
    loaded = adapters.load_adapter(Net().eval(), tmp_path / "theirs")
    torch.testing.assert_close(loaded(x), mine(x))
    torch.manual_seed(0)
    base = Net().eval()
    graft = bind(base, adapters.AdapterConfig.from_pretrained(tmp_path / "theirs"))
    params = adapters.load_adapter(graft, tmp_path / "theirs")
    torch.testing.assert_close(graft(params, x), mine(x))
    adapters.save_adapter(graft, tmp_path / "again", params=params)
    a, b = (tmp_path / name / "adapter_model.safetensors" for name in ("mine", "again"))
    assert a.read_bytes() == b.read_bytes()
    assert not peft_set(theirs, own).unexpected_keys


def test_low_cpu_mem_usage_and_state_dict_targets():
    mine, _ = pair(torch.float32)
    state = adapters.get_peft_model_state_dict(mine)
    torch.manual_seed(0)
    model = Net().eval()
    config = adapters.LoraConfig(r=3, target_modules=["attn", "head"])
    adapters.inject_adapter_in_model(config, model, low_cpu_mem_usage=True, state_dict=state)
    assert adapters.set_peft_model_state_dict(model, state, low_cpu_mem_usage=True) == ([], [])
    assert not any(p.is_meta for p in model.parameters())
    torch.testing.assert_close(model(X.float()), mine(X.float()))


def test_separate_projections_are_one_layer():
    torch.manual_seed(0)
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=6, vdim=10)}).double()
    model = adapters.inject_adapter_in_model(adapters.LoraConfig(r=2, target_modules=["attn"]), copy.deepcopy(base))
    randomise(model)
    state = adapters.get_peft_model_state_dict(model)
    assert {key: tuple(t.shape) for key, t in state.items() if "out_proj" not in key} == {
        "attn.lora_A.weight": (2, 24),
        "attn.lora_B.weight": (24, 2),
    }
    q, k, v = (torch.randn(4, 3, size, dtype=torch.float64) for size in (8, 6, 10))
    adapted = model["attn"](q, k, v)
    graft, params = adapters.extract_graft(model), adapters.extract_params(model)
    torch.testing.assert_close(graft.view(params)["attn"](q, k, v), adapted)
    adapters.merge_adapter(model)
    torch.testing.assert_close(model["attn"](q, k, v), adapted)
    adapters.unmerge_adapter(model)
    after = adapters.get_base_model_state_dict(model)
    assert all(torch.equal(after[name], value) for name, value in base.state_dict().items())
