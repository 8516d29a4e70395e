"""However a model reaches its modules, the adapted output is right or an error names the site."""

import copy
import functools
import types
import weakref

import accelerate.hooks
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind, functional_call, merge


def randomised(graft, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = graft.init(generator)
    return {
        path: {leaf: torch.randn(t.shape, generator=generator) * 0.3 for leaf, t in leaves.items()}
        for path, leaves in params.items()
    }


def dense(model, graft, params):
    """The oracle: another model with the merged weights."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(merge(graft, params))
    return twin


def assert_adapted(model, x, targets="all-linear"):
    graft = bind(model, LoraConfig(r=2, target_modules=targets))
    params = randomised(graft)
    expected = dense(model, graft, params)(x)
    base = model(x)
    torch.testing.assert_close(graft(params, x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(graft.view(params)(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-3)
    assert torch.equal(model(x), base)
    return graft, params


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)


def block(forward, **attributes):
    """A model with this forward; attributes are made from the model."""
    model = type("Model", (Block,), {"forward": forward})()
    for name, make in attributes.items():
        setattr(model, name, make(model))
    return model


X = torch.linspace(-1, 1, 8).view(2, 4)


WAYS = {
    "weight": (lambda self, x: self.out(F.linear(x, self.lin.weight, self.lin.bias)), {}),
    "list": (lambda self, x: self.out(self.order[0](x)), {"order": lambda m: [m.lin, m.out]}),
    "dict": (lambda self, x: self.out(self.table["in"](x)), {"table": lambda m: {"in": m.lin, "out": m.out}}),
    "key": (lambda self, x: self.out(next(iter(self.table))(x)), {"table": lambda m: {m.lin: 1}}),
    "tuple": (lambda self, x: self.out(self.pair[0](x)), {"pair": lambda m: (m.lin, 1)}),
    "bound method": (lambda self, x: self.out(self.f(x)), {"f": lambda m: m.lin.forward}),
    "bound call": (lambda self, x: self.out(self.f(x)), {"f": lambda m: m.lin.__call__}),
    "partial": (
        lambda self, x: self.out(self.f(x)),
        {"f": lambda m: functools.partial(lambda lin, x: lin(x), m.lin)},
    ),
    "closure": (lambda self, x: self.f(x), {"f": lambda m: lambda x: m.out(m.lin(x))}),
    "default": (lambda self, x: self.f(x), {"f": lambda m: lambda x, lin=m.lin: m.out(lin(x))}),
    "weak reference": (lambda self, x: self.out(self.r()(x)), {"r": lambda m: weakref.ref(m.lin)}),
    "weak method": (lambda self, x: self.out(self.r()(x)), {"r": lambda m: weakref.WeakMethod(m.lin.forward)}),
    "weak proxy": (lambda self, x: self.out(self.r[0](x)), {"r": lambda m: [weakref.proxy(m.lin)]}),
    "weak key": (lambda self, x: self.out(self.lin(x) * self.r[self.lin]), {"r": lambda m: weak_keys(m.lin)}),
    "attribute of a dict": (lambda self, x: self.out(self.table.lin(x)), {"table": lambda m: Table(m.lin)}),
    "keyword": (lambda self, x: self.out(self.lin(input=x)), {}),
}


class Table(dict):
    def __init__(self, lin):
        super().__init__(lin=None)
        self.lin = lin


def weak_keys(lin):
    table = weakref.WeakKeyDictionary()
    table[lin] = 2.0
    return table


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_reach_a_module(way):
    forward, attributes = WAYS[way]
    model, twin = block(forward, **attributes), block(forward, **attributes)
    graft = bind(model, LoraConfig(r=2, target_modules="all-linear"))
    params = randomised(graft)
    twin.load_state_dict(merge(graft, params))
    base = model(X)
    torch.testing.assert_close(graft(params, X), twin(X))
    torch.testing.assert_close(graft.view(params)(X), twin(X))
    assert not torch.allclose(base, twin(X), atol=1e-3)
    assert torch.equal(model(X), base)


def test_an_object_that_holds_a_module():
    class Holder:
        def __init__(self, module):
            self.module = module

    assert_adapted(block(lambda self, x: self.out(self.holder.module(x)), holder=lambda m: Holder(m.lin)), X)


class Shifted(nn.Linear):
    """Takes more than the input, and calls the inherited forward."""

    def forward(self, x, scale=1.0, *, shift=0.0):
        return scale * super().forward(x) + shift


class Doubled(nn.Linear):
    """Computes with its weight itself."""

    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias), None


class Positions(nn.Embedding):
    """Looks up something else than its input, as the positions of OPT and Whisper."""

    def forward(self, x, past=0):
        return super().forward(torch.arange(x.shape[1]) + past) + self.weight[past]


OWN_FORWARDS = {
    "calls the inherited": (lambda: Shifted(4, 4), lambda self, x: self.out(self.lin(x, 2.0, shift=1.0))),
    "by keyword": (lambda: Shifted(4, 4), lambda self, x: self.out(self.lin(x=x, scale=3.0))),
    "reads its weight": (lambda: Doubled(4, 4), lambda self, x: self.out(self.lin(x)[0])),
    "reads both": (lambda: Positions(9, 4), lambda self, x: self.out(self.lin(x, past=2))),
    "scales": (
        lambda: BartScaledWordEmbedding(9, 4, 0, embed_scale=3.0),
        lambda self, x: self.out(self.lin(torch.arange(3))),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OWN_FORWARDS)
def test_a_class_with_its_own_forward_means_what_its_merged_weight_means(case):
    make, forward = OWN_FORWARDS[case]
    model = block(forward)
    model.lin = make()
    graft, params = assert_adapted(model, X, ["lin", "out"])
    compiled = torch.compile(lambda params: graft(params, X), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(params), graft(params, X))


def test_a_weight_in_integers_is_called_and_never_read():
    class Quantised(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.weight = nn.Parameter((self.weight * 100).to(torch.int8), requires_grad=False)

        def forward(self, x):
            return F.linear(x, self.weight / 100, self.bias)

    model = nn.Sequential(Quantised())
    graft = bind(model, LoraConfig(r=2, target_modules=["0"]))
    params = randomised(graft)
    a, b = params["0"].values()
    torch.testing.assert_close(graft(params, X), model(X) + 4 * X @ a.T @ b.T)
    with pytest.raises(TypeError, match=r"0: its weight is torch\.int8, so an adapter cannot be added to it"):
        merge(graft, params)


def test_a_site_of_which_only_the_bias_is_read_is_unreached():
    model = block(lambda self, x: self.out(x) + self.lin.bias.sum())
    graft = bind(model, LoraConfig(r=2, target_modules=["lin", "out"]))
    with pytest.raises(RuntimeError, match="never reached 'lin'"):
        graft(graft.init(), X)


@pytest.mark.parametrize(
    "hide",
    [
        lambda lin: types.MappingProxyType({"lin": lin}),
        lambda lin: iter([lin]),
        lambda lin: functools.cache(lambda i: lin),
    ],
)
def test_an_object_that_cannot_be_rebuilt_around_a_copy_is_named(hide):
    model = block(lambda self, x: self.out(self.lin(x)), hidden=lambda m: hide(m.lin))
    with pytest.raises(TypeError, match=r"an attribute of type \S+ holds a module .* list or dict"):
        bind(model, LoraConfig(target_modules=["lin"]))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_module_beside_the_targets():
    model = nn.Sequential(torch.jit.trace(nn.Linear(4, 4), X), nn.Linear(4, 3))
    graft = bind(model, LoraConfig(r=2, target_modules=["1"]))
    assert torch.equal(graft(graft.init(), X), model(X))


def test_encoder_layer_fast_path_and_out_proj():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    targets = ["linear1", "linear2", "out_proj"]
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert_adapted(model, x, targets)
    assert_adapted(model, x, targets)
    stack = nn.TransformerEncoder(model, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        assert_adapted(stack, x, targets)


def test_multihead_attention_out_proj_is_differentiable():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model, x = Model(), torch.randn(5, 2, 8)
    graft, params = assert_adapted(model, x, ["out_proj"])
    leaf = params["attention.out_proj"]["lora_B"].requires_grad_()
    graft(params, x).sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_one_module_under_two_names_is_one_site():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    for name in ("a", "b"):
        graft, _ = assert_adapted(Model(), X, [name])
        assert list(graft.sites[""]) == [name]
    assert list(bind(Model(), LoraConfig(target_modules="all-linear")).sites[""]) == ["a"]


def test_instance_level_forward_of_accelerate():
    class Double(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return (args[0] * 2,), kwargs

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    accelerate.hooks.add_hook_to_module(model[0], Double())
    accelerate.hooks.add_hook_to_module(model, Double())
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    graft = bind(model, LoraConfig(r=2, target_modules="all-linear"))
    params = randomised(graft)
    plain.load_state_dict(merge(graft, params))
    torch.testing.assert_close(graft(params, X), plain(X * 4))
    assert not torch.allclose(model(X), plain(X * 4))


def test_hooks_see_the_adapted_module():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 3))
    model[0][0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[0][0].register_forward_hook(lambda module, args, y: y * 2)
    model[0].register_forward_hook(lambda module, args, y: y - 1)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    graft = bind(model, LoraConfig(r=2, target_modules="all-linear"))
    params = randomised(graft)
    torch.testing.assert_close(graft(params, X), dense(model, graft, params)(X))
    seen = []
    handle = model[1].register_forward_hook(lambda module, args, y: seen.append(y))
    y = graft(params, X)
    assert seen[0] is y, "a hook added after bind runs"
    handle.remove()
    graft(params, X)
    assert len(seen) == 1


def effective(model, graft, params):
    """The oracle for computed weights: plain layers with W_eff + s B A."""
    twin = nn.Sequential(*(nn.Linear(m.in_features, m.out_features) for m in model))
    for (path, leaves), new, old in zip(params.items(), twin, model, strict=True):
        scaling = graft.sites[""][path].constants.scaling
        new.weight.data = (old.weight + scaling * leaves["lora_B"] @ leaves["lora_A"]).detach()
        new.bias.data = old.bias.data
    return twin


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["parametrize", "weight_norm", "old_weight_norm", "spectral_norm"])
def test_computed_weights(kind):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wrap = {
        "parametrize": lambda m: parametrize.register_parametrization(m, "weight", Symmetric()),
        "weight_norm": parametrizations.weight_norm,
        "old_weight_norm": nn.utils.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
    }[kind]
    for module in model:
        wrap(module)
    model.eval()
    model(X)
    graft = bind(model, LoraConfig(r=2, target_modules="all-linear"))
    params = randomised(graft)
    expected = effective(model, graft, params)(X)
    torch.testing.assert_close(graft(params, X), expected)
    torch.testing.assert_close(graft.view(params)(X), expected)
    with pytest.raises(ValueError, match=r"0: weight is computed .* graft\.view"):
        merge(graft, params)


def test_tied_weights_stay_apart_in_calls_and_are_refused_by_merge():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    model, ids = Model(), torch.arange(7)
    graft = bind(model, LoraConfig(r=2, target_modules=["head"]))
    params = randomised(graft)
    leaves = params["head"]
    w = model.embed.weight
    expected = F.linear(model.embed(ids), w + 4 * leaves["lora_B"] @ leaves["lora_A"])
    torch.testing.assert_close(graft(params, ids), expected)
    with pytest.raises(ValueError, match=r"head: its weight is tied to embed\.weight"):
        merge(graft, params)


def test_module_replaced_after_bind():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    graft = bind(model, LoraConfig(r=2, target_modules="all-linear"))
    params = randomised(graft)
    model[0] = nn.Linear(4, 4)
    model[1] = nn.Tanh()
    torch.testing.assert_close(graft(params, X), dense(model, graft, params)(X))
    model[0] = nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"0: the module was replaced after bind .* bind the model again"):
        graft(params, X)
    del model[2]
    model[0] = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"2: the module was removed from the model after bind"):
        graft(params, X)


def test_unreached_site_is_an_error_unless_allowed():
    model = block(lambda self, x: self.out(x))
    config = LoraConfig(r=2, target_modules=["lin", "out"])
    graft = bind(model, config)
    with pytest.raises(RuntimeError, match=r"never reached 'lin'.*allow_unreached=True"):
        graft(graft.init(), X)
    graft = bind(model, config, allow_unreached=True)
    assert graft(graft.init(), X).shape == (2, 3)


def test_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    graft = bind(model, LoraConfig(r=2, target_modules="all-linear"))
    params = graft.init()
    assert params["0"]["lora_A"].is_meta
    assert graft(params, X.to("meta")).shape == (2, 3)
    assert merge(graft, params)["0.weight"].is_meta


def test_lstm_beside_the_targets():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 5, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    model, x = Model(), torch.randn(2, 6, 4)
    graft, params = assert_adapted(model, x, ["head"])
    base = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    twin = Model()
    twin.load_state_dict(base)
    twin.load_state_dict(merge(bind(twin, LoraConfig(r=2, target_modules=["head"])), params))
    torch.testing.assert_close(functional_call(graft, (base, params), (x,)), twin(x))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def test_activation_checkpointing_keeps_each_calls_adapter():
    model = Checkpointed()
    graft = bind(model, LoraConfig(r=2, target_modules="all-linear"))
    trees = [randomised(graft, seed) for seed in range(3)]
    for tree in trees:
        for leaves in tree.values():
            for leaf in leaves.values():
                leaf.requires_grad_()
    losses = [graft(tree, X).square().sum() for tree in trees]
    sum(losses).backward()
    for tree in trees:
        loss = dense_loss(graft, tree)
        expected = torch.autograd.grad(loss, [leaf for leaves in tree.values() for leaf in leaves.values()])
        given = [leaf.grad for leaves in tree.values() for leaf in leaves.values()]
        torch.testing.assert_close(given, list(expected))


def dense_loss(graft, tree):
    state = merge(graft, tree)
    hidden = F.linear(X, state["body.0.weight"], state["body.0.bias"]).tanh()
    hidden = F.linear(hidden, state["body.2.weight"], state["body.2.bias"])
    return F.linear(hidden, state["head.weight"], state["head.bias"]).square().sum()


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_and_compiled_modules_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"1: a parameter of a lazy module"):
        bind(model, LoraConfig(target_modules=["0"]))
    model = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 3)))
    with pytest.raises(TypeError, match=r"1: a module compiled by torch\.compile"):
        bind(model, LoraConfig(target_modules=["0"]))


def test_binding_a_view_is_refused():
    graft = bind(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match=r"0 is already adapted.*Bind the original"):
        bind(graft.view(graft.init()), LoraConfig(target_modules=["0"]))


def test_an_embedding_elsewhere_that_renormalises_its_weight_is_left_alone():
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.1), nn.Linear(4, 3))
    before = model[0].weight.detach().clone()
    graft = bind(model, LoraConfig(target_modules=["1"]))
    graft(graft.init(), torch.arange(7))
    assert torch.equal(model[0].weight, before)


GLOBAL = nn.Linear(4, 4)


def test_a_module_reached_through_a_global_or_a_closure_is_named():
    def forward(self, x):
        return self.out(GLOBAL(x) + self.lin(x))

    model = block(forward)
    model.lin = GLOBAL
    with pytest.raises(ValueError, match=r"lin: .*forward .* reaches this module through the variable 'GLOBAL'"):
        bind(model, LoraConfig(target_modules=["lin"]))
    bind(model, LoraConfig(target_modules=["out"]))
    hidden = nn.Linear(4, 4)
    model = block(lambda self, x: self.out(sum(hidden(v) for v in [x]) + self.lin(x)))
    model.lin = hidden
    with pytest.raises(ValueError, match=r"lin: .* through the variable 'hidden'"):
        bind(model, LoraConfig(target_modules=["lin"]))
    model = block(lambda self, x: self.f(x), f=lambda m: lambda x: m.out(GLOBAL(x)))
    model.lin = GLOBAL
    with pytest.raises(ValueError, match=r"lin: .* through the variable 'GLOBAL'"):
        bind(model, LoraConfig(target_modules=["lin", "out"]))


TABLE = {"lin": GLOBAL}


def test_a_container_in_a_global_is_looked_into_and_names_of_attributes_are_no_globals():
    model = block(lambda self, x: self.out(TABLE["lin"](self.lin(x))))
    model.lin = GLOBAL
    with pytest.raises(ValueError, match=r"lin: .* through the variable 'TABLE'"):
        bind(model, LoraConfig(target_modules=["lin"]))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.GLOBAL = GLOBAL

        def forward(self, x):
            return self.GLOBAL(x)

    assert_adapted(Model(), X)


class Twice(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def test_another_class_of_a_module_is_seen():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2))), torch.randn(3, 4)
    graft = bind(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    params = graft.init(torch.Generator().manual_seed(0))
    before = graft(params, x)
    model[1].__class__ = Twice
    torch.testing.assert_close(graft(params, x), 2 * before)
    model.__class__ = Twice
    torch.testing.assert_close(graft(params, x), 4 * before)
