"""An adapter that is made to be trained, in a short run: the outer gradient goes through the inner steps."""

import optree
import pytest
import torch

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind


@pytest.fixture(scope="module")
def maml(load_example):
    return load_example("maml")


def test_starts_are_learned_and_drawn(maml, folder, capsys):
    result = maml.main(["--quick", "--out", str(folder)])
    assert list(result["found"]) == list(maml.COLORS) and all(len(read) == 4 for read in result["found"].values())
    assert result["picture"].read_bytes().startswith(b"\x89PNG")
    assert "inner steps" in capsys.readouterr().out
    rates = optree.tree_leaves(result["starts"]["MAML"][1])
    assert len({round(float(rate), 6) for rate in rates}) > 1  # rates were learned


@pytest.mark.parametrize("first_order", [False, True])
def test_the_outer_gradient_is_that_of_a_difference(maml, tiny, first_order):
    model, images, labels = tiny
    graft = bind(model, LoraConfig(r=2, target_modules=["qkv", "up"], init_lora_weights=False))
    params = graft.init(torch.Generator().manual_seed(0))
    rates = optree.tree_map(lambda leaf: torch.tensor(0.5, dtype=torch.float64).log(), params)
    direction = optree.tree_map(lambda leaf: torch.sin(torch.arange(leaf.numel()) + 1.0).view_as(leaf).double(), params)

    def outer(params):
        there = maml.after(graft, params, rates, images[0], labels[0], 2, first_order)
        return maml.loss_of(graft, there, images[1], labels[1])

    def along(step):
        return outer(optree.tree_map(lambda leaf, d: leaf + step * d, params, direction))

    grads = torch.func.grad(outer)(params)
    slope = sum(float((g * d).sum()) for g, d in zip(*map(optree.tree_leaves, (grads, direction)), strict=True))
    difference = float(along(1e-6) - along(-1e-6)) / 2e-6
    assert (slope == pytest.approx(difference, rel=1e-4)) is not first_order


def test_an_inner_step_is_gradient_descent(maml, tiny):
    model, images, labels = tiny
    graft = bind(model, LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False))
    params = graft.init(torch.Generator().manual_seed(0))
    rates = optree.tree_map(lambda leaf: torch.tensor(0.3, dtype=torch.float64).log(), params)
    leaves = [leaf.clone().requires_grad_() for leaf in optree.tree_leaves(params)]
    tree = optree.tree_unflatten(optree.tree_structure(params), leaves)
    torch.nn.functional.cross_entropy(graft(tree, images[0]), labels[0]).backward()
    found = optree.tree_leaves(maml.after(graft, params, rates, images[0], labels[0], 1))
    for leaf, own in zip(leaves, found, strict=True):
        torch.testing.assert_close(own, leaf.detach() - 0.3 * leaf.grad, rtol=1e-9, atol=1e-12)


def test_the_lines_of_its_page_run(run_page):
    there = run_page("maml")
    assert all(leaf.grad.abs().max() > 0 for leaf in optree.tree_leaves(there["params"]))
