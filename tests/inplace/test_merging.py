"""Merging: any order of calls gives base plus active or merged adapters, and unmerging restores every bit."""

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import (
    LoraConfig,
    delete_adapter,
    disable_adapter_layers,
    enable_adapter_layers,
    extract_graft,
    get_base_model_state_dict,
    inject_adapter_in_model,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    unload,
    unmerge_adapter,
)
from torchgraft.adapters._inplace.tensors.checksum import content, holds

from .models import SIZES, inject, inputs, layers, net, randomise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = st.sampled_from("abc")


def tensors(model):
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}


def same(model, before):
    """The base holds the very tensors that it had, to the bit."""
    now = dict(get_base_model_state_dict(model))
    return all(
        now[name].data_ptr() == where and torch.equal(now[name], value) for name, (where, value) in before.items()
    )


class Calls(RuleBasedStateMachine):
    """A model under calls, beside what its output has to be."""

    @initialize(method=st.sampled_from(["LORA", "IA3", "OFT", "VERA", "ADALORA"]))
    def start(self, method):
        self.method, self.model, self.x = method, net(), inputs()
        self.before = tensors(self.model)
        self.names, self.active, self.merged, self.disabled = [], [], [], False

    @rule(name=NAMES, where=st.sampled_from([["first"], ["first", "second"]]))
    def inject(self, name, where):
        if name not in self.names:
            randomise(inject(self.model, self.method, name, target_modules=where), seed=ord(name), scale=0.2)
            self.names.append(name)
            self.active, self.merged = [name], []

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def set_adapter(self, data):
        self.active = data.draw(st.lists(st.sampled_from(self.names), unique=True))
        self.merged = []
        set_adapter(self.model, self.active)

    @precondition(lambda self: self.names and not self.disabled)
    @rule(data=st.data())
    def merge(self, data):
        names = data.draw(st.none() | st.lists(st.sampled_from(self.names), unique=True))
        merge_adapter(self.model, names)
        new = [name for name in (self.active if names is None else names) if name not in self.merged]
        self.merged += new[::-1] if self.method == "OFT" else new

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def unmerge(self, data):
        names = data.draw(st.none() | st.lists(st.sampled_from(self.names), unique=True))
        unmerge_adapter(self.model, names)
        self.merged = [name for name in self.merged if names is not None and name not in names]

    @precondition(lambda self: self.names)
    @rule()
    def disable(self):
        disable_adapter_layers(self.model)
        self.disabled, self.merged = True, []

    @precondition(lambda self: self.names)
    @rule()
    def enable(self):
        enable_adapter_layers(self.model)
        self.disabled = False

    @precondition(lambda self: set(self.names) - set(self.active) - set(self.merged))
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(set(self.names) - set(self.active) - set(self.merged))))
        delete_adapter(self.model, name)
        self.names.remove(name)

    @precondition(lambda self: self.names)
    @rule()
    def within_a_context(self):
        with adapters.disable_adapter(self.model):
            torch.testing.assert_close(self.model(self.x), net()(self.x))

    @precondition(lambda self: self.names)
    @rule()
    def copy(self):
        self.model = copy.deepcopy(self.model)
        self.before = {
            name: (tensor.data_ptr(), self.before[name][1])
            for name, tensor in get_base_model_state_dict(self.model).items()
        }

    @precondition(lambda self: self.names)
    @rule()
    def unload(self):
        assert unload(self.model) is self.model
        assert repr(self.model) == repr(net())
        self.names, self.active, self.merged, self.disabled = [], [], [], False

    @invariant()
    def the_output_is_that_of_the_base_with_merged_and_active_adapters(self):
        if self.names:
            for layer in layers(self.model):
                here = [name for name in self.merged if name in layer.entries]
                assert (layer.merged_adapters, layer.disable_adapters) == (here, self.disabled)
        model = net()
        active = [name for name in self.active if name not in self.merged]
        order = [*self.merged, *(active[::-1] if self.method == "OFT" else active)]
        for name in [] if self.disabled else order:
            graft = extract_graft(unmerged(self.model), name)
            for path, leaves in adapters.extract_params(self.model, name).items():
                fold(model.get_submodule(path), graft.binding.adapters("")[path], leaves)
        assert torch.allclose(self.model(self.x), model(self.x), rtol=0, atol=1e-9)
        assert same(self.model, self.before)


def unmerged(model):
    model = copy.deepcopy(model)
    unmerge_adapter(model)
    return model


@torch.no_grad()
def fold(module, entry, leaves):
    """The dense meaning of one adapter, written into a plain module."""
    weight, bias = entry.merge(leaves, entry.site.canonical(module.weight), module.bias)
    module.weight.copy_(entry.site.canonical(weight))
    if bias is not None:
        module.bias.copy_(bias)


TestCalls = Calls.TestCase
TestCalls.pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:adapters .* are merged already:UserWarning"),
    pytest.mark.filterwarnings("ignore:no adapter is merged:UserWarning"),
]
TestCalls.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", SIZES)
def test_unmerging_restores_every_bit_after_many_cycles(method, dtype):
    model = net(dtype=dtype)
    before = tensors(model)
    for name in "abc":
        randomise(inject(model, method, name), seed=ord(name))
    parameters = dict(model.named_parameters())
    for cycle in range(20):
        merge_adapter(model, ["abc"[cycle % 3]])
        merge_adapter(model, ["b", "c"])
        unmerge_adapter(model, ["c"])
        now = {name: getattr(model.first, name) for name in ("weight", "bias")}
        assert not all(torch.equal(tensor, before[f"first.{name}"][1]) for name, tensor in now.items())
        unmerge_adapter(model)
    assert same(model, before)
    assert all(parameters[name] is p for name, p in model.named_parameters())


@pytest.mark.parametrize("method", SIZES)
def test_merging_and_unloading_leaves_the_users_modules(method):
    model, x = randomise(inject(net(), method)), inputs()
    adapted = model(x)
    assert merge_and_unload(model) is model
    assert repr(model) == repr(net()) and not hasattr(model, "peft_config")
    assert torch.allclose(model(x), adapted, rtol=0, atol=1e-10)


def test_merging_and_unloading_keeps_the_trained_copy():
    model, x = randomise(inject(net(), "LORA", target_modules=["first"], modules_to_save=["head"])), inputs()
    adapted, head = model(x), model.head.modules_to_save["default"]
    merge_and_unload(model)
    assert model.head is head and torch.allclose(model(x), adapted, rtol=0, atol=1e-10)


def test_unloading_with_no_adapter_left_removes_the_layers():
    model = inject(net(), "LORA")
    delete_adapter(model, "default")
    unload(model)
    assert repr(model) == repr(net())


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float16), lambda m: m.bfloat16(), lambda m: m.double()])
def test_a_merged_model_moves_as_one_that_is_not(move):
    model = randomise(inject(net(dtype=torch.float32), "LORA"))
    expected = get_base_model_state_dict(move(copy.deepcopy(model)))
    merge_adapter(model)
    move(model)
    assert model.first.weight.dtype == expected["first.weight"].dtype
    unmerge_adapter(model)
    after = get_base_model_state_dict(model)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_merged_copy_unmerges_on_its_own(clone):
    model = randomise(inject(net(), "LORA"))
    before, x = tensors(model), inputs()
    merge_adapter(model)
    adapted, other = model(x), clone(model)
    unmerge_adapter(other)
    assert model.first.merged and not other.first.merged
    assert torch.equal(other.first.weight, before["first.base_layer.weight"][1])
    assert torch.equal(model(x), adapted) and torch.allclose(other(x), adapted, rtol=0, atol=1e-10)
    unmerge_adapter(model)
    assert all(p.data_ptr() == before[name][0] for name, p in model.named_parameters())


def test_state_dicts_of_a_merged_model():
    model = randomise(inject(net(), "LORA"))
    plain = net().state_dict()
    merge_adapter(model)
    merged = model.state_dict()
    assert not torch.equal(merged["first.base_layer.weight"], plain["first.weight"])
    assert all(torch.equal(tensor, plain[name]) for name, tensor in get_base_model_state_dict(model).items())
    with pytest.raises(RuntimeError, match=r"first: adapters \['default'\] are merged.*unmerge_adapter"):
        model.load_state_dict(merged)
    with pytest.raises(RuntimeError, match=r"first: adapters are merged.*unmerge_adapter"):
        adapters.set_base_model_state_dict(model, plain)
    kept = merged["first.base_layer.weight"].clone()
    unmerge_adapter(model)
    assert torch.equal(merged["first.base_layer.weight"], kept), "a state dict keeps what it was taken with"
    model.load_state_dict(model.state_dict())
    assert adapters.set_base_model_state_dict(model, plain) == ([], [])


def test_what_changes_under_a_merged_adapter_changes_the_merged_weight():
    model, x = randomise(inject(net(), "LORA")), inputs()
    other = adapters.get_peft_model_state_dict(randomise(inject(net(), "LORA"), seed=9))
    merge_adapter(model)
    adapters.set_peft_model_state_dict(model, other)
    model.first.scaling["default"] = 0.25
    model.load_state_dict({"second.lora_A.default.weight": torch.ones(3, 4)}, strict=False)
    merged = model(x)
    unmerge_adapter(model)
    assert torch.allclose(model(x), merged, rtol=0, atol=1e-10)


def test_writing_to_a_merged_base_is_detected_and_nothing_is_half_unmerged():
    model = randomise(inject(net(), "LORA"))
    merge_adapter(model)
    with torch.no_grad():
        model.second.base_layer.weight.add_(1)
    for call in (
        unmerge_adapter,
        unload,
        disable_adapter_layers,
        lambda m: set_adapter(m, []),
        lambda m: inject(m, "LORA", "late"),
        lambda m: adapters.set_peft_model_state_dict(m, adapters.get_peft_model_state_dict(m)),
    ):
        before = repr(model)
        with pytest.raises(RuntimeError, match="second: something wrote to weight while adapters were merged"):
            call(model)
        assert model.first.merged and model.second.merged and repr(model) == before


def bits(model):
    """What a model's parameters hold, as integers."""
    return {name: p.detach().clone().view(torch.int64) for name, p in model.named_parameters()}


def by_numpy(module):
    module.weight.detach().numpy()[0, 0] += 1


def by_average(module):
    with torch.no_grad():
        module.weight.lerp_(torch.ones_like(module.weight), 0.1)


def by_vector(module):
    nn.utils.vector_to_parameters(2 * nn.utils.parameters_to_vector(module.parameters()), module.parameters())


WRITES = {
    "data": lambda module: module.weight.data.mul_(2),
    "one number": lambda module: module.weight.data[0, 0].add_(1),
    "order": lambda module: module.weight.data.copy_(module.weight.data.flip(0).clone()),
    "sign": lambda module: module.weight.data[0].neg_(),
    "numpy": by_numpy,
    "average": by_average,
    "vector": by_vector,
    "inference mode": lambda module: torch.inference_mode()(module.weight.fill_)(1),
    "storage": lambda module: setattr(module.weight, "data", 2 * module.weight.data),
    "swap": lambda module: module.weight.set_(2 * module.weight.data),
    "parameter": lambda module: setattr(module, "weight", nn.Parameter(2 * module.weight.data)),
    "nan": lambda module: module.weight.data.fill_(float("nan")),
}
CHANGES = {
    "unmerge": unmerge_adapter,
    "unload": unload,
    "disable": disable_adapter_layers,
    "switch": lambda model: set_adapter(model, "other"),
    "merge another": lambda model: merge_adapter(model, ["other"]),
    "another scaling": lambda model: model.second.scaling.update({"default": 9.0}),
    "load": lambda model: model.load_state_dict(
        {key: tensor for key, tensor in model.state_dict().items() if "base_layer" not in key}, strict=False
    ),
    "move and unmerge": lambda model: unmerge_adapter(model.float()),
}


@pytest.mark.parametrize("write", WRITES)
def test_every_write_to_a_merged_weight_is_noticed(write):
    model = randomise(inject(inject(net(), "LORA", "other"), "LORA")).requires_grad_(False)
    merge_adapter(model, ["default"])
    WRITES[write](model.second.base_layer)
    written = bits(model)
    for change in CHANGES.values() if write == "data" else (unmerge_adapter,):
        with pytest.raises(RuntimeError, match="second: something wrote to weight .* merge_and_unload.model. keeps"):
            change(model)
        assert model.first.merged_adapters == model.second.merged_adapters == ["default"]
    kept = model.double().second.base_layer.weight.clone()
    assert write == "data" or all(torch.equal(tensor, written[name]) for name, tensor in bits(model).items())
    assert torch.equal(merge_and_unload(model).second.weight, kept) or write == "nan"


@pytest.mark.parametrize("method", SIZES)
def test_a_write_to_a_merged_bias_is_noticed(method):
    model = randomise(inject(net(), method)).requires_grad_(False)
    merge_adapter(model)
    model.first.base_layer.bias.data.mul_(2)
    with pytest.raises(RuntimeError, match="first: something wrote to bias"):
        unmerge_adapter(model)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -0.0])
def test_equal_content_counts_as_unwritten_wherever_it_lies(dtype, special):
    module = nn.Linear(300, 301, dtype=dtype)
    module.weight.data[0, :3] = special
    held = content(module.weight)
    for other in (
        module.weight.data.clone(),
        module.weight.data.t().contiguous().t(),
        torch.cat([module.weight.data.new_zeros(1, 300), module.weight.data])[1:],
    ):
        assert holds(other, held)
        other[-1, -1] = 3
        assert not holds(other, held)
    assert not holds(module.weight.data.view(301 * 300), held) and not holds(module.weight.data[:, :-1], held)
    model = randomise(inject(net(dtype=torch.float64), "LORA"))
    model.first.base_layer.weight.data[0, 0] = special
    before = bits(model)
    merge_adapter(model)
    model.first.base_layer.weight.data = model.first.base_layer.weight.data.clone()
    model.second.base_layer.weight = nn.Parameter(model.second.base_layer.weight.data.clone(), False)
    unmerge_adapter(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.q, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.q(self.embed(x)))


def test_a_tied_weight_is_refused_and_others_are_merged():
    model, x = Tied(), torch.arange(5)
    for name, where in (("tied", ["q", "head"]), ("free", ["q"])):
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=where)
        inject_adapter_in_model(config, model, name)
    set_adapter(model, ["tied", "free"])
    before, adapted = tensors(model), model(x)
    with pytest.raises(ValueError, match=r"head: its weight is tied to embed.weight.*untie the two, or leave"):
        merge_adapter(model)
    assert not model.q.merged and same_tensors(model, before)
    merge_adapter(model, ["free"])
    assert torch.allclose(model(x), adapted, atol=1e-5)


def same_tensors(model, before):
    return all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())


def test_a_merge_that_fails_leaves_nothing_merged():
    model = randomise(inject(net(), "LORA"))
    with torch.no_grad():
        model.second.lora_B["default"].weight[0, 0] = torch.inf
    before = tensors(model)
    with pytest.raises(ValueError, match=r"second: weight with \['default'\] merged has values that are not finite"):
        merge_adapter(model, safe_merge=True)
    assert not model.first.merged and same_tensors(model, before)
    merge_adapter(model)
    assert model.first.merged and model.second.merged


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: merge_adapter(m, ["x"]), ValueError, r"the model has no adapter 'x'; it has \['default'\]"),
        (lambda m: unmerge_adapter(m, ["x"]), ValueError, r"the model has no adapter 'x'; it has \['default'\]"),
        (lambda m: merge_adapter(nn.Linear(2, 2)), ValueError, "the model has no adapters; inject one first"),
        (lambda m: (disable_adapter_layers(m), merge_adapter(m)), RuntimeError, "disabled.*enable them first"),
        (lambda m: (merge_adapter(m), delete_adapter(m, "default")), ValueError, "is merged.*unmerge_adapter"),
        (lambda m: (merge_adapter(m), extract_graft(m)), ValueError, "first: adapters are merged.*unmerge_adapter"),
        (lambda m: merge_adapter(3), TypeError, "model is of type int, expected a torch.nn.Module"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call(inject(net(), "LORA"))
