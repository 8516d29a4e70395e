"""Adapters on the weights of recurrent layers, which torch's kernels get in a list, not as attributes."""

import copy

import optree
import peft
import pytest
import torch
from torch import nn

from torchgraft.adapters import (
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    merge_adapter,
    save_adapter,
    unmerge_adapter,
)
from torchgraft.functional import UnsupportedCall, bind, functional_call, merge, route, stack

LAYERS = {
    "lstm": lambda: nn.LSTM(6, 5),
    "projected": lambda: nn.LSTM(6, 5, proj_size=3),
    "bidirectional": lambda: nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True),
    "gru": lambda: nn.GRU(6, 5, num_layers=2, bias=False),
    "rnn": lambda: nn.RNN(6, 5, nonlinearity="relu"),
}


def made(layer, last=True):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[layer]())
    names = [f"0.{name}" for name, _ in model[0].named_parameters() if name.startswith("weight")]
    config = LoraConfig(r=2, target_parameters=names[-3:] if last else names[:1], init_lora_weights=False)
    graft = bind(model, config)
    params = {path: {k: t.requires_grad_() for k, t in ls.items()} for path, ls in graft.init().items()}
    return model, config, graft, params


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_both_styles_are_the_dense_layer(layer, last, tmp_path):
    model, config, graft, params = made(layer, last)
    x = torch.randn(4, 3, 6, requires_grad=True)
    leaves = [x, *(t for own in params.values() for t in own.values())]
    expected = graft(params, x)[0]
    dense = torch.func.functional_call(copy.deepcopy(model), merge(graft, params), (x,))[0]
    torch.testing.assert_close(expected, dense)
    g = torch.randn_like(dense)
    wanted = torch.autograd.grad(dense, leaves, g)
    torch.testing.assert_close(torch.autograd.grad(expected, leaves, g), wanted)
    view = graft.view(params)
    torch.testing.assert_close(view(x)[0], dense)
    torch.testing.assert_close(view.state_dict(), merge(graft, params))
    own = copy.deepcopy(model)
    injected = inject_adapter_in_model(config, own, params=params)
    y = injected(x)[0]
    torch.testing.assert_close(y, dense)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], wanted[0])
    before = injected.state_dict()
    merge_adapter(injected)
    torch.testing.assert_close(injected(x)[0], dense)
    unmerge_adapter(injected)
    torch.testing.assert_close(injected.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(injected(x)[0], dense)
    injected[0].get_base_layer().flatten_parameters()
    save_adapter(injected, tmp_path)
    torch.testing.assert_close(load_adapter(copy.deepcopy(model), tmp_path)(x)[0], dense)
    torch.testing.assert_close(copy.deepcopy(view.eval())(x)[0], graft.view(params).eval()(x)[0])


def test_packed_sequences():
    _, config, graft, params = made("lstm")
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 2, 6), torch.tensor([4, 2]))
    dense = torch.func.functional_call(graft.model, merge(graft, params), (packed,))[0]
    torch.testing.assert_close(graft(params, packed)[0].data, dense.data)
    injected = inject_adapter_in_model(config, copy.deepcopy(graft.model), params=params)
    torch.testing.assert_close(injected(packed)[0].data, dense.data)


@pytest.mark.parametrize("layer", ["lstm", "gru", "rnn"])
def test_as_peft(layer):
    model, _, _, _ = made(layer)
    fields = {"r": 2, "target_parameters": ["0.weight_hh_l0"], "init_lora_weights": False}
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[], **fields), copy.deepcopy(model))
    state = peft.get_peft_model_state_dict(theirs)
    ours = inject_adapter_in_model(LoraConfig(**fields), copy.deepcopy(model))
    assert sorted(get_peft_model_state_dict(ours)) == sorted(state)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 2, 6)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def test_rows_along_the_second_axis():
    _, _, graft, params = made("lstm")
    many = optree.tree_map(lambda t: torch.stack([t, -2 * t]), params)
    x = torch.randn(4, 2, 6)
    y, states = graft(route(many, torch.tensor([1, 0]), batch_dim=1), x)
    for row, tree in enumerate((optree.tree_map(lambda t: -2 * t, params), params)):
        expected, expected_states = graft(tree, x[:, row : row + 1])
        for given, alone in zip((y, *states), (expected, *expected_states), strict=True):
            torch.testing.assert_close(given[:, row : row + 1], alone)
    with pytest.raises(ValueError, match="route"):  # the batch is the leading axis, where this layer has time
        graft(route(many, torch.tensor([1, 0])), x)


def test_packed_rows_are_refused_by_name():
    _, _, graft, params = made("lstm")
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 2, 6), torch.tensor([4, 2]))
    with pytest.raises(UnsupportedCall, match=r"0\.weight_.*its module gets a PackedSequence"):
        graft(route(stack([params, params]), torch.tensor([0, 1]), batch_dim=0), packed)


def test_base_tensors_as_data():
    model, _, graft, params = made("lstm")
    other = {name: torch.randn_like(t) for name, t in model.named_parameters()}
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(other)
    x = torch.randn(4, 2, 6)
    expected = bind(fresh, graft.configs[""])(params, x)[0]
    torch.testing.assert_close(functional_call(graft, (other, params), (x,))[0], expected)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cell):
    torch.manual_seed(0)
    model, x = nn.Sequential(cell(6, 5)), torch.randn(3, 6)
    graft = bind(model, LoraConfig(r=2, target_parameters=["weight_ih", "weight_hh"], init_lora_weights=False))
    params = graft.init()
    expected = torch.func.functional_call(model, merge(graft, params), (x,))
    torch.testing.assert_close(graft(params, x), expected)
