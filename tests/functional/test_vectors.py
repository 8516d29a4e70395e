"""Trees as vectors and back, with noise, copied and projected: for trees of any shape, alone and in stacks."""

import re

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchgraft.functional import copy_rows, perturb, project, ravel, stack, unravel, unstack

keys = st.text("abc.01", min_size=1, max_size=4)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
leaves = st.tuples(st.lists(st.integers(0, 3), max_size=3).map(tuple), dtypes)
forms = st.dictionaries(keys, st.dictionaries(keys, leaves, min_size=1, max_size=3), min_size=1, max_size=3)
X = {"a": {"v": torch.arange(6.0).view(2, 3), "w": torch.tensor(7.0)}}


def source(seed):
    return torch.Generator().manual_seed(seed)


def filled(form, seed):
    return {
        path: {name: torch.randn(shape, generator=source(seed)).to(dtype) for name, (shape, dtype) in one.items()}
        for path, one in form.items()
    }


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    return True


@settings(max_examples=30)
@given(forms, st.integers(1, 3))
def test_unravel_undoes_ravel(form, count):
    trees = [filled(form, seed) for seed in range(count)]
    many = stack(trees)
    for tree in unstack(stack(trees)):
        vector = ravel(tree)
        assert vector.ndim == 1 and vector.numel() == sum(leaf.numel() for leaf in optree.tree_leaves(tree))
        assert same(unravel(vector, tree), tree)
    matrix = ravel(many, stacked=True)
    assert same(matrix, torch.stack([ravel(tree) for tree in trees]))
    assert same(unravel(matrix, trees[0]), many)
    assert same(unravel(matrix[:, None], trees[0]), optree.tree_map(lambda leaf: leaf[:, None], many))


def test_vectors_are_optrees():
    expected, _ = optree.integrations.torch.tree_ravel(X)
    assert same(ravel(X), expected)


@settings(max_examples=30)
@given(forms, st.integers(1, 3), st.integers(0, 99))
def test_noise_is_of_the_generator_wherever_it_stands(form, count, seed):
    tree = optree.tree_map(lambda leaf: leaf, filled(form, 0))
    many = perturb(tree, [source(seed + i) for i in range(count)], 0.5)
    wide = torch.promote_types(ravel(tree).dtype, torch.float32)
    for i, one in enumerate(unstack(many)):
        z = torch.randn(ravel(tree).numel(), generator=source(seed + i), dtype=wide)
        expected = unravel(ravel(tree).to(wide) + 0.5 * z, tree)
        torch.testing.assert_close(one, expected)
        assert same(one, perturb(tree, source(seed + i), 0.5))
    again = perturb(stack([tree] * count), [source(seed + i) for i in range(count)], 0.5, stacked=True)
    assert same(again, many)


def test_standard_deviations_of_each_adapter_and_each_number():
    each = perturb(X, [source(0), source(1)], torch.tensor([0.0, 2.0]))
    assert same(unstack(each)[0], X) and same(unstack(each)[1], perturb(X, source(1), 2.0))
    std = {"a": {"v": torch.tensor([0.0, 1.0, 2.0]), "w": torch.tensor(0.0)}}
    noise = ravel(perturb(X, source(3), std)) - ravel(X)
    torch.testing.assert_close(
        noise, torch.randn(7, generator=source(3)) * torch.tensor([0, 1, 2, 0, 1, 2, 0.0]), rtol=1e-5, atol=1e-6
    )
    assert same(perturb(X, [source(3)], std), stack([perturb(X, source(3), std)]))
    (gradient,) = torch.autograd.grad(ravel(perturb(X, source(4), s := torch.tensor(1.0, requires_grad=True))).sum(), s)
    torch.testing.assert_close(gradient, torch.randn(7, generator=source(4)).sum())


def test_noise_has_the_standard_deviation_that_is_asked_for():
    noise = ravel(perturb({"a": torch.zeros(100_000)}, source(0), 0.3))
    assert noise.mean().abs() < 0.005 and noise.std().item() == pytest.approx(0.3, rel=0.02)


@given(st.data(), st.integers(1, 6))
def test_copied_rows_are_those_of_a_loop(data, count):
    to = data.draw(st.lists(st.integers(0, count - 1), unique=True))
    from_ = data.draw(st.lists(st.integers(0, count - 1), min_size=len(to), max_size=len(to)))
    many = {"a": torch.randn(count, 2), "b": {"c": torch.randn(count)}}
    trees = unstack(many)
    expected = list(trees)
    for i, j in zip(from_, to, strict=True):
        expected[j] = trees[i]
    assert same(copy_rows(many, from_, to), stack(expected))
    indices = torch.tensor(from_, dtype=torch.long), torch.tensor(to, dtype=torch.long)
    assert same(copy_rows(many, *indices), stack(expected))


def test_copied_rows_under_vmap_and_with_gradients():
    many = {"a": torch.randn(2, 3, 4, requires_grad=True)}
    to = torch.tensor([[0, 1], [2, 0]])
    found = torch.vmap(lambda tree, to: copy_rows(tree, torch.tensor([1, 2]), to))(many, to)
    expected = [copy_rows({"a": many["a"][i]}, [1, 2], to[i]) for i in range(2)]
    assert same(found, stack(expected))
    (gradient,) = torch.autograd.grad(copy_rows({"a": many["a"][0]}, 1, 0)["a"].sum(), many["a"])
    assert gradient[0, :, 0].tolist() == [0, 2, 1]


def matrix(count, size, seed):
    """The projection as a matrix, from its formula in Python's integers."""

    def mixed(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    result = torch.zeros(size, count, dtype=torch.float64)
    for i in range(count):
        bits = mixed((mixed(seed) + i * 0x9E3779B97F4A7C15) % 2**64)
        signed = bits - 2**64 if bits >= 2**63 else bits
        result[(signed >> 1) % size, i] = 1 - 2 * (bits & 1)
    return result


@settings(max_examples=30)
@given(forms, st.integers(1, 9), st.integers(0, 2**63 - 1))
def test_a_projection_is_its_matrix(form, size, seed):
    tree = filled(form, 0)
    vector = ravel(tree).double()
    found = project(tree, size, seed)
    torch.testing.assert_close(found.double(), matrix(len(vector), size, seed) @ vector, rtol=1e-5, atol=1e-5)
    many = stack([tree, optree.tree_map(lambda leaf: 2 * leaf, tree)])
    assert same(
        project(many, size, seed, stacked=True), torch.stack([project(one, size, seed) for one in unstack(many)])
    )


def test_projections_keep_inner_products_on_average():
    x, y = torch.randn(2, 500, dtype=torch.float64)
    size, seeds = 64, range(400)
    found = torch.stack([project({"a": x}, size, s) @ project({"a": y}, size, s) for s in seeds])
    spread = (x.norm() * y.norm() * (2 / size) ** 0.5).item()
    assert found.std() < spread
    assert abs(found.mean() - x @ y) < 4 * spread / len(seeds) ** 0.5


def test_under_vmap_and_in_gradients():
    many = {"a": torch.randn(3, 5), "b": torch.randn(3, 2, 2)}
    assert same(torch.vmap(ravel)(many), ravel(many, stacked=True))
    assert same(torch.vmap(lambda tree: project(tree, 4, 1))(many), project(many, 4, 1, stacked=True))
    assert same(torch.vmap(lambda v: unravel(v, unstack(many)[0]))(ravel(many, stacked=True)), many)
    gradient = torch.func.grad(lambda tree: project(tree, 4, 1).sum())(unstack(many)[0])
    assert set(ravel(gradient).tolist()) == {-1.0, 1.0}


@pytest.mark.full
def test_whole_graph_compile():
    def all_of(tree, many):
        copied = copy_rows(many, torch.tensor([0]), torch.tensor([1]))
        return project(tree, 4, 2), unravel(ravel(many, stacked=True) * 2, tree), copied

    many = stack([X, optree.tree_map(torch.neg, X)])
    torch.testing.assert_close(torch.compile(all_of, fullgraph=True, backend="aot_eager")(X, many), all_of(X, many))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ravel({}), ValueError, "ravel: the tree has no leaves"),
        (lambda: ravel({"a": torch.ones(2, dtype=torch.long)}), TypeError, "ravel: leaf [a] has dtype torch.int64"),
        (
            lambda: ravel({"a": torch.ones(2), "b": torch.ones(1, dtype=torch.complex64)}),
            TypeError,
            "leaf [b] has dtype torch.complex64 and leaf [a] has torch.float32",
        ),
        (
            lambda: ravel({"a": torch.ones(2), "b": torch.ones(3)}, stacked=True),
            ValueError,
            "ravel: leaf [b] has shape",
        ),
        (lambda: ravel({"a": torch.ones(2), "b": torch.ones(2, device="meta")}), ValueError, "leaf [b] is on meta"),
        (lambda: unravel(torch.ones(6), X), ValueError, "vector has shape (6,), expected (..., 7)"),
        (lambda: unravel(torch.ones(7).long(), X), TypeError, "vector has dtype torch.int64"),
        (lambda: unravel([1.0] * 7, X), TypeError, "vector is of type list"),
        (lambda: perturb(X, 3), TypeError, "generators is of type int, expected a torch.Generator"),
        (lambda: perturb(X, []), ValueError, "got no generators"),
        (lambda: perturb(X, [source(0)] * 2), ValueError, "a generator is given twice"),
        (lambda: perturb(X, source(0), -1.0), ValueError, "std is -1.0, expected a number from 0 on"),
        (
            lambda: perturb(X, [source(0)], torch.ones(2)),
            ValueError,
            "std has shape (2,), expected a number or one for",
        ),
        (lambda: perturb(X, source(0), {"a": 1.0}), ValueError, "std is a tree with other keys"),
        (
            lambda: perturb(stack([X, X]), [source(0)], stacked=True),
            ValueError,
            "got 1 generators for a stack of 2",
        ),
        (lambda: copy_rows(stack([X, X]), 0, 2), IndexError, "to has 2, and the stack has adapters 0 to 1"),
        (lambda: copy_rows(stack([X, X]), -1, 0), IndexError, "from_ has -1, and the stack has adapters 0 to 1"),
        (lambda: copy_rows(stack([X, X]), [0, 1], [0]), ValueError, "from_ has 2 adapters and to has 1"),
        (lambda: copy_rows(stack([X, X]), [0, 1], [1, 1]), ValueError, "to is [1, 1], and an adapter can be the copy"),
        (lambda: copy_rows(stack([X, X]), 0.0, 1), TypeError, "from_ is of type float, expected an integer"),
        (lambda: copy_rows(stack([X, X]), [True], [1]), TypeError, "from_ is torch.bool of shape (1,)"),
        (lambda: project(X, 0, 0), ValueError, "size is 0, expected a positive number"),
        (lambda: project(X, 4, 0.5), TypeError, "seed is 0.5, expected an integer"),
        (lambda: project({"a": torch.ones(1, dtype=torch.complex64)}, 4, 0), TypeError, "expected real numbers"),
    ],
)
def test_errors_say_what_to_do(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call()
