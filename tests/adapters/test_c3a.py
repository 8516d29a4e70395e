"""C3A against its equation and against PEFT: sizes of blocks, starts, spectra, and what PEFT gets wrong."""

import copy

import peft
import pytest
import torch
from torch import nn

from torchgraft.adapters import (
    C3AConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    save_adapter,
    set_adapter,
    set_peft_model_state_dict,
)
from torchgraft.adapters._methods import c3a
from torchgraft.functional import bind, merge, route, stack, value_and_grad

ON_FIRST = {"target_modules": ["0"]}


def made(layer, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(layer()).to(dtype)


def randomised(params, seed=1):
    torch.manual_seed(seed)
    return {path: {leaf: torch.randn_like(p) for leaf, p in leaves.items()} for path, leaves in params.items()}


def entries(kernel, weight):
    """Return `C / d`, one entry of the weight after the other."""
    b, found = kernel.shape[2], torch.zeros_like(weight)
    for t, j in torch.cartesian_prod(torch.arange(len(weight)), torch.arange(weight.shape[1])).tolist():
        found[t, j] = kernel[t // b, j // b, (j % b - t % b) % b]
    return found / weight[0].numel()


LAYERS = {
    "one block": (lambda: nn.Linear(12, 12), 12),
    "odd blocks": (lambda: nn.Linear(6, 12), 3),
    "many blocks": (lambda: nn.Linear(12, 20), 4),
    "blocks of one": (lambda: nn.Linear(4, 3), 1),
    "conv1d": (lambda: nn.Conv1d(6, 9, 3), 3),
    "groups": (lambda: nn.Conv2d(12, 8, 3, groups=2), 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_merged_weights_are_the_equation(name):
    layer, b = LAYERS[name]
    model = made(layer)
    graft = bind(model, C3AConfig(block_size=b, **ON_FIRST))
    params, weight = randomised(graft.init()), model[0].weight.detach()
    expected = weight + entries(params["0"]["c3a_kernel"], weight)
    torch.testing.assert_close(merge(graft, params)["0.weight"], expected)
    x = torch.randn(3, weight.shape[1] * getattr(model[0], "groups", 1), *(5,) * (weight.ndim - 2)).double()
    y = torch.func.functional_call(model, {"0.weight": expected}, (x,))
    torch.testing.assert_close(graft(params, x), y)
    rows = torch.tensor([0, -1, 0])
    routed = graft(route(stack([params]), rows), x)
    torch.testing.assert_close(routed, torch.where((rows < 0).view(3, *(1,) * (y.ndim - 1)), model(x), y))


@pytest.mark.parametrize("speed", [0, 1000], ids=["by spectra", "as a weight"])
@pytest.mark.parametrize("name", ["one block", "odd blocks", "many blocks", "blocks of one"])
def test_both_ways_have_the_equations_gradients(name, speed, monkeypatch):
    monkeypatch.setattr(c3a, "_TRANSFORM", speed)
    layer, b = LAYERS[name]
    model = made(layer).requires_grad_(False)
    graft = bind(model, C3AConfig(block_size=b, **ON_FIRST))
    kernel = randomised(graft.init())["0"]["c3a_kernel"].double().requires_grad_()
    x = torch.randn(2, 3, model[0].in_features, dtype=torch.float64, requires_grad=True)
    expected = nn.functional.linear(x, model[0].weight + entries(kernel, model[0].weight), model[0].bias)
    y = graft({"0": {"c3a_kernel": kernel}}, x)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    for mine, theirs in zip(*(torch.autograd.grad(out, (x, kernel), g) for out in (y, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradgradcheck(lambda x, kernel: graft({"0": {"c3a_kernel": kernel}}, x), (x, kernel))


@pytest.mark.parametrize("b", [64, 16])
def test_no_weight_is_kept_for_the_backward(b):
    model = made(lambda: nn.Linear(64, 128))
    graft = bind(model, C3AConfig(block_size=b, **ON_FIRST))
    params = {"0": {"c3a_kernel": graft.init()["0"]["c3a_kernel"].requires_grad_()}}
    own, kept = model[0].weight.data_ptr(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        graft(params, torch.randn(2, 64).double())
    assert max(t.numel() for t in kept if t.data_ptr() != own) < 64 * 128 / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    model, x = made(lambda: nn.Linear(12, 8), dtype), torch.randn(5, 12, dtype=dtype)
    graft = bind(model, C3AConfig(block_size=4, **ON_FIRST))
    leaf = torch.randn(2, 3, 4).to(dtype)
    y = graft({"0": {"c3a_kernel": leaf}}, x)
    weight = model[0].weight.detach().double()
    expected = x.double() @ (weight + entries(leaf.double(), weight)).T + model[0].bias.detach().double()
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("init", [True, False, "gaussian", "kaiming_uniform", "xavier_uniform"])
def test_starts_are_pefts_bit_for_bit(init):
    model, fields = made(lambda: nn.Linear(12, 8), torch.float32), {"block_size": 4, "init_weights": init, **ON_FIRST}
    torch.manual_seed(3)
    theirs = peft.inject_adapter_in_model(peft.C3AConfig(**fields), copy.deepcopy(model))
    after = torch.rand(1)
    generator = torch.Generator().manual_seed(3)
    params = bind(model, C3AConfig(**fields)).init(generator)
    assert torch.equal(torch.rand(1, generator=generator), after)
    assert torch.equal(params["0"]["c3a_kernel"], theirs[0].c3a_kernel["default"])
    x = torch.randn(2, 12)
    torch.testing.assert_close(bind(model, C3AConfig(**fields))(params, x), theirs(x))


def test_sizes_by_pattern_are_pefts_and_are_found_in_tensors(tmp_path):
    model = nn.Sequential(nn.Linear(12, 8), nn.Sequential(nn.Linear(8, 4)))
    fields = {"block_size": 4, "block_size_pattern": {"1.0": 2}, "target_modules": ["0", "1.0"]}
    config = C3AConfig(**fields)
    assert inject_adapter_in_model(config, copy.deepcopy(model))[1][0].block_size["default"] == 2
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.C3AConfig(**fields))
    theirs.save_pretrained(tmp_path / "theirs")
    graft, x = bind(model, load_config(tmp_path / "theirs")), torch.randn(3, 12)
    torch.testing.assert_close(graft(load_adapter(graft, tmp_path / "theirs"), x), theirs(x))
    params = randomised(graft.init())
    save_adapter(graft, tmp_path / "mine", params=params)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "mine")
    torch.testing.assert_close(again(x), graft(params, x))
    state = get_peft_model_state_dict(inject_adapter_in_model(config, copy.deepcopy(model)))
    from_state = inject_adapter_in_model(
        C3AConfig(block_size=4, target_modules=["0", "1.0"]), copy.deepcopy(model), state_dict=state
    )
    assert set_peft_model_state_dict(from_state, state) == ([], [])
    assert from_state[1][0].block_size["default"] == 2
    save_adapter(from_state, tmp_path / "found")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "found")
    torch.testing.assert_close(again(x), from_state(x))


def test_patterns_that_match_nothing_are_said():
    with pytest.warns(RuntimeWarning, match=r"C3AConfig: \['2'\] in block_size_pattern match none of the targeted"):
        bind(made(lambda: nn.Linear(4, 4)), C3AConfig(block_size=4, block_size_pattern={"2": 2}, **ON_FIRST))
    with pytest.raises(ValueError, match="block_size is 3 at 0, whose weight is 4 x 4; expected a divisor of 4, or gi"):
        bind(made(lambda: nn.Linear(4, 4)), C3AConfig(block_size=4, block_size_pattern={"0": 3}, **ON_FIRST))


def test_the_gradient_of_the_input_is_the_equations_which_pefts_is_not():
    model, x = made(lambda: nn.Linear(12, 8), torch.float32), torch.randn(5, 12, requires_grad=True)
    fields = {"block_size": 4, **ON_FIRST}
    theirs = peft.inject_adapter_in_model(peft.C3AConfig(**fields), copy.deepcopy(model))
    graft = bind(model, C3AConfig(**fields))
    params = {"0": {"c3a_kernel": theirs[0].c3a_kernel["default"].detach()}}
    weight = merge(graft, params)["0.weight"]
    seed = torch.arange(8.0)
    (given,), (wrong,) = (
        torch.autograd.grad((call(x) * seed).sum(), x) for call in (lambda x: graft(params, x), theirs)
    )
    torch.testing.assert_close(given, seed.expand(5, 8) @ weight)
    assert not torch.allclose(wrong, given, atol=1e-3)


def test_of_two_active_adapters_each_gets_the_layers_input():
    model, x = made(lambda: nn.Linear(8, 8)), torch.randn(3, 8).double()
    configs = [C3AConfig(block_size=b, **ON_FIRST) for b in (4, 8)]
    params = [randomised(bind(model, config).init(), seed) for seed, config in enumerate(configs)]
    weight = model[0].weight.detach()
    both = weight + sum(entries(tree["0"]["c3a_kernel"], weight) for tree in params)
    injected = inject_adapter_in_model(configs[0], copy.deepcopy(model), "a", params=params[0])
    inject_adapter_in_model(configs[1], injected, "b", params=params[1])
    set_adapter(injected, ["a", "b"])
    torch.testing.assert_close(injected(x), nn.functional.linear(x, both, model[0].bias))


def test_it_trains():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(32, 8)
    graft = bind(model, C3AConfig(block_size=4, init_weights=True, target_modules=["0", "2"]))
    goal, params = graft(randomised(graft.init()), x), graft.init()

    def loss(params):
        return (graft(params, x) - goal).square().mean()

    first = loss(params).item()
    for _ in range(100):
        _, grads = value_and_grad(loss)(params)
        params = {p: {leaf: t - 3.0 * grads[p][leaf] for leaf, t in own.items()} for p, own in params.items()}
    assert loss(params) < first / 4
