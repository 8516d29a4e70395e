"""Posteriors of an adapter, in a short run: deviations, Langevin steps, linearised predictions, scores by formulas."""

import optree
import pytest
import torch
import torch.nn.functional as F

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind, per_example, perturb, ravel, stack, unstack


@pytest.fixture(scope="module")
def posterior(load_example):
    return load_example("posterior")


@pytest.fixture(scope="module")
def task(posterior, tiny):
    model, images, labels = tiny
    graft = bind(model, LoraConfig(r=2, target_modules=["qkv", "up"], init_lora_weights=False))
    images, labels = images.flatten(0, 1)[:16], labels.flatten()[:16]
    return posterior.Task(graft, images, labels, (images, labels), (images, labels))


@pytest.fixture(scope="module")
def params(task):
    return task.graft.init(torch.Generator().manual_seed(0))


def test_ways_are_scored_and_drawn(posterior, folder, capsys):
    result = posterior.main(["--quick", "--out", str(folder)])
    names = ["one adapter", "... at a temperature", "Langevin", "variational", "Laplace", "Laplace, linearised"]
    assert list(result["scores"]) == [*names, "3 adapters"]
    one, scaled = (result["scores"][name] for name in names[:2])
    assert one.accuracy == scaled.accuracy and one.nll != scaled.nll
    assert result["picture"].read_bytes().startswith(b"\x89PNG")
    assert "on 32 more labelled digits: a temperature of" in capsys.readouterr().out


def test_laplaces_deviations_are_of_the_prior_and_the_fisher_information(posterior, task, params):
    each = per_example(lambda p, x, t: F.cross_entropy(task.graft(p, x), t))(params, task.images, task.labels)[1]
    expected, found = ravel(each, stacked=True).square().sum(0), posterior.fisher(task, params)
    torch.testing.assert_close(ravel(found), expected, rtol=1e-9, atol=1e-9)
    away = ravel(posterior.laplace(params, found, 0.1, 2000), stacked=True) - ravel(params)
    torch.testing.assert_close(away.std(0), (expected + 100).rsqrt(), rtol=0.1, atol=0)


def test_a_step_of_each_chain_is_langevins(posterior, task, params):
    def log_posterior(leaf):
        tree = optree.tree_unflatten(optree.tree_structure(params), leaf)
        images, labels = task.batch(0)
        squares = sum(one.square().sum() for one in leaf)
        return -F.cross_entropy(task.graft(tree, images), labels) - squares / (2 * 16 * posterior.PRIOR**2)

    torch.manual_seed(3)
    many = posterior.langevin(task, params, 2, 1, rate=1e-3)
    leaves = [leaf.clone().requires_grad_() for leaf in optree.tree_leaves(params)]
    grads = torch.autograd.grad(log_posterior(leaves), leaves)
    torch.manual_seed(3)
    for leaf, grad, found in zip(leaves, grads, optree.tree_leaves(many), strict=True):
        noise = torch.randn_like(found)
        torch.testing.assert_close(found, leaf + 1e-3 * grad + (2 * 1e-3 / 16) ** 0.5 * noise, rtol=1e-9, atol=1e-9)


def test_linearised_predictions_are_the_jacobians(posterior, task, params):
    many = perturb(params, [torch.Generator().manual_seed(i) for i in range(3)], 0.5)
    jacobian = torch.func.jacrev(lambda p: task.graft(p, task.images))(params)
    found = posterior.linearised(task.graft, params, many, task.images)
    for there, log_probs in zip(unstack(many), found, strict=True):
        away = optree.tree_map(torch.sub, there, params)
        moved = optree.tree_map(lambda j, d: torch.tensordot(j, d, d.ndim), jacobian, away)
        logits = task.graft(params, task.images) + sum(optree.tree_leaves(moved))
        torch.testing.assert_close(log_probs, logits.log_softmax(-1), rtol=1e-9, atol=1e-9)
    exact = posterior.predicted(task.graft, stack([params]), task.images)
    torch.testing.assert_close(posterior.linearised(task.graft, params, stack([params]), task.images), exact)


def test_scores_are_those_of_the_mean_of_predictions(posterior):
    probabilities = torch.tensor([[[0.9, 0.1], [0.4, 0.6]], [[0.7, 0.3], [0.2, 0.8]]])
    found = posterior.score(probabilities.log(), torch.tensor([0, 0]))
    assert found.accuracy == 0.5  # confidences 0.8 and 0.7: right, and wrong
    assert found.nll == pytest.approx(-0.5 * (torch.tensor(0.8).log() + torch.tensor(0.3).log()).item(), rel=1e-5)
    assert found.ece == pytest.approx(0.5 * 0.2 + 0.5 * 0.7, abs=1e-5)


def test_the_lines_of_its_page_run(run_page):
    there = run_page("posterior")
    assert there["prediction"].shape == (40, 3) and there["logits"].shape == (5, 40, 3)
    torch.testing.assert_close(there["prediction"].sum(1), torch.ones(40))
