"""The user's model is never changed, and whatever the user does to it is seen by the next call."""

import copy
import threading

import numpy
import optree
import pytest
import torch
from torch import nn
from torch.func import vmap

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind, functional_call, merge, stack

CONFIG = LoraConfig(r=2, target_modules="all-linear")
X = torch.linspace(-1, 1, 8).view(2, 4)


def randomised(graft, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: torch.randn(t.shape, generator=generator) * 0.3, graft.init())


def photograph(model):
    """Everything a call could touch, by identity and by value."""
    objects = [
        (name, key, id(value), dict(value) if isinstance(value, dict) else value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    ]
    tensors = [
        (name, id(t), t.data_ptr(), t.requires_grad, t._version, t.detach().clone())
        for name, t in (*model.named_parameters(), *model.named_buffers())
    ]
    return objects, tensors, {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a == b


class Busy(nn.Module):
    """Writes to everything it owns in each forward."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(()))
        self.history, self.seen, self.calls, self.last = [], {}, 0, None
        self.bare = torch.zeros(2)

    def forward(self, x, explode=False):
        self.count += 1
        self.bare.add_(1)
        self.calls += 1
        self.history.append(x)
        self.seen[self.calls] = x
        y = self.norm(self.lin(x))
        self.last = y
        self.count = self.count * 2
        if explode:
            raise ZeroDivisionError("inside the forward")
        return y + self.calls + self.count + self.bare.sum() + len(self.history)


def test_a_forward_that_writes_everywhere_changes_nothing():
    model = Busy()
    before = photograph(model)
    graft = bind(model, CONFIG)
    params = randomised(graft)
    first = graft(params, X)
    again = graft(params, X)
    assert torch.equal(first, again), "a call leaves nothing behind for the next one"
    assert same(before, photograph(model))
    with pytest.raises(ZeroDivisionError):
        graft(params, X, explode=True)
    assert same(before, photograph(model))
    assert torch.equal(graft(params, X), first)
    torch.func.grad(lambda p: graft(p, X).sum())(params)
    graft.view(params)(X)
    merge(graft, params)
    assert same(before, photograph(model))


def test_modules_and_objects_outside_the_tree_keep_their_state():
    class Counter:
        def __init__(self, module):
            self.module, self.calls = module, 0

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.hidden = [nn.BatchNorm1d(4)]
            self.counter = Counter(self.lin)

        def forward(self, x):
            self.counter.calls += 1
            return self.hidden[0](self.counter.module(x)) * self.counter.calls

    model = Model()
    before = photograph(model.hidden[0])
    graft = bind(model, CONFIG)
    params = randomised(graft)
    trained = graft(params, X)
    assert torch.equal(graft(params, X), trained)
    graft.view(params)(X)
    vmap(graft, in_dims=(0, None))(stack([params, params]), X)
    assert same(before, photograph(model.hidden[0])) and model.counter.calls == 0
    model.hidden[0].eval()
    assert not torch.allclose(graft(params, X), trained), "its mode is followed"


def test_attributes_that_cannot_be_compared_are_put_back():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.table, self.offset = numpy.ones(3), torch.ones(3)

        def forward(self, x):
            self.table, self.offset = self.table + 1, self.offset + 1
            return self.lin(x) * float(self.table.sum()) + self.offset.sum()

    model = Model()
    graft = bind(model, CONFIG)
    params = randomised(graft)
    y = graft(params, X)
    assert torch.equal(graft(params, X), y)
    assert model.table.sum() == model.offset.sum() == 3
    model.table = numpy.zeros(3)
    assert not torch.allclose(graft(params, X), y)


def test_written_buffers_come_back_on_request():
    model, twin = Busy(), Busy()
    twin.load_state_dict(model.state_dict())
    graft = bind(model, CONFIG)
    params = graft.init()
    y, buffers = functional_call(graft, params, (X,), return_buffers=True)
    torch.testing.assert_close(y, twin(X))
    torch.testing.assert_close(buffers, dict(twin.named_buffers()))
    assert model.norm.num_batches_tracked == 0 and buffers["norm.num_batches_tracked"] == 1
    second, _ = functional_call(graft, (buffers, params), (X,), return_buffers=True)
    torch.testing.assert_close(second, twin(X) - 4, msg="buffers go back in as base parameters, attributes do not")


def test_returned_buffers_are_never_the_models_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    graft = bind(model, CONFIG)
    _, buffers = functional_call(graft, graft.init(), (X,), return_buffers=True)
    buffers["1.running_mean"].add_(1)
    assert model[1].running_mean.sum() == 0


def test_batch_norm_in_training_mode_under_vmap():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    graft = bind(model, CONFIG)
    trees = [randomised(graft, seed) for seed in range(3)]
    before = photograph(model)

    def call(params, x):
        return functional_call(graft, params, (x,), return_buffers=True)

    ys, buffers = vmap(call, in_dims=(0, None))(stack(trees), X)
    for i, tree in enumerate(trees):
        y, own = call(tree, X)
        torch.testing.assert_close(ys[i], y)
        torch.testing.assert_close({name: t[i] for name, t in buffers.items()}, own)
    xs = torch.stack([X, X + 1])
    ys, buffers = vmap(call, in_dims=(None, 0))(trees[0], xs)
    torch.testing.assert_close(buffers["1.running_mean"][1], call(trees[0], xs[1])[1]["1.running_mean"])
    assert same(before, photograph(model))


def test_base_as_data_is_never_written_to_and_may_have_its_own_axis():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    graft = bind(model, CONFIG)
    trees = [randomised(graft, seed) for seed in range(3)]

    def call(base, params):
        return functional_call(graft, (base, params), (X,), return_buffers=True)

    _, buffers = vmap(lambda params: call({}, params))(stack(trees))
    before = {name: t.clone() for name, t in buffers.items()}
    ys, later = vmap(call)(buffers, stack(trees))
    assert same(before, buffers)
    for i, tree in enumerate(trees):
        own = {name: t[i] for name, t in buffers.items()}
        y, after = call(own, tree)
        assert same(own, {name: t[i] for name, t in before.items()})
        torch.testing.assert_close((ys[i], {name: t[i] for name, t in later.items()}), (y, after))
    weights = torch.randn(3, 4, 4)
    ys, _ = vmap(lambda weight: call({"0.weight": weight}, trees[0]))(weights)
    torch.testing.assert_close(ys[1], call({"0.weight": weights[1]}, trees[0])[0])


def test_what_the_user_changes_is_seen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 3))
    graft = bind(model, CONFIG)
    params = randomised(graft)

    def expected():
        twin = copy.deepcopy(model)
        twin.load_state_dict(merge(graft, params))
        torch.manual_seed(3)
        return twin(X)

    def given():
        torch.manual_seed(3)
        return graft(params, X)

    def check():
        torch.testing.assert_close(given(), expected())
        return given()

    trained = check()
    model.eval()
    evaluated = check()
    assert not torch.allclose(trained, evaluated)
    model.train()
    assert torch.equal(check(), trained)
    model.eval()
    with torch.no_grad():
        model[0].weight.mul_(2)
    check()
    model.load_state_dict(
        {key: torch.randn_like(t) if t.is_floating_point() else t for key, t in model.state_dict().items()}
    )
    model[2].running_var.abs_()
    check()
    fresh = {key: t.clone() for key, t in model.state_dict().items()}
    fresh["0.weight"] += 1
    model.load_state_dict(fresh, assign=True)
    check()
    model[3].bias = nn.Parameter(torch.ones(3))
    check()
    model.double()
    assert graft(params, X.double()).dtype == torch.float64
    model.float().requires_grad_(False)
    check()
    model[1].p = 0.9
    model.train()
    assert torch.equal(check(), check())


@pytest.mark.slow
def test_threads_share_one_graft_and_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    graft = bind(model, CONFIG)
    trees = [randomised(graft, seed) for seed in range(4)]
    expected = [graft(tree, X) for tree in trees]
    base = model(X)
    wrong, rounds = [], 1000

    def work(i):
        view = graft.view(trees[i])
        for _ in range(rounds):
            if not torch.equal(graft(trees[i], X), expected[i]):
                wrong.append(("call", i))
            if not torch.equal(view(X), expected[i]):
                wrong.append(("view", i))
            if not torch.equal(model(X), base):
                wrong.append(("model", i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"{len(wrong)} of {12 * rounds} outputs were wrong"


def test_base_tensors_are_constants_of_the_call():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3))
    graft = bind(model, LoraConfig(r=2, target_modules=["2"]))
    params = optree.tree_map(lambda t: t.requires_grad_(), graft.init())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = graft(params, X)
    assert all(t.shape != X.shape or not torch.equal(t, X) for t in saved), "the first layer keeps no activation"
    y.sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_one_graft_inside_another_call_of_itself():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x, inner=None):
            return self.lin(x if inner is None else inner())

    graft = bind(Outer(), CONFIG)
    a, b = randomised(graft, 1), randomised(graft, 2)
    nested = graft(a, X, inner=lambda: graft(b, X))
    assert torch.equal(nested, graft(a, graft(b, X)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_what_the_user_changes_is_seen_by_compiled_calls():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))
    graft = bind(model, CONFIG)
    params = randomised(graft)
    torch._dynamo.reset()
    compiled = torch.compile(lambda params, x: graft(params, x), fullgraph=True, backend="eager")

    def check(x=X):
        twin = copy.deepcopy(model)
        twin.load_state_dict(merge(graft, params))
        torch.manual_seed(3)
        expected = twin(x)
        torch.manual_seed(3)
        torch.testing.assert_close(compiled(params, x), expected)

    check()
    model.eval()
    check()
    state = {key: torch.rand_like(t) if t.is_floating_point() else t for key, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    check()
    with torch.no_grad():
        model[0].weight.mul_(2)
    check()
    model[3].bias = nn.Parameter(torch.ones(3))
    check()
    model.double()
    check(X.double())
    model.float().train()
    check()
    base = {"0.weight": torch.randn(8, 4)}
    model.eval()
    given = torch.compile(lambda b, p, x: functional_call(graft, (b, p), (x,)), fullgraph=True, backend="eager")
    torch.testing.assert_close(given(base, params, X), functional_call(graft, (base, params), (X,)))
    model[1] = nn.Identity()
    check()
    model.append(nn.Tanh())
    check()
    model.to(torch.float64)
    check(X.double())


@pytest.mark.slow
@pytest.mark.parametrize("first", ["train", "eval"])
def test_compiled_calls_write_to_their_own_buffers_in_any_mode(first):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(first == "train")
    graft = bind(model, CONFIG)
    params = randomised(graft)
    before = {name: t.clone() for name, t in model.named_buffers()}
    torch._dynamo.reset()
    compiled = torch.compile(lambda params: graft(params, X), fullgraph=True, backend="aot_eager")
    for training in (first == "train", first != "train", first == "train"):
        model.train(training)
        torch.testing.assert_close(compiled(params), graft(params, X))
        assert same(before, dict(model.named_buffers()))
