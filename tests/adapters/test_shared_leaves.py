"""Leaves that several sites train together, under PEFT's keys: in state dicts and in files, in both styles."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from torchgraft.adapters import (
    extract_params,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_peft_model_state_dict,
)
from torchgraft.adapters._config.keys import split_key, to_keys
from torchgraft.adapters._config.peft_format import PeftFormat
from torchgraft.adapters._files.disk.headers import Weights
from torchgraft.functional import Site, bind

from ..toy_methods import CONFIG, BankConfig, Model, X, away

FORMS = {"by size": {}, "one for all": {"by_size": False}, "nothing else": {"mixed": False}}
forms = pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)


def functional(dtype=torch.float64, seed=0, **fields):
    """A graft and a tree."""
    graft = bind(Model().to(dtype), BankConfig(**CONFIG, **fields))
    return graft, away(graft.init(torch.Generator().manual_seed(seed), dtype=dtype), seed)


def injected(**fields):
    """A fresh adapter in a model."""
    return inject_adapter_in_model(BankConfig(**CONFIG, **fields), Model().double())


def keys(fields):
    """The keys of a file."""
    banks = ["base_model.bank"] if "by_size" in fields else ["base_model.bank.2x5", "base_model.bank.5x5"]
    own = [] if "mixed" in fields else [f"base_model.model.{path}.mix" for path in CONFIG["target_modules"]]
    return sorted(banks + own)


def same(one, other):
    """Whether two trees are the same, bit for bit."""
    flat = [{(path, leaf): t for path, own in tree.items() for leaf, t in own.items()} for tree in (one, other)]
    return flat[0].keys() == flat[1].keys() and all(
        torch.equal(flat[0][at], flat[1][at]) and flat[0][at].dtype == flat[1][at].dtype for at in flat[0]
    )


def as_state(params):
    """What `get_peft_model_state_dict` is to give for a tree."""
    return to_keys(BankConfig(), params)


# -- state dicts -----------------------------------------------------------------------------------------------------


@forms
def test_a_state_dict_has_each_once(fields):
    graft, params = functional(**fields)
    model = inject_adapter_in_model(graft.configs[""], Model().double(), params=params)
    state = get_peft_model_state_dict(model)
    expected = as_state(params)
    assert sorted(state) == sorted(key.removeprefix("base_model.model.") for key in keys(fields)) == sorted(expected)
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor)
    assert state[keys(fields)[0]].data_ptr() == params["*"][keys(fields)[0].removeprefix("base_model.")].data_ptr()
    whole = {key: 2 * tensor for key, tensor in model.state_dict().items()}
    for key, tensor in get_peft_model_state_dict(model, state_dict=whole).items():
        assert torch.equal(tensor, 2 * expected[key])
    named = dict(model.named_parameters())  # each parameter under one name alone, as gathered states have them
    assert get_peft_model_state_dict(model, state_dict=named).keys() == state.keys()


@forms
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_a_state_dict(fields, prefix, low_cpu_mem_usage):
    graft, params = functional(**fields)
    model = injected(**fields)
    state = as_state(params)
    if prefix:
        state = {key if key.startswith("base_model.") else f"base_model.model.{key}": t for key, t in state.items()}
    before = dict(model.named_parameters())
    found = set_peft_model_state_dict(model, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert found == ([], [])
    assert torch.equal(model(X), graft(params, X)) and model.first.bank is model.out.bank
    assert same(extract_params(model), params)
    kept = model.first.bank["default"]
    kept = kept if isinstance(kept, nn.Parameter) else kept["5x5"]
    assert any(kept is one for one in before.values()) is not low_cpu_mem_usage
    assert kept.requires_grad


@forms
def test_empty_adapters_are_filled(fields):
    graft, params = functional(**fields)
    model = inject_adapter_in_model(graft.configs[""], Model().double(), low_cpu_mem_usage=True)
    assert all(p.is_meta for name, p in model.named_parameters() if "default" in name)
    assert set_peft_model_state_dict(model, as_state(params), low_cpu_mem_usage=True) == ([], [])
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(model(X), graft(params, X))
    held = [layer.bank["default"] for layer in (model.first, model.second, model.out)]
    assert held[0] is held[1] is held[2]


@forms
def test_merged_adapters_are_merged_anew(fields):
    graft, params = functional(**fields)
    model = injected(**fields)
    merge_adapter(model)
    set_peft_model_state_dict(model, as_state(params))
    assert model.first.merged_adapters == ["default"]
    torch.testing.assert_close(model(X), graft(params, X))


@forms
def test_states_that_do_not_fit(fields):
    _, params = functional(**fields)
    model = injected(**fields)
    before = extract_params(model)
    before = {path: {leaf: tensor.clone() for leaf, tensor in leaves.items()} for path, leaves in before.items()}
    state, key = as_state(params), keys(fields)[0]
    lacking = {name: tensor for name, tensor in state.items() if name != key}
    with pytest.raises(RuntimeError, match=rf"'{key}' has shape \(1,.*, expected \(3,.*nothing was loaded"):
        set_peft_model_state_dict(model, state | {key: state[key][:1]})
    assert same(extract_params(model), before)
    with pytest.warns(UserWarning, match=rf"left out: '{key}'"):
        set_peft_model_state_dict(model, state | {key: state[key][:1]}, ignore_mismatched_sizes=True)
    assert torch.equal(get_peft_model_state_dict(model)[key], before["*"][key.removeprefix("base_model.")])
    more = lacking | {"base_model.bank.9x9": torch.ones(1)}
    assert set_peft_model_state_dict(model, more) == ([key], ["base_model.bank.9x9"])
    with pytest.raises(KeyError, match="state_dict lacks 'first"):
        get_peft_model_state_dict(model, state_dict={})


@pytest.mark.parametrize("fields", [{}, {"by_size": False}], ids=str)
def test_injection_from_keys(fields):
    _, params = functional(size=2, **fields)
    params = {path: leaves for path, leaves in params.items() if path != "second"}
    state = as_state(params)
    with pytest.warns(RuntimeWarning, match="name different modules"):
        model = inject_adapter_in_model(BankConfig(**CONFIG, **fields), Model().double(), state_dict=state)
    assert type(model.second) is nn.Linear and model.peft_config["default"].size == 2
    assert set_peft_model_state_dict(model, state) == ([], [])
    assert same(extract_params(model), params)


def test_keys_without_a_module_name_no_target():
    _, params = functional(mixed=False)
    with pytest.raises(ValueError, match="state_dict has no key of BANK, expected keys like '<module>.mix'"):
        inject_adapter_in_model(BankConfig(**CONFIG, mixed=False), Model(), state_dict=as_state(params))


def test_names_that_keys_speak_of():
    config = BankConfig()
    assert split_key(config, "base_model.bank.5x5") == ("*", "bank.5x5")
    assert split_key(config, "_orig_mod.base_model.bank") == ("*", "bank")
    assert split_key(config, "base_model.model.bank.mix") == ("bank", "mix")
    assert split_key(config, "bank.5x5") is split_key(config, "base_model.model.bank.5x5") is None
    assert split_key(config, "base_model.banks") is None
    form = PeftFormat("bank_", shared_leaves=("bank",))
    for shared in ({"other": "bank.0"}, {"bank": "other"}, {"bank": "bank.0.1"}, {"bank": "bank."}):
        with pytest.raises(
            ValueError, match="first: shares its leaf '.*' under the name '.*', expected one of shared_"
        ):
            form.places(Site("first", "linear", 1, 1, shared=shared))


# -- files -----------------------------------------------------------------------------------------------------------


def from_graft(folder, fields):
    graft, params = functional(**fields)
    save_adapter(graft, folder, params=params)
    return params


def from_model(folder, fields):
    graft, params = functional(**fields)
    save_adapter(inject_adapter_in_model(graft.configs[""], Model().double(), "other", params=params), folder, "other")
    return params


SAVED = {"graft": from_graft, "model": from_model}


@forms
@pytest.mark.parametrize("saved", SAVED)
def test_files_both_ways(fields, saved, tmp_path):
    params = SAVED[saved](tmp_path, fields)
    folder = tmp_path / "other" if saved == "model" else tmp_path
    assert sorted(safetensors.torch.load_file(folder / "adapter_model.safetensors")) == keys(fields)
    graft, _ = functional(**fields)
    assert same(load_adapter(graft, folder), params)
    model = load_adapter(Model().double(), folder, "mine", is_trainable=True)
    assert same(extract_params(model, "mine"), params)
    assert torch.equal(model(X), graft(params, X))
    assert model.first.bank is model.second.bank and model.first.bank["mine"] is model.out.bank["mine"]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == len(keys(fields))
    second = load_adapter(model, folder, "again")
    assert same(extract_params(second, "again"), params)
    named = bind(Model().double(), {"a": graft.configs[""]})
    save_adapter(named, tmp_path / "named", "a", params={"a": params})
    assert same(load_adapter(named, tmp_path / "named", "a"), params)


def change(folder, edit):
    """Edit the tensors of a file."""
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "lacking": (lambda key, t: t.pop(key), KeyError, "lacks '{key}', which the config asks for"),
    "unknown": (
        lambda key, t: t.update({"base_model.bank.9x9": torch.ones(1)}),
        KeyError,
        "has 'base_model.bank.9x9', which is neither a tensor of this BANK adapter nor of the model",
    ),
    "shape": (
        lambda key, t: t.update({key: t[key][:, :1].contiguous()}),
        ValueError,
        r"'{key}' has shape \(3, 1, 5\), expected",
    ),
    "dtype": (lambda key, t: t.update({key: t[key].long()}), ValueError, "'{key}' has dtype torch.int64, expected"),
    "complex": (lambda key, t: t.update({key: t[key].to(torch.complex64)}), ValueError, "'{key}' is complex"),
}


@forms
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("target", ["graft", "model", "injected"])
def test_files_that_do_not_fit(fields, damage, target, tmp_path, monkeypatch):
    from_graft(tmp_path, fields)
    edit, error, match = DAMAGES[damage]
    key = keys(fields)[0]
    change(tmp_path, lambda tensors: edit(key, tensors))
    graft, _ = functional(**fields)
    model = Model().double() if target == "model" else injected(**fields)
    before, names = model(X), list(model.state_dict())
    if damage != "complex":  # what is wrong is seen before anything is read
        monkeypatch.setattr(Weights, "read", lambda self: pytest.fail("read"))
    with pytest.raises(error, match=match.format(key=key)):
        load_adapter(graft if target == "graft" else model, tmp_path, "more" if target == "injected" else "default")
    assert torch.equal(model(X), before) and list(model.state_dict()) == names


def test_a_graft_whose_sites_share_otherwise(tmp_path, monkeypatch):
    from_graft(tmp_path, {})
    graft, _ = functional()
    monkeypatch.setitem(graft.binding.sites[""]["second"].shared, "bank", "bank.2x5")
    with pytest.raises(ValueError, match=r"second shares \{'bank': 'bank.5x5'\} in the file and \{'bank': 'bank.2"):
        load_adapter(graft, tmp_path)


def test_a_config_that_says_otherwise(tmp_path):
    from_graft(tmp_path, {})
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"by_size": False}))
    with pytest.raises(KeyError, match="lacks 'base_model.bank', which the config asks for on this model"):
        load_adapter(Model().double(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_what_is_loaded(dtype, tmp_path):
    params = from_graft(tmp_path, {})
    graft = bind(Model().to(dtype), BankConfig(**CONFIG))
    assert load_adapter(graft, tmp_path)["*"]["bank.5x5"].dtype == torch.float32
    assert load_adapter(graft, tmp_path, dtype=torch.float64)["*"]["bank.5x5"].equal(params["*"]["bank.5x5"])
    drawn = inject_adapter_in_model(BankConfig(**CONFIG), Model().to(dtype)).first.bank["default"]["5x5"]
    model = load_adapter(Model().to(dtype), tmp_path)
    assert model.first.bank["default"]["5x5"].dtype == drawn.dtype
    change(tmp_path, lambda tensors: tensors["base_model.bank.5x5"].fill_(float("nan")))
    with pytest.raises(ValueError, match="'base_model.bank.5x5' has values that are NaN or infinite"):
        load_adapter(graft, tmp_path, check_finite=True)
