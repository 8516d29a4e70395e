"""Lower ranks and the canonical form, held against decompositions of the changes themselves, in float64."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.arithmetic.oracle import Experts, Layers, adapter, assert_same, changes, lora
from torchgraft.adapters import LoHaConfig, LoraConfig, canonical, shrink
from torchgraft.adapters._conversion.wanted import Wanted, nearest
from torchgraft.functional import UnsupportedConfig, bind

PATTERNS = {"rank_pattern": {"up": 5, "attention": 3}, "alpha_pattern": {"down": 3.0, "attention": 2.0}}


def singular_values(change):
    return torch.linalg.svdvals(change.flatten(1))


def test_shrunk_is_the_nearest_of_the_rank_on_each_kind_of_layer():
    base = Layers().double()
    one = adapter(base, lora(r=4, lora_alpha=5, use_rslora=True, **PATTERNS))
    before, (config, params, report) = changes(base, one), shrink(*one, 2)
    after = changes(base, (config, params))
    assert config.r == 2 and config.lora_alpha == 2 and not config.use_rslora
    names = {"attention": "attention.in_proj_weight"}
    for path, error in report.modules.items():
        name = names.get(path, f"{path}.weight")
        s = singular_values(before[name])
        assert error.norm == pytest.approx(float(s.norm())) and error.rank == 2
        assert error.error == pytest.approx(float(s[2:].norm()), abs=1e-10)
        assert float((after[name] - before[name]).norm()) == pytest.approx(error.error, abs=1e-10)


def test_with_neither_rank_nor_energy_all_is_kept_with_the_least_rank():
    base = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5)).double()
    config, tree = adapter(base, LoraConfig(r=4, target_modules=["0", "1"]))
    tree["0"]["lora_B"][:, 2:] = tree["0"]["lora_B"][:, :2]  # of rank 2 now
    tree["1"]["lora_B"].zero_()
    new = shrink(config, tree)
    assert new[1]["0"]["lora_A"].shape == (2, 7) and new[1]["1"]["lora_A"].shape == (1, 6)
    assert_same(changes(base, new[:2]), changes(base, (config, tree)))
    assert new[2].relative < 1e-12


@settings(max_examples=20, deadline=None)
@given(energy=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_energy_is_kept_with_as_little_rank_as_that_takes(energy, seed):
    base = nn.Sequential(nn.Linear(9, 8)).double()
    one = adapter(base, LoraConfig(r=6, target_modules=["0"]), seed)
    config, _, report = shrink(*one, energy=energy)
    share = singular_values(changes(base, one)["0.weight"]).square().cumsum(0)
    share = share / share[-1]
    assert report.modules["0"].relative ** 2 <= 1 - energy + 1e-9
    assert config.r == 1 or float(share[config.r - 2]) < energy


def test_experts_have_one_rank():
    base = Experts().double()
    one = adapter(base, LoraConfig(r=3, target_parameters=["weights"]))
    config, params, report = shrink(*one, 2)
    before, after = changes(base, one)["weights"], changes(base, (config, params))["weights"]
    left = torch.stack([singular_values(own)[2:] for own in before])
    assert config.r == 2 and float((after - before).norm()) == pytest.approx(float(left.norm()))
    assert report.modules["weights"].error == pytest.approx(float(left.norm()))


def test_the_error_has_the_rounding_to_half_precision():
    base = nn.Sequential(nn.Linear(9, 8)).double()
    config, tree = adapter(base, LoraConfig(r=3, target_modules=["0"]))
    half = {path: {leaf: t.bfloat16() for leaf, t in leaves.items()} for path, leaves in tree.items()}
    _, params, report = shrink(config, half)
    assert params["0"]["lora_A"].dtype == torch.bfloat16 and 1e-4 < report.relative < 1e-2


# -- the canonical form --------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), alpha=st.floats(0.5, 9), factor=st.floats(0.3, 4))
def test_adapters_that_do_the_same_have_one_canonical_form(seed, alpha, factor):
    base = nn.Sequential(nn.Linear(9, 8), nn.Conv2d(3, 4, 2)).double()
    config, tree = adapter(base, LoraConfig(r=3, lora_alpha=alpha, target_modules=["0", "1"]), seed)
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(3, 3, generator=generator, dtype=torch.float64) + 3 * torch.eye(3)
    same = {
        path: {
            "lora_A": torch.linalg.solve(mix, leaves["lora_A"].flatten(1)).view_as(leaves["lora_A"]),
            "lora_B": (leaves["lora_B"].flatten(1) @ mix / factor).view_as(leaves["lora_B"]),
        }
        for path, leaves in tree.items()
    }
    other = dataclasses.replace(config, lora_alpha=alpha * factor)
    one, two = canonical(config, tree), canonical(other, same)
    assert_same(changes(base, one), changes(base, (config, tree)))
    assert one[0].lora_alpha == one[0].r == 3
    for path in tree:
        for leaf in ("lora_A", "lora_B"):
            torch.testing.assert_close(one[1][path][leaf], two[1][path][leaf], rtol=1e-6, atol=1e-6)
        a = one[1][path]["lora_A"].flatten(1)
        torch.testing.assert_close(a @ a.mT, torch.eye(3, dtype=torch.float64))
    again = canonical(*one)
    assert all(torch.allclose(again[1][p][leaf], t) for p, leaves in one[1].items() for leaf, t in leaves.items())


def test_directions_that_change_nothing_are_zero():
    base = nn.Sequential(nn.Linear(9, 8)).double()
    config, tree = adapter(base, LoraConfig(r=3, target_modules=["0"]))
    tree["0"]["lora_B"][:, 2] = 0
    _, params = canonical(config, tree)
    assert params["0"]["lora_A"].shape == (3, 9)
    assert params["0"]["lora_A"][2].abs().max() == params["0"]["lora_B"][:, 2].abs().max() == 0


def test_a_bias_of_b_and_whole_modules_stay():
    base = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 3)).double()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], lora_bias=True, modules_to_save=["1"])
    one = adapter(base, config)
    for new in (shrink(*one, 8)[:2], canonical(*one)):
        assert_same(changes(base, new), changes(base, one))
        assert torch.equal(new[1]["1"]["weight"], one[1]["1"]["weight"])


def test_errors():
    base = nn.Sequential(nn.Linear(4, 4))
    loha = LoHaConfig(r=2, target_modules=["0"])
    with pytest.raises(UnsupportedConfig, match=r"shrink: the adapter is LOHA.*make it a LoRA first: to_lora"):
        shrink(loha, bind(base, loha).init(), 1)
    with pytest.raises(TypeError, match=r"rank is 0.5, expected an integer; a share of the energy is energy="):
        shrink(LoraConfig(), {}, 0.5)
    with pytest.raises(ValueError, match="canonical: params has no factors of LoRA"):
        canonical(LoraConfig(), {})


# -- randomised decompositions -------------------------------------------------------------------------------------


def matrix(decay, size=300):
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    s = decay ** torch.arange(size, dtype=torch.float64)
    return (u * s @ v.mT)[None], s


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.98])
def test_a_randomised_decomposition_is_nearly_the_nearest(decay):
    change, s = matrix(decay)
    a, b = nearest(change, Wanted(8))
    assert a.shape == (1, 8, 300)
    best = float(s[8:].norm())
    assert best <= float((change - b @ a).norm()) + 1e-12 <= best * 1.001 + 1e-11
    again = nearest(change, Wanted(8))
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])


def test_a_range_grows_until_it_has_what_is_wanted():
    change, s = matrix(0.9)
    a, b = nearest(change, Wanted(energy=0.999))
    share = s.square().cumsum(0) / s.square().sum()
    assert a.shape[1] == int((share < 0.999).sum()) + 1
    assert float((change - b @ a).norm() / change.norm()) ** 2 <= 1e-3
    low = change[:, :, :40] @ change[:, :40, :]
    a, b = nearest(low, Wanted())
    assert a.shape[1] <= 60 and float((low - b @ a).norm() / low.norm()) < 1e-12
