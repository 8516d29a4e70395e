"""Gradients of each example: those of each alone, by `vmap` and by routing, in chunks, clipped and projected."""

import re

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchgraft.adapters import IA3Config, LoraConfig, OFTConfig
from torchgraft.functional import bind, per_example, project, route, stack, unstack, value_and_grad

N = 7
WHOLE = {"fullgraph": True, "backend": "aot_eager"}


def made(config=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    graft = bind(model, config or LoraConfig(r=2, target_modules="all-linear"))
    params = optree.tree_map(lambda leaf: leaf + 0.3 * torch.randn_like(leaf), graft.init())

    def loss(params, x, t):
        return F.cross_entropy(graft(params, x), t)

    def losses(many, x, t):
        return F.cross_entropy(graft(route(many, batch_dim=0), x), t, reduction="none")

    return params, loss, losses, torch.randn(N, 6).double(), torch.randint(3, (N,))


def ways(loss, losses, **options):
    return [per_example(loss, **options), per_example(losses, stacked=True, **options)]


def length(grads):
    return torch.cat([leaf.flatten() for leaf in optree.tree_leaves(grads)]).norm()


def one_by_one(loss, params, x, t):
    found = [value_and_grad(loss)(params, x[i : i + 1], t[i : i + 1]) for i in range(len(x))]
    return torch.stack([value for value, _ in found]), stack([grads for _, grads in found])


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 20])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules="all-linear"),
        IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
        OFTConfig(oft_block_size=2, target_modules=["0", "2"]),
    ],
    ids=["lora", "ia3", "oft"],
)
def test_each_is_that_of_its_example_alone(config, chunk_size):
    params, loss, losses, x, t = made(config)
    expected = one_by_one(loss, params, x, t)
    for each in ways(loss, losses, chunk_size=chunk_size):
        torch.testing.assert_close(each(params, x, t), expected)
        lengths = torch.stack([length(grads) for grads in unstack(expected[1])])
        torch.testing.assert_close(each.norms(params, x, t), lengths)


@settings(max_examples=20)
@given(count=st.integers(0, N), chunk_size=st.none() | st.integers(1, N + 1), max_norm=st.floats(1e-3, 10))
def test_a_clipped_sum_is_the_sum_of_clipped_gradients(count, chunk_size, max_norm):
    params, loss, losses, x, t = made()
    x, t = x[:count], t[:count]
    expected = optree.tree_map(torch.zeros_like, params)
    norms = []
    for i in range(count):
        grads = value_and_grad(loss)(params, x[i : i + 1], t[i : i + 1])[1]
        norms.append(torch.nn.utils.get_total_norm(optree.tree_leaves(grads)))
        factor = min(1.0, max_norm / (norms[-1].item() + 1e-6))
        expected = optree.tree_map(lambda total, g, by=factor: total + by * g, expected, grads)
    for each in ways(loss, losses, chunk_size=chunk_size):
        total, found, values = each.clipped_sum(params, x, t, max_norm=max_norm)
        torch.testing.assert_close(total, expected)
        assert found.tolist() == pytest.approx([norm.item() for norm in norms])
        assert len(values) == count


def test_what_is_mapped_is_joined_and_all_is_never_there_at_once():
    params, loss, losses, x, t = made()
    sizes = []

    def seen(grads):
        sizes.append(len(optree.tree_leaves(grads)[0]))
        return project(grads, 4, seed=3, stacked=True)

    for each in ways(loss, losses, chunk_size=3):
        projected = each.map(seen, params, x, t)
        torch.testing.assert_close(projected, project(one_by_one(loss, params, x, t)[1], 4, seed=3, stacked=True))
    assert sizes == [3, 3, 1, 3, 3, 1]


@pytest.mark.parametrize("way", [0, 1])
def test_under_transforms_and_for_stacks(way):
    params, loss, losses, x, t = made()
    each = ways(loss, losses, chunk_size=4)[way]
    many = stack([params, optree.tree_map(lambda leaf: 2 * leaf, params)])
    values, grads = torch.vmap(lambda tree: each(tree, x, t))(many)
    for i, tree in enumerate(unstack(many)):
        torch.testing.assert_close((values[i], unstack(grads)[i]), one_by_one(loss, tree, x, t))

    def total(tree):
        return sum(length(torch.func.grad(loss)(tree, x[i, None], t[i, None])) for i in range(N))

    found = torch.func.grad(lambda tree: each.norms(tree, x, t).sum())(params)
    torch.testing.assert_close(found, torch.func.grad(total)(params))


@pytest.mark.full
def test_whole_graph_compile():
    params, loss, losses, x, t = made()
    for each in ways(loss, losses, chunk_size=4):
        compiled = torch.compile(lambda p, x, t, each=each: each.clipped_sum(p, x, t, max_norm=0.5), **WHOLE)
        torch.testing.assert_close(compiled(params, x, t), each.clipped_sum(params, x, t, max_norm=0.5))


def test_trees_of_arguments_and_what_is_shared():
    params, _, _, x, t = made()
    graft = bind(nn.Linear(6, 3).double(), LoraConfig(r=2, target_modules="all-linear"))
    params = optree.tree_map(lambda leaf: leaf + 0.1, graft.init())

    def loss(params, batch, weight, *, power=1):
        assert batch["name"] == "digits" and batch["none"] is None
        return (F.cross_entropy(graft(params, batch["x"]), batch["t"], weight=weight, reduction="sum")) ** power

    weight = torch.tensor([1.0, 2.0, 3.0]).double()
    batch = {"x": x, "t": t, "name": "digits", "none": None}
    values, _ = per_example(loss, in_dims=(0, None), chunk_size=2)(params, batch, weight, power=2)
    alone = [loss(params, batch | {"x": x[i, None], "t": t[i, None]}, weight, power=2) for i in range(N)]
    torch.testing.assert_close(values, torch.stack(alone).detach())
    with pytest.raises(
        ValueError, match=r"argument 1 has a tensor of shape \(3,\) and argument 0\['t'\] one of \(7,\)"
    ):
        per_example(loss)(params, batch, weight)


def test_random_numbers_are_an_error_unless_one_says_how():
    params, _, _, x, _ = made()
    model = nn.Sequential(nn.Dropout(), nn.Linear(6, 3)).double()
    graft = bind(model, LoraConfig(r=2, target_modules="all-linear"))
    params = optree.tree_map(lambda leaf: leaf + 0.1, graft.init())

    def loss(params, x):
        return graft(params, x).square().sum()

    with pytest.raises(RuntimeError, match="randomness"):
        per_example(loss)(params, x)
    ones = torch.ones(5, 6).double()
    assert len(set(per_example(loss, randomness="same")(params, ones)[0].tolist())) == 1
    assert len(set(per_example(loss, randomness="different")(params, ones)[0].tolist())) > 1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p, f, x, t: per_example(f(p, x, t)), TypeError, "f is of type Tensor, expected a function"),
        (lambda p, f, x, t: per_example(f, chunk_size=0), ValueError, "chunk_size is 0, expected a positive number"),
        (
            lambda p, f, x, t: per_example(f)(p, x, t[1:]),
            ValueError,
            "argument 1 has a tensor of shape (6,) and",
        ),
        (lambda p, f, x, t: per_example(f)(p), ValueError, "no positional argument after the tree has tensors"),
        (
            lambda p, f, x, t: per_example(f, in_dims=(0,))(p, x, t),
            ValueError,
            "for each of the 2 positional",
        ),
        (lambda p, f, x, t: per_example(lambda p, x: x)(p, x), ValueError, "(1, 6) for a batch of one example"),
        (lambda p, f, x, t: per_example(f)({}, x, t), ValueError, "the tree has no leaves"),
        (lambda p, f, x, t: per_example(f)(None, x, t), TypeError, "expected a tensor"),
        (lambda p, f, x, t: per_example(f, stacked=True)(p, x, t), ValueError, "looks like a stack of 7 adapters"),
        (lambda p, f, x, t: per_example(lambda p, x: x.sum())(p, x), RuntimeError, "no gradient reaches"),
    ],
)
def test_errors_say_what_to_do(call, error, words):
    params, loss, _, x, t = made()
    with pytest.raises(error, match=re.escape(words)):
        call(params, loss, x, t)
