"""BOFT against PEFT with its CUDA extension, which is stood in for here, and against the group of rotations."""

import copy

import peft
import pytest
import torch
from peft.tuners.boft import layer as peft_layer
from torch import nn
from torch.func import vmap

from torchgraft.adapters import BOFTConfig, inject_adapter_in_model, load_adapter
from torchgraft.functional import bind, merge

ON_FIRST = {"target_modules": ["0"]}


class Extension:
    """What PEFT's extension computes: matrices with given blocks on their diagonals."""

    @staticmethod
    def forward(blocks):
        return (torch.stack([torch.block_diag(*one) for one in blocks]),)


def made(layer, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(layer()).to(dtype)


def randomised(graft, dtype=torch.float64):
    torch.manual_seed(2)
    return {"0": {leaf: torch.randn_like(tensor, dtype=dtype) for leaf, tensor in graft.init()["0"].items()}}


SIZES = [
    (16, {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    (16, {"boft_block_size": 2, "boft_n_butterfly_factor": 4}),
    (24, {"boft_block_num": 4, "boft_block_size": 0, "boft_n_butterfly_factor": 3}),
    (15, {"boft_block_size": 5}),
]


@pytest.mark.parametrize(("width", "fields"), SIZES, ids=str)
def test_butterfly_factors_are_pefts(width, fields, monkeypatch):
    monkeypatch.setattr(peft_layer, "get_fbd_cuda", lambda: Extension)
    model, x = made(lambda: nn.Linear(width, 6), torch.float32), torch.randn(3, 5, width)
    theirs = peft.inject_adapter_in_model(peft.BOFTConfig(**fields, **ON_FIRST), copy.deepcopy(model))
    graft = bind(model, BOFTConfig(**fields, **ON_FIRST))
    params = randomised(graft, torch.float32)
    for leaf, tensor in params["0"].items():
        own = getattr(theirs[0], leaf)["default"]
        assert own.shape == tensor.shape
        own.data.copy_(tensor)
    torch.testing.assert_close(graft(params, x), theirs(x), rtol=1e-4, atol=1e-5)
    theirs[0].merge()
    torch.testing.assert_close(merge(graft, params)["0.weight"], theirs[0].base_layer.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "fields"), SIZES, ids=str)
def test_the_merged_weight_is_rotated_and_each_factor_mixes_more_blocks(width, fields):
    model = made(lambda: nn.Linear(width, width, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(width))
    graft = bind(model, BOFTConfig(**fields, **ON_FIRST))
    params = randomised(graft)
    turn = merge(graft, params)["0.weight"] / params["0"]["boft_s"]
    torch.testing.assert_close(turn @ turn.T, torch.eye(width).double())
    size = graft.sites[""]["0"].constants.block_size * 2 ** (fields.get("boft_n_butterfly_factor", 1) - 1)
    assert ((turn != 0).sum(1) <= size).all()


def test_one_factor_in_a_file_is_read_whatever_the_config_says(tmp_path):
    model, x = made(lambda: nn.Linear(16, 6), torch.float32), torch.randn(3, 16)
    fields = {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "init_weights": False, **ON_FIRST}
    with pytest.warns(UserWarning, match="CUDA extension|to 1"):
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.BOFTConfig(**fields))
    theirs.save_pretrained(tmp_path)
    injected = copy.deepcopy(model)
    load_adapter(injected, tmp_path)
    torch.testing.assert_close(injected(x), theirs(x))


def test_dropout_takes_a_share_of_the_blocks_of_one_factor():
    model = made(lambda: nn.Linear(16, 16, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(16))
    graft = bind(model.train(), BOFTConfig(boft_block_size=2, boft_dropout=0.6, **ON_FIRST))
    params = randomised(graft)
    params["0"]["boft_s"].fill_(1.0)
    x = torch.eye(16).double()
    many = vmap(lambda one: graft(params, x + 0 * one), randomness="different")(torch.arange(8.0))
    for turn in (graft(params, x), *many):
        blocks = [turn[i : i + 2, i : i + 2] for i in range(0, 16, 2)]
        assert sum(torch.equal(block, x[:2, :2]) for block in blocks) == int(0.6 * 8)
    assert len({tuple(one.flatten().tolist()) for one in many}) > 1
    model.eval()
    torch.testing.assert_close(graft(params, x), merge(graft, params)["0.weight"].T)


@pytest.mark.parametrize("init", [True, False])
def test_starts_are_pefts_bit_for_bit(init):
    model = made(lambda: nn.Conv2d(4, 6, 3), torch.float32)
    fields = {"boft_block_size": 4, "init_weights": init, **ON_FIRST}
    layers = []
    for lib in (peft, None):
        torch.manual_seed(3)
        inject, config = (
            (peft.inject_adapter_in_model, peft.BOFTConfig) if lib else (inject_adapter_in_model, BOFTConfig)
        )
        layers.append(inject(config(**fields), copy.deepcopy(model))[0])
    for leaf in ("boft_R", "boft_s"):
        assert torch.equal(getattr(layers[0], leaf)["default"], getattr(layers[1], leaf)["default"])
    assert (layers[0].boft_block_num, layers[0].boft_block_size) == (
        dict(layers[1].boft_block_num),
        dict(layers[1].boft_block_size),
    )
