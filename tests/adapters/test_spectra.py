"""FourierFT and WaveFT: every way of computing is the equation's, wavelets are wavelets, files are PEFT's."""

import copy
import math

import peft
import pytest
import torch
from torch import nn

from torchgraft.adapters import FourierFTConfig, WaveFTConfig, inject_adapter_in_model, load_adapter, load_config
from torchgraft.adapters._methods import fourierft, waveft
from torchgraft.adapters._methods.shared.wavelets import FAMILIES, filters_of
from torchgraft.functional import bind, merge

ON_FIRST = {"target_modules": ["0"]}
CONFIGS = {
    "fourierft": FourierFTConfig(n_frequency=40, scaling=20.0, **ON_FIRST),
    "fourierft, each": FourierFTConfig(n_frequency=70, scaling=20.0, **ON_FIRST),
    "waveft": WaveFTConfig(n_frequency=40, scaling=2.0, wavelet_family="sym4", **ON_FIRST),
    "waveft, sparse": WaveFTConfig(n_frequency=40, scaling=2.0, use_idwt=False, **ON_FIRST),
}


def made(layer, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(layer()).to(dtype)


@pytest.mark.parametrize("few", [0, 10**9], ids=["tokens", "a weight"])
@pytest.mark.parametrize(("inputs", "outputs"), [(7, 10), (10, 7)])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways_are_the_merged_weight_and_have_its_gradients(name, inputs, outputs, few, monkeypatch):
    monkeypatch.setattr(fourierft, "_TRANSFORM", few)
    monkeypatch.setattr(waveft, "_GATHER", few)
    model = made(lambda: nn.Linear(inputs, outputs)).requires_grad_(False)
    graft = bind(model, CONFIGS[name])
    ((leaf, value),) = graft.init(torch.Generator().manual_seed(0))["0"].items()
    value = torch.randn_like(value).requires_grad_()
    x = torch.randn(2, 3, inputs, dtype=torch.float64, requires_grad=True)
    y = graft({"0": {leaf: value}}, x)
    expected = nn.functional.linear(x, merge(graft, {"0": {leaf: value}})["0.weight"], model[0].bias)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    for mine, theirs in zip(*(torch.autograd.grad(out, (x, value), g) for out in (y, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradgradcheck(lambda x, value: graft({"0": {leaf: value}}, x), (x, value), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_weight_is_kept_for_the_backward(name, dtype):
    model = made(lambda: nn.Linear(64, 96), dtype).requires_grad_(False)
    graft = bind(model, CONFIGS[name])
    ((leaf, value),) = graft.init()["0"].items()
    own, kept = model[0].weight.data_ptr(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        graft({"0": {leaf: value.requires_grad_()}}, torch.randn(48, 64, dtype=dtype))
    assert max(t.numel() for t in kept if t.data_ptr() != own) < 64 * 96


@pytest.mark.parametrize("family", FAMILIES)
def test_filters_are_those_of_orthogonal_wavelets(family):
    low, high = (torch.tensor(one, dtype=torch.float64) for one in filters_of(family))
    length, number = len(low), int(family.lstrip("dbsymcoif"))
    assert length == (6 if family.startswith("coif") else 2) * number
    for shift in range(0, length, 2):
        own = 1.0 if shift == 0 else 0.0
        assert abs(low[shift:] @ low[: length - shift] - own) < 1e-11
        assert abs(low[shift:] @ high[: length - shift]) + abs(high[shift:] @ low[: length - shift]) < 1e-11
    assert abs(low.sum() - math.sqrt(2)) < 1e-11
    places = torch.arange(length, dtype=torch.float64) / length
    assert all(abs(places**p @ high) < 1e-11 for p in range((2 if family.startswith("coif") else 1) * number))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_wavelet_makes_the_weight_that_peft_makes(family):
    model, x = made(lambda: nn.Linear(9, 14)), torch.randn(4, 9).double()
    fields = {"n_frequency": 60, "wavelet_family": family, "init_weights": False, **ON_FIRST}
    theirs = peft.inject_adapter_in_model(peft.WaveFTConfig(**fields), copy.deepcopy(model))
    spectrum = theirs[0].waveft_spectrum["default"].data.normal_()
    torch.testing.assert_close(bind(model, WaveFTConfig(**fields))({"0": {"waveft_spectrum": spectrum}}, x), theirs(x))


@pytest.mark.parametrize("family", ["coif4", "coif5"])
def test_two_of_pefts_wavelets_are_none(family):
    filters = torch.tensor(peft.tuners.waveft.wavelet.Wavelet(family).rec_lo)
    assert abs(filters @ filters - 1) > 0.01 or abs(filters[2:] @ filters[:-2]) > 0.01
    with pytest.raises(ValueError, match=f"WaveFTConfig: wavelet_family is '{family}', expected one of db1, db2"):
        WaveFTConfig(wavelet_family=family)


FIELDS = [
    ("FourierFTConfig", {"n_frequency": 9, "n_frequency_pattern": {"1.0": 5}, "random_loc_seed": 1, "scaling": 3.0}),
    ("WaveFTConfig", {"n_frequency": 9, "n_frequency_pattern": {"1.0": 5}, "init_weights": False}),
    ("WaveFTConfig", {"n_frequency": 9, "proportional_parameters": True, "wavelet_family": "db3"}),
]


@pytest.mark.parametrize(("name", "fields"), FIELDS, ids=str)
def test_counts_of_modules_are_pefts_and_are_read_from_files(name, fields, tmp_path):
    model, x = nn.Sequential(nn.Linear(12, 8), nn.Sequential(nn.Linear(8, 4))), torch.randn(3, 12)
    fields = {**fields, "target_modules": ["0", "1.0"]}
    config = {"FourierFTConfig": FourierFTConfig, "WaveFTConfig": WaveFTConfig}[name](**fields)
    theirs = peft.get_peft_model(copy.deepcopy(model), getattr(peft, name)(**fields))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    theirs.save_pretrained(tmp_path)
    graft = bind(model, load_config(tmp_path))
    torch.testing.assert_close(graft(load_adapter(graft, tmp_path), x), theirs(x), rtol=1e-4, atol=1e-5)
    for path, site in graft.sites[""].items():
        own = inject_adapter_in_model(config, copy.deepcopy(model)).get_submodule(path)
        leaf = next(name for name in theirs.base_model.model.get_submodule(path).adapter_layer_names)
        assert getattr(own, leaf)["default"].shape == (site.constants.n,)
