"""Lily: what layers share, as in PEFT with one example in a batch; shares of each example; files with copies."""

import copy
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from torchgraft.adapters import (
    LilyConfig,
    adapter_rows,
    delete_adapter,
    extract_graft,
    extract_params,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    save_adapter,
    set_adapter,
    set_peft_model_state_dict,
)
from torchgraft.functional import UnsupportedCall, UnsupportedConfig, bind, merge, route, stack

PREFIX = "base_model.model."


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


def base(blocks=3):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks)))


def config(cls=LilyConfig, **fields):
    return cls(**{"r": 2, "num_B": 3, "stride_A": 2, "target_modules": ["up", "down"], **fields})


def theirs(model, **fields):
    torch.manual_seed(7)
    return peft.get_peft_model(copy.deepcopy(model), config(peft.LilyConfig, **fields))


def mine(model, **fields):
    torch.manual_seed(7)
    return inject_adapter_in_model(config(**fields), copy.deepcopy(model))


X = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(1))
FIELDS = {
    "list": {},
    "expression": {"target_modules": r".*\.(up|down)"},
    "each its own": {"stride_A": 1, "target_modules": ["0.up", "1.up", "2.down"]},
    "random": {"init_weights": False, "scaling": 3.0},
    "all": {"target_modules": "all-linear"},
}
SHARED = {"list": 4 + 2, "expression": 4 + 2, "each its own": 3 + 3, "random": 4 + 2, "all": 4 + 2}
"""How many down-projections and up-projections there are."""


def moved(state):
    """Return a state dict with noise, the same for keys of one parameter."""
    noisy = {}
    for tensor in state.values():
        noisy.setdefault(tensor.data_ptr(), tensor + 0.3 * torch.randn_like(tensor))
    return {key: noisy[tensor.data_ptr()] for key, tensor in state.items()}


def shared_by(model):
    """Return the sets of keys that are one parameter."""
    found = [(key.removeprefix(PREFIX), p) for key, p in model.named_parameters(remove_duplicate=False)]
    return {frozenset(key for key, q in found if q is p) for key, p in found if "lily" in key}


@pytest.mark.parametrize("name", FIELDS)
def test_what_layers_share_and_draw_is_pefts(name):
    model, other = mine(base(), **FIELDS[name]), theirs(base(), **FIELDS[name])
    state, own = peft.get_peft_model_state_dict(other), get_peft_model_state_dict(model)
    assert {PREFIX + key for key in own} == state.keys()
    assert len(extract_params(model)["*"]) == SHARED[name]
    if (
        name == "all"
    ):  # of few layers PEFT makes a list of whole names, of twenty one of their ends, by which they share
        return
    assert all(torch.equal(tensor, state[PREFIX + key]) for key, tensor in own.items())
    assert shared_by(model) == shared_by(other)
    state = moved(state)
    peft.set_peft_model_state_dict(other, state)
    assert set_peft_model_state_dict(model, state) == ([], [])
    torch.testing.assert_close(model(X), other(X))
    for one in (model, other):
        one(X).square().sum().backward()
    grads = {key.removeprefix(PREFIX): p.grad for key, p in other.named_parameters() if p.requires_grad}
    torch.testing.assert_close({key: p.grad for key, p in model.named_parameters() if p.requires_grad}, grads)


def params_of(graft):
    generator = torch.Generator().manual_seed(3)
    return {
        path: {leaf: 0.5 * torch.randn(t.shape, generator=generator) for leaf, t in leaves.items()}
        for path, leaves in graft.init().items()
    }


def test_an_examples_output_does_not_depend_on_the_others():
    model, x = base(), torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2))
    graft = bind(model, config())
    params = params_of(graft)
    y = graft(params, x)
    for row in range(3):
        torch.testing.assert_close(y[row : row + 1], graft(params, x[row : row + 1]))
    torch.testing.assert_close(torch.vmap(lambda one: graft(params, one[None])[0])(x), y)
    other = theirs(model)
    state = {
        f"{PREFIX}{path}.{leaf}.weight": params["*"][site.shared[leaf]] if leaf in site.shared else params[path][leaf]
        for path, site in graft.sites[""].items()
        for leaf in ("lily_A", "lily_B", "lily_router")
    }
    peft.set_peft_model_state_dict(other, state)
    torch.testing.assert_close(y[:1], other(x[:1]))
    assert not torch.allclose(y, other(x), atol=1e-3)  # whose router takes the mean over the batch


def test_files_have_a_copy_for_each_layer_and_go_both_ways(tmp_path):
    model = base()
    graft = bind(model, config())
    params = params_of(graft)
    save_adapter(graft, tmp_path / "mine", params=params)
    other = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "mine")
    torch.testing.assert_close(other(X), graft(params, X))
    other.save_pretrained(tmp_path / "theirs")
    one, two = (load_file(tmp_path / whose / "adapter_model.safetensors") for whose in ("mine", "theirs"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    again = load_adapter(graft, tmp_path / "theirs")
    assert all(torch.equal(again[path][leaf], t) for path, leaves in params.items() for leaf, t in leaves.items())
    loaded = load_adapter(copy.deepcopy(model), tmp_path / "theirs")
    torch.testing.assert_close(loaded(X), other(X))
    assert len(extract_params(loaded)["*"]) == 6


def test_copies_that_differ_are_errors(tmp_path):
    graft = bind(base(), config())
    save_adapter(graft, tmp_path, params=params_of(graft))
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key, first = (f"{PREFIX}{i}.up.lily_B.weight" for i in (2, 0))
    state[key] = state[key] + 1
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"{key!r} differs from {first!r}")):
        load_adapter(graft, tmp_path)
    model = mine(base())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    words = "'2.up.lily_B.weight' differs from '0.up.lily_B.weight', and the two are one parameter of adapter 'default'"
    with pytest.raises(ValueError, match=re.escape(words)):
        set_peft_model_state_dict(model, state)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_in_place_layers_keep_sharing_when_moved_copied_and_joined():
    model = mine(base())
    inject_adapter_in_model(config(num_B=2, target_modules=["up"]), model, "second")
    sharing = shared_by(model)
    assert shared_by(copy.deepcopy(model)) == sharing == shared_by(model.double().float())
    set_peft_model_state_dict(model, moved(get_peft_model_state_dict(model)), low_cpu_mem_usage=True)
    assert shared_by(model) == sharing
    set_adapter(model, "default")
    graft, params = extract_graft(model), extract_params(model)
    torch.testing.assert_close(graft(params, X), model(X))
    rows = adapter_rows(model, ["second", "default"])(torch.cat([X, X]))
    torch.testing.assert_close(rows[1:], model(X))
    set_adapter(model, "second")
    delete_adapter(model, "default")
    assert shared_by(model) == {keys for keys in sharing if any("second" in key for key in keys)}


def test_routing_of_tokens_and_merging_are_errors_that_say_why():
    model = base()
    graft = bind(model, config())
    params = graft.init()
    with pytest.raises(UnsupportedCall, match="Lily's router mixes by all tokens of an example, so tokens cannot have"):
        graft(route(stack([params]), torch.zeros(1, 5, dtype=torch.long), batch_dim=0, tokens_dim=1), X)
    with pytest.raises(UnsupportedConfig, match=r"0.up: Lily's router mixes its matrices by the input, .* graft.view"):
        merge(graft, params)


def test_modules_that_hold_leaves_are_called_where_something_is_attached():
    model = mine(base(), init_weights=False)
    expected, seen = model(X), []
    for leaf in ("lily_A", "lily_router"):
        model[0].up.get_submodule(f"{leaf}.default").register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(X), expected)
    assert len(seen) == 3  # `lily_A` is that of two layers
