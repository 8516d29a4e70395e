"""Adapters of bare parameters in a user's model: PEFT's modules, names, numbers and life cycle."""

import copy
import warnings

import optree
import peft
import pytest
import torch
from peft.functional import set_adapter as peft_set_adapter
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import LoraConfig, inject_adapter_in_model
from torchgraft.functional import bind
from torchgraft.functional._sites.factored import Factored

X = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
FIELDS = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": ["experts.up", "experts.down"]}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 4, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(3, 4, 8, dtype=torch.float64))
        self.scale = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.calls = 0

    def forward(self, x):
        expert = torch.arange(len(x)) % 3
        up = torch.bmm(self.up[expert], x.unsqueeze(-1)).tanh()
        return torch.bmm(self.down[expert], up).squeeze(-1) * self.scale


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=torch.float64)
        self.experts = Experts()
        self.gate = nn.Linear(4, 4, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.gate(self.experts(self.first(x)))


def net():
    torch.manual_seed(0)
    return Net().eval()


def ours(model=None, name="default", **fields):
    return inject_adapter_in_model(LoraConfig(**copy.deepcopy({**FIELDS, **fields})), model or net(), name)


def theirs(model=None, name="default", **fields):
    config = peft.LoraConfig(**copy.deepcopy({**FIELDS, **fields}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        warnings.filterwarnings("ignore", ".*_pattern keys did not match")  # it looks at modules only
        return peft.inject_adapter_in_model(config, model or net(), name).eval()


def seeded(do, **fields):
    torch.manual_seed(7)
    return do(**fields)


def randomised(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


CASES = {
    "both": {},
    "one": {"target_parameters": ["down"]},
    "with modules": {"target_modules": ["first"], "target_parameters": ["experts.up", "gate.weight"]},
    "patterns": {"rank_pattern": {"experts.up": 3}, "alpha_pattern": {"down": 5}, "use_rslora": True},
    "random": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_injection_is_pefts(fields):
    a, b = seeded(ours, **fields), seeded(theirs, **fields)
    mine, expected = dict(a.named_parameters()), dict(b.named_parameters())
    assert list(mine) == list(expected)
    for name, parameter in mine.items():
        assert torch.equal(parameter, expected[name]) and parameter.requires_grad == expected[name].requires_grad
    randomised(a), randomised(b)
    y, z = a(X), b(X)
    torch.testing.assert_close(y, z)
    (y * X).sum().backward(), (z * X).sum().backward()
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, expected[name].grad)
    one, other = adapters.get_peft_model_state_dict(a), peft.get_peft_model_state_dict(b)
    assert list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)
    layer, wrapper = a.experts, b.experts
    for attribute in ("parameter_name", "num_experts", "scaling", "r", "lora_alpha", "merged"):
        assert getattr(layer, attribute) == getattr(wrapper, attribute)
    assert torch.equal(layer.get_param(), wrapper.get_param())
    for part in (layer, wrapper):
        assert type(part.get_base_layer()) is Experts
    delta, expected = layer.get_delta_weight("default"), wrapper.get_delta_weight("default")
    torch.testing.assert_close(delta, expected)


def test_state_dicts_go_both_ways():
    a, b = randomised(ours()), theirs()
    state = adapters.get_peft_model_state_dict(a)
    result = peft.set_peft_model_state_dict(b, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(b(X), a(X))
    fresh = ours()
    assert adapters.set_peft_model_state_dict(fresh, peft.get_peft_model_state_dict(b)) == ([], [])
    torch.testing.assert_close(fresh(X), a(X))
    meta = inject_adapter_in_model(LoraConfig(**FIELDS), net(), low_cpu_mem_usage=True)
    adapters.set_peft_model_state_dict(meta, state, low_cpu_mem_usage=True)
    torch.testing.assert_close(meta(X), a(X))
    assert meta.experts.lora_A["default"].weight.dtype == torch.float64


def test_nothing_is_multiplied_out(monkeypatch):
    model = randomised(ours())
    monkeypatch.setattr(Factored, "dense", lambda self: pytest.fail("multiplied out"))
    model(X).sum().backward()


def test_life_cycle():
    base, model = net(), randomised(ours())
    y = model(X)
    assert not torch.allclose(y, base(X))
    with adapters.disable_adapter(model):
        torch.testing.assert_close(model(X), base(X))
    adapters.merge_adapter(model, safe_merge=True)
    torch.testing.assert_close(model(X), y)
    bare = model.experts.get_base_layer()
    assert not torch.equal(bare.up, base.experts.up) and model.experts.merged_adapters == ["default"]
    assert all(torch.equal(t, base.state_dict()[k]) for k, t in adapters.get_base_model_state_dict(model).items())
    adapters.unmerge_adapter(model)
    assert torch.equal(bare.up, base.experts.up) and torch.equal(model(X), y)
    torch.testing.assert_close(copy.deepcopy(model)(X), y)
    graft, params = adapters.extract_graft(model), adapters.extract_params(model)
    torch.testing.assert_close(graft(params, X), y)
    assert sorted(params) == ["experts.down", "experts.up"]
    planted = inject_adapter_in_model(LoraConfig(**FIELDS), net(), params=params)
    torch.testing.assert_close(planted(X), y)
    merged = adapters.merge_and_unload(copy.deepcopy(model))
    assert type(merged.experts) is Experts
    torch.testing.assert_close(merged(X), y)
    assert type(adapters.unload(model).experts) is Experts
    torch.testing.assert_close(model(X), base(X))
    assert list(model.state_dict()) == list(base.state_dict())


def test_several_adapters_are_pefts():
    models = []
    for inject in (ours, theirs):
        model = inject(inject(), "other", r=1, lora_alpha=5)
        models.append(randomised(model))
    a, b = models
    assert list(dict(a.named_parameters())) == list(dict(b.named_parameters()))
    for names in ("other", "default"):
        adapters.set_adapter(a, names), peft_set_adapter(b, names)
        torch.testing.assert_close(a(X), b(X))
        one, other = (lib.get_peft_model_state_dict(m, adapter_name=names) for lib, m in ((adapters, a), (peft, b)))
        assert list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)
    adapters.set_adapter(a, ["default", "other"])
    both = a(X)
    adapters.merge_adapter(a)
    torch.testing.assert_close(a(X), both)
    adapters.unmerge_adapter(a)
    adapters.set_adapter(a, "other")
    adapters.delete_adapter(a, "default")
    peft_set_adapter(b, "other")
    torch.testing.assert_close(a(X), b(X))


@pytest.mark.parametrize("first", ["up", "down"])
def test_adapters_may_be_on_different_parameters(first):
    """PEFT refuses this; files have the keys that each adapter would have alone."""
    model = ours(ours(target_parameters=[f"experts.{first}"]), "both")
    randomised(model)
    state = adapters.get_peft_model_state_dict(model, adapter_name="both")
    assert list(state) == list(adapters.get_peft_model_state_dict(ours()))
    adapters.set_adapter(model, "both")
    alone = ours()
    assert adapters.set_peft_model_state_dict(alone, state) == ([], [])
    torch.testing.assert_close(alone(X), model(X))
    doubled = {key: 2 * value for key, value in state.items()}
    adapters.set_peft_model_state_dict(model, doubled, "both")
    adapters.set_peft_model_state_dict(alone, doubled)
    torch.testing.assert_close(alone(X), model(X))
    adapters.set_adapter(model, "default")
    one = ours(target_parameters=[f"experts.{first}"])
    adapters.set_peft_model_state_dict(one, adapters.get_peft_model_state_dict(model))
    torch.testing.assert_close(one(X), model(X))


def test_modes_hooks_and_moves_follow():
    model = randomised(ours())
    seen = []
    model.experts.get_base_layer().register_forward_hook(lambda module, args, y: seen.append(module.training))
    y = model(X)
    model.train()(X)
    assert seen == [False, True]
    model.float()
    torch.testing.assert_close(model(X.float()).double(), y, rtol=1e-4, atol=1e-4)
    state = {key: value.clone() for key, value in model.double().state_dict().items()}
    model.load_state_dict(state, assign=True)
    model(X)
    with torch.no_grad():
        model.experts.lora_A["default"].weight = nn.Parameter(torch.zeros_like(state["experts.lora_A.default.weight"]))
        model.experts.base_layer.lora_B["default"].weight.zero_()
    assert torch.equal(model(X), adapters.unload(model)(X))


def test_a_parent_that_reads_the_parameter_gets_the_adapted_one():
    class Reader(Net):
        def forward(self, x):
            return torch.bmm(self.experts.up[torch.zeros(len(x), dtype=torch.long)], x.unsqueeze(-1))

    torch.manual_seed(0)
    model = randomised(ours(Reader().eval()))
    y = model(X)
    adapters.merge_adapter(model)
    torch.testing.assert_close(model(X), y)
    assert isinstance(model.experts.up, nn.Parameter)


@pytest.mark.slow
def test_compiles_whole_and_once():
    model = randomised(ours())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X))
    with torch._dynamo.config.patch(error_on_recompile=True):
        with torch.no_grad():
            model.experts.lora_B["default"].weight.mul_(2)
        torch.testing.assert_close(compiled(X), model(X))


def test_errors_leave_the_model_as_it_was():
    def check(error, match, fields, model=None, **how):
        model = model or net()
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(error, match=match):
            inject_adapter_in_model(LoraConfig(**{**FIELDS, **fields}), model, "new", **how)
        assert {name: type(module) for name, module in model.named_modules()} == before

    check(ValueError, "lora_dropout is 0.1 at experts.up", {"lora_dropout": 0.1})
    check(ValueError, "match no parameter of the model", {"target_parameters": ["nowhere"]})
    check(ValueError, "experts.scale: the parameter has shape", {"target_parameters": ["scale"]})
    check(ValueError, "first.weight: target_parameters names a parameter of a module that is adapted",
          {"target_modules": ["first"], "target_parameters": ["first.weight"]})  # fmt: skip
    whole = ours(target_modules=["first"], target_parameters=None)
    check(ValueError, "first.weight: another adapter is on this module as a whole",
          {"target_parameters": ["first.weight"]}, whole)  # fmt: skip
    part = ours(target_parameters=["first.weight"])
    check(ValueError, "first: another adapter is on a parameter of this module",
          {"target_modules": ["first"], "target_parameters": None}, part)  # fmt: skip
    check(ValueError, "up, a parameter of the model itself, is targeted", {"target_parameters": ["up"]}, Experts())
    check(ValueError, "names experts.up, which is in one of modules_to_save", {"modules_to_save": ["experts"]})
    saved = ours(target_parameters=["gate.weight"], modules_to_save=["experts"])
    check(ValueError, "experts: experts is one of modules_to_save, of which adapters train copies", {}, saved)
    state = adapters.get_peft_model_state_dict(ours())
    check(ValueError, "state_dict is given with target_parameters", {}, state_dict=state)
    tied = net()
    tied.gate.weight = tied.first.weight
    model = ours(tied, target_parameters=["first.weight"])
    with pytest.raises(ValueError, match=r"first.weight: its weight is tied to gate.weight"):
        adapters.merge_adapter(model)


def test_beside_layers_that_run_several_times_and_tied_weights():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Net(), Net()])
            self.embed, self.head = nn.Embedding(4, 4, dtype=torch.float64), nn.Linear(4, 4, False, dtype=torch.float64)
            self.head.weight = self.embed.weight

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.head(x + self.embed(torch.arange(len(x)) % 4))

    torch.manual_seed(0)
    model = Stack().eval()
    fields = {"layer_replication": [(0, 2), (1, 2)], "target_modules": ["embed"], "ensure_weight_tying": True}
    config = LoraConfig(**{**FIELDS, **fields})
    graft = bind(model, config)
    params = optree.tree_map(torch.randn_like, graft.init(dtype=torch.float64))
    assert "layers.2.experts.up" in params and "head" not in params
    injected = inject_adapter_in_model(config, copy.deepcopy(model), params=params)
    torch.testing.assert_close(injected(X), graft(params, X))
    assert not torch.allclose(injected.layers[2](X), injected.layers[1](X))


def test_loading_the_base_while_merged_is_an_error():
    model = randomised(ours())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    adapters.merge_adapter(model)
    with pytest.raises(RuntimeError, match="are merged, so loading the base's weights would mix the two"):
        model.load_state_dict(state)
