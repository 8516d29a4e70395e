"""Named adapters, views, and what bad input gets."""

import copy
import pickle
import re

import optree
import pytest
import torch
from torch import nn

from torchgraft.adapters import IA3Config, LoraConfig
from torchgraft.functional import bind, functional_call, merge, stack, unstack, value_and_grad

X = torch.linspace(-1, 1, 8).view(2, 4)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def randomised(graft, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: torch.randn(t.shape, generator=generator) * 0.3, graft.init())


# -- named adapters ------------------------------------------------------------------------------------------


def test_loras_add_up_and_missing_names_are_off():
    model = mlp()
    configs = {"b": LoraConfig(r=2, target_modules=["0"]), "a": LoraConfig(r=3, target_modules=["0", "2"])}
    graft = bind(model, configs)
    params = randomised(graft)
    assert list(params) == ["a", "b"], "sorted, whatever the order of binding"
    alone = {name: bind(model, config) for name, config in configs.items()}
    for name in configs:
        assert torch.equal(graft({name: params[name]}, X), alone[name](params[name], X))
    assert torch.equal(graft({}, X), model(X))
    state = merge(alone["a"], params["a"])
    twin = mlp()
    twin.load_state_dict(state)
    twin.load_state_dict(merge(bind(twin, configs["b"]), params["b"]))
    torch.testing.assert_close(graft(params, X), twin(X))
    torch.testing.assert_close(merge(graft, params), dict(twin.state_dict()))


@pytest.mark.parametrize("order", [("scale", "add"), ("add", "scale")])
def test_others_compose_in_the_order_given(order):
    model = mlp()
    configs = {"scale": IA3Config(target_modules=["0"]), "add": LoraConfig(r=2, target_modules=["0"])}
    graft = bind(model, {name: configs[name] for name in order})
    params = randomised(graft)
    a, b, scale = *params["add"]["0"].values(), params["scale"]["0"]["ia3_l"]
    w, bias = model[0].weight, model[0].bias
    delta = 4 * b @ a
    if order == ("scale", "add"):
        w, bias = scale * w + delta, scale[:, 0] * bias
    else:
        w, bias = scale * (w + delta), scale[:, 0] * bias
    expected = model[2](torch.tanh(X @ w.T + bias))
    torch.testing.assert_close(graft(params, X), expected)
    twin = mlp()
    twin.load_state_dict(merge(graft, params))
    torch.testing.assert_close(twin(X), expected)


def test_gradients_flow_to_named_adapters():
    graft = bind(mlp(), {"a": LoraConfig(r=2, target_modules=["0"]), "b": IA3Config(target_modules=["2"])})
    _, grads = value_and_grad(lambda p: graft(p, X).square().sum())(randomised(graft))
    assert sorted(grads) == ["a", "b"]
    assert all(g.abs().sum() > 0 for g in optree.tree_leaves(grads))


# -- views ---------------------------------------------------------------------------------------------------


class Greeter(nn.Module):
    """A model with methods, properties and a signature of its own."""

    name = "greeter"

    def __init__(self):
        super().__init__()
        self.body = mlp()

    @property
    def width(self):
        return self.body[0].in_features

    def forward(self, x, *, scale=1.0):
        return self.body(x) * scale

    def generate(self, x, steps=2):
        for _ in range(steps):
            x = torch.cat([self(x), x[:, :1]], 1)
        return x


def test_a_view_is_a_module_like_the_users():
    model = Greeter()
    graft = bind(model, LoraConfig(r=2, target_modules="all-linear"))
    trees = [randomised(graft, seed) for seed in range(2)]
    views = [graft.view(tree) for tree in trees]
    twins = [copy.deepcopy(model) for _ in trees]
    for tree, twin in zip(trees, twins, strict=True):
        twin.load_state_dict(merge(graft, tree))
    for view, twin in zip(views, twins, strict=True):
        assert isinstance(view, Greeter) and isinstance(view.body[0], nn.Linear)
        assert (view.width, view.name) == (4, "greeter")
        torch.testing.assert_close(view.generate(X), twin.generate(X))
        torch.testing.assert_close(view(X, scale=2.0), twin(X, scale=2.0))
        torch.testing.assert_close(view.body[0].weight, twin.body[0].weight)
        torch.testing.assert_close(view.body(X), twin.body(X))
        assert [name for name, _ in view.named_modules()] == [name for name, _ in model.named_modules()]
        assert list(view.state_dict()) == list(model.state_dict())
        assert view.get_submodule("body.0")._parameters["weight"].data_ptr() == model.body[0].weight.data_ptr()
        torch.testing.assert_close(view.state_dict(), twin.state_dict())
        assert "adapters={'': LORA}" in repr(view)
    views[0].eval()
    assert model.training and views[1].training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_grafts_and_views_are_copied_whole(copied):
    model = Greeter()
    graft = bind(model, LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear"))
    params = randomised(graft)
    view = graft.view(params).eval()
    expected = view(X)
    own = copied(graft)
    torch.testing.assert_close(copied(view)(X), expected)
    assert own.model is not model
    torch.testing.assert_close(own.view(params).eval()(X), expected)
    awake = copied(graft.view(params))
    assert not torch.equal(awake(X), awake(X))
    torch.testing.assert_close(awake.eval()(X), expected)  # modes reach every part of the copy
    with torch.no_grad():
        model.body[0].weight.zero_()
    torch.testing.assert_close(awake(X), expected)
    torch.testing.assert_close(own.view(params).eval()(X), expected)


def test_gradients_flow_through_a_view():
    graft = bind(Greeter(), LoraConfig(r=2, target_modules="all-linear"))
    params = optree.tree_map(lambda t: t.requires_grad_(), randomised(graft))
    graft.view(params)(X).square().sum().backward()
    _, expected = value_and_grad(lambda p: graft(p, X).square().sum())(params)
    torch.testing.assert_close(optree.tree_map(lambda t: t.grad, params), expected)


@pytest.mark.slow
def test_views_compile_and_export():
    graft = bind(Greeter().eval(), LoraConfig(r=2, target_modules="all-linear"))
    view = graft.view(randomised(graft))
    expected = view(X).detach()
    torch._dynamo.reset()
    compiled = torch.compile(view, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected)
    for strict in (False, True):
        program = torch.export.export(view, (X,), strict=strict)
        torch.testing.assert_close(program.module()(X), expected)


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.fixture
def graft():
    return bind(mlp(), LoraConfig(r=2, target_modules=["0", "2"]))


def altered(params, path, leaf, value):
    new = {key: dict(leaves) for key, leaves in params.items()}
    if leaf is None:
        new[path] = value
    else:
        new[path][leaf] = value
    return new


@pytest.mark.parametrize(
    ("alter", "error", "words"),
    [
        (lambda p: None, TypeError, "params is None, expected a dict of sites; graft.init(generator) makes one"),
        (lambda p: altered(p, "7", None, {}), KeyError, "params has unknown site '7'; expected '0', '2'"),
        (lambda p: {"0": p["0"]}, KeyError, "params lacks site '2'; given were '0'"),
        (lambda p: altered(p, "0", None, None), TypeError, "params has None for a site: ['0']"),
        (lambda p: altered(p, "0", None, torch.ones(1)), TypeError, "params['0'] is of type Tensor, expected a dict"),
        (lambda p: altered(p, "0", "lora_C", X), KeyError, "params['0'] has unknown leaf 'lora_C'; expected 'lora_A'"),
        (
            lambda p: altered(p, "2", None, {"lora_A": X}),
            KeyError,
            "params['2'] lacks leaf 'lora_B'; given were 'lora_A'",
        ),
        (lambda p: altered(p, "2", "lora_B", None), TypeError, "params['2']['lora_B'] is None, expected a tensor of"),
        (
            lambda p: altered(p, "2", "lora_B", 1.0),
            TypeError,
            "params['2']['lora_B'] is of type float, expected a tensor",
        ),
        (
            lambda p: altered(p, "0", "lora_A", X.T),
            ValueError,
            "params['0']['lora_A'] has shape (4, 2), expected (2, 4)",
        ),
        (
            lambda p: stack([p, p]),
            ValueError,
            "it looks like a stack of 2 adapters: use route or torch.vmap, or unstack it",
        ),
        (lambda p: ({}, p, p), TypeError, "params is a tuple of 3, expected a tree or (base_params, params)"),
        (lambda p: ({"0.wieght": X}, p), KeyError, "no parameter or buffer of the model; did you mean '0.weight'?"),
        (lambda p: ({"0.weight": X}, p), ValueError, "base_params['0.weight'] has shape (2, 4), expected (4, 4)"),
        (
            lambda p: ({"0.weight": None}, p),
            TypeError,
            "base_params['0.weight'] is of type NoneType, expected a tensor",
        ),
    ],
)
def test_a_tree_that_does_not_fit(graft, alter, error, words):
    with pytest.raises(error, match=re.escape(words)):
        graft(alter(graft.init()), X)
    assert torch.equal(graft(graft.init(), X), graft.model(X)), "nothing is left half done"


def test_arguments_of_another_type(graft):
    params = graft.init()
    for call, words in (
        (lambda: graft.init(0), "init: generator is 0, expected a torch.Generator; torch.Generator().manual_seed(0)"),
        (lambda: graft.init(dtype=torch.int8), "init: dtype is torch.int8, expected a floating-point dtype"),
        (lambda: graft.init(dtype="float16"), "init: dtype is 'float16', expected a floating-point dtype"),
        (lambda: merge(graft.model, params), "merge: graft is of type Sequential, expected what bind returned"),
        (lambda: functional_call(graft.model, params, (X,)), "functional_call: graft is of type Sequential, expected"),
        (lambda: graft(([], params), X), "base_params is of type list, expected a dict from names"),
        (lambda: value_and_grad(sum, argnums=(0, 1))(X, X), "value_and_grad: argnums is (0, 1), expected an int"),
        (lambda: value_and_grad(torch.sum, has_aux=True)(X), "the function returned Tensor, expected (scalar, aux)"),
    ):
        with pytest.raises(TypeError, match=re.escape(words)):
            call()


def test_unknown_adapter_name():
    graft = bind(mlp(), {"a": LoraConfig(target_modules=["0"])})
    with pytest.raises(KeyError, match=r"params has unknown adapter 'b'; this graft was bound with \['a'\]"):
        graft({"b": {}}, X)
    with pytest.raises(KeyError, match=r"params\['a'\] lacks site '0'; given were none"):
        graft({"a": {}}, X)
    with pytest.raises(TypeError, match=r"expected a dict of adapters: \['a'\]"):
        graft(None, X)


@pytest.mark.parametrize(
    ("model", "config", "error", "words"),
    [
        (
            "model",
            LoraConfig(target_modules=["0"]),
            TypeError,
            "bind: model is of type str, expected a torch.nn.Module",
        ),
        (mlp(), LoraConfig, TypeError, "bind: config is the class LoraConfig, expected a config object"),
        (mlp(), {"a": 3}, TypeError, "bind: config['a'] is 3, expected a config object"),
        (mlp(), {}, ValueError, "bind: got an empty dict of configs"),
        (
            mlp(),
            {"": LoraConfig(target_modules=["0"])},
            TypeError,
            "bind: an adapter's name is a non-empty string, got ''",
        ),
        (
            mlp(),
            LoraConfig(target_modules=["1"]),
            ValueError,
            "1: LORA does not support Tanh; it supports attention, conv1d",
        ),
        (
            mlp(),
            LoraConfig(r=0, target_modules=["0"]),
            ValueError,
            "LoraConfig: r is 0 at 0, expected a positive integer",
        ),
    ],
)
def test_bad_binds(model, config, error, words):
    with pytest.raises(error, match=re.escape(words)):
        bind(model, config)


def test_a_tied_tensor_given_twice():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    graft = bind(model, LoraConfig(target_modules=["0"]))
    w = torch.randn(4, 4)
    y = functional_call(graft, ({"1.weight": w}, graft.init()), (X,))
    torch.testing.assert_close(y, (X @ w.T + model[0].bias) @ w.T + model[1].bias)
    with pytest.raises(ValueError, match=r"different tensors for '0\.weight' and '1\.weight', which are one tied"):
        functional_call(graft, ({"0.weight": w, "1.weight": w.clone()}, graft.init()), (X,))


def test_stack_and_unstack_say_what_differs():
    a, b = {"x": {"w": torch.zeros(2)}}, {"x": {"w": torch.ones(3)}}
    with pytest.raises(ValueError, match=r"leaf \[x\]\[w\] has shape \(2,\) in tree 0 and \(3,\) in tree 1"):
        stack([a, b])
    with pytest.raises(ValueError, match=r"leaf \[y\] is in tree 1 and not in tree 0"):
        stack([a, {"x": a["x"], "y": torch.ones(1)}])
    with pytest.raises(ValueError, match="stack: got no trees"):
        stack([])
    with pytest.raises(TypeError, match=r"leaf \[x\] is None, expected a tensor"):
        stack([{"x": None}])
    with pytest.raises(ValueError, match=r"leaf \[b\] has shape \(3,\) and leaf \[a\] has \(2,\)"):
        unstack({"a": torch.ones(2), "b": torch.ones(3)})


def test_value_and_grad_says_what_is_wrong():
    p = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"returned a tensor of shape \(2,\), expected a scalar"):
        value_and_grad(lambda p: p["w"])(p)
    with pytest.raises(TypeError, match="returned float, expected a scalar tensor"):
        value_and_grad(lambda p: 1.0)(p)
    with pytest.raises(TypeError, match=r"is torch\.int64, expected a floating-point tensor"):
        value_and_grad(lambda p: p["w"].sum())({"w": torch.ones(2, dtype=torch.long)})
    with pytest.raises(ValueError, match="argnums=1, but only 1 positional"):
        value_and_grad(lambda p: p["w"].sum(), argnums=1)(p)


def test_value_and_grad_is_torch_funcs():
    p, x = {"w": torch.randn(3), "unused": torch.ones(2)}, torch.randn(3)

    def f(p, x):
        return (p["w"] * x).sin().sum(), {"x": x}

    grads, (value, _) = torch.func.grad_and_value(f, has_aux=True)(p, x)
    (own_value, aux), own = value_and_grad(f, has_aux=True)(p, x)
    torch.testing.assert_close((own_value, own), (value, grads))
    assert aux["x"] is not None and own["unused"].tolist() == [0, 0]
    leaf = torch.randn(3, requires_grad=True)
    _, grads = value_and_grad(lambda p: (p["w"] ** 3).sum(), create_graph=True)({"w": leaf * 2})
    (second,) = torch.autograd.grad(grads["w"].sum(), leaf)
    torch.testing.assert_close(second, 24 * leaf.detach())
    inner = value_and_grad(lambda q: (q**3).sum(), create_graph=True)
    (_, hessian) = value_and_grad(lambda p: inner(p)[1].sum())(leaf)
    torch.testing.assert_close(hessian, 6 * leaf.detach())
    with pytest.raises(RuntimeError, match="no gradient reaches the 1 leaves.*create_graph=True"):
        value_and_grad(lambda p: value_and_grad(lambda q: (q**3).sum())(p)[1].sum())(leaf)
