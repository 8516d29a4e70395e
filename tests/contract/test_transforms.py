"""Every method under the transforms of torch.func, under autograd and compiled, beside its formula."""

import optree
import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from torchgraft.functional import stack, unstack, value_and_grad

from .cases import case, close, moved, second_order


def test_gradients_are_the_formulas(name, site):
    one = case(name, site)
    leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), one.params)
    expected = torch.autograd.grad(one.oracle(leaves, one.x).square().mean(), optree.tree_leaves(leaves))
    close(list(torch.autograd.grad(one.loss(leaves, one.x), optree.tree_leaves(leaves))), list(expected))
    value, grads = value_and_grad(one.loss)(one.params, one.x)
    close(value, one.loss(one.params, one.x))
    close(optree.tree_leaves(grads), list(expected))
    close(optree.tree_leaves(grad(one.loss)(one.params, one.x)), list(expected))


def test_vmap_is_a_loop(name, site):
    one = case(name, site)
    many = stack(one.trees)
    expected = torch.stack([one.graft(tree, one.x) for tree in one.trees])
    close(vmap(one.graft, in_dims=(0, None))(many, one.x), expected)
    xs = torch.stack([one.x.roll(i, 0) for i in range(3)])
    expected = torch.stack([one.graft(tree, x) for tree, x in zip(one.trees, xs, strict=True)])
    close(vmap(one.graft)(many, xs), expected)


def test_vmap_of_grad_is_a_loop(name, site):
    one = case(name, site)
    many = vmap(grad(one.loss), in_dims=(0, None))(stack(one.trees), one.x)
    for given, tree in zip(unstack(many), one.trees, strict=True):
        close(given, grad(one.loss)(tree, one.x))
    values, grads = vmap(value_and_grad(one.loss), in_dims=(0, None))(stack(one.trees), one.x)
    close(grads, many)
    assert values.shape == (3,)


def test_per_example_gradients(name, site):
    one = case(name, site)
    grads = vmap(grad(lambda params, x: one.loss(params, x[None])), in_dims=(None, 0))(one.params, one.x)
    for given, x in zip(unstack(grads), one.x, strict=True):
        close(given, grad(one.loss)(one.params, x[None]))


def test_jvp_agrees_with_the_gradient(name, site):
    one = case(name, site)
    tangent = moved(one.initial, 7)
    _, given = jvp(lambda params: one.loss(params, one.x), (one.params,), (tangent,))
    grads = grad(one.loss)(one.params, one.x)
    expected = sum((g * t).sum() for g, t in zip(*map(optree.tree_leaves, (grads, tangent)), strict=True))
    close(given, expected)


def test_hessians_are_the_formulas(name, site):
    one = case(name, site)
    x = one.x[:2]
    gradient = jacrev(lambda params: one.oracle(params, x).square().mean())
    expected = jacfwd(gradient, randomness="same")(one.params)  # formulas may draw what is fixed
    close(hessian(one.loss)(one.params, x), expected)


def test_gradients_of_gradients_are_the_formulas(name, site):
    one = case(name, site)
    leaves, treedef = optree.tree_flatten(one.params)
    x = one.x[:2]

    def of(call):
        return second_order(lambda *own: call(optree.tree_unflatten(treedef, own), x), leaves)

    close(of(one.graft), of(one.oracle))


@pytest.mark.slow
def test_gradients_of_gradients_are_differences(name, site):
    one = case(name, site)
    leaves, treedef = optree.tree_flatten(one.params)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    x = one.x[:2]

    def f(*leaves):
        return one.graft(optree.tree_unflatten(treedef, leaves), x).sum((0,))

    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True, raise_exception=False)


def test_leaves_from_another_network_get_gradients(name, site):
    one = case(name, site)
    leaves, treedef = optree.tree_flatten(one.params)
    sizes = [leaf.numel() for leaf in leaves]
    network = nn.Linear(3, sum(sizes)).double()
    emitted = network(torch.ones(3, dtype=torch.float64)).split(sizes)
    emitted = [e.view(leaf.shape) * 0.1 + leaf for e, leaf in zip(emitted, leaves, strict=True)]
    one.loss(optree.tree_unflatten(treedef, emitted), one.x).backward()
    assert network.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_compiles_whole_and_once(name, site):
    one = case(name, site, torch.float32)
    torch._dynamo.reset()
    f = torch.compile(lambda params, x: one.loss(params, x), fullgraph=True, backend="aot_eager")
    close(f(one.trees[0], one.x), one.loss(one.trees[0], one.x), torch.float32)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tree in one.trees[1:]:
            close(f(tree, one.x), one.loss(tree, one.x), torch.float32)
