"""Leaves for optimizers: all of them, once, or an error that says what to give."""

import optree
import pytest
import torch
from torch import nn

from torchgraft.adapters import LoraConfig, inject_adapter_in_model
from torchgraft.functional import bind, route, stack, trainable, unstack


def made(count=1):
    graft = bind(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, init_lora_weights=False, target_modules=["0"]))
    return graft, [graft.init() for _ in range(count)]


def test_all_leaves_in_order_and_each_once():
    _, (a, b) = made(2)
    assert all(x is y for x, y in zip(trainable(a), optree.tree_leaves(a), strict=True))
    assert all(leaf.requires_grad for leaf in optree.tree_leaves(a))
    assert len(trainable({"a": a, "b": b})) == 4 and len(trainable({"a": a, "b": a})) == 2
    assert trainable(b["0"])[1] is b["0"]["lora_B"]


def test_one_rate_for_each_adapter_of_a_stack():
    graft, trees = made(2)
    before = [optree.tree_map(torch.clone, tree) for tree in trees]
    groups = [{"params": trainable(tree), "lr": rate} for tree, rate in zip(trees, (0.5, 0.0), strict=True)]
    optimizer = torch.optim.SGD(groups)
    graft(route(stack(trees)), torch.ones(2, 4)).square().sum().backward()
    gradients = [leaf.grad for leaf in optree.tree_leaves(trees[0])]
    optimizer.step()
    expected = [leaf - 0.5 * g for leaf, g in zip(optree.tree_leaves(before[0]), gradients, strict=True)]
    torch.testing.assert_close(optree.tree_leaves(trees[0]), expected)
    assert optree.tree_all(optree.tree_map(torch.equal, trees[1], before[1]))


def test_what_an_optimizer_cannot_write_to_is_refused():
    graft, (tree, other) = made(2)
    many = stack([tree, other])
    trainable(many)
    with pytest.raises(ValueError, match=r"trainable: leaf \[0\]\[lora_A\] was computed from.*SelectBackward.*no_grad"):
        trainable(unstack(many)[0])
    with torch.no_grad():
        trainable(unstack(many)[0])
    with torch.inference_mode():
        made_there = graft.init()
    with pytest.raises(ValueError, match=r"\[0\]\[lora_A\] was made in torch.inference_mode\(\).*clone it"):
        trainable(made_there)
    with pytest.raises(TypeError, match=r"leaf \[a\] has dtype torch.int64, which has no gradient"):
        trainable({"a": torch.arange(2)})


def test_what_is_no_tree_says_what_to_give():
    graft, trees = made(2)
    model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 3)))
    for given, words in [
        (graft, "of type Graft.*a graft holds no parameters"),
        (model, r"of type Sequential.*a module has parameters\(\)"),
        (route(stack(trees)), "of type Routed.*give the stack that was routed"),
        (trees, "of type list.*of several trees: "),
        (None, "of type NoneType, expected one parameter tree"),
        ({"a": None}, r"leaf \[a\] is None, expected a tensor"),
    ]:
        with pytest.raises(TypeError, match=words):
            trainable(given)
    with pytest.raises(ValueError, match="the tree has no leaves"):
        trainable({})
