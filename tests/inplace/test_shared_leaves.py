"""Leaves that several layers train together: one container in all of them, one parameter, one key."""

import copy
import gc
import pickle

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import (
    BaseTunerLayer,
    LoraConfig,
    cast_adapter_dtype,
    delete_adapter,
    disable_adapter,
    extract_config,
    extract_graft,
    extract_params,
    get_base_model_state_dict,
    inject_adapter_in_model,
    lora_plus_groups,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    set_requires_grad,
    summary,
    unload,
    unmerge_adapter,
)
from torchgraft.functional import bind, value_and_grad

from ..toy_methods import CONFIG, BankConfig, Model, X, away, dense

FORMS = {"by size": {}, "one for all": {"by_size": False}, "nothing else": {"mixed": False}}
forms = pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)


def planted(name="default", model=None, seed=0, **fields):
    """A model with an adapter of some numbers, the graft of the same, and the tree."""
    config = BankConfig(**{**CONFIG, **fields})
    graft = bind(Model().double(), config)
    params = away(graft.init(torch.Generator().manual_seed(seed)), seed)
    model = inject_adapter_in_model(config, model or Model().double(), name, params=params)
    return model, graft, params


def bank(layer, name="default"):
    """The bank that a layer of five inputs has."""
    found = layer.bank[name]
    return found if isinstance(found, nn.Parameter) else found[f"{layer.base_layer.out_features}x5"]


def check_one(model, fields, name="default"):
    """What layers share is one object in all of them."""
    first, second, out = model.first, model.second, model.out
    assert first.bank is second.bank is out.bank
    assert bank(first, name) is bank(second, name)
    assert (bank(out, name) is bank(first, name)) is (fields == FORMS["one for all"])
    assert sum(parameter is bank(first, name) for parameter in model.parameters()) == 1
    for layer in (first, second):
        active = (
            layer._live.leaves()[layer._live.names.index(name)] if name in layer._live.names else layer.leaves(name)
        )
        assert active["bank"] is bank(first, name)


@forms
def test_outputs_are_the_functional_ones(fields):
    model, graft, params = planted(**fields)
    assert torch.equal(model(X), graft(params, X))
    torch.testing.assert_close(model(X), dense(graft.model, params)(X))
    check_one(model, fields)


@forms
def test_names_of_parameters(fields):
    model = inject_adapter_in_model(BankConfig(**CONFIG, **fields), Model())
    banks = ["first.bank.default"] if "by_size" in fields else ["first.bank.default.5x5", "first.bank.default.2x5"]
    mixes = [] if "mixed" in fields else [f"{path}.mix.default" for path in CONFIG["target_modules"]]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(trained) == sorted(banks + mixes)
    assert "bank" in model.out.adapter_layer_names
    assert torch.equal(model(X.float()), Model()(X.float())), "it starts as the identity"


def replaced_by_loading(model):
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert len([key for key in state if ".bank." in key]) > 1
    model.load_state_dict(state, assign=True)
    return model


def replaced_by_assignment(model):
    held = model.second.bank
    if isinstance(held["default"], nn.Parameter):
        held["default"] = nn.Parameter(held["default"].detach().clone())
    else:
        held["default"]["5x5"] = nn.Parameter(held["default"]["5x5"].detach().clone())
    return model


CHANGES = {
    "half": lambda model: model.half(),
    "to": lambda model: model.to(torch.float32).to(torch.float64),
    "to empty": lambda model: model.to("meta").to_empty(device="cpu"),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "loading": replaced_by_loading,
    "assignment": replaced_by_assignment,
}


@forms
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_shared_stays_one(change, fields):
    model, graft, params = planted(**fields)
    before = bank(model.first)
    model = CHANGES[change](model)
    check_one(model, fields)
    if change not in ("half", "to empty"):
        torch.testing.assert_close(model(X), graft(params, X))
    if change in ("deepcopy", "pickle"):
        assert bank(model.first) is not before
    with torch.no_grad():
        bank(model.second).zero_()
        assert not bank(model.first).any()


@forms
def test_a_copy_of_one_layer_goes_without_the_others(fields):
    model, *_ = planted(**fields)
    for layer in (copy.deepcopy(model.second), pickle.loads(pickle.dumps(model.second))):
        assert torch.equal(layer(X), model.second(X))
        assert layer.bank.layers == [layer]
        assert len(list(layer.modules())) == len(list(model.second.modules()))
    assert {id(one) for one in model.first.bank.layers} == {id(model.first), id(model.second), id(model.out)}


@forms
def test_compiled_calls_follow_an_assignment(fields):
    model, graft, params = planted(**fields)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(X), graft(params, X))
    changed = copy.deepcopy(params)
    changed["*"]["bank" if "by_size" in fields else "bank.5x5"] *= 2
    with torch.no_grad():
        new = nn.Parameter(2 * bank(model.first))
    if isinstance(model.out.bank["default"], nn.Parameter):
        model.out.bank["default"] = new
    else:
        model.out.bank["default"]["5x5"] = new
    torch.testing.assert_close(compiled(X), graft(changed, X))
    torch.testing.assert_close(model(X), graft(changed, X))


@forms
def test_training_through_one_layer_changes_all(fields):
    model, graft, params = planted(**fields)
    model(X).square().sum().backward()
    grads = value_and_grad(lambda params: graft(params, X).square().sum())(params)[1]
    for name, grad in grads["*"].items():
        layer = model.out if name == "bank.2x5" else model.first
        torch.testing.assert_close(bank(layer).grad, grad)
    before = model.second(X).detach()
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.first(X).sum().backward()
    optimizer.step()
    assert not torch.allclose(model.second(X), before)


@forms
def test_adapters_have_banks_of_their_own(fields):
    model, graft, params = planted("a", **fields)
    model, other, more = planted("b", model, 1, **fields | {"target_modules": ["second", "first"]})
    check_one(model, fields, "a")
    assert model.first.bank["a"] is not model.first.bank["b"] and "b" not in model.out.entries
    close = torch.testing.assert_close
    close(model(X), other(more, X))
    set_adapter(model, "a")
    close(model(X), graft(params, X))
    assert bank(model.first, "a").requires_grad and not bank(model.first, "b").requires_grad
    set_adapter(model, ["a", "b"])
    close(
        model(X), bind(Model().double(), {"a": graft.configs[""], "b": other.configs[""]})({"a": params, "b": more}, X)
    )
    with disable_adapter(model):
        assert torch.equal(model(X), Model().double()(X))
        assert not bank(model.first, "a").requires_grad
    assert bank(model.first, "a").requires_grad and bank(model.first, "b").requires_grad
    delete_adapter(model, "b")
    assert list(model.first.bank) == ["a"] and not [name for name, _ in model.named_parameters() if ".b." in f"{name}."]
    close(model(X), graft(params, X))
    delete_adapter(model, "a")
    assert torch.equal(model(X), Model().double()(X)) and not len(model.first.bank)
    model, graft, params = planted("a", model, 2, **fields)
    close(model(X), graft(params, X))
    check_one(model, fields, "a")


def test_layers_share_otherwise_in_another_adapter():
    model, *_ = planted("a", by_size=False)
    with pytest.raises(ValueError, match=r"first: adapter 'a' is BANK, and BANK has another kind of 'bank'"):
        planted("b", model)
    assert "b" not in model.first.bank and list(model.peft_config) == ["a"]
    torch.testing.assert_close(planted("b", model, 1, by_size=False)[0].first.bank["a"], bank(model.second, "a"))


@forms
def test_a_layer_that_drops_an_adapter_leaves_it_to_the_others(fields):
    model, graft, params = planted(**fields)
    model.out.delete_adapter("default")
    sizes = [] if "by_size" in fields else ["5x5"]
    assert bank(model.first).requires_grad and (not sizes or list(model.first.bank["default"]) == sizes)
    kept = BankConfig(**{**CONFIG, "target_modules": ["first", "second"]}, **fields)
    rest = {path: leaves for path, leaves in params.items() if path != "out"}
    rest["*"] = {name: one for name, one in params["*"].items() if name != "bank.2x5"}
    if sizes:
        torch.testing.assert_close(model(X), bind(graft.model, kept)(rest, X))
    model.first.delete_adapter("default")
    model.second.delete_adapter("default")
    assert not len(model.first.bank)


@forms
def test_merging_is_exact_to_take_back(fields):
    model, graft, params = planted(**fields)
    before = {name: tensor.clone() for name, tensor in get_base_model_state_dict(model).items()}
    merge_adapter(model)
    torch.testing.assert_close(model(X), graft(params, X))
    torch.testing.assert_close(model.first.base_layer(X), dense(graft.model, params).first(X))
    unmerge_adapter(model)
    for name, tensor in get_base_model_state_dict(model).items():
        assert torch.equal(tensor, before[name])
    merged = merge_and_unload(copy.deepcopy(model))
    assert type(merged.first) is nn.Linear
    torch.testing.assert_close(merged(X), graft(params, X))
    assert [name for name, _ in unload(model).named_parameters()] == [name for name, _ in Model().named_parameters()]


@forms
def test_dtypes_and_flags(fields):
    model = inject_adapter_in_model(BankConfig(**CONFIG, **fields), Model()).to(torch.bfloat16)
    cast_adapter_dtype(model, "default")
    assert bank(model.first).dtype == bank(model.out).dtype == torch.float32
    assert model.first.base_layer.weight.dtype == torch.bfloat16
    check_one(model, fields)
    set_requires_grad(model, "default", False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    set_requires_grad(model, "default")
    assert bank(model.first).requires_grad and bank(model.out).requires_grad
    assert (
        inject_adapter_in_model(BankConfig(**CONFIG, **fields, inference_mode=True), Model())
        .first.bank["default"]
        .requires_grad_
        is not None
    )


@forms
@pytest.mark.parametrize("before", [False, True])
def test_an_error_leaves_nothing_behind(fields, before, monkeypatch):
    model = planted("a", **fields)[0] if before else Model().double()
    state, y = {name: id(p) for name, p in model.named_parameters()}, model(X)
    add = BaseTunerLayer.add

    def fail(self, name, entry, *rest):
        add(self, name, entry, *rest)
        if entry.site.path == "second":
            raise RuntimeError("in between")

    with monkeypatch.context() as patch:
        patch.setattr(BaseTunerLayer, "add", fail)
        with pytest.raises(RuntimeError, match="in between"):
            planted("b", model, 1, **fields | {"target_modules": ["first", "second"]})
    gc.collect()
    assert {name: id(p) for name, p in model.named_parameters()} == state
    assert torch.equal(model(X), y)
    if before:
        assert {id(one) for one in model.first.bank.layers} == {id(model.first), id(model.second), id(model.out)}
        check_one(model, fields, "a")
    other = planted("b", model, 1, **fields)
    torch.testing.assert_close(other[0](X), other[1](other[2], X))


@forms
def test_trees_share_storage_both_ways(fields):
    model, graft, params = planted(**fields)
    tree = extract_params(model)
    assert list(tree) == list(params)
    for path, leaves in params.items():
        assert list(tree[path]) == list(leaves)
        for leaf, tensor in leaves.items():
            assert tree[path][leaf].data_ptr() == tensor.data_ptr() and torch.equal(tree[path][leaf], tensor)
    found = extract_graft(model)
    assert torch.equal(found(tree, X), graft(params, X))
    assert extract_config(model).to_dict() == graft.configs[""].to_dict()


@forms
def test_a_tree_that_does_not_fit_is_refused(fields):
    _, _, params = planted(**fields)
    model = Model().double()
    name = next(iter(params["*"]))
    for bad, match in (
        ({path: leaves for path, leaves in params.items() if path != "*"}, r"params lacks site '\*'"),
        ({**params, "*": {}}, r"params\['\*'\] lacks leaf"),
        ({**params, "*": params["*"] | {name: params["*"][name][:1]}}, r"params\['\*'\]\['bank.*has shape"),
    ):
        with pytest.raises((KeyError, ValueError), match=match):
            inject_adapter_in_model(BankConfig(**CONFIG, **fields), model, params=bad)
        assert type(model.first) is nn.Linear


@forms
def test_summaries_and_optimizers_see_it_once(fields):
    model, graft, params = planted(**fields)
    size = sum(tensor.numel() for leaves in params.values() for tensor in leaves.values())
    assert summary(model).rows[0].parameters == summary(model).rows[0].trainable == size
    assert summary(graft, params).rows[0].parameters == size
    inject_adapter_in_model(LoraConfig(target_modules=["first"]), model, "lora")
    set_adapter(model, ["default", "lora"])
    groups = lora_plus_groups(model, 1e-3, 16)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and {id(bank(model.first)), id(bank(model.out))} <= set(grouped)
    torch.optim.AdamW(groups)


class Doubled(nn.Linear):
    """A layer of a class with its own forward."""

    def forward(self, x):
        return 2 * super().forward(x)


@forms
def test_layers_with_a_forward_of_their_own(fields):
    config = BankConfig(**CONFIG, **fields)
    base = Model().double()
    base.second.__class__ = Doubled
    graft = bind(base, config)
    params = away(graft.init(torch.Generator().manual_seed(0)))
    model = inject_adapter_in_model(config, copy.deepcopy(base), params=params)
    torch.testing.assert_close(model(X), graft(params, X))
    merge_adapter(model)
    torch.testing.assert_close(model(X), graft(params, X))


@forms
def test_offloaded_leaves(fields):
    model, graft, params = planted(**fields)
    state = {key: tensor.clone() for key, tensor in adapters.get_peft_model_state_dict(model).items()}
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert bank(model.first).is_meta
    torch.testing.assert_close(model(X), graft(params, X))
    for key, tensor in adapters.get_peft_model_state_dict(model).items():
        assert torch.equal(tensor, state[key])
    set_adapter(model, [])
    assert torch.equal(model(X), Model().double()(X))
