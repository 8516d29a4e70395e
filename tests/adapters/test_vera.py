"""VeRA against its equation and against PEFT."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradgradcheck
from transformers.pytorch_utils import Conv1D

from torchgraft.adapters import VeraConfig
from torchgraft.functional import bind, merge, stack

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}
TARGETS = ["0", "2", "4"]


def net(linear=nn.Linear):
    """Sites whose largest input and largest output are of different modules."""
    if linear is Conv1D:
        return nn.Sequential(Conv1D(3, 8), nn.Tanh(), Conv1D(9, 3), nn.Tanh(), Conv1D(2, 9))
    return nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 9, bias=False), nn.Tanh(), nn.Linear(9, 2))


def injected(model, config):
    """The same model with PEFT's layers in it."""
    return peft.get_peft_model(copy.deepcopy(model), config).get_base_model()


def randomised(params, dtype=torch.float64):
    return {
        path: {leaf: torch.randn_like(p, dtype=dtype) for leaf, p in leaves.items()} for path, leaves in params.items()
    }


@pytest.mark.parametrize("linear", [nn.Linear, Conv1D])
def test_linear_is_its_equation(linear):
    model = nn.Sequential(Conv1D(3, 8) if linear is Conv1D else nn.Linear(8, 3)).double()
    graft = bind(model, VeraConfig(r=4, target_modules=["0"]))
    params, x = randomised(graft.init()), torch.randn(2, 5, 8, dtype=torch.float64)
    constants, leaves = graft.sites[""]["0"].constants, params["0"]
    a, b = constants.vera_A.double(), constants.vera_B.double()
    delta = torch.diag(leaves["vera_lambda_b"]) @ b @ torch.diag(leaves["vera_lambda_d"]) @ a
    weight = model[0].weight.T if linear is Conv1D else model[0].weight
    oracle = F.linear(x, weight + delta, model[0].bias)
    torch.testing.assert_close(graft(params, x), oracle, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.func.functional_call(model, merge(graft, params), (x,)), oracle, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("linear", [nn.Linear, Conv1D])
@pytest.mark.parametrize("key", [0, 7])
def test_outputs_and_shared_matrices_are_those_of_peft(key, linear, dtype):
    model, x = net(linear).to(dtype), torch.randn(4, 8, dtype=dtype)
    graft = bind(model, VeraConfig(r=5, projection_prng_key=key, target_modules=TARGETS))
    params = randomised(graft.init(), dtype)
    config = peft.VeraConfig(r=5, projection_prng_key=key, target_modules=TARGETS, fan_in_fan_out=linear is Conv1D)
    twin = injected(model, config)
    for path, leaves in params.items():
        layer, constants = twin.get_submodule(path), graft.sites[""][path].constants
        assert torch.equal(layer.vera_A["default"].float(), constants.vera_A)
        assert torch.equal(layer.vera_B["default"].float(), constants.vera_B)
        for leaf, value in leaves.items():
            getattr(layer, leaf)["default"].data.copy_(value)
    torch.testing.assert_close(graft(params, x), twin(x), **TOLERANCE[dtype])


@pytest.mark.parametrize("init", [True, False])
def test_init_is_that_of_peft_and_uses_up_the_same_random_numbers(init):
    model = net()
    kwargs = {"r": 6, "target_modules": TARGETS, "init_weights": init, "d_initial": 0.3}
    torch.manual_seed(3)
    twin = injected(model, peft.VeraConfig(**kwargs))
    after = torch.rand(1)
    generator = torch.Generator().manual_seed(3)
    params = bind(model, VeraConfig(**kwargs)).init(generator)
    for path, leaves in params.items():
        for leaf, value in leaves.items():
            assert torch.equal(value, getattr(twin.get_submodule(path), leaf)["default"])
    assert torch.equal(torch.rand(1, generator=generator), after)


def test_all_sites_share_one_pair_of_matrices_that_the_global_random_state_does_not_change():
    torch.manual_seed(1)
    sites = bind(net(), VeraConfig(r=4, target_modules=TARGETS)).sites[""].values()
    torch.manual_seed(2)
    again = bind(net(), VeraConfig(r=4, target_modules=TARGETS)).sites[""]
    assert len({id(site.constants.vera_A) for site in sites}) == 1
    assert len({id(site.constants.vera_B) for site in sites}) == 1
    assert torch.equal(next(iter(sites)).constants.vera_A, again["0"].constants.vera_A)
    assert again["0"].constants.vera_A.shape == (4, 9)
    assert again["0"].constants.vera_B.shape == (9, 4)


def test_identity_at_init_bit_for_bit_in_half_precision():
    model, x = net().bfloat16(), torch.randn(4, 8, dtype=torch.bfloat16)
    graft = bind(model, VeraConfig(r=4, target_modules=TARGETS))
    y = graft(graft.init(), x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, model(x))


def test_dropout_is_on_the_adapter_input_in_training_mode():
    model, x = nn.Sequential(nn.Linear(8, 3)), torch.randn(4, 8)
    graft = bind(model, VeraConfig(r=4, vera_dropout=0.5, target_modules=["0"]))
    params = randomised(graft.init(), torch.float32)
    site = graft.sites[""]["0"].constants
    torch.manual_seed(5)
    y = graft(params, x)
    torch.manual_seed(5)
    inner = F.dropout(x, 0.5) @ site.vera_A.T * params["0"]["vera_lambda_d"]
    torch.testing.assert_close(y, model(x) + inner @ site.vera_B.T * params["0"]["vera_lambda_b"])
    model.eval()
    assert torch.equal(graft(params, x), graft(params, x))


def test_second_derivatives_and_stacks():
    model, x = net().double(), torch.randn(2, 8, dtype=torch.float64)
    graft = bind(model, VeraConfig(r=3, target_modules=TARGETS))
    trees = [randomised(graft.init()) for _ in range(3)]
    y = torch.vmap(lambda params: graft(params, x))(stack(trees))
    torch.testing.assert_close(y, torch.stack([graft(tree, x) for tree in trees]))
    leaves = [p.requires_grad_() for p in trees[0]["2"].values()]
    assert gradgradcheck(
        lambda b, d: graft({**trees[0], "2": {"vera_lambda_b": b, "vera_lambda_d": d}}, x).sin().sum(), leaves
    )


def test_errors_say_what_to_write():
    with pytest.raises(ValueError, match="VeraConfig: r is 0, expected a positive integer"):
        VeraConfig(r=0)
    with pytest.raises(ValueError, match="VeraConfig: vera_dropout is 1, expected 0 <= p < 1"):
        VeraConfig(vera_dropout=1)
    with pytest.raises(ValueError, match=r"0: VERA does not support Conv2d \(conv2d\); it supports linear"):
        bind(nn.Sequential(nn.Conv2d(2, 2, 1)), VeraConfig(target_modules=["0"]))
