"""Gradients of stacks: torch.func's numbers, one call for all adapters, memory of one chunk."""

import re

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind, clip_by_norm, grad, norms, route, stack, unstack, value_and_grad

N, K = 6, 4


def made(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    graft = bind(model, LoraConfig(r=2, target_modules="all-linear"))
    trees = [optree.tree_map(lambda t: t + 0.3 * torch.randn(t.shape, dtype=t.dtype), graft.init()) for _ in range(N)]
    return graft, trees, torch.randn(N * K, 8, dtype=dtype), torch.randint(3, (N * K,))


def losses_of(graft):
    def losses(many, x, t):
        logits = graft(route(many, batch_dim=0), x)
        return (
            F.cross_entropy(logits, t, reduction="none").unflatten(0, (-1, len(t) // len(many["0"]["lora_A"]))).mean(1)
        )

    return losses


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 4, 6, 9])
def test_numbers_are_torch_funcs(chunk_size):
    graft, trees, x, t = made()
    losses, many = losses_of(graft), stack(trees)
    values, grads = value_and_grad(losses, stacked=True, chunk_size=chunk_size)(many, x, t)

    def loss(tree, x, t):
        return F.cross_entropy(graft(tree, x), t)

    parts = x.unflatten(0, (N, K)), t.unflatten(0, (N, K))
    expected, expected_values = torch.vmap(torch.func.grad_and_value(loss))(many, *parts)
    torch.testing.assert_close(values, expected_values)
    torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(torch.func.grad(lambda m: losses(m, x, t).sum())(many), expected)
    torch.testing.assert_close(grad(losses, stacked=True, chunk_size=chunk_size)(many, x, t), expected)
    inside = torch.func.grad(lambda x: value_and_grad(losses, chunk_size=chunk_size or N)(many, x, t)[0].sum())(x)
    torch.testing.assert_close(inside, torch.func.grad(lambda x: losses(many, x, t).sum())(x))


def test_auxiliary_data_and_shared_arguments():
    graft, trees, x, _ = made()
    many, shared = stack(trees), x[:K]

    def losses(many, x, scale):
        count = len(many["0"]["lora_A"])
        y = graft(route(many, batch_dim=0), x.repeat(count, 1)).unflatten(0, (count, -1))
        return y.square().mean((1, 2)) * scale["by"], {"y": y, "none": None}

    scale = {"by": torch.arange(1.0, N + 1).double()}
    (values, aux), grads = value_and_grad(losses, has_aux=True, stacked=True)(many, shared, scale)
    chunked = value_and_grad(losses, has_aux=True, chunk_size=4, in_dims=(0, None, 0))(many, shared, scale)
    torch.testing.assert_close(chunked, ((values, aux), grads))
    assert aux["y"].shape == (N, K, 3)
    torch.testing.assert_close(
        grad(losses, has_aux=True, chunk_size=4, in_dims=(0, None, 0))(many, shared, scale), (grads, aux)
    )


def saved_bytes(f, given):
    """The most memory that autograd keeps for backward at one time, beyond the tensors given."""
    alive, peak, given = {}, 0, {tensor.untyped_storage().data_ptr() for tensor in given}

    class Kept:
        def __init__(self, tensor):
            nonlocal peak
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.key, self.size = storage.data_ptr(), storage.nbytes()
            alive[self.key] = alive.get(self.key, 0) + 1
            peak = max(peak, sum(sizes[key] for key in alive if alive[key] and key not in given))

        def __del__(self):
            alive[self.key] -= 1

    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return Kept(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        f()
    return peak


def test_chunks_bound_memory():
    graft, trees, _, _ = made(torch.float32)
    many, x, t = stack(trees), torch.randn(N * 64, 8), torch.randint(3, (N * 64,))
    losses = losses_of(graft)
    given = [x, t, *graft.model.parameters(), *optree.tree_leaves(many)]
    whole, half, one = (
        saved_bytes(lambda c=c: value_and_grad(losses, stacked=True, chunk_size=c)(many, x, t), given)
        for c in (None, N // 2, 1)
    )
    assert half < 0.55 * whole and one < 0.2 * whole


@pytest.mark.slow
def test_compiles():
    graft, trees, x, t = made(torch.float32)
    many, losses = stack(trees), losses_of(graft)
    f = torch.compile(value_and_grad(losses, chunk_size=3), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(many, x, t), value_and_grad(losses, stacked=True)(many, x, t))
    with torch._dynamo.config.patch(error_on_recompile=True):
        f(many, x + 1, t)


def test_second_order():
    leaf = torch.randn(3, dtype=torch.float64, requires_grad=True)
    _, grads = value_and_grad(lambda p: p["w"] ** 3, create_graph=True, chunk_size=2)({"w": leaf * 2})
    (second,) = torch.autograd.grad(grads["w"].sum(), leaf)
    torch.testing.assert_close(second, 24 * leaf.detach())


@pytest.mark.parametrize("max_norm", [0.1, torch.linspace(0.01, 10, N, dtype=torch.float64)])
def test_norms_and_clipping_are_each_adapters(max_norm):
    graft, trees, x, t = made()
    grads = grad(losses_of(graft), stacked=True)(stack(trees), x, t)
    clipped = clip_by_norm(grads, max_norm)
    for i, (own, given) in enumerate(zip(unstack(grads), unstack(clipped), strict=True)):
        leaves = [torch.zeros_like(g) for g in optree.tree_leaves(own)]
        for leaf, g in zip(leaves, optree.tree_leaves(own), strict=True):
            leaf.grad = g.clone()
        limit = max_norm if isinstance(max_norm, float) else max_norm[i]
        norm = torch.nn.utils.clip_grad_norm_(leaves, limit)
        torch.testing.assert_close(norms(grads)[i], norm)
        torch.testing.assert_close(optree.tree_leaves(given), [leaf.grad for leaf in leaves])


def test_what_errors_say():
    p, many = {"w": torch.ones(2)}, {"w": torch.ones(4, 2)}
    with pytest.raises(ValueError, match=r"shape \(2,\), expected a scalar; .* or say stacked=True"):
        value_and_grad(lambda p: p["w"])(p)
    with pytest.raises(
        ValueError, match=r"returned a tensor of shape \(\), expected \(4,\): one loss for each adapter"
    ):
        value_and_grad(lambda p: p["w"].sum(), stacked=True)(many)
    with pytest.raises(TypeError, match="returned float, expected a tensor of 4 losses"):
        value_and_grad(lambda p: 1.0, stacked=True)(many)
    with pytest.raises(ValueError, match="chunk_size is 0, expected a positive number of adapters"):
        value_and_grad(lambda p: p["w"].sum(1), chunk_size=0)
    f = value_and_grad(lambda p, x: p["w"].sum(1) * x, chunk_size=2)
    with pytest.raises(
        ValueError, match=r"argument 1 has a tensor of shape \(3,\), whose axis 0 .* 4 adapters; in_dims"
    ):
        f(many, torch.ones(3))
    for in_dims in ((0,), (0, 1), (None, 0), None):
        with pytest.raises(ValueError, match=re.escape(f"in_dims is {in_dims!r}, expected 0 or None")):
            value_and_grad(lambda p, x: p["w"].sum(1) * x, chunk_size=2, in_dims=in_dims)(many, torch.ones(4))
    with pytest.raises(ValueError, match=r"value_and_grad: leaf \[b\] has shape \(3,\) and leaf \[a\] has \(2,\)"):
        value_and_grad(lambda p: p["a"], stacked=True)({"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(ValueError, match=r"norms: leaf \[b\] has shape \(3,\)"):
        clip_by_norm({"a": torch.ones(2), "b": torch.ones(3)}, 1.0)


@pytest.mark.parametrize("make", [value_and_grad, grad])
@pytest.mark.parametrize("options", [{}, {"stacked": True}, {"chunk_size": 1}, {"create_graph": True}])
def test_a_value_that_no_leaf_has_a_part_in(make, options):
    many, x = {"b": torch.ones(2, requires_grad=True), "w": torch.ones(2)}, torch.ones(2)
    reduce = (lambda y: y) if len({"stacked", "chunk_size"} & set(options)) else torch.sum

    def in_no_grad(p, x):
        with torch.no_grad():
            return reduce(p["w"] * x)

    def elsewhere(p, x):
        return reduce(x * p["w"].detach())

    with pytest.raises(RuntimeError, match=r"no gradient reaches the 2 leaves: .* does not require grad\. .*no_grad"):
        make(in_no_grad, **options)(many, x)
    with pytest.raises(RuntimeError, match=r"the 2 leaves: .* requires grad, but through other tensors"):
        make(elsewhere, **options)(many, x.requires_grad_())
    grads = make(lambda p, x: reduce(p["w"] * x), **options)(many, x)
    grads = grads[1] if make is value_and_grad else grads
    assert grads["b"].tolist() == [0, 0] and grads["w"].tolist() == [1, 1], (
        "one leaf that it does not depend on is zero"
    )


def test_a_value_that_depends_on_nothing_within_torch_func_and_without_leaves():
    p = {"w": torch.ones(2)}
    expected = torch.func.grad(lambda p: torch.ones(()))(p)
    inside = torch.vmap(lambda p: grad(lambda q: torch.ones(()))(p))({"w": torch.ones(1, 2)})
    torch.testing.assert_close(inside["w"][0], expected["w"])
    value, grads = value_and_grad(lambda p: torch.ones(()))({})
    assert value == 1 and grads == {}


def test_reentrant_checkpointing_warns_or_raises():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(checkpoint(self.a, x, use_reentrant=True))

    model, x = Model().requires_grad_(False), torch.randn(3, 4)
    whole = bind(model, LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False))
    only = bind(model, LoraConfig(r=2, target_modules=["a"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        grads = grad(lambda p: whole(p, x).sum())(whole.init())
    assert grads["a"]["lora_A"].abs().sum() == 0 and grads["b"]["lora_A"].abs().sum() > 0
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
        pytest.raises(RuntimeError, match="no gradient reaches the 2 leaves.*use_reentrant=False"),
    ):
        grad(lambda p: only(p, x).sum())(only.init())
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient reaches 2 of the 4 leaves.* reentrantly.*use_reentrant=False"):
        grad(lambda p: whole(p, x).sum())(whole.init())
    leaves = optree.tree_map(lambda t: t.requires_grad_(), whole.init())
    whole(leaves, x).sum().backward()
    assert leaves["a"]["lora_A"].grad.abs().sum() > 0
