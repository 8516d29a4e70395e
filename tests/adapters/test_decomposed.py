"""What DEFT, GLoRA and PSOFT have beside their rows of the contract, against PEFT and formulas."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

from torchgraft.adapters import (
    DeftConfig,
    GloraConfig,
    PsoftConfig,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    set_peft_model_state_dict,
)
from torchgraft.functional import bind, merge

X = torch.linspace(-1, 1, 40).view(5, 8)


def linear():
    model = nn.Sequential(nn.Linear(8, 6))
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def theirs(config, seed=1):
    fields, cls = config.to_dict(), getattr(peft, type(config).__name__)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(linear(), cls(**fields))


def test_what_deft_only_takes_out_is_the_projection_of_the_weight():
    model = linear()
    graft = bind(model, DeftConfig(r=2, para=True, decomposition_method="qr", target_modules=["0"]))
    params = graft.init(torch.Generator().manual_seed(0))
    assert list(params["0"]) == ["deft_P"]
    q, weight = torch.linalg.qr(params["0"]["deft_P"].double())[0], model[0].weight.detach().double()
    expected = weight - q @ (q.T @ weight)
    torch.testing.assert_close(merge(graft, params)["0.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    y = nn.functional.linear(X.double(), expected, model[0].bias.detach().double())
    torch.testing.assert_close(graft(params, X).double(), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"psoft_svd": "lowrank", "random_seed": 3},
        {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 2, "ab_svd_init": "pissa_init"},
        {"use_cayley_neumann": True, "cayley_neumann_eps": 0.5, "num_cayley_neumann_terms": 4},
        {"psoft_orth": False, "psoft_mag_a": False, "init_weights": False},
        {"psoft_mag_b": False, "psoft_alpha": 7, "init_weights": False},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_psoft_is_pefts_whatever_its_fields(fields):
    config = PsoftConfig(r=4, target_modules=["0"], **fields)
    other = theirs(config)
    torch.manual_seed(1)
    model = inject_adapter_in_model(config, linear())
    torch.testing.assert_close(model(X), other(X))
    state = {key: t + torch.randn_like(t) for key, t in peft.get_peft_model_state_dict(other).items()}
    peft.set_peft_model_state_dict(other, state)
    assert set_peft_model_state_dict(model, state) == ([], [])
    torch.testing.assert_close(model(X), other(X), rtol=1e-4, atol=1e-5)


def test_fields_of_psoft_without_an_effect_are_a_warning():
    with pytest.warns(UserWarning, match="cayley_neumann_eps is 0.5, which has no effect without use_cayley_neumann"):
        PsoftConfig(cayley_neumann_eps=0.5)
    with pytest.warns(UserWarning, match="niter is 3, which has no effect without psoft_svd='lowrank'"):
        PsoftConfig(psoft_svd_lowrank_niter=3)


def test_zeros_that_peft_writes_for_paths_of_glora_that_are_not_there_are_read_past(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    config = peft.GloraConfig(r=2, target_modules=["0"], init_weights=False)
    other = peft.get_peft_model(copy.deepcopy(model), config)
    other.save_pretrained(tmp_path)
    assert "0.glora_C.zeros" in {key.removeprefix("base_model.model.") for key in peft.get_peft_model_state_dict(other)}
    graft = bind(model, load_config(tmp_path))
    torch.testing.assert_close(graft(load_adapter(graft, tmp_path), X), other(X))
    injected = inject_adapter_in_model(GloraConfig(r=2, target_modules=["0"]), model)
    assert set_peft_model_state_dict(injected, peft.get_peft_model_state_dict(other)) == ([], [])
