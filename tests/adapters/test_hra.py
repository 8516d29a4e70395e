"""HRA against its equation and against PEFT: reflections one after the other, pairs that cancel, Gram and Schmidt."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.func import grad

from torchgraft.adapters import HRAConfig, inject_adapter_in_model
from torchgraft.functional import bind, merge, route, stack

ON_FIRST = {"target_modules": ["0"]}


def made(layer, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(layer()).to(dtype)


def reflected(weight, u):
    """`W H_1 ... H_r`, a whole matrix for each reflection."""
    flat = weight.flatten(1)
    for v in u.T:
        flat = flat @ (torch.eye(len(v)).to(v) - 2 * torch.outer(v, v) / v.dot(v))
    return flat.reshape(weight.shape)


LAYERS = {
    "linear": lambda: nn.Linear(12, 7),
    "conv1d": lambda: nn.Conv1d(6, 9, 3, dilation=2),
    "groups": lambda: nn.Conv2d(12, 8, (3, 2), groups=2, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("r", [1, 2, 5, 8, 15])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_merged_weights_are_the_equation(name, r):
    model = made(LAYERS[name])
    graft, weight = bind(model, HRAConfig(r=r, init_weights=False, **ON_FIRST)), model[0].weight.detach()
    u = torch.randn(weight[0].numel(), r).double()
    expected = reflected(weight, u)
    torch.testing.assert_close(merge(graft, {"0": {"hra_u": u}})["0.weight"], expected)
    x = torch.randn(3, weight.shape[1] * getattr(model[0], "groups", 1), *(7,) * (weight.ndim - 2)).double()
    y = torch.func.functional_call(model, {"0.weight": expected}, (x,))
    torch.testing.assert_close(graft({"0": {"hra_u": u}}, x), y)
    rows = torch.tensor([0, -1, 0])
    routed = graft(route(stack([{"0": {"hra_u": u}}]), rows), x)
    torch.testing.assert_close(routed, torch.where((rows < 0).view(3, *(1,) * (y.ndim - 1)), model(x), y))


def test_pairs_of_equal_vectors_cancel_exactly_where_pefts_do_up_to_rounding_and_have_the_equations_gradients():
    model, x = made(lambda: nn.Linear(16, 8), torch.float32), torch.randn(50, 16)
    torch.manual_seed(1)
    theirs = peft.inject_adapter_in_model(peft.HRAConfig(r=6, **ON_FIRST), copy.deepcopy(model))
    u = theirs[0].hra_u["default"].detach()
    graft = bind(model, HRAConfig(r=6, **ON_FIRST))
    assert torch.equal(graft({"0": {"hra_u": u}}, x), model(x)) and not torch.equal(theirs(x), model(x))
    exact, u, x = model.double(), u.double(), x.double()
    given = grad(lambda u: bind(exact, HRAConfig(r=6, **ON_FIRST))({"0": {"hra_u": u}}, x).sin().sum())(u)
    expected = grad(lambda u: (x @ reflected(exact[0].weight, u).T + exact[0].bias).sin().sum())(u)
    torch.testing.assert_close(given, expected)
    assert given.abs().max() > 1e-3


@pytest.mark.parametrize("r", [3, 4])
def test_a_vector_of_zeros_reflects_nothing(r):
    model, x = made(lambda: nn.Linear(8, 3)), torch.randn(5, 8).double()
    u = torch.randn(8, r).double()
    padded = torch.cat([u, torch.zeros(8, 2).double()], 1)
    for apply_gs in (False, True):
        outputs = [
            bind(model, HRAConfig(r=one.shape[1], apply_GS=apply_gs, init_weights=False, **ON_FIRST))(
                {"0": {"hra_u": one}}, x
            )
            for one in (u, padded)
        ]
        torch.testing.assert_close(*outputs)


def test_orthonormal_reflections_are_pefts():
    model, x = made(lambda: nn.Linear(12, 7), torch.float32), torch.randn(5, 12)
    fields = {"r": 4, "apply_GS": True, "init_weights": False, **ON_FIRST}
    theirs = peft.inject_adapter_in_model(peft.HRAConfig(**fields), copy.deepcopy(model))
    params = {"0": {"hra_u": theirs[0].hra_u["default"].detach()}}
    torch.testing.assert_close(bind(model, HRAConfig(**fields))(params, x), theirs(x))


def test_starts_that_mean_nothing_are_errors_and_those_that_are_no_identity_are_said():
    model = made(lambda: nn.Linear(8, 3))
    with pytest.raises(
        ValueError, match="apply_GS=True, init_weights=True and r=4 start with pairs of equal vectors, w"
    ):
        bind(model, HRAConfig(r=4, apply_GS=True, **ON_FIRST)).init()
    with pytest.warns(
        UserWarning, match="HRAConfig: r is 3, an odd number of reflections, which do not cancel in pairs"
    ):
        inject_adapter_in_model(HRAConfig(r=3, **ON_FIRST), model)


def test_thin_factors_alone_are_kept_for_the_backward():
    model = made(lambda: nn.Linear(64, 128)).requires_grad_(False)
    graft, kept = bind(model, HRAConfig(r=4, **ON_FIRST)), []
    params = {"0": {"hra_u": graft.init()["0"]["hra_u"].requires_grad_()}}
    own = model[0].weight.data_ptr()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        graft(params, torch.randn(2, 64).double())
    assert max(t.numel() for t in kept if t.data_ptr() != own) <= 64 * 4
