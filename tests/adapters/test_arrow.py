"""Arrow: LoRA adapters as experts give what PEFT's arrow model computes, with general knowledge subtracted or not."""

import copy
import re

import peft
import pytest
import torch
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import (
    IA3Config,
    LoraConfig,
    arrow_directions,
    arrow_experts,
    arrow_shares,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    save_adapter,
)
from torchgraft.functional import UnsupportedConfig, bind, merge, value_and_grad

X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


def config(**fields):
    return LoraConfig(**{"r": 2, "init_lora_weights": False, "target_modules": ["0", "2"], **fields})


def experts(count, seed=0, **fields):
    graft = bind(base(), config(**fields))
    generator = torch.Generator().manual_seed(seed)
    return [(graft.configs[""], graft.init(generator)) for _ in range(count)]


@pytest.mark.parametrize("generals", [0, 2])
def test_outputs_and_gradients_are_pefts(tmp_path, generals):
    alphas = (4, 8, 2)
    tasks = [(config(lora_alpha=alpha), experts(1, seed)[0][1]) for seed, alpha in enumerate(alphas)]
    common = experts(generals, seed=9)
    paths = []
    for i, (one, tree) in enumerate([*tasks, *common]):
        paths.append(str(save_adapter(bind(base(), one), tmp_path / str(i), params=tree)))
    how = peft.ArrowConfig(top_k=2, router_temperature=0.3, use_gks=bool(generals), rng_seed=5)
    theirs = peft.create_arrow_model(base(), paths[:3], how, paths[3:] or None).eval()
    theirs(X)  # which subtracts, and finds directions
    for name, p in theirs.named_parameters():
        p.requires_grad_("task_" in name)
    expected = theirs(X).square().mean()
    expected.backward()

    def loss(trees):
        given = [(one, tree) for (one, _), tree in zip(tasks, trees, strict=True)]
        made, params = arrow_experts(given, common, top_k=2, router_temperature=0.3, rng_seed=5)
        return bind(base(), made)(params, X).square().mean()

    value, grads = value_and_grad(loss)([tree for _, tree in tasks])
    torch.testing.assert_close(value, expected)
    for i, tree in enumerate(grads):
        for path, leaves in tree.items():
            for leaf, grad in leaves.items():
                own = theirs.get_submodule(f"base_model.model.{path}.{leaf}.task_{i}").weight.grad
                torch.testing.assert_close(grad, own)


def test_pefts_entry_makes_the_same_model_of_files(tmp_path):
    paths = []
    for i, (one, tree) in enumerate(experts(4)):
        paths.append(str(save_adapter(bind(base(), one), tmp_path / str(i), params=tree)))
    outputs = []
    for lib in (peft, adapters):
        how = lib.ArrowConfig(top_k=2, router_temperature=0.3, use_gks=True, rng_seed=5)
        model = lib.create_arrow_model(base(), paths[:3], how, paths[3:])
        assert not any(p.requires_grad for name, p in model.named_parameters() if "arrow_A" in name)
        outputs.append(model.eval()(X))
    torch.testing.assert_close(outputs[1], outputs[0])
    with pytest.raises(ValueError, match="use_gks is True and general_adapter_paths is empty"):
        adapters.create_arrow_model(base(), paths, adapters.ArrowConfig(use_gks=True))
    with pytest.raises(ValueError, match="task_specific_adapter_paths is empty"):
        adapters.create_arrow_model(base(), [], adapters.ArrowConfig())


def test_directions_are_the_first_singular_vectors():
    a, b = torch.diag(torch.tensor([3.0, 1.0, 0.5])), torch.linalg.qr(torch.randn(5, 3)).Q
    found = arrow_directions(a, b, torch.ones(3) / 3**0.5)
    torch.testing.assert_close(found.abs(), torch.tensor([1.0, 0.0, 0.0]))


def test_shares_are_a_softmax_of_the_nearest_experts():
    directions, x = torch.eye(3), torch.tensor([[1.0, -3.0, 2.0]])
    given = arrow_shares(x, directions, 2, 0.5)
    torch.testing.assert_close(given, torch.tensor([[0.0, *torch.tensor([6.0, 4.0]).softmax(0)]]))


def test_files_and_layers_in_place_are_the_functional_ones(tmp_path):
    made, params = arrow_experts(experts(3), top_k=2)
    graft = bind(base(), made)
    y = graft(params, X)
    torch.testing.assert_close(inject_adapter_in_model(made, base(), params=copy.deepcopy(params))(X), y)
    save_adapter(graft, tmp_path, params=params)
    again = bind(base(), load_config(tmp_path))
    assert torch.equal(again(load_adapter(again, tmp_path), X), y)
    torch.testing.assert_close(load_adapter(base(), tmp_path)(X), y)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([(IA3Config(), {})], UnsupportedConfig, "adapters[0] is IA3, whose change of a weight is no product"),
        ([*experts(1), *experts(1, r=3)], ValueError, "0 of adapters[1] has rank 3, expected 2 as in adapters[0]"),
        (
            [*experts(1), *experts(1, target_modules=["0"])],
            ValueError,
            "adapters[1] adapts other modules than adapters[0]: only one has '2'",
        ),
        (experts(1, lora_bias=True), ValueError, "0 of adapters[0] has ['lora_B_bias'], and an expert is a lora_A and"),
    ],
)
def test_what_is_no_expert_is_an_error_that_names_it(given, error, words):
    with pytest.raises(error, match=re.escape(words)):
        arrow_experts(given)


def test_merging_is_an_error_that_says_why():
    made, params = arrow_experts(experts(2))
    with pytest.raises(UnsupportedConfig, match="0: Arrow's shares of experts depend on each token, which no weight"):
        merge(bind(base(), made), params)
