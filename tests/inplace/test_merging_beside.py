"""Merging what adapters have beside their layers: rows of tokens, copies of modules, biases."""

import copy
import pickle

import pytest
import torch
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import LoraConfig, inject_adapter_in_model, merge_adapter, merge_and_unload, unmerge_adapter
from torchgraft.functional import bind


class Net(nn.Module):
    """An embedding, a layer, and a head that may be tied to the embedding."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.lin, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.lin(self.emb(ids)))


IDS = torch.arange(6)
FIELDS = {
    "tokens": {"trainable_token_indices": {"emb": [0, 3]}},
    "copy": {"modules_to_save": ["head"]},
    "biases": {"bias": "lora_only"},
}


def built(tied=False, **fields_by_name):
    """A model with adapters, each with numbers of its own, the last one active."""
    model = Net(tied).double()
    for i, (name, fields) in enumerate(fields_by_name.items()):
        config = LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False, **fields)
        inject_adapter_in_model(config, model, name)
        torch.manual_seed(10 + i)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def alone(name, tied=False, **fields_by_name):
    """The output with just one of the adapters active."""
    model = built(tied, **fields_by_name)
    adapters.set_adapter(model, name)
    return model(IDS)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", FIELDS)
def test_merging_changes_no_output_and_unmerging_no_bit(kind, tied):
    model = built(tied, a=FIELDS[kind] if (kind, tied) != ("copy", True) else {"modules_to_save": ["emb"]})
    before, expected = state(model), model(IDS)
    base = adapters.get_base_model_state_dict(model)
    base = {name: tensor.clone() for name, tensor in base.items()}
    merge_adapter(model)
    torch.testing.assert_close(model(IDS), expected)
    assert_same(adapters.get_base_model_state_dict(model), base)
    if kind == "tokens":
        assert torch.equal(model.emb.token_adapter.base_layer.weight[0], model.emb.rows("a")[0][0])
        assert model.emb.merged_adapters == ["a"]
    with adapters.disable_adapter(model):
        torch.testing.assert_close(model(IDS), Net(tied).double()(IDS))
    torch.testing.assert_close(model(IDS), expected)
    assert_same(state(pickle.loads(pickle.dumps(model))), state(model))
    again = copy.deepcopy(model)
    for one in (again, model):
        unmerge_adapter(one)
        assert_same(state(one), before)
    merge_adapter(model)
    model.float().double()
    unmerge_adapter(model)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("active", ["a", "b"])
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("kind", FIELDS)
def test_what_was_asked_for_is_baked_whatever_is_active(kind, name, active):
    fields = {"a": FIELDS[kind], "b": {}}
    if kind != "biases":
        fields["b"] = {"trainable_token_indices": {"emb": [2]}} if kind == "tokens" else FIELDS[kind]
    model = built(**fields)
    expected = alone(name, **fields)
    adapters.set_adapter(model, active)
    out = merge_and_unload(model, adapter_names=[name])
    assert type(out.emb) is nn.Embedding and type(out.lin) is nn.Linear and type(out.head) is nn.Linear
    torch.testing.assert_close(out(IDS), expected)
    if kind == "tokens":
        changed = (out.emb.weight != Net().double().emb.weight).any(1).nonzero().flatten().tolist()
        assert changed == ([0, 3] if name == "a" else [2])


def test_rows_of_both_are_baked():
    fields = {"a": FIELDS["tokens"], "b": {"trainable_token_indices": {"emb": [2]}}}
    model = built(**fields)
    rows = {name: model.emb.rows(name)[0].detach().clone() for name in fields}
    adapters.set_adapter(model, "b")
    out = merge_and_unload(model, adapter_names=["a", "b"])
    torch.testing.assert_close(out.emb.weight[[0, 3, 2]], torch.cat([rows["a"], rows["b"]]))
    assert torch.equal(out.emb.weight[[1, 4, 5]], Net().double().emb.weight[[1, 4, 5]])


@pytest.mark.parametrize("way", [merge_adapter, merge_and_unload])
def test_what_two_adapters_want_at_once_is_an_error(way):
    fields = {"a": FIELDS["tokens"], "b": {"trainable_token_indices": {"emb": [3, 4]}}}
    model = built(**fields)
    before, expected = state(model), model(IDS)
    with pytest.raises(ValueError, match=r"emb: adapters 'a' and 'b' have other numbers for token 3 .*adapter_names"):
        way(model, adapter_names=["a", "b"])
    assert_same(state(model), before)
    assert torch.equal(model(IDS), expected) and not model.lin.merged
    with torch.no_grad():
        model.emb.rows("a")[0][1] = model.emb.rows("b")[0][0]
    row = model.emb.rows("a")[0][1].detach().clone()
    out = way(model, adapter_names=["a", "b"]) or model
    assert torch.equal(out.emb.weight[3], row)
    copies = built(a=FIELDS["copy"], b=FIELDS["copy"])
    with pytest.raises(ValueError, match=r"adapters \['a', 'b'\] each have a copy of Linear .* only one .* be merged"):
        way(copies, adapter_names=["a", "b"])
    assert not copies.lin.merged


def test_an_active_adapter_is_on_top_of_a_merged_one():
    fields = {"a": FIELDS["tokens"], "b": {"trainable_token_indices": {"emb": [2]}}}
    model = built(**fields)
    adapters.set_adapter(model, ["a", "b"])
    expected = model(IDS)
    adapters.set_adapter(model, "b")
    merge_adapter(model, ["a"])
    torch.testing.assert_close(model(IDS), expected)
    merge_adapter(model, ["b"])
    torch.testing.assert_close(model(IDS), expected)
    unmerge_adapter(model, ["a"])
    torch.testing.assert_close(model(IDS), alone("b", **fields))
    adapters.set_adapter(model, "a")
    assert model.emb.merged_adapters == []
    torch.testing.assert_close(model(IDS), alone("a", **fields))


def test_other_rows_that_are_loaded_while_merged_are_merged():
    model = built(a=FIELDS["tokens"])
    merge_adapter(model)
    other = {name: t + 1 for name, t in adapters.get_peft_model_state_dict(model, adapter_name="a").items()}
    adapters.set_peft_model_state_dict(model, other, "a")
    assert torch.equal(model.emb.weight[[0, 3]], model.emb.rows("a")[0])
    unmerge_adapter(model)
    assert torch.equal(model.emb.token_adapter.base_layer.weight, Net().double().emb.weight)


def test_rows_of_one_of_two_tied_modules_are_not_merged():
    model = built(True, a={"trainable_token_indices": {"emb": [0], "head": [1]}})
    before = state(model)
    with pytest.raises(ValueError, match=r"emb: its weight is tied to head.weight, which would change with it; untie"):
        merge_adapter(model)
    assert_same(state(model), before)
    assert not model.lin.merged


def test_rows_that_are_not_finite_are_refused():
    model = built(a=FIELDS["tokens"])
    with torch.no_grad():
        model.emb.rows("a")[0].fill_(torch.inf)
    before = state(model)
    with pytest.raises(ValueError, match=r"emb: weight with \['a'\] merged has values that are not finite"):
        merge_adapter(model, safe_merge=True)
    assert_same(state(model), before)
    merge_adapter(model)


def test_a_write_to_merged_rows_is_noticed():
    model = built(a=FIELDS["tokens"])
    merge_adapter(model)
    with torch.no_grad():
        model.emb.token_adapter.base_layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="emb: something wrote to weight while adapters were merged into it"):
        unmerge_adapter(model)


def test_the_merged_model_is_the_merged_graft():
    config = LoraConfig(r=2, target_modules=["lin"], trainable_token_indices={"emb": [0, 3]}, init_lora_weights=False)
    model = Net(True).double()
    graft = bind(Net(True).double(), config)
    params = graft.init()
    inject_adapter_in_model(config, model, params={k: {n: t.double() for n, t in v.items()} for k, v in params.items()})
    torch.testing.assert_close(merge_and_unload(model)(IDS), graft(params, IDS))


@pytest.mark.parametrize("fields", [{}, {"lora_bias": True}], ids=str)
def test_biases_and_layers_are_merged_and_unmerged_in_each_other(fields):
    model = built(a={**FIELDS["biases"], **fields}, b=fields)
    base = Net().double().state_dict()
    for active, merged in (("b", ["a"]), ("a", ["a"]), ("a", ["b"]), ("b", ["b", "a"])):
        adapters.set_adapter(model, [active, *(name for name in merged if name != active)])
        expected = model(IDS)
        adapters.set_adapter(model, active)
        before = state(model)
        merge_adapter(model, merged)
        torch.testing.assert_close(model(IDS), expected)
        assert_same(adapters.get_base_model_state_dict(model), base)
        with adapters.disable_adapter(model):
            torch.testing.assert_close(model(IDS), Net().double()(IDS))
        torch.testing.assert_close(model(IDS), expected)
        own = {k: t.clone() for k, t in adapters.get_peft_model_state_dict(model, adapter_name="a").items()}
        adapters.set_peft_model_state_dict(model, {k: t + 1 for k, t in own.items()}, "a")
        adapters.set_peft_model_state_dict(model, own, "a")
        torch.testing.assert_close(model(IDS), expected)
        unmerge_adapter(model)
        assert_same(state(model), before)
