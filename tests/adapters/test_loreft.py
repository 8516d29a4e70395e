"""LoReFT: its subspace, its start, the positions that it edits, and modules that it cannot be merged into."""

import re

import pytest
import torch
from torch import nn

from torchgraft.adapters import LoReftConfig, edited_positions
from torchgraft.functional import UnsupportedConfig, bind, merge, route, stack

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]])


def orthonormal(rows):
    return torch.linalg.qr(rows.mT).Q.mT


def test_an_orthonormal_matrix_is_itself_and_edits_its_subspace_alone():
    model = nn.Sequential(nn.Linear(4, 6)).double()
    graft = bind(model, LoReftConfig(r=2, target_modules=["0"]))
    torch.manual_seed(0)
    basis, x = orthonormal(torch.randn(2, 6, dtype=torch.float64)), torch.randn(3, 4, dtype=torch.float64)
    leaves = {
        "loreft_rotate": basis,
        "loreft_weight": torch.randn(2, 6).double(),
        "loreft_bias": torch.ones(2).double(),
    }
    y, base = graft({"0": leaves}, x), model(x)
    torch.testing.assert_close(y @ basis.T, base @ leaves["loreft_weight"].T + 1)
    torch.testing.assert_close(y - y @ basis.T @ basis, base - base @ basis.T @ basis)
    again = {**leaves, "loreft_rotate": torch.tensor([[2.0, 0.0], [3.0, 0.5]]).double() @ basis}
    torch.testing.assert_close(graft({"0": again}, x), y)  # Gram and Schmidt's of a triangle times it


def test_it_starts_as_the_identity_in_float32_and_nearly_so_elsewhere():
    x = torch.randn(3, 4)
    for dtype in (torch.float32, torch.float64):
        model = nn.Sequential(nn.Linear(4, 6)).to(dtype)
        graft = bind(model, LoReftConfig(r=3, target_modules=["0"]))
        y, base = graft(graft.init(), x.to(dtype)), model(x.to(dtype))
        torch.testing.assert_close(y, base, rtol=1e-6, atol=1e-6)
        assert dtype != torch.float32 or torch.equal(y, base)


def test_autocast_leaves_the_subspace_in_float32():
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(3, 64)
    graft = bind(model, LoReftConfig(r=8, target_modules=["0"]))
    params = graft.init()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(graft(params, x), model(x))
        assert torch.equal(graft(route(stack([params, params]), torch.tensor([1, 0, -1])), x), model(x))


def test_rows_that_depend_on_each_other_are_an_error():
    graft = bind(nn.Sequential(nn.Linear(4, 6)), LoReftConfig(r=2, target_modules=["0"]))
    params = graft.init()
    params["0"]["loreft_rotate"] = torch.eye(6)[:1].expand(2, 6)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
        graft(params, torch.ones(1, 4))


@pytest.mark.parametrize(
    ("first", "last", "apart", "expected"),
    [
        (1, 1, False, [[0, -1, -1, -1, 0], [0, -1, 0, -1, -1], [-1, -1, -1, 0, 0]]),
        (1, 2, True, [[0, -1, -1, 1, 1], [0, 1, 1, -1, -1], [-1, -1, -1, 0, 1]]),
        (3, 0, False, [[0, 0, 0, -1, -1], [0, 0, 0, -1, -1], [-1, -1, -1, 0, 0]]),
        (0, 0, True, [[-1] * 5] * 3),
    ],
)
def test_positions_are_counted_from_the_ends_of_each_prompt(first, last, apart, expected):
    for mask in (MASK, MASK.bool()):
        rows = edited_positions(mask, first, last, apart=apart)
        assert rows.tolist() == expected and rows.dtype == torch.long


def test_positions_are_edited_and_others_are_the_bases_bit_for_bit():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    graft = bind(model, LoReftConfig(r=2, init_weights=False, target_modules=["1", "3"]))
    trees = [graft.init(torch.Generator().manual_seed(seed)) for seed in range(2)]
    ids, rows = torch.arange(15).view(3, 5) % 9, edited_positions(MASK, 1, 1, apart=True)
    y, each = graft(route(stack(trees), rows), ids), [graft(tree, ids) for tree in trees]
    assert torch.equal(y[rows < 0], model(ids)[rows < 0])
    for adapter in range(2):
        torch.testing.assert_close(y[rows == adapter], each[adapter][rows == adapter])
        assert not torch.allclose(y[rows == adapter], model(ids)[rows == adapter], atol=1e-2)


def test_what_positions_cannot_be_is_an_error_that_says_so():
    words = "attention_mask has the shape (5,), expected (batch, tokens)"
    with pytest.raises(ValueError, match=re.escape(words)):
        edited_positions(MASK[0], 1, 1)
    with pytest.raises(ValueError, match="first is 1 and last is -1, expected numbers from 0 on"):
        edited_positions(MASK, 1, -1)


def test_a_module_without_a_bias_works_and_cannot_be_merged_into():
    model = nn.Sequential(nn.Linear(4, 6, bias=False))
    graft = bind(model, LoReftConfig(r=2, init_weights=False, target_modules=["0"]))
    params = graft.init()
    assert not torch.allclose(graft(params, torch.ones(1, 4)), model(torch.ones(1, 4)), atol=1e-2)
    with pytest.raises(UnsupportedConfig, match="0: LoReFT adds to the bias, and this module has none to merge it in"):
        merge(graft, params)
