"""The layer that carries adapters: what it shows, what it computes, and the models it lives in."""

import copy
import pickle

import peft
import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.utils import parametrizations

from torchgraft import adapters
from torchgraft.adapters import IA3Config, LoraConfig, OFTConfig, inject_adapter_in_model, set_adapter

from .models import EXACT, SIZES, both, inject, inputs, layers, net, randomise


class DummyModel(nn.Module):
    """The example of PEFT's documentation."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 10)
        self.linear = nn.Linear(10, 10)
        self.lm_head = nn.Linear(10, 10)

    def forward(self, input_ids):
        return self.lm_head(self.linear(self.embedding(input_ids)))


def test_the_example_of_pefts_documentation():
    config = LoraConfig(
        lora_alpha=16, lora_dropout=0.1, r=64, bias="none", target_modules=["linear"], init_lora_weights=False
    )
    model, before = DummyModel(), copy.deepcopy(config)
    assert inject_adapter_in_model(config, model) is model
    assert "(linear): lora.Linear(" in repr(model) and "(lora_A): ModuleDict(" in repr(model)
    assert "(default): Linear(in_features=10, out_features=64, bias=False)" in repr(model)
    dummy_inputs = torch.LongTensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    assert model(dummy_inputs).shape == (1, 8, 10) and model(input_ids=dummy_inputs).shape == (1, 8, 10)
    keys = ["linear.lora_A.weight", "linear.lora_B.weight"]
    assert list(adapters.get_peft_model_state_dict(model)) == keys
    inject_adapter_in_model(config, model, "second")
    assert model.linear.active_adapters == ["second"] and list(model.peft_config) == ["default", "second"]
    assert adapters.adapter_names(model) == ["default", "second"]
    assert list(adapters.get_peft_model_state_dict(model, adapter_name="second")) == keys
    assert type(model) is DummyModel and config == before and model.peft_config["default"] is not config


@pytest.mark.parametrize("method", ["LORA", "ADALORA", "VERA"])
def test_numbers_and_deltas_are_pefts(method):
    mine, theirs = both(method)
    randomise(mine), randomise(theirs)
    for own, other in zip(layers(mine), layers(theirs), strict=True):
        assert own.adapter_layer_names and own.get_base_layer() is own.base_layer
        for name in {"LORA": ("r", "lora_alpha", "scaling"), "ADALORA": ("r", "lora_alpha", "scaling"), "VERA": ("r",)}[
            method
        ]:
            assert dict(getattr(own, name)) == dict(getattr(other, name)), name
        delta = own.get_delta_weight("default")
        assert torch.allclose(delta, other.get_delta_weight("default"), rtol=0, atol=1e-10)
        assert own.in_features == other.base_layer.in_features


@pytest.mark.parametrize("method", sorted(SIZES.keys() - {"C3A", "FOURIERFT"}))  # wrong there, and in single precision
def test_gradients_are_pefts(method):
    mine, theirs = both(method)
    for model in (mine, theirs):
        randomise(model)
        model.train()(inputs()).square().sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in mine.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name in expected if "ranknum" not in name}
    close = EXACT.get(method, 1e-9)
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=close) for name in found)


@pytest.mark.parametrize("method", SIZES)
def test_autocast_gives_what_pefts_gives(method):
    mine, theirs = both(method, dtype=torch.float32)
    randomise(mine), randomise(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        x = inputs(dtype=torch.float32)
        y, expected = mine(x), theirs(x)
    assert y.dtype == expected.dtype
    assert torch.allclose(y.float(), expected.float(), rtol=0.05, atol=0.05)


def test_writing_a_number_changes_what_the_layer_computes():
    model, x = randomise(inject(net(), "LORA")), inputs()
    base, adapted = net()(x), model(x)
    model.first.scaling["default"] = model.second.scaling["default"] = 0.0
    assert torch.allclose(model(x), base, rtol=0, atol=1e-12)
    model.first.scaling["default"] = model.second.scaling["default"] = 8 / 3
    assert torch.allclose(model(x), adapted, rtol=0, atol=1e-12)
    graft = adapters.extract_graft(model)
    model.first.scaling["default"] = 1.0
    assert torch.allclose(adapters.extract_graft(model)(adapters.extract_params(model), x), model(x), atol=1e-12)
    assert torch.allclose(graft(adapters.extract_params(model), x), adapted, rtol=0, atol=1e-12)
    with pytest.raises(TypeError, match="first: r of adapter 'default' is fixed; inject another adapter"):
        model.first.r["default"] = 4
    with pytest.raises(KeyError, match="no adapter 'x' with a scaling here"):
        model.first.scaling["x"] = 4
    with pytest.raises(AttributeError, match="nothing"):
        model.first.nothing  # noqa: B018


def test_replaced_parameters_are_seen():
    model, x = randomise(inject(net(), "LORA")), inputs()
    model.first.lora_B["default"].weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    model.second.lora_B["default"] = nn.Linear(3, 8, bias=False).double()
    nn.init.zeros_(model.second.lora_B["default"].weight)
    torch.testing.assert_close(model(x), net()(x))
    model = randomise(inject(net(), "IA3"))
    model.first.ia3_l["default"] = nn.Parameter(torch.ones(4, 1, dtype=torch.float64))
    model.second.ia3_l["default"] = nn.Parameter(torch.ones(8, 1, dtype=torch.float64))
    torch.testing.assert_close(model(x), net()(x))


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()


@pytest.mark.parametrize("grad", [True, False])
def test_parents_that_read_weights_get_the_adapted_ones_where_peft_is_silently_the_base(grad):
    model, x = encoder(), torch.randn(2, 3, 8)
    base = model(x)
    fields = {"init_lora_weights": False, "target_modules": ["linear1", "linear2", "self_attn.out_proj"]}
    inject_adapter_in_model(LoraConfig(r=2, **fields), model)
    expected = copy.deepcopy(model)
    adapters.merge_and_unload(expected)
    with torch.set_grad_enabled(grad):
        y = model(x)
        assert not torch.allclose(y, base, atol=1e-2) and torch.allclose(y, expected(x), atol=1e-5)
    with adapters.disable_adapter(model):
        assert torch.allclose(model(x), base, atol=1e-6)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_peft_runs_the_base_there():
    model, x = encoder(), torch.randn(2, 3, 8)
    base = model(x)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["linear1", "linear2"])
    with torch.no_grad():
        assert torch.allclose(peft.inject_adapter_in_model(config, model).eval()(x), base, atol=1e-6)


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_a_module_under_two_names_is_adapted_under_both():
    model, x = Twice(), torch.randn(3, 4)
    base = model(x)
    for name, where in (("default", ["a"]), ("second", ["b"])):
        inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules=where), model, name)
        assert model.a is model.b
    set_adapter(model, ["default", "second"])
    merged = adapters.merge_and_unload(copy.deepcopy(model))
    assert merged.a is merged.b and torch.allclose(model(x), merged(x), atol=1e-5)
    adapters.unload(model)
    assert model.a is model.b and isinstance(model.a, nn.Linear) and torch.equal(model(x), base)
    saved = inject_adapter_in_model(
        IA3Config(target_modules=["0"], modules_to_save=["a"]), nn.ModuleDict({"0": nn.Linear(2, 2), "1": model})
    )
    assert saved["1"].a is saved["1"].b and isinstance(model.a, adapters.ModulesToSaveWrapper)


def test_a_parametrized_base_is_adapted_and_not_merged():
    model, x = net(), inputs()
    parametrizations.weight_norm(model.first)
    base = model(x)
    inject(model, "LORA")
    assert torch.equal(model(x), base)
    randomise(model)
    assert not torch.allclose(model(x), base)
    with pytest.raises(ValueError, match="first: weight is computed .* so no adapter can be merged"):
        adapters.merge_adapter(model)
    assert not model.second.merged


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("method", SIZES)
def test_a_copy_is_independent(method, clone):
    model, x = randomise(inject(net(), method)), inputs()
    before, other = model(x), clone(model)
    torch.testing.assert_close(other(x), before)
    randomise(other, seed=11)
    assert torch.equal(model(x), before) and not torch.allclose(other(x), before)
    if method == "VERA":
        assert other.first.vera_A["default"] is other.second.vera_A["default"]


def test_hooks_of_the_users_modules_run():
    model, calls = net(), []
    model.first.register_forward_hook(lambda module, args, y: calls.append(type(module).__name__))
    inject(model, "LORA")(inputs())
    assert calls == ["Linear"]
    x = inputs()
    assert torch.equal(model.first(input=x), model.first(x))
    assert model.first.in_features == 8 and model.first.weight is model.first.base_layer.weight


@pytest.mark.parametrize(
    "config", [LoraConfig(r=2), IA3Config(), OFTConfig(oft_block_size=4)], ids=lambda c: c.peft_type
)
def test_compiled_once_for_new_values_and_for_another_adapter(config):
    config.target_modules = ["first", "second"]
    model, x = net(), inputs()
    for name in "ab":
        inject_adapter_in_model(config, model, name)
    randomise(model)
    model.requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    set_adapter(model, "a", inference_mode=True)
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name, seed in (("b", 5), ("a", 6)):
            set_adapter(model, name, inference_mode=True)
            randomise(model, seed)
            assert torch.allclose(compiled(x), model(x), rtol=0, atol=1e-12)
    state = adapters.get_peft_model_state_dict(compiled, adapter_name="b")
    assert state.keys() == adapters.get_peft_model_state_dict(model, adapter_name="b").keys()


@pytest.mark.slow
def test_compiled_training_switches_without_compiling_anew():
    model, x = randomise(inject(inject(net(), "LORA", "a"), "LORA", "b")), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    set_adapter(model, "a")
    compiled(x).sum().backward()
    set_adapter(model, "b")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x).sum().backward()
    assert model.first.lora_B["b"].weight.grad is not None
