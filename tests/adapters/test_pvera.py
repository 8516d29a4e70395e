"""PVeRA's noise: its distribution, under vmap, in place beside PEFT's generator, and for rows."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from torchgraft.adapters import PveraConfig, adapter_rows, inject_adapter_in_model, sample_latent, set_adapter
from torchgraft.functional import bind, merge, route, stack

FIELDS = {"r": 6, "target_modules": ["0", "2"]}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def randomised(graft, seed=1):
    torch.manual_seed(seed)
    return {path: {leaf: torch.randn_like(t) for leaf, t in leaves.items()} for path, leaves in graft.init().items()}


def formula(graft, model, params, x, draw):
    """The two layers, each with the noise that is drawn for it."""
    for path, layer in model.named_children():
        y = layer(x)
        if path in params:
            constants, leaves = graft.sites[""][path].constants, params[path]
            a, b = constants.pvera_A[:, : x.shape[-1]].to(x), constants.pvera_B[: y.shape[-1]].to(x)
            mean, log_variance = (leaves["pvera_lambda_d"] * (x @ a.T)).split(6, -1)
            y = y + leaves["pvera_lambda_b"] * ((mean + draw(mean) * (log_variance / 2).exp()) @ b.T)
        x = y
    return x


def test_noise_is_torchs_in_training_and_none_in_evaluation():
    model, x = net(torch.float64), torch.randn(4, 8).double()
    graft = bind(model, PveraConfig(**FIELDS))
    params = randomised(graft)
    torch.manual_seed(3)
    y = graft(params, x)
    torch.manual_seed(3)
    torch.testing.assert_close(y, formula(graft, model, params, x, torch.randn_like))
    model.eval()
    torch.testing.assert_close(graft(params, x), formula(graft, model, params, x, torch.zeros_like))
    torch.testing.assert_close(torch.func.functional_call(model, merge(graft, params), (x,)), graft(params, x))
    sampled = bind(model, PveraConfig(sample_at_inference=True, **FIELDS))
    torch.manual_seed(3)
    torch.testing.assert_close(sampled(params, x), y)


def test_a_sample_has_the_mean_and_the_variance_and_their_gradients():
    mean, log_variance = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0])
    noise = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    drawn = sample_latent(mean, log_variance, noise)
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.var(0), log_variance.exp(), atol=0.02, rtol=0)
    given = grad(lambda v: sample_latent(mean, v, noise[0]).sum())(log_variance)
    torch.testing.assert_close(given, noise[0] * (log_variance / 2).exp() / 2)


def test_vmap_draws_for_each_or_once_for_all():
    model, x = net(), torch.randn(4, 8)
    graft = bind(model, PveraConfig(**FIELDS))
    many = stack([randomised(graft)] * 3)
    for randomness, same in (("different", False), ("same", True)):
        y = vmap(graft, in_dims=(0, None), randomness=randomness)(many, x)
        assert torch.equal(y[0], y[1]) is same
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(graft, in_dims=(0, None))(many, x)


@pytest.mark.parametrize("training", [True, False])
def test_a_seed_gives_pefts_noise_from_call_to_call(training):
    model, x = net(), torch.randn(4, 8)
    fields = {"generator_seed": 11, "sample_at_inference": True, "init_weights": False, **FIELDS}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.PveraConfig(**fields)).train(training)
    mine = inject_adapter_in_model(PveraConfig(**fields), copy.deepcopy(model)).train(training)
    graft = bind(copy.deepcopy(model).train(training), PveraConfig(**fields))
    params = {"0": {}, "2": {}}
    for path in params:
        for leaf in ("pvera_lambda_b", "pvera_lambda_d"):
            params[path][leaf] = getattr(theirs.base_model.model.get_submodule(path), leaf)["default"].detach()
            getattr(mine.get_submodule(path), leaf)["default"].data.copy_(params[path][leaf])
    state = graft.sites[""]["0"].constants.noise.generator.get_state()
    outputs = []
    for _ in range(3):
        expected = theirs(x)
        outputs.append(expected)
        torch.testing.assert_close(mine(x), expected)
        torch.testing.assert_close(graft(params, x), expected)
    assert not torch.equal(outputs[0], outputs[1])
    assert mine[0].pvera_generator["default"] is not mine[2].pvera_generator["default"]
    for site in graft.sites[""].values():
        site.constants.noise.generator.set_state(state)
    torch.testing.assert_close(graft(params, x), outputs[0])


def test_rows_draw_each_for_itself():
    model, x = net(torch.float64), torch.randn(1, 8).double().expand(6, 8)
    graft = bind(model, PveraConfig(**FIELDS))
    y = graft(route(stack([randomised(graft)]), torch.tensor([0, 0, -1, 0, -1, 0])), x)
    assert len({tuple(row.tolist()) for row in y}) == 5
    torch.testing.assert_close(y[2], model(x)[2])


def test_in_place_adapters_are_switched_and_mixed():
    model, x = net().eval(), torch.randn(4, 8)
    inject_adapter_in_model(PveraConfig(init_weights=False, **FIELDS), model)
    inject_adapter_in_model(PveraConfig(init_weights=False, **FIELDS), model, "other")
    outputs = {}
    for name in ("default", "other"):
        set_adapter(model, name)
        outputs[name] = model(x)
    names = ["other", "default", "default", "other"]
    expected = torch.stack([outputs[name][i] for i, name in enumerate(names)])
    torch.testing.assert_close(adapter_rows(model, names)(x), expected)
