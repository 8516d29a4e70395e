"""Models that prepare themselves in their first forward: in calls it is undone as a whole, a view keeps it."""

import copy

import pytest
import torch
from torch import nn

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind

X = torch.linspace(-1, 1, 12).view(3, 4)
CONFIG = LoraConfig(r=2, target_modules=["lin"])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.plain = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls = 0
        self.prepare()

    def prepare(self):
        pass

    def forward(self, x):
        return self.plain(self.lin(x))


class Hooks(Model):
    def forward(self, x):
        if not hasattr(self, "ready"):
            self.plain.register_forward_hook(lambda module, args, y: y * 2)
            self.lin.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
            self.ready = True
        return super().forward(x)


class Buffer(Model):
    def forward(self, x):
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(4), persistent=False)
        self.seen += 1
        return super().forward(x) + self.seen


class Built(Model):
    def forward(self, x):
        if hasattr(self, "extra"):
            return super().forward(x) * 100
        self.extra = nn.Linear(4, 4)
        nn.init.ones_(self.extra.weight), nn.init.zeros_(self.extra.bias)
        return self.extra(super().forward(x))


class Replaced(Model):
    def forward(self, x):
        y = super().forward(x)
        self.plain = nn.Identity()
        return y


class OwnForward(Model):
    def forward(self, x):
        y = super().forward(x)
        self.plain.forward = lambda x: x * 0
        return y


class Renamed(Model):
    def forward(self, x):
        y = super().forward(x)
        self.plain.__class__ = Zero
        return y


class Zero(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


class Parametrised(Model):
    def forward(self, x):
        torch.nn.utils.parametrize.register_parametrization(self.plain, "weight", Doubled())
        return super().forward(x)


class Caches(Model):
    def prepare(self):
        self.dict, self.list, self.holder = {}, [], Holder()
        self.holder.module = self.plain

    def forward(self, x):
        self.dict["calls"] = self.dict.get("calls", 0) + 1
        self.list.append(x)
        self.holder.calls += 1
        self.calls += 1
        return super().forward(x) * (self.dict["calls"] + len(self.list) + self.holder.calls + self.calls)


class Holder:
    calls = 0


class Counting(Model):
    def prepare(self):
        calls = 0

        def scale(x):
            nonlocal calls
            calls += 1
            return self.plain(x) * calls

        self.scale = scale

    def forward(self, x):
        return self.scale(self.lin(x))


KINDS = [Hooks, Buffer, Built, Replaced, OwnForward, Renamed, Parametrised, Caches, Counting]


def photograph(model):
    return [
        (name, type(module), dict(vars(module)), {k: dict(v) for k, v in vars(module).items() if type(v) is dict})
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("cls", KINDS)
def test_calls_begin_anew_and_nothing_reaches_the_model(cls):
    model = cls()
    graft, expected = bind(model, CONFIG), cls()(X)
    params, before = graft.init(), photograph(model)
    for _ in range(3):
        torch.testing.assert_close(graft(params, X), expected)
    if cls is not Parametrised:  # which torch.func refuses
        torch.func.grad(lambda params: graft(params, X).sum())(params)
    torch.testing.assert_close(graft(params, X), expected)
    assert photograph(model) == before


@pytest.mark.parametrize("cls", KINDS)
def test_views_keep_what_a_forward_does(cls):
    model, twin = cls(), cls()
    graft = bind(model, CONFIG)
    view, before = graft.view(graft.init()), photograph(model)
    for _ in range(2 - (cls is Parametrised)):
        torch.testing.assert_close(view(X), twin(X))
    assert photograph(model) == before


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("cls", [Hooks, Buffer, Replaced, OwnForward, Caches])
def test_compiled_calls_begin_anew(cls):
    model = cls()
    graft, expected = bind(model, CONFIG), cls()(X)
    params, before = graft.init(), photograph(model)
    torch._dynamo.reset()
    compiled = torch.compile(lambda params, x: graft(params, x), fullgraph=cls is not Hooks, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(params, X), expected)
    torch.testing.assert_close(graft(params, X), expected)
    assert photograph(model) == before


def test_a_first_forward_that_raises_midway():
    class Fails(Hooks):
        def forward(self, x, fail=False):
            y = super().forward(x)
            if fail:
                raise ZeroDivisionError("midway")
            return y

    graft, expected = bind(Fails(), CONFIG), Fails()(X)
    params = graft.init()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            graft(params, X, fail=True)
        torch.testing.assert_close(graft(params, X), expected)


def test_a_tensor_of_one_element_that_is_equal_is_put_back():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.scale = torch.ones(())

        def forward(self, x):
            if self.scale.requires_grad:
                raise AssertionError("this is another call's tensor")
            y = self.lin(x)
            self.scale = self.scale + 0 * y.sum()
            return y * self.scale

    graft = bind(Model(), CONFIG)
    params = copy.deepcopy(graft.init())
    params["lin"]["lora_A"].requires_grad_()
    for _ in range(2):
        graft(params, X).sum().backward()
