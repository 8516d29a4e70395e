"""What the autograd graph runs once more finds the adapter of its own call."""

import gc
import threading

import optree
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchgraft.adapters import IA3Config, LoraConfig, OFTConfig, VeraConfig
from torchgraft.functional import bind, functional_call, route, stack

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
FIELDS = {"target_modules": ["layer"], "init_lora_weights": False}
CONFIGS = {
    "lora": LoraConfig(r=2, **FIELDS),
    "dora": LoraConfig(r=2, use_dora=True, **FIELDS),
    "ia3": IA3Config(target_modules=["layer"], feedforward_modules=[]),
    "oft": OFTConfig(oft_block_size=2, target_modules=["layer"]),
    "vera": VeraConfig(r=2, target_modules=["layer"]),
}


class Own(nn.Linear):
    """Reads its weight in a forward of its own, as Falcon's layers do."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Block(nn.Module):
    def __init__(self, layer, reentrant=False):
        super().__init__()
        self.first, self.layer, self.norm = nn.Linear(4, 4), layer, nn.LayerNorm(4)
        self.reentrant = reentrant

    def body(self, x):
        return self.layer(x).tanh()

    def forward(self, x):
        x = self.first(x)
        return checkpoint(self.body, x, use_reentrant=self.reentrant) + checkpoint(
            lambda x: self.norm(x), x, use_reentrant=self.reentrant
        )


def made(layer=None, config=None, reentrant=False, count=3):
    torch.manual_seed(0)
    model = Block(layer or Own(4, 4), reentrant).double().requires_grad_(False)
    graft = bind(model, config or CONFIGS["lora"])
    trees = [
        optree.tree_map(lambda t: (t + 0.3 * torch.randn_like(t)).requires_grad_(), graft.init(dtype=torch.float64))
        for _ in range(count)
    ]
    return graft, trees


def expected(graft, tree, x=X):
    """The gradient through a view, whose adapter stays."""
    return torch.autograd.grad(graft.view(tree)(x).square().sum(), optree.tree_leaves(tree))


def built(graft):
    """A list that grows with each skeleton that the graft makes."""
    made, build = [], graft.bound.pool()._build
    graft.bound.pool()._build = lambda cell: made.append(1) or build(cell)
    return made


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("layer", [Own, nn.Linear])
def test_calls_in_flight_keep_their_adapters(method, layer):
    graft, trees = made(layer(4, 4), CONFIGS[method])
    losses = [graft(tree, X).square().sum() for tree in trees]
    for i in (1, 2, 0):
        given = torch.autograd.grad(losses[i], optree.tree_leaves(trees[i]))
        torch.testing.assert_close(given, expected(graft, trees[i]))


def test_threads_with_calls_in_flight():
    graft, trees = made()
    wanted = [expected(graft, tree) for tree in trees]
    barrier, wrong = threading.Barrier(len(trees)), []

    def work(i):
        for _ in range(20):
            loss = graft(trees[i], X).square().sum()
            barrier.wait()
            given = torch.autograd.grad(loss, optree.tree_leaves(trees[i]))
            wrong.extend(i for a, b in zip(given, wanted[i], strict=True) if not torch.allclose(a, b))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(trees))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_replaced_tensors_and_base_tensors_as_data():
    config = LoraConfig(r=2, modules_to_save=["norm"], **FIELDS)
    graft, trees = made(config=config)
    base = {"norm.bias": torch.randn(4, dtype=torch.float64), "layer.weight": torch.randn(4, 4, dtype=torch.float64)}
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def loss(tree, scale):
        given = {"layer.weight": base["layer.weight"] * scale}
        return functional_call(graft, (given, tree), (X,)).square().sum()

    first, second = loss(trees[0], scale), loss(trees[1], scale)
    given = torch.autograd.grad(first, [scale, *optree.tree_leaves(trees[0])])
    del second
    h = 1e-6
    with torch.no_grad():
        numeric = (loss(trees[0], scale + h) - loss(trees[0], scale - h)) / (2 * h)
    torch.testing.assert_close(given[0], numeric, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(graft(trees[0], X), graft.view(trees[0])(X))
    losses = [graft(tree, X).square().sum() for tree in trees]
    for tree, own in zip(trees, losses, strict=True):
        torch.testing.assert_close(
            torch.autograd.grad(own, optree.tree_leaves(tree)), expected(graft, tree), msg="the norm's leaves too"
        )


@pytest.mark.parametrize("layer", [Own, nn.Linear])
def test_reentrant_checkpointing(layer):
    graft, trees = made(layer(4, 4), reentrant=True)
    x = X.clone().requires_grad_()
    losses = [graft(tree, x).square().sum() for tree in trees]
    graft.model.reentrant = False
    wanted = [expected(graft, tree) for tree in trees]
    graft.model.reentrant = True
    for i in (1, 0, 2):
        losses[i].backward()
        torch.testing.assert_close([t.grad for t in optree.tree_leaves(trees[i])], list(wanted[i]))


def test_a_function_that_runs_a_layer_in_backward():
    class Rerun(torch.autograd.Function):
        @staticmethod
        def forward(ctx, layer, x):
            ctx.layer = layer
            ctx.save_for_backward(x)
            return layer(x)

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                ctx.layer(x).backward(dy)
            return None, x.grad

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return Rerun.apply(self.layer, x)

    graft = bind(Model().double(), CONFIGS["lora"])
    trees = [optree.tree_map(lambda t: t.requires_grad_(), graft.init(dtype=torch.float64)) for _ in range(2)]
    x = X.clone().requires_grad_()
    ys = [graft(tree, x) for tree in trees]
    for tree, y in zip(trees, ys, strict=True):
        y.square().sum().backward()
        plain = bind(nn.Sequential(graft.model.layer), LoraConfig(r=2, target_modules=["0"]))
        wanted = torch.autograd.grad(
            plain({"0": tree["layer"]}, X).square().sum(), optree.tree_leaves(tree), allow_unused=True
        )
        torch.testing.assert_close([t.grad for t in optree.tree_leaves(tree)], list(wanted))


def test_what_a_call_returns_runs_with_its_adapter():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.layer(x)
            return lambda: self.head(self.layer(h))

    graft = bind(Model().double(), CONFIGS["lora"])
    trees = [graft.init(dtype=torch.float64) for _ in range(2)]
    later = [graft(tree, X) for tree in trees]
    with torch.no_grad():
        for tree, f in zip(trees, later, strict=True):
            torch.testing.assert_close(f(), graft.view(tree)(X)())


class Stateful(Block):
    """Keeps modules and activations in attributes."""

    def forward(self, x):
        self.stash, self.last = [self.layer, (self.norm,)], self.layer
        y = super().forward(x)
        self.seen = y.detach()
        return y


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Block, Stateful])
@pytest.mark.parametrize("grad", [True, False])
def test_skeletons_are_used_again(cls, grad):
    graft, trees = made()
    graft = bind(cls(Own(4, 4)).double().requires_grad_(False), CONFIGS["lora"])
    graft(trees[0], X)
    made_now = built(graft)
    for _ in range(5):
        with torch.set_grad_enabled(grad):
            y = graft(trees[0], X)
        if grad:
            y.sum().backward()
        del y
        gc.collect()
    assert len(made_now) == 0, "one skeleton does"
    ys = [graft(trees[0], X) for _ in range(3)]
    assert len(made_now) == 2, "one for each call in flight"
    del ys
    assert len([graft(trees[0], X) for _ in range(3)]) == 3 and len(made_now) == 2


def test_a_call_that_raises_leaves_nothing():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, fail=False):
            y = self.layer(x)
            self.calls = getattr(self, "calls", 0) + 1
            if fail:
                raise ZeroDivisionError("midway")
            return y * self.calls

    graft = bind(Model().double(), CONFIGS["lora"])
    a, b = graft.init(dtype=torch.float64), graft.init(dtype=torch.float64)
    want = graft(b, X)
    made_now = built(graft)
    for _ in range(10):
        with pytest.raises(ZeroDivisionError):
            graft(a, X, fail=True)
        assert torch.equal(graft(b, X), want)
    assert len(made_now) <= 1


def test_routed_rows():
    graft, trees = made(nn.Linear(4, 4))
    many = optree.tree_map(lambda t: t.detach().requires_grad_(), stack(trees))
    losses = [graft(route(many, torch.tensor(rows)), X).square() for rows in ([0, 1, 2], [2, 2, 1])]
    for rows, loss in zip(([0, 1, 2], [2, 2, 1]), losses, strict=True):
        given = torch.autograd.grad(loss.sum(), optree.tree_leaves(many))
        parts = [graft(trees[a], X[i : i + 1]).square().sum() for i, a in enumerate(rows)]
        wanted = torch.autograd.grad(
            sum(parts), [leaf for tree in trees for leaf in optree.tree_leaves(tree)], materialize_grads=True
        )
        count = len(wanted) // len(trees)
        for j, leaf in enumerate(given):
            torch.testing.assert_close(leaf, torch.stack([wanted[i * count + j] for i in range(len(trees))]))
