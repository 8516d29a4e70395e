"""(IA)^3 against its equation and against PEFT."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.autograd import gradgradcheck
from transformers.pytorch_utils import Conv1D

from torchgraft.adapters import IA3Config
from torchgraft.functional import bind, merge, stack

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}


class Net(nn.Module):
    """Every kind of module, with and without a bias, in groups and transposed."""

    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.grouped = nn.Conv2d(4, 6, 3, groups=2, padding=1)
        self.volume = nn.Conv3d(1, 2, (1, 2, 2), bias=False)
        self.k = nn.Linear(8, 5)
        self.w0 = Conv1D(3, 5) if linear is Conv1D else nn.Linear(5, 3, bias=False)

    def forward(self, x):
        y = self.volume(self.grouped(x).unsqueeze(1)).sum(1).tanh()
        return self.w0(self.k(y.flatten(2)[..., :8]).tanh())


TARGETS = ["grouped", "volume", "k", "w0"]


def randomised(params, dtype=torch.float64):
    return {
        path: {leaf: torch.randn_like(p, dtype=dtype) for leaf, p in leaves.items()} for path, leaves in params.items()
    }


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("feedforward", [False, True])
def test_linear_is_its_equation(feedforward, bias, transposed):
    module = Conv1D(3, 5) if transposed else nn.Linear(5, 3, bias=bias)
    model = nn.Sequential(module.double())
    graft = bind(model, IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else None))
    params = randomised(graft.init())
    scale, x = params["0"]["ia3_l"], torch.randn(2, 5, dtype=torch.float64)
    assert scale.shape == ((1, 5) if feedforward else (3, 1))
    weight = module.weight.T if transposed else module.weight
    b = torch.zeros(3, dtype=torch.float64) if module.bias is None else module.bias
    oracle = (x * scale) @ weight.T + b if feedforward else (x @ weight.T + b) * scale.T
    torch.testing.assert_close(graft(params, x), oracle, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.func.functional_call(model, merge(graft, params), (x,)), oracle, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5)),
        (nn.Conv2d(4, 6, 2, bias=False), (4, 5, 5)),
        (nn.Conv3d(4, 8, 2, dilation=2, groups=4), (1, 4, 4, 4, 4)),
    ],
)
def test_convolution_is_its_equation(module, shape, feedforward):
    model = nn.Sequential(copy.deepcopy(module).double())
    graft = bind(model, IA3Config(target_modules=["0"], feedforward_modules="0" if feedforward else []))
    params = randomised(graft.init())
    x, channel = torch.randn(shape, dtype=torch.float64), shape.index(4)
    scale = params["0"]["ia3_l"].flatten()
    if feedforward:
        oracle = model(torch.stack([xi * s for xi, s in zip(x.unbind(channel), scale, strict=True)], channel))
    else:
        oracle = torch.stack([yi * s for yi, s in zip(model(x).unbind(channel), scale, strict=True)], channel)
    torch.testing.assert_close(graft(params, x), oracle, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.func.functional_call(model, merge(graft, params), (x,)), oracle, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("feedforward", [[], ["w0", "grouped"], ["k", "volume"], r".*0|k"])
@pytest.mark.parametrize("linear", [nn.Linear, Conv1D])
def test_outputs_and_merged_weights_are_those_of_peft(linear, feedforward, dtype):
    model = Net(linear).to(dtype)
    x = torch.randn(2, 4, 5, 5, dtype=dtype)
    graft = bind(model, IA3Config(target_modules=TARGETS, feedforward_modules=feedforward))
    params = randomised(graft.init(), dtype)
    # one flag serves all of PEFT's layers, which it corrects with a warning
    config = peft.IA3Config(target_modules=TARGETS, feedforward_modules=feedforward, fan_in_fan_out=linear is Conv1D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = peft.inject_adapter_in_model(config, copy.deepcopy(model))
    for path, leaves in params.items():
        own = twin.get_submodule(path).ia3_l["default"]
        assert own.shape == leaves["ia3_l"].shape
        own.data.copy_(leaves["ia3_l"])
    torch.testing.assert_close(graft(params, x), twin(x), **TOLERANCE[dtype])
    state = merge(graft, params)
    for path in params:
        layer = twin.get_submodule(path)
        layer.fan_in_fan_out = isinstance(layer.get_base_layer(), Conv1D)
        layer.merge()
        torch.testing.assert_close(state[f"{path}.weight"], layer.get_base_layer().weight.data, **TOLERANCE[dtype])
        if f"{path}.bias" in state:
            torch.testing.assert_close(state[f"{path}.bias"], layer.get_base_layer().bias.data, **TOLERANCE[dtype])


@pytest.mark.parametrize("init", [True, False])
def test_init_is_that_of_peft_and_uses_up_the_same_random_numbers(init):
    model = Net()
    kwargs = {"target_modules": TARGETS, "feedforward_modules": ["k"], "init_ia3_weights": init}
    torch.manual_seed(3)
    twin = peft.inject_adapter_in_model(peft.IA3Config(**kwargs), copy.deepcopy(model))
    after = torch.rand(1)
    generator = torch.Generator().manual_seed(3)
    params = bind(model, IA3Config(**kwargs)).init(generator)
    for path, leaves in params.items():
        assert torch.equal(leaves["ia3_l"], twin.get_submodule(path).ia3_l["default"])
    assert torch.equal(torch.rand(1, generator=generator), after)


def test_identity_at_init_bit_for_bit_in_half_precision():
    model, x = Net().bfloat16(), torch.randn(2, 4, 5, 5, dtype=torch.bfloat16)
    graft = bind(model, IA3Config(target_modules=TARGETS, feedforward_modules=["w0", "grouped"]))
    y = graft(graft.init(), x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, model(x))


def test_a_feedforward_name_is_a_whole_name_or_an_end_after_a_dot():
    model = nn.ModuleDict({"w": nn.Linear(2, 3), "raw": nn.Linear(2, 3), "deep": nn.ModuleDict({"w": nn.Linear(2, 3)})})
    graft = bind(model, IA3Config(target_modules=["w", "raw"], feedforward_modules=["w"]))
    assert {path: site.constants.feedforward for path, site in graft.sites[""].items()} == {
        "w": True,
        "raw": False,
        "deep.w": True,
    }


def test_second_derivatives_and_stacks():
    model, x = Net(Conv1D).double(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    graft = bind(model, IA3Config(target_modules=TARGETS, feedforward_modules=["w0", "grouped"]))
    trees = [randomised(graft.init()) for _ in range(3)]
    y = torch.vmap(lambda params: graft(params, x))(stack(trees))
    torch.testing.assert_close(y, torch.stack([graft(tree, x) for tree in trees]))
    names = list(trees[0])
    leaves = [trees[0][name]["ia3_l"].requires_grad_() for name in names]
    assert gradgradcheck(
        lambda *given: (
            graft({name: {"ia3_l": leaf} for name, leaf in zip(names, given, strict=True)}, x[:1]).sin().sum()
        ),
        leaves,
    )


def test_errors_and_warnings_say_what_to_write():
    with pytest.raises(ValueError, match=r"IA3Config: feedforward_modules has \['w1'\], expected a subset of target_"):
        IA3Config(target_modules=["k"], feedforward_modules=["w1", "k"])
    with pytest.warns(
        RuntimeWarning, match=r"IA3Config: feedforward_modules 'mlp': \['mlp'\] match none of the targeted"
    ):
        bind(Net(), IA3Config(target_modules=["k"], feedforward_modules="mlp"))
    with pytest.raises(ValueError, match=r"IA3 does not support Embedding \(embedding\)"):
        bind(nn.Sequential(nn.Embedding(2, 3)), IA3Config(target_modules=["0"]))
