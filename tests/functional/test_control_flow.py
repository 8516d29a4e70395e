"""Compiled calls write to nothing outside themselves, so that they work within operators, in threads and in pieces."""

import threading

import optree
import pytest
import torch
from torch import nn
from torch._higher_order_ops import map as map_rows
from torch._higher_order_ops import scan, while_loop
from torch.utils.checkpoint import checkpoint

from torchgraft.adapters import IA3Config, LoraConfig
from torchgraft.functional import bind, functional_call, route, stack

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
X = torch.linspace(-1, 1, 12).view(3, 4)
FIELDS = {"r": 2, "target_modules": ["a", "b"], "init_lora_weights": False}
CONFIGS = {
    "lora": LoraConfig(**FIELDS),
    "dora": LoraConfig(use_dora=True, **FIELDS),
    "ia3": IA3Config(target_modules=["a", "b"], feedforward_modules=[]),
    "replaced": LoraConfig(**{**FIELDS, "target_modules": ["a"]}, modules_to_save=["b"]),
}


class Model(nn.Module):
    def __init__(self, checkpointed=False, breaks=False):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.checkpointed, self.breaks = checkpointed, breaks

    def body(self, x):
        return self.norm(self.a(x)).tanh()

    def forward(self, x):
        y = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.b(y)


def made(config="lora", training=False, **options):
    torch.manual_seed(0)
    model = Model(**options)
    graft = bind(model, CONFIGS[config])
    model.train(training)  # after bind, as programs do
    trees = [optree.tree_map(lambda t: t + 0.3 * torch.randn_like(t), graft.init()) for _ in range(2)]
    return graft, trees


def whole(f, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend=backend)


def reads(graft):
    """Everything that compiled calls of a graft could write to, by identity."""
    skeletons = list(graft.bound.compiled.skeletons.values())
    dicts = [d for s in skeletons for _, own in s.modules for d in (vars(own), own._parameters, own._buffers)]
    return [list(map(id, d.values())) for d in dicts], [dict(s.context.state) for s in skeletons]


WITHIN = {
    "cond": lambda f, x: torch.cond(x.sum() > -1, lambda: f(x), lambda: -f(x)),
    "checkpoint": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "map": lambda f, x: map_rows(f, torch.stack([x, x + 1])),
    "scan": lambda f, x: scan(lambda c, u: (f(c) + u, c.clone()), x, torch.stack([x, x + 1])),
    "while": lambda f, x: while_loop(lambda i, c: i < 2, lambda i, c: (i + 1, f(c)), (torch.zeros((), dtype=int), x)),
}


@pytest.mark.parametrize("operator", WITHIN)
@pytest.mark.parametrize("training", [False, True])
def test_calls_within_operators(operator, training):
    graft, trees = made(training=training)

    def f(tree, x):
        return WITHIN[operator](lambda x: graft(tree, x), x)

    compiled, expected = whole(f), [f(tree, X) for tree in trees]
    torch.testing.assert_close(compiled(trees[0], X), expected[0])
    before = reads(graft)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(trees[1], X), expected[1])
    assert reads(graft) == before


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("around", [False, True])
def test_gradients_through_checkpointing_in_and_around_the_model(config, around):
    graft, trees = made(config, training=True, checkpointed=not around)

    def loss(tree, x):
        y = checkpoint(graft, tree, x, use_reentrant=False) if around else graft(tree, x)
        return y.square().sum()

    compiled = whole(loss)
    for tree in trees:
        leaves = optree.tree_leaves(optree.tree_map(lambda t: t.requires_grad_(), tree))
        expected = torch.autograd.grad(graft.view(tree)(X).square().sum(), leaves)
        torch.testing.assert_close(torch.autograd.grad(compiled(tree, X), leaves), expected)


def test_base_tensors_as_data_and_buffers_within_operators():
    graft, trees = made(training=True)
    base = {"a.weight": torch.randn(4, 4)}

    def call(base, tree, x):
        return functional_call(graft, (base, tree), (x,), return_buffers=True)

    def f(base, tree, x):
        first, _ = checkpoint(call, base, tree, x, use_reentrant=False)
        return first, *call({}, tree, x), graft(tree, x)

    before = {name: t.clone() for name, t in graft.model.named_buffers()}
    torch.testing.assert_close(whole(f)(base, trees[0], X), f(base, trees[0], X))
    torch.testing.assert_close(dict(graft.model.named_buffers()), before)


def test_transforms_of_written_buffers():
    graft, trees = made(training=True)
    grads = torch.vmap(torch.func.grad(lambda tree, x: graft(tree, x).square().sum()), in_dims=(0, None))
    torch.testing.assert_close(whole(grads)(stack(trees), X), grads(stack(trees), X))


def test_buffers_that_come_back_are_no_memory_of_the_model():
    graft, trees = made(training=False)
    f = whole(lambda tree: functional_call(graft, tree, (X,), return_buffers=True))
    _, buffers = f(trees[0])
    assert not {t.data_ptr() for t in buffers.values()} & {t.data_ptr() for t in graft.model.buffers()}


def test_routed_rows_and_stacks_within_operators():
    graft, trees = made()
    many, rows = stack(trees), torch.tensor([0, 1, 0])

    def f(many, rows, x):
        return checkpoint(lambda x: graft(route(many, rows, batch_dim=0), x), x, use_reentrant=False)

    torch.testing.assert_close(whole(f)(many, rows, X), graft(route(many, rows, batch_dim=0), X))
    stacked = bind(graft.model, [LoraConfig(**FIELDS), LoraConfig(**{**FIELDS, "r": 1})])
    padded = stacked.init()

    def g(many, x):
        one = torch.func.vmap(lambda i, tree: stacked.at(i)(tree, x))
        return checkpoint(lambda many: one(torch.arange(2), many), many, use_reentrant=False)

    torch.testing.assert_close(whole(g)(padded, X), g(padded, X))


def test_one_call_within_another():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, inner=None):
            y = self.a(x)
            return self.b(y if inner is None else inner(y))

    graft = bind(Outer(), CONFIGS["lora"])
    first, second = graft.init(), graft.init()
    base = {"b.weight": torch.randn(4, 4)}

    def f(first, second, x):
        return functional_call(graft, (base, first), (x,), {"inner": lambda y: graft(second, y)})

    torch.testing.assert_close(whole(f)(first, second, X), f(first, second, X))


def test_compiles_once_for_each_set_of_modes_and_finds_it_again():
    graft, trees = made(training=True)
    compiled = whole(lambda tree, x: graft(tree, x))
    expected = {}
    for training in (True, False):
        graft.model.train(training)
        expected[training] = graft(trees[0], X)
        torch.testing.assert_close(compiled(trees[0], X), expected[training])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for training in (True, False, True):
            graft.model.train(training)
            graft(trees[1], X)
            torch.testing.assert_close(compiled(trees[0], X), expected[training])
        graft.model.load_state_dict({key: t.clone() for key, t in graft.model.state_dict().items()}, assign=True)
        with torch.no_grad():
            graft.model.a.weight.mul_(2)
        torch.testing.assert_close(compiled(trees[0], X), graft(trees[0], X))


def test_threads_share_a_compiled_call():
    graft, trees = made(training=True)
    compiled = whole(lambda tree, x: graft(tree, x), backend="eager")
    expected = [compiled(tree, X) for tree in trees]
    failed = []

    def work(i):
        try:
            for _ in range(200):
                torch.testing.assert_close(compiled(trees[i], X), expected[i])
        except Exception as error:
            failed.append(error)

    with torch._dynamo.config.patch(error_on_recompile=True):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo asks for it
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_that_cannot_be_compiled_whole(checkpointed):
    graft, trees = made(training=True, breaks=True, checkpointed=checkpointed)
    leaves = [optree.tree_leaves(optree.tree_map(lambda t: t.requires_grad_(), tree)) for tree in trees]
    expected = [
        torch.autograd.grad(graft(tree, X).square().sum(), own) for tree, own in zip(trees, leaves, strict=True)
    ]
    torch._dynamo.reset()
    compiled = torch.compile(lambda tree, x: graft(tree, x).square().sum(), backend="aot_eager")
    for _ in range(2):
        losses = [compiled(tree, X) for tree in trees]
        for loss, own, wanted in zip(losses, leaves, expected, strict=True):
            torch.testing.assert_close(torch.autograd.grad(loss, own), wanted)
    base = {"b.weight": torch.randn(4, 4)}
    given = torch.compile(lambda tree, x: functional_call(graft, (base, tree), (x,)), backend="aot_eager")
    torch.testing.assert_close(given(trees[0], X), functional_call(graft, (base, trees[0]), (X,)))


def test_the_parts_of_a_model_that_cannot_be_compiled_whole_are_compiled():
    graft, trees = made(breaks=True)
    compiled = []

    def backend(module, inputs):
        compiled.append({node.target for node in module.graph.nodes})
        return module.forward

    torch._dynamo.reset()
    run = torch.compile(lambda tree, x: graft(tree, x), backend=backend)
    for tree in trees:
        torch.testing.assert_close(run(tree, X), graft(tree, X))
    assert len(compiled) == 2, "the part before the break and the one behind it, once each"
    assert all(torch.addmm in calls for calls in compiled), "the adapters' products in both"


def test_routed_rows_of_a_model_that_cannot_be_compiled_whole():
    graft, trees = made(breaks=True)
    many, rows = stack(trees), torch.tensor([0, 1, 0])
    torch._dynamo.reset()
    compiled = torch.compile(lambda many, x: graft(route(many, rows), x), backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(many, X), graft(route(many, rows), X))


def test_exports():
    graft, trees = made()

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.tree = trees[0]

        def forward(self, x):
            return graft(self.tree, x)

    program = torch.export.export(Whole(), (X,))
    torch.testing.assert_close(program.module()(X), graft(trees[0], X))
    torch.testing.assert_close(graft(trees[1], X), graft.view(trees[1])(X))
