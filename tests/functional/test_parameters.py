"""Bare parameters as sites: oracles from the equation, and that nothing as large as the weights is made."""

import copy
import pickle

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from torchgraft.adapters import IA3Config, LoraConfig
from torchgraft.functional import bind, functional_call, merge, stack, unstack, value_and_grad
from torchgraft.functional._sites.factored import Factored, Term

EXPERTS, TOKENS, INNER, OUTER = 3, 5, 4, 8
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
FIELDS = {"target_parameters": ["up", "down"], "r": 2, "lora_alpha": 3}


class Mixture(nn.Module):
    """Experts whose weights are stacked, `"experts out in"`; which expert a token goes to is fixed."""

    inner = INNER

    def __init__(self, dtype=torch.float64):
        super().__init__()
        shapes = {"up": (EXPERTS, OUTER, self.inner), "down": (EXPERTS, self.inner, OUTER)}
        for name, shape in shapes.items():
            if getattr(self, "is_transposed", False):
                shape = (shape[0], shape[2], shape[1])
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=dtype) * 0.5))
        self.register_buffer("expert", torch.tensor([0, 2, 2, 1, 0]))

    def forward(self, x):
        return self.product(self.product(x, "up").tanh(), "down")


class Loop(Mixture):
    def product(self, x, name):
        return torch.stack([F.linear(row, getattr(self, name)[e]) for row, e in zip(x, self.expert, strict=True)])


class Gathered(Mixture):
    def product(self, x, name):
        return torch.bmm(getattr(self, name)[self.expert], x.unsqueeze(-1)).squeeze(-1)


class GatheredTransposed(Mixture):
    is_transposed = True

    def product(self, x, name):
        return (x.unsqueeze(1) @ getattr(self, name)[self.expert]).squeeze(1)


class Everywhere(Mixture):
    """Each expert sees all tokens."""

    def product(self, x, name):
        return torch.einsum("ti,eoi->eto", x, getattr(self, name))[self.expert, torch.arange(TOKENS)]


class Batched(Mixture):
    is_transposed = True

    def product(self, x, name):
        y = torch.bmm(x.expand(EXPERTS, TOKENS, x.shape[-1]), getattr(self, name))
        return y[self.expert, torch.arange(TOKENS)]


class OnTheLeft(Mixture):
    def product(self, x, name):
        return torch.matmul(getattr(self, name), x.mT).mT[self.expert, torch.arange(TOKENS)]


class Added(Mixture):
    def product(self, x, name):
        zeros = x.new_zeros(EXPERTS, 1, 1)
        y = torch.baddbmm(zeros, x.expand(EXPERTS, TOKENS, x.shape[-1]), getattr(self, name).transpose(1, 2))
        return y[self.expert, torch.arange(TOKENS)]


class Dense(Mixture):
    """Does more with its weights than to multiply with them."""

    def product(self, x, name):
        return torch.stack([F.linear(x[t], getattr(self, name).sin()[e]) for t, e in enumerate(self.expert.tolist())])


class Matrix(nn.Module):
    """Parameters of two axes, one of them looked up."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.up = nn.Parameter(torch.randn(OUTER, INNER, dtype=dtype))
        self.down = nn.Parameter(torch.randn(INNER, OUTER, dtype=dtype))
        self.table = nn.Parameter(torch.randn(6, INNER, dtype=dtype))

    def forward(self, x):
        return F.linear(F.linear(x, self.up).tanh(), self.down) + F.embedding(torch.arange(TOKENS), self.table)


FACTORED = [Loop, Gathered, GatheredTransposed, Everywhere, Batched, OnTheLeft, Added, Matrix]
ALL = [*FACTORED, Dense]


def oracle(model, params, scaling=1.5):
    """The dense weights by the equation that PEFT's `ParamWrapper` states."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, leaves in params.items():
        a, b, w = leaves["lora_A"], leaves["lora_B"], weights[name]
        if w.ndim == 2:
            weights[name] = w + scaling * b @ a
            continue
        a, b = a.reshape(EXPERTS, -1, a.shape[-1]), b.reshape(b.shape[0], -1, EXPERTS)
        way = "e i o" if getattr(model, "is_transposed", False) else "e o i"
        weights[name] = w + scaling * torch.einsum(f"o r e, e r i -> {way}", b, a)
    return weights


class Case:
    def __init__(self, cls, dtype=torch.float64, **fields):
        torch.manual_seed(1)
        self.model = cls(dtype)
        table = ["table"] if cls is Matrix else []
        self.config = LoraConfig(**{**FIELDS, "target_parameters": FIELDS["target_parameters"] + table, **fields})
        self.x = torch.randn(TOKENS, getattr(cls, "inner", INNER), dtype=dtype)
        self.graft = bind(self.model, self.config)
        self.initial = self.graft.init(torch.Generator().manual_seed(0))
        self.trees = [self.random(seed) for seed in range(3)]
        self.params = self.trees[0]

    def random(self, seed):
        generator = torch.Generator().manual_seed(seed)
        return optree.tree_map(
            lambda t: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype), self.initial
        )

    def loss(self, params, x):
        return self.graft(params, x).square().mean()

    def expected(self, params, x=None):
        return torch.func.functional_call(self.model, oracle(self.model, params), (self.x if x is None else x,))


@pytest.fixture
def never_dense(monkeypatch):
    """Multiplying out is an error."""

    def refuse(self):
        raise AssertionError(f"{self} was multiplied out")

    monkeypatch.setattr(Factored, "dense", refuse)


@pytest.mark.parametrize("cls", FACTORED)
def test_products_and_their_gradients_are_the_equations_without_a_dense_weight(cls, never_dense):
    case = Case(cls)
    leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), case.params)
    y, expected = case.graft(leaves, case.x), case.expected(leaves)
    torch.testing.assert_close(y, expected, **CLOSE)
    flat, seed = optree.tree_leaves(leaves), torch.randn_like(y)
    given = torch.autograd.grad((y * seed).sum(), flat)
    torch.testing.assert_close(given, torch.autograd.grad((expected * seed).sum(), flat), **CLOSE)
    assert all(g.abs().sum() > 0 for g in given)
    assert not torch.allclose(y, case.model(case.x))


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_at_init_bit_for_bit(cls, dtype):
    case = Case(cls, dtype)
    assert {leaf.dtype for leaf in optree.tree_leaves(case.initial)} == {torch.float32}
    y = case.graft(case.initial, case.x)
    assert y.dtype == dtype and torch.equal(y, case.model(case.x))


@pytest.mark.parametrize("cls", ALL)
def test_transforms_agree(cls):
    case = Case(cls)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(case.graft(case.params, case.x), case.expected(case.params), **close)
    _, grads = value_and_grad(case.loss)(case.params, case.x)
    torch.testing.assert_close(grads, grad(case.loss)(case.params, case.x), **close)
    tangent = case.random(7)
    _, slope = jvp(lambda params: case.loss(params, case.x), (case.params,), (tangent,))
    expected = sum((g * t).sum() for g, t in zip(*map(optree.tree_leaves, (grads, tangent)), strict=True))
    torch.testing.assert_close(slope, expected, **close)
    leaves, treedef = optree.tree_flatten(case.params)
    assert torch.autograd.gradgradcheck(
        lambda *leaves: case.graft(optree.tree_unflatten(treedef, leaves), case.x).sum(),
        tuple(leaf.clone().requires_grad_() for leaf in leaves),
        fast_mode=True,
    )


@pytest.mark.parametrize("cls", ALL)
def test_vmap_is_a_loop(cls):
    case = Case(cls)
    many = stack(case.trees)
    expected = torch.stack([case.graft(tree, case.x) for tree in case.trees])
    torch.testing.assert_close(vmap(case.graft, in_dims=(0, None))(many, case.x), expected, **CLOSE)
    grads = vmap(grad(case.loss), in_dims=(0, None))(many, case.x)
    for given, tree in zip(unstack(grads), case.trees, strict=True):
        torch.testing.assert_close(given, grad(case.loss)(tree, case.x), **CLOSE)
    xs = torch.stack([case.x, 2 * case.x, -case.x])
    expected = torch.stack([case.graft(tree, x) for tree, x in zip(case.trees, xs, strict=True)])
    torch.testing.assert_close(vmap(case.graft)(many, xs), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [cls for cls in FACTORED if cls is not Loop])
def test_compiles_whole_and_once_without_a_dense_weight(cls, never_dense):
    case = Case(cls, torch.float32)
    torch._dynamo.reset()
    f = torch.compile(case.loss, fullgraph=True, backend="aot_eager")
    f(case.trees[0], case.x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tree in case.trees:
            torch.testing.assert_close(f(tree, case.x), case.loss(tree, case.x))


@pytest.mark.slow
def test_compiles_where_it_is_multiplied_out():
    case = Case(Dense, torch.float32)
    torch._dynamo.reset()
    f = torch.compile(case.loss, fullgraph=True, backend="aot_eager")
    for tree in case.trees:
        torch.testing.assert_close(f(tree, case.x), case.loss(tree, case.x))


class Grouped(Mixture):
    """Tokens sorted by expert, in one grouped product."""

    def product(self, x, name):
        offsets = torch.tensor([2, 3, 5], dtype=torch.int32)
        order = self.expert.argsort(stable=True)
        y = F.grouped_mm(x[order].contiguous(), getattr(self, name).transpose(1, 2), offs=offsets)
        return y[order.argsort()]


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product")
@pytest.mark.parametrize("r", [2, 4])  # strides of the thin matrices are whole 16 bytes for one of them
def test_grouped_products(r, never_dense):
    case = Case(Grouped, torch.float32, r=r, lora_alpha=1.5 * r)
    leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), case.params)
    y = case.graft(leaves, case.x)
    twin = Case(Gathered, torch.float32, r=r, lora_alpha=1.5 * r)
    expected = twin.expected(leaves)
    torch.testing.assert_close(y, expected)
    flat = optree.tree_leaves(leaves)
    given = torch.autograd.grad(y.square().sum(), flat)
    torch.testing.assert_close(given, torch.autograd.grad(expected.square().sum(), flat), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product")
def test_a_grouped_product_compiles_with_a_dense_weight():
    class Wide(Grouped):
        inner = 8

    case = Case(Wide, torch.bfloat16)
    torch._dynamo.reset()
    f = torch.compile(case.graft, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(case.params, case.x), case.graft(case.params, case.x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("cls", ALL)
def test_merge_view_and_base_as_data(cls):
    case = Case(cls)
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    expected = case.expected(case.params)
    twin = copy.deepcopy(case.model)
    twin.load_state_dict(merge(case.graft, case.params))
    torch.testing.assert_close(twin(case.x), expected, **CLOSE)
    view = case.graft.view(case.params)
    assert isinstance(view, cls) and "LORA" in repr(view)
    for one in (view, copy.deepcopy(view)):
        torch.testing.assert_close(one(case.x), expected, **CLOSE)
    base = {key: 2 * value for key, value in case.model.named_parameters()}
    doubled = copy.deepcopy(case.model)
    doubled.load_state_dict({**case.model.state_dict(), **base})
    expected = bind(doubled, case.config)(case.params, case.x)
    torch.testing.assert_close(functional_call(case.graft, (base, case.params), (case.x,)), expected, **CLOSE)
    grads = grad(lambda b: functional_call(case.graft, (b, case.params), (case.x,)).square().sum())(base)
    assert all(g.abs().sum() > 0 for g in grads.values())
    assert all(torch.equal(before[key], value) for key, value in case.model.state_dict().items())
    assert type(case.model) is cls and set(before) == set(case.model.state_dict())


def test_a_view_goes_through_pickle():
    case = Case(Gathered)
    loaded = pickle.loads(pickle.dumps(case.graft.view(case.params)))
    torch.testing.assert_close(loaded(case.x), case.graft(case.params, case.x), **CLOSE)


def test_several_adapters_add_up_and_switch_off():
    case = Case(Gathered)
    both = bind(case.model, {"a": case.config, "b": LoraConfig(r=1, target_parameters=["up"])})
    params = {"a": case.params, "b": {"up": bind(case.model, both.configs["b"]).init(dtype=torch.float64)["up"]}}
    params["b"]["up"]["lora_B"] = torch.randn_like(params["b"]["up"]["lora_B"])
    weights = oracle(case.model, case.params)
    weights |= {"up": weights["up"] + oracle(case.model, params["b"], 8.0)["up"] - case.model.up.detach()}
    expected = torch.func.functional_call(case.model, weights, (case.x,))
    torch.testing.assert_close(both(params, case.x), expected, **CLOSE)
    torch.testing.assert_close(merge(both, params)["up"], weights["up"], **CLOSE)
    torch.testing.assert_close(both({"a": case.params}, case.x), case.expected(case.params), **CLOSE)
    assert torch.equal(both({}, case.x), case.model(case.x))


def test_checkpointed_activations_find_their_adapter():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Gathered()

        def forward(self, x):
            return checkpoint(self.experts, x, use_reentrant=False)

    graft = bind(Outer(), LoraConfig(**FIELDS))
    x = torch.randn(TOKENS, INNER, dtype=torch.float64)
    trees = [optree.tree_map(torch.randn_like, graft.init(dtype=torch.float64)) for _ in range(2)]
    leaves = [optree.tree_map(lambda t: t.clone().requires_grad_(), tree) for tree in trees]
    outputs = [graft(tree, x) for tree in leaves]
    for tree, y in zip(leaves, outputs, strict=True):
        given = torch.autograd.grad(y.square().sum(), optree.tree_leaves(tree))
        plain = bind(graft.model.experts, LoraConfig(**FIELDS))
        same = {path.removeprefix("experts."): value for path, value in tree.items()}
        expected = torch.autograd.grad(plain(same, x).square().sum(), optree.tree_leaves(same))
        torch.testing.assert_close(given, expected, **CLOSE)


def test_stacks_of_several_configs():
    torch.manual_seed(0)
    model, x = Gathered(), torch.randn(TOKENS, INNER, dtype=torch.float64)
    others = [{"lora_alpha": 7, "target_parameters": ["up"]}, {"r": 5}, {"r": 1}]
    graft = bind(model, [LoraConfig(**{**FIELDS, **other}) for other in ({}, *others)])
    trees = graft.unstack(graft.init(dtype=torch.float64))
    given = [optree.tree_map(torch.randn_like, tree) for tree in trees]
    many = graft.stack(given)
    y = vmap(lambda i, params: graft.at(i)(params, x))(torch.arange(4), many)
    assert many["down"]["lora_A"].shape == (4, 3 * 5, OUTER)
    for i, tree in enumerate(graft.unstack(many)):
        assert optree.tree_all(optree.tree_map(torch.equal, tree, given[i]))
        assert optree.tree_all(optree.tree_map(torch.equal, unstack(many)[i], graft.pad(tree)))
        torch.testing.assert_close(y[i], graft.member(i)(tree, x), **CLOSE)
    many["down"]["lora_A"][3, 2] = 1.0  # behind the rank of the first expert
    with pytest.raises(ValueError, match=r"unstack: lora_A of 'down' has numbers in the padding of adapter 3"):
        graft.unstack(many)


def test_autocast_and_half_precision_round_once():
    case = Case(Loop, torch.bfloat16)
    y = case.graft(case.params, case.x)
    wide = Case(Loop, torch.float64)
    wide.model.load_state_dict(case.model.state_dict())
    params = optree.tree_map(torch.Tensor.double, case.params)
    torch.testing.assert_close(y.double(), wide.expected(params, case.x.double()), rtol=0.05, atol=0.05)


# -- errors ---------------------------------------------------------------------------------------------------------


def test_what_has_no_adapter():
    model = nn.ModuleDict({"mix": Gathered(), "cube": nn.Bilinear(2, 2, 2), "head": nn.Linear(2, 2)})
    model["cube"].register_parameter("scale", nn.Parameter(torch.ones(2)))
    model["cube"].register_parameter("codes", nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False))
    with pytest.raises(ValueError, match="cube.scale: the parameter has shape .2,., expected 2 axes, or 3"):
        bind(model, LoraConfig(target_parameters=["scale"]))
    with pytest.raises(ValueError, match="cube.codes: the parameter has dtype torch.int8, expected floating point"):
        bind(model, LoraConfig(target_parameters=["codes"]))
    with pytest.raises(ValueError, match="head.weight: target_parameters names a parameter of a module that is"):
        bind(model, LoraConfig(target_modules=["head"], target_parameters=["head.weight"]))
    both = {"a": LoraConfig(target_modules=["head"]), "b": LoraConfig(target_parameters=["head.weight"])}
    with pytest.raises(ValueError, match="head.weight: one adapter is on this parameter and another on its module"):
        bind(model, both)


def test_a_method_without_parameters_says_so():
    class Wrong(IA3Config):
        def targets(self, model):
            return ["up"]

    with pytest.raises(ValueError, match=r"up: IA3 does not support Gathered \(experts\)"):
        bind(Gathered(), Wrong(target_modules=["up"], feedforward_modules=[]))


def test_a_parameter_that_no_forward_reads_is_an_error():
    class Idle(Gathered):
        def forward(self, x):
            return self.product(x, "up")

    graft = bind(Idle(), LoraConfig(**FIELDS))
    with pytest.raises(RuntimeError, match="never reached 'down'"):
        graft(graft.init(), torch.randn(TOKENS, INNER, dtype=torch.float64))
    graft = bind(Idle(), LoraConfig(**FIELDS), allow_unreached=True)
    graft(graft.init(), torch.randn(TOKENS, INNER, dtype=torch.float64))


@pytest.mark.parametrize(
    "write",
    [lambda w: w.mul_(2), lambda w: torch.nn.init.zeros_(w), lambda w: torch.abs(torch.ones(2, 2), out=w)],
    ids=["method", "init", "out"],
)
def test_writing_to_it_is_an_error(write):
    w = Factored(torch.ones(2, 3), (Term(torch.ones(2, 1), torch.ones(1, 3), 2.0),))
    with pytest.raises(TypeError, match="the forward writes to an adapted parameter"):
        write(w)


def test_a_replaced_parameter_of_another_shape_is_an_error():
    case = Case(Gathered)
    case.model.up = nn.Parameter(torch.randn(EXPERTS + 1, OUTER, INNER))
    with pytest.raises(ValueError, match="up: the module was replaced after bind"):
        case.graft(case.params, case.x)


# -- the stand-in ----------------------------------------------------------------------------------------------------


def weight(*lead):
    torch.manual_seed(0)
    w, left, right = (torch.randn(*lead, *shape) for shape in ((4, 6), (4, 2), (2, 6)))
    return Factored(w, (Term(left, right, 0.5),)), w + 0.5 * left @ right


X = torch.randn(3, 5, 4)
FUNCTIONS = {
    "x @ w": (3, lambda w: X @ w),
    "x @ w, one batch": (3, lambda w: X[:1] @ w),
    "w @ x": (3, lambda w: w @ torch.ones(6, 2)),
    "w @ vector": (3, lambda w: w @ torch.arange(6.0)),
    "vector @ w": (2, lambda w: torch.arange(4.0) @ w),
    "mm": (2, lambda w: torch.mm(X[0], w)),
    "w.mm": (2, lambda w: w.mm(torch.ones(6, 2))),
    "mv": (2, lambda w: torch.mv(w, torch.arange(6.0))),
    "addmm": (2, lambda w: torch.addmm(torch.ones(6), X[0], w, beta=2, alpha=3)),
    "addmm on the left": (2, lambda w: torch.addmm(torch.ones(2), w, torch.ones(6, 2), alpha=3)),
    "linear with a bias": (2, lambda w: F.linear(torch.ones(3, 6), w, torch.ones(4))),
    "einsum both ways": (3, lambda w: torch.einsum("etm,emn->etn", X, w)),
    "einsum that sums experts": (3, lambda w: torch.einsum("emn,etm->tn", w, X)),
    "einsum of a list": (3, lambda w: torch.einsum("etm,emn->etn", [X, w])),
    "an expert": (3, lambda w: X[0] @ w[1]),
    "some experts": (3, lambda w: X @ w[[2, 0, 0]]),
    "experts by mask": (3, lambda w: X[:2] @ w[torch.tensor([True, False, True])]),
    "a grid of experts": (3, lambda w: X[:, None] @ w[torch.tensor([[0, 1], [2, 0], [1, 1]])]),
    "each expert": (3, lambda w: torch.stack([x @ one for x, one in zip(X, w, strict=True)])),
    "unbind": (3, lambda w: X[0] @ w.unbind(0)[2]),
    "index_select": (3, lambda w: X[:1] @ w.index_select(0, torch.tensor([1]))),
    "transposes": (3, lambda w: torch.ones(3, 2, 6) @ w.mT.contiguous().transpose(-1, -2).permute(0, 2, 1)),
    "matrix transposes": (2, lambda w: torch.ones(2, 6) @ w.T.t().mT),
    "cast": (2, lambda w: X[0].double() @ w.to(torch.float64)),
    "rows looked up": (2, lambda w: F.embedding(torch.tensor([[0, 3], [1, 1]]), w)),
    "rows indexed": (2, lambda w: torch.ones(1, 6) @ w[torch.tensor([3, 1])].mT),
    "a view by expert": (2, lambda w: X[:2, :, :2] @ w.view(2, 2, 6)),
}
DENSE = {
    "arithmetic": (3, lambda w: 1 - w * 2 + w / 3),
    "comparison": (3, lambda w: (w > 0) & (w <= 1)),
    "a row": (2, lambda w: w[1]),
    "an entry": (3, lambda w: w[1, 2, 3]),
    "a method": (3, lambda w: w.softmax(-1).flatten(1)),
    "a function": (3, lambda w: torch.cat([w, w])),
    "other axes": (3, lambda w: w.transpose(0, 1)),
    "another view": (3, lambda w: w.view(-1)),
    "both": (2, lambda w: w @ w.mT),
    "einsum of both axes": (2, lambda w: torch.einsum("mn,mn->m", torch.ones(4, 6), w)),
    "a padded lookup": (2, lambda w: F.embedding(torch.tensor([0, 1]), w, padding_idx=0)),
    "a convolution": (3, lambda w: F.conv1d(torch.ones(1, 4, 9), w)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_products_stay_factored(name, never_dense):
    ndim, function = FUNCTIONS[name]
    w, dense = weight(*([3] if ndim == 3 else []))
    torch.testing.assert_close(function(w), function(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DENSE)
def test_everything_else_sees_the_dense_weight(name):
    ndim, function = DENSE[name]
    w, dense = weight(*([3] if ndim == 3 else []))
    torch.testing.assert_close(function(w), function(dense))


def test_facts_need_no_values(never_dense):
    w, dense = weight(3)
    for fact in ("shape", "dtype", "device", "ndim", "is_cuda", "layout", "itemsize"):
        assert getattr(w, fact) == getattr(dense, fact)
    assert (len(w), w.size(1), w.dim(), w.numel(), w.stride()) == (3, 4, 3, 72, dense.stride())
    assert not w.requires_grad and "Factored((3, 4, 6)" in repr(w)


def test_compiled_operators_with_the_parameter_on_the_left():
    w, dense = weight()

    def compiled(f):
        torch._dynamo.reset()
        return torch.compile(f, fullgraph=True, backend="aot_eager")

    parts = w.weight, *w.terms[0][:2]

    def on_the_left(weight, left, right, x):
        return Factored(weight, (Term(left, right, 0.5),)) @ x

    torch.testing.assert_close(compiled(on_the_left)(*parts, torch.ones(6, 3)), dense @ torch.ones(6, 3))
    square = torch.randn(4, 4), torch.randn(4, 1), torch.randn(1, 4)
    with pytest.raises(Exception, match=r"look the same.*write torch\.matmul"):
        compiled(on_the_left)(*square, torch.ones(4, 4))
