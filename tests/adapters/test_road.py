"""RoAd against its equation and against PEFT: three variants, groups, rows of a batch."""

import copy

import peft
import pytest
import torch
from torch import nn

from torchgraft.adapters import RoadConfig, adapter_rows, inject_adapter_in_model
from torchgraft.functional import bind, merge, route, stack

VARIANTS = ("road_1", "road_2", "road_4")
ON_FIRST = {"target_modules": ["0"]}


def made(layer, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(layer()).to(dtype)


def turn(config, theta, alpha, y):
    """`R y` of a vector, pair by pair."""
    n, half, result = int(config.variant[-1]), config.group_size // 2, y.clone()
    for i in range(len(y) // config.group_size):
        t, a = (leaf.view(-1, n, half)[i] for leaf in (theta, alpha))
        for j in range(half):
            first, second = config.group_size * i + j, config.group_size * i + j + half
            rows = {1: (0, 0, 0, 0), 2: (0, 0, 1, 1), 4: (0, 2, 3, 1)}[n]
            c0, s0, s1, c1 = (
                a[k, j] * f(t[k, j]) for k, f in zip(rows, (torch.cos, torch.sin, torch.sin, torch.cos), strict=True)
            )
            result[first] = c0 * y[first] - s0 * y[second]
            result[second] = s1 * y[first] + c1 * y[second]
    return result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [2, 4, 12])
def test_outputs_and_merged_weights_are_the_equation(variant, group_size):
    model, x = made(lambda: nn.Linear(5, 12)), torch.randn(3, 5).double()
    config = RoadConfig(variant=variant, group_size=group_size, init_weights=False, **ON_FIRST)
    graft = bind(model, config)
    params = {"0": {leaf: tensor.double() for leaf, tensor in graft.init()["0"].items()}}
    expected = torch.stack([turn(config, *reversed(params["0"].values()), y) for y in model(x)])
    torch.testing.assert_close(graft(params, x), expected)
    torch.testing.assert_close(torch.func.functional_call(model, merge(graft, params), (x,)), expected)
    routed = graft(route(stack([params]), torch.tensor([0, -1, 0])), x)
    torch.testing.assert_close(routed, torch.stack([expected[0], model(x)[1], expected[2]]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_starts_and_rows_of_a_batch_are_pefts(variant):
    model, x = made(lambda: nn.Linear(6, 8), torch.float32), torch.randn(4, 6)
    fields = {"variant": variant, "group_size": 4, "init_weights": False, **ON_FIRST}
    mine, theirs = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(theirs, peft.RoadConfig(**fields)).eval()
    wrapped.add_adapter("other", peft.RoadConfig(**fields))
    torch.manual_seed(1)
    inject_adapter_in_model(RoadConfig(**fields), mine)
    inject_adapter_in_model(RoadConfig(**fields), mine, "other")
    names = ["other", "__base__", "default", "other"]
    torch.testing.assert_close(adapter_rows(mine, names)(x), wrapped(x, adapter_names=names))
    layer = mine[0]
    assert (layer.variant["default"], layer.group_size["default"]) == (variant, 4)
    assert torch.equal(layer.road_alpha["other"], wrapped.base_model.model[0].road_alpha["other"])


def test_channels_of_a_convolution_keep_their_layout():
    model, x = made(lambda: nn.Conv2d(3, 8, 3), torch.float32), torch.randn(2, 3, 6, 5)
    graft = bind(model, RoadConfig(group_size=4, init_weights=False, **ON_FIRST))
    for layout in (torch.contiguous_format, torch.channels_last):
        y = graft(graft.init(), x.to(memory_format=layout))
        assert y.stride() == model(x.to(memory_format=layout)).stride()


def test_half_precision_computes_angles_in_single():
    model, x = made(lambda: nn.Linear(4, 4), torch.bfloat16), torch.randn(3, 4, dtype=torch.bfloat16)
    config = RoadConfig(group_size=4, **ON_FIRST)
    leaves = {"road_theta": torch.tensor([1.3, 0.2]).bfloat16(), "road_alpha": torch.tensor([0.7, 1.9]).bfloat16()}
    exact = {leaf: tensor.double() for leaf, tensor in leaves.items()}
    expected = torch.stack([turn(config, *exact.values(), y) for y in model(x).double()])
    assert torch.equal(bind(model, config)({"0": leaves}, x), expected.bfloat16())
