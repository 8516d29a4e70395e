"""Uni-LoRA against PEFT: indices of a seed, files with and without them, several adapters."""

import copy
import sys

import peft
import pytest
import torch
from peft.tuners.unilora.model import UniLoraModel
from torch import nn

from torchgraft.adapters import UniLoraConfig, inject_adapter_in_model, load_adapter, save_adapter
from torchgraft.adapters._methods.unilora import deal
from torchgraft.functional import bind

FIELDS = {"r": 2, "theta_d_length": 11, "target_modules": ["0", "2"]}
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize(("count", "length", "seed"), [(5, 2, 0), (40, 8, 42), (3, 10, 1), (1000, 7, 3)])
def test_indices_are_dealt_as_in_peft(count, length, seed):
    dealt = deal(count, length, seed)
    assert torch.equal(dealt, UniLoraModel.generate_index(count, length, seed))
    counts = dealt.bincount(minlength=length)
    assert counts.max() - counts.min() <= 1


def test_without_numpy_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ImportError, match="Uni-LoRA's indices are drawn by NumPy, which is not installed; install nu"):
        bind(net(), UniLoraConfig(**FIELDS))


def test_the_map_from_the_vector_keeps_lengths():
    graft = bind(net(), UniLoraConfig(**FIELDS))
    theta = graft.init()["*"]["unilora_theta_d"]
    squares = torch.zeros(())
    for site in graft.sites[""].values():
        for matrix in "AB":
            index, scales = (getattr(site.constants, f"unilora_{what}_{matrix}") for what in ("indices", "scales"))
            squares = squares + (theta[index] * scales).square().sum()
    torch.testing.assert_close(squares, theta.square().sum())


def test_files_with_indices_bring_them(tmp_path):
    source = bind(net(), UniLoraConfig(**FIELDS, save_indices=True, proj_seed=5))
    params = source.init(torch.Generator().manual_seed(0))
    save_adapter(source, tmp_path, params=params)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"proj_seed": 5', '"proj_seed": 6'))
    model = net()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model.eval()(X), source(params, X))
    with pytest.raises(ValueError, match="unilora_indices_A' is not what this graft has made of the base's weights"):
        load_adapter(bind(net(), UniLoraConfig(**FIELDS, save_indices=True, proj_seed=6)), tmp_path)


def test_two_adapters_are_pefts():
    fields = {**FIELDS, "init_theta_d_bound": 1.0}
    model, base = net(), net()
    torch.manual_seed(3)
    other = peft.get_peft_model(base, peft.UniLoraConfig(**fields), "one")
    other.add_adapter("two", peft.UniLoraConfig(**{**fields, "r": 3, "proj_seed": 1}))
    torch.manual_seed(3)
    inject_adapter_in_model(UniLoraConfig(**fields), model, "one")
    model_a = copy.deepcopy(model)
    inject_adapter_in_model(UniLoraConfig(**{**fields, "r": 3, "proj_seed": 1}), model, "two")
    with torch.no_grad():
        model[0].unilora_theta_d["two"].copy_(other.base_model.unilora_theta_d["two"])
    other.set_adapter("one")
    torch.testing.assert_close(model_a(X), other(X))
    other.set_adapter("two")
    torch.testing.assert_close(model(X), other(X))
