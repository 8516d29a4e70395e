"""AdaLoRA against its equation and against PEFT, and its budget against PEFT's over whole schedules."""

import copy
import dataclasses

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradgradcheck
from torch.func import grad, vmap
from transformers.pytorch_utils import Conv1D

from torchgraft.adapters import AdaLoraConfig, adalora_state, allocate, orthogonality, prune
from torchgraft.adapters._methods.adalora.budget import budget
from torchgraft.functional import bind, merge, stack, unstack

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}
TRAJECTORY = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}
TARGETS = ["kernel", "k", "w0"]


class Net(nn.Module):
    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.kernel = nn.Conv2d(2, 4, (2, 3), padding=1)
        self.k = Conv1D(5, 4) if linear is Conv1D else nn.Linear(4, 5, bias=False)
        self.w0 = Conv1D(3, 5) if linear is Conv1D else nn.Linear(5, 3)

    def forward(self, x):
        return self.w0(self.k(self.kernel(x).tanh().movedim(1, -1).contiguous()).tanh())


def randomised(params, dtype=torch.float64):
    return {
        path: {leaf: torch.randn_like(p, dtype=dtype) for leaf, p in leaves.items()} for path, leaves in params.items()
    }


def inputs(dtype=torch.float64):
    return torch.randn(2, 2, 3, 4, dtype=dtype)


@pytest.mark.parametrize("alpha", [8, 0.5, 0])
@pytest.mark.parametrize("module", [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), Conv1D(4, 6)], ids=str)
def test_linear_is_its_equation(module, alpha):
    model = nn.Sequential(copy.deepcopy(module).double())
    graft = bind(model, AdaLoraConfig(init_r=3, lora_alpha=alpha, target_modules=["0"]))
    params, x = randomised(graft.init()), torch.randn(2, 5, 6, dtype=torch.float64)
    leaves = params["0"]
    delta = leaves["lora_B"] @ torch.diag(leaves["lora_E"][:, 0]) @ leaves["lora_A"] * (alpha or 3) / (3 + 1e-5)
    weight = model[0].weight.T if isinstance(module, Conv1D) else model[0].weight
    oracle = F.linear(x, weight + delta, model[0].bias)
    torch.testing.assert_close(graft(params, x), oracle, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        torch.func.functional_call(model, merge(graft, params), (x,)), oracle, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 6, (2, 3), stride=2, dilation=(1, 2), groups=2, bias=False),
        nn.Conv2d(4, 4, 2, groups=4),
    ],
    ids=str,
)
def test_convolution_is_its_equation(module):
    model = nn.Sequential(copy.deepcopy(module).double())
    graft = bind(model, AdaLoraConfig(init_r=3, target_modules=["0"]))
    params, x = randomised(graft.init()), torch.randn(2, 4, 6, 7, dtype=torch.float64)
    leaves, oracle = params["0"], copy.deepcopy(model)
    delta = leaves["lora_B"] @ torch.diag(leaves["lora_E"][:, 0]) @ leaves["lora_A"] * 8 / (3 + 1e-5)
    oracle[0].weight.data += delta.view(oracle[0].weight.shape)
    torch.testing.assert_close(graft(params, x), oracle(x), rtol=0, atol=1e-11)
    torch.testing.assert_close(
        torch.func.functional_call(model, merge(graft, params), (x,)), oracle(x), rtol=0, atol=1e-10
    )


def planted(model, config, params):
    """The same model with PEFT's layers in it, holding these parameters."""
    tuner = peft.AdaLoraModel(copy.deepcopy(model), config, "default")
    for path, leaves in params.items():
        for leaf, value in leaves.items():
            own = getattr(tuner.model.get_submodule(path), leaf)["default"]
            assert own.shape == value.shape
            own.data.copy_(value)
    return tuner


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("linear", [nn.Linear, Conv1D])
@pytest.mark.parametrize("alpha", [8, 0])
def test_outputs_are_those_of_peft(alpha, linear, dtype):
    model, x = Net(linear).to(dtype), inputs(dtype)
    kwargs = {"init_r": 3, "lora_alpha": alpha, "total_step": 9, "target_modules": TARGETS}
    graft = bind(model, AdaLoraConfig(**kwargs))
    params = randomised(graft.init(), dtype)
    twin = planted(model, peft.AdaLoraConfig(**kwargs, fan_in_fan_out=linear is Conv1D), params)
    torch.testing.assert_close(graft(params, x), twin(x), **TOLERANCE[dtype])


@pytest.mark.parametrize("init", [True, False])
def test_init_is_that_of_peft_and_uses_up_the_same_random_numbers(init):
    model = Net()
    kwargs = {"total_step": 9, "target_modules": TARGETS, "init_lora_weights": init}
    torch.manual_seed(3)
    twin = peft.inject_adapter_in_model(peft.AdaLoraConfig(**kwargs), copy.deepcopy(model))
    after = torch.rand(1)
    generator = torch.Generator().manual_seed(3)
    params = bind(model, AdaLoraConfig(**kwargs)).init(generator)
    for path, leaves in params.items():
        for leaf, value in leaves.items():
            assert torch.equal(value, getattr(twin.get_submodule(path), leaf)["default"])
    assert torch.equal(torch.rand(1, generator=generator), after)


def test_identity_at_init_bit_for_bit_in_half_precision():
    model, x = Net().bfloat16(), inputs(torch.bfloat16)
    graft = bind(model, AdaLoraConfig(target_modules=TARGETS))
    y = graft(graft.init(), x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, model(x))


SCHEDULES = [
    {"total_step": 9},
    {"total_step": 12, "tinit": 3, "tfinal": 4},
    {"total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 3, "beta1": 0.5, "beta2": 0.9},
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_allocation_is_that_of_peft_over_a_whole_schedule(schedule, dtype):
    """Plain gradient descent on both sides, with the regulariser, past the end of the schedule."""
    model, x = Net().to(dtype), inputs(dtype)
    kwargs = {"init_r": 4, "target_r": 2, "target_modules": TARGETS, **schedule}
    config = AdaLoraConfig(**kwargs)
    graft = bind(model, config)
    params = randomised(graft.init(), dtype)
    twin = planted(model, peft.AdaLoraConfig(**kwargs), params)
    # PEFT also leaves ranknum trainable where the base is not float32, a defect
    trained = {name: p for name, p in twin.model.named_parameters() if "lora_" in name}
    state = adalora_state(config, params)

    def loss(params):
        return graft(params, x).square().mean() + orthogonality(config, params)

    phases = set()
    for step in range(config.total_step + 1):
        grads = grad(loss)(params)
        params = {path: {leaf: p - 0.02 * grads[path][leaf] for leaf, p in params[path].items()} for path in params}
        params, state = allocate(config, params, grads, state, step)

        for p in trained.values():
            p.grad = None
        regulariser = []
        for name, p in trained.items():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                regulariser.append(torch.norm(gram - torch.eye(len(gram), dtype=dtype), p="fro"))
        (twin(x).square().mean() + 0.5 * sum(regulariser) / len(regulariser)).backward()
        with torch.no_grad():
            for p in trained.values():
                p -= 0.02 * p.grad
        # nothing to mask is an error in PEFT, kthvalue of k=0
        triplets, masking = budget(config, [4, 4, 4], step)
        if step < config.total_step - config.tfinal and masking and triplets == 12:
            twin.rankallocator.update_ipt(twin.model)
        else:
            twin.update_and_allocate(step)
        for path, leaves in params.items():
            for leaf, value in leaves.items():
                own = trained[f"{path}.{leaf}.default"].detach()
                torch.testing.assert_close(value, own, **TRAJECTORY[dtype])
        zeros = sum((leaves["lora_E"] == 0).sum().item() for leaves in params.values())
        phases.add("masked" if zeros else "free")
    assert phases == {"masked", "free"}
    assert zeros == 12 - 6
    assert twin.peft_config["default"].rank_pattern == {
        f"{path}.lora_E.default": kept.flatten().tolist() for path, kept in state["kept"].items()
    }


@pytest.mark.parametrize("step", [0, 3, 4, 7, 8, 10])
def test_budget_is_that_of_peft(step):
    kwargs = {"init_r": 5, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 11}
    twin = planted(Net(), peft.AdaLoraConfig(**kwargs, target_modules=TARGETS), {})
    assert budget(AdaLoraConfig(**kwargs), [5, 5, 5], step) == twin.rankallocator.budget_schedule(step)


def test_a_stack_under_vmap_is_a_loop_over_its_adapters():
    model, x = Net().double(), inputs()
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=2, total_step=6, target_modules=TARGETS)
    graft = bind(model, config)
    trees = [randomised(graft.init()) for _ in range(3)]
    states, many = [adalora_state(config, tree) for tree in trees], stack(trees)
    together = adalora_state(config, many)

    def loss(params):
        return graft(params, x).square().mean() + orthogonality(config, params)

    for step in range(7):
        grads = [grad(loss)(tree) for tree in trees]
        pairs = [allocate(config, *each, step) for each in zip(trees, grads, states, strict=True)]
        trees, states = map(list, zip(*pairs, strict=True))
        many, together = vmap(lambda p, s, step=step: allocate(config, p, grad(loss)(p), s, step))(many, together)
    for one, other in zip(trees, unstack(many), strict=True):
        for path, leaves in one.items():
            for leaf, value in leaves.items():
                torch.testing.assert_close(value, other[path][leaf])
    for one, other in zip(states, unstack(together), strict=True):
        assert all(torch.equal(one["kept"][path], other["kept"][path]) for path in one["kept"])
    assert len({tuple(torch.cat(list(state["kept"].values())).flatten().tolist()) for state in states}) > 1


def test_allocate_compiles_into_one_graph():
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=4, target_modules=TARGETS)
    params = randomised(bind(Net(), config).init())
    grads = randomised(params)
    _, state = allocate(config, params, grads, adalora_state(config, params), 0)

    def run(params, grads, state):
        return allocate(config, params, grads, state, 2)

    compiled = torch.compile(run, fullgraph=True, backend="eager")(params, grads, state)
    for path, leaves in run(params, grads, state)[0].items():
        assert torch.equal(compiled[0][path]["lora_E"], leaves["lora_E"])


def test_allocate_changes_nothing_it_was_given_and_keeps_no_graph():
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=2, target_modules=TARGETS)
    params = randomised(bind(Net(), config).init())
    for leaves in params.values():
        for p in leaves.values():
            p.requires_grad_()
    before, state = copy.deepcopy(params), adalora_state(config, params)
    after, state = allocate(config, params, randomised(params), state, 1)
    assert all(torch.equal(p, before[path][leaf]) for path in params for leaf, p in params[path].items())
    assert not any(
        value.requires_grad
        for tree in (state["importance"], state["uncertainty"])
        for leaves in tree.values()
        for value in leaves.values()
    )
    assert after["k"]["lora_E"].requires_grad


@pytest.mark.parametrize("alpha", [8, 0])
def test_pruned_parameters_compute_the_same_and_load_into_peft(alpha):
    model, x = Net().double(), inputs()
    config = AdaLoraConfig(init_r=4, target_r=1, total_step=2, lora_alpha=alpha, target_modules=TARGETS)
    graft = bind(model, config)
    params, state = randomised(graft.init()), adalora_state(config, graft.init())
    for step in (0, 1, 2):
        params, state = allocate(config, params, randomised(params), state, step)
    small, pruned = prune(config, params, state)
    assert sum(len(leaves["lora_E"]) for leaves in pruned.values()) == 3
    torch.testing.assert_close(bind(model, small)(pruned, x), graft(params, x))
    if not alpha:
        return  # PEFT then scales by the new rank
    own = peft.AdaLoraConfig(init_r=4, total_step=2, target_modules=TARGETS)
    twin = peft.AdaLoraModel(copy.deepcopy(model), own, "default")
    twin.resize_modules_by_rank_pattern(dict(small.rank_pattern), "default")
    for path, leaves in pruned.items():
        for leaf, value in leaves.items():
            getattr(twin.model.get_submodule(path), leaf)["default"].data.copy_(value)
    torch.testing.assert_close(twin(x), graft(params, x))


def test_orthogonality_is_zero_for_orthonormal_triplets_and_differentiable():
    q = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64)).Q
    leaves = {"lora_A": q.T, "lora_B": q, "lora_E": torch.ones(3, 1).double()}
    assert orthogonality(AdaLoraConfig(), {"0": leaves}) < 1e-12
    twice = orthogonality(AdaLoraConfig(orth_reg_weight=2.0), {"0": {**leaves, "lora_A": 2 * q.T}})
    torch.testing.assert_close(twice, torch.tensor(2 * 3 * 3**0.5 / 2, dtype=torch.float64))
    assert grad(lambda p: orthogonality(AdaLoraConfig(), p))({"0": {**leaves, "lora_A": 2 * q.T}})["0"]["lora_A"].any()


def test_second_derivatives():
    model, x = Net(Conv1D).double(), inputs()[:1]
    graft = bind(model, AdaLoraConfig(init_r=2, target_modules=TARGETS))
    params = randomised(graft.init())
    leaves = [p.requires_grad_() for path in ("kernel", "k") for p in params[path].values()]

    def loss(*given):
        names = ("lora_A", "lora_B", "lora_E")
        tree = {"kernel": dict(zip(names, given[:3], strict=True)), "k": dict(zip(names, given[3:], strict=True))}
        return graft({**params, **tree}, x).sin().sum()

    assert gradgradcheck(loss, leaves)


def test_errors_say_what_to_write():
    with pytest.raises(
        ValueError, match="AdaLoraConfig: tinit=5, tfinal=5 and total_step=10 leave no step to allocate"
    ):
        AdaLoraConfig(tinit=5, tfinal=5, total_step=10)
    with pytest.raises(ValueError, match="AdaLoraConfig: beta1 is 1.0, expected 0 < beta < 1"):
        AdaLoraConfig(beta1=1.0)
    with pytest.raises(ValueError, match="AdaLoraConfig: init_r is 0, expected a positive integer"):
        AdaLoraConfig(init_r=0)
    with pytest.raises(ValueError, match="AdaLoraConfig: tinit is -1, expected 0 or more"):
        AdaLoraConfig(tinit=-1)
    with pytest.raises(ValueError, match="rank_pattern has 1 entries for k, expected one for each of the init_r=12"):
        bind(Net(), AdaLoraConfig(target_modules=["k"], rank_pattern={"k.lora_E": [True]}))
    with pytest.raises(ValueError, match=r"rank_pattern names \['q'\], expected targeted modules followed by"):
        bind(Net(), AdaLoraConfig(target_modules=["k"], rank_pattern={"q.lora_E": [True]}))
    config = AdaLoraConfig(init_r=2, target_modules=["k"])
    params = bind(Net(), config).init()
    state = adalora_state(config, params)
    with pytest.raises(ValueError, match="AdaLoraConfig: total_step is None, expected the number of training steps"):
        allocate(config, params, params, state, 0)
    config = dataclasses.replace(config, total_step=4)
    for step in (-1, 1.5, None, torch.tensor(1)):
        with pytest.raises(ValueError, match="AdaLoraConfig: step is .*, expected a Python integer, 0 or more"):
            allocate(config, params, params, state, step)
    for call in (
        lambda: allocate(config, None, params, state, 0),
        lambda: orthogonality(config, None),
        lambda: adalora_state(config, None),
    ):
        with pytest.raises(TypeError, match="params is of type NoneType, expected one AdaLoRA adapter's tree"):
            call()
    with pytest.raises(TypeError, match=r"allocate: state is \['kept'\], expected what adalora_state or the last"):
        allocate(config, params, params, {"kept": state["kept"]}, 0)
    with pytest.raises(KeyError, match=r"params\['style'\] has \['k'\], expected"):
        allocate(config, {"style": params}, params, state, 0)
    with pytest.raises(
        ValueError, match=r"grads has \[\] and state has \['k'\], expected the sites of params, \['k'\]"
    ):
        allocate(config, params, {}, state, 0)
    many = stack([params, params])
    with pytest.raises(
        ValueError, match=r"k: lora_E has shape \(2, 2, 1\), expected \(r, 1\); for a stack of adapters use"
    ):
        allocate(config, many, many, adalora_state(config, many), 0)
    with pytest.raises(ValueError, match="lora_E of k is not zero where state masks it"):
        prune(config, randomised(params), {"kept": {"k": torch.tensor([[True], [False]])}})
