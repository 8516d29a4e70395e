"""What every method promises, over every kind of site. A new method joins by one row in `METHODS`.

`make test` runs each method whole on one kind of site and a covering selection of the rest (see `selected`),
`make test-full` what that leaves out.
"""

import copy
import itertools
from inspect import signature

import optree
import pytest
import torch
import torch.utils._pytree as pytree
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import grad, jvp, vmap
from transformers.pytorch_utils import Conv1D

from torchgraft.adapters import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, VeraConfig
from torchgraft.functional import Graft, bind, functional_call, merge, route, stack, unstack, value_and_grad

METHODS = {
    "lora": LoraConfig(r=2, lora_alpha=3, target_modules=["first", "second"]),
    "rslora": LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["first", "second"]),
    "pissa": LoraConfig(r=2, lora_alpha=3, init_lora_weights="pissa", target_modules=["first", "second"]),
    "mica": LoraConfig(r=2, lora_alpha=3, init_lora_weights="mica", target_modules=["first", "second"]),
    "lora with bias": LoraConfig(r=2, lora_alpha=3, lora_bias=True, target_modules=["first"]),
    "dora": LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["first", "second"]),
    "ia3": IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["first", "second"]),
    "oft": OFTConfig(oft_block_size=2, target_modules=["first", "second"]),
    "oft exact": OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, target_modules=["first", "second"]),
    "vera": VeraConfig(r=3, target_modules=["first", "second"]),
}
ONLY = {
    "pissa": {"linear"},
    "mica": {"linear", "embedding"},
    "lora with bias": {"linear", "conv1d", "conv2d", "conv3d"},
}
"""Kinds of site, where they are fewer than the method's."""
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.05},
}


class Model(nn.Module):
    """Two sites of one kind and of different sizes, with a nonlinearity between them."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Lookup(Model):
    def forward(self, ids):
        return self.first(ids).tanh() + self.second(ids)


SITES = {
    "linear": lambda: (Model(nn.Linear(4, 6), nn.Linear(6, 4, bias=False)), (5, 4)),
    "linear (3-d input)": lambda: (Model(nn.Linear(4, 6), nn.Linear(6, 4)), (2, 5, 4)),
    "linear (Conv1D)": lambda: (Model(Conv1D(6, 4), Conv1D(4, 6)), (3, 2, 4)),
    "embedding": lambda: (Lookup(nn.Embedding(7, 4), nn.Embedding(7, 4)), None),
    "conv1d": lambda: (Model(nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 4, 1)), (3, 4, 7)),
    "conv2d": lambda: (
        Model(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.Conv2d(6, 4, 2, stride=2, bias=False)),
        (3, 4, 5, 6),
    ),
    "conv2d (dilated)": lambda: (Model(nn.Conv2d(4, 6, 2, dilation=2), nn.Conv2d(6, 4, 1)), (3, 4, 5, 6)),
    "conv3d": lambda: (Model(nn.Conv3d(4, 6, 2, padding="same"), nn.Conv3d(6, 4, (1, 2, 2))), (2, 4, 2, 3, 4)),
}
KINDS = {
    name: [site for site in SITES if site.split(" ")[0] in ONLY.get(name, config.method.kinds)]
    for name, config in METHODS.items()
}
"""The kinds of site of each method."""
DETACHED = ("dora",)
"""Methods with a part that the gradient takes for a constant, so that differences of outputs do not show it."""


class Case:
    def __init__(self, name, site, dtype=torch.float64):
        torch.manual_seed(1)
        self.config = METHODS[name]
        model, shape = SITES[site]()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.model = model.to(dtype)
        self.x = torch.arange(7).view(7, 1) if shape is None else torch.randn(shape, dtype=dtype)
        self.graft = bind(self.model, self.config)
        self.initial = self.graft.init(torch.Generator().manual_seed(0))
        self.trees = [self.random(seed) for seed in range(3)]
        self.params = self.trees[0]

    def random(self, seed):
        """Parameters away from the initial ones, where nothing vanishes."""
        generator = torch.Generator().manual_seed(seed)
        return optree.tree_map(
            lambda t: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype), self.initial
        )

    def loss(self, params, x):
        return self.graft(params, x).square().mean()


def close(a, b, dtype):
    torch.testing.assert_close(a, b, **TOLERANCE[dtype])


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def properties():
    """Return the names of the tests that every method passes on every kind of site."""
    return [
        name for name, test in globals().items() if name.startswith("test_") and "site" in signature(test).parameters
    ]


def selected(test):
    """Return the pairs of a method and a kind of site on which a test runs in `make test`.

    Each method has its first kind. Each other kind has one method, the next one for the next test: so every test meets
    every method and every kind, and every method meets each of its kinds, as long as there are not fewer tests than
    methods.
    """
    turn, pairs = properties().index(test), {(name, sites[0]) for name, sites in KINDS.items()}
    for number, site in enumerate(SITES):
        names = [name for name, sites in KINDS.items() if site in sites[1:]]
        if names:
            pairs.add((names[(turn + number) % len(names)], site))
    return pairs


def pytest_generate_tests(metafunc):
    if metafunc.function.__name__ in properties():
        chosen = selected(metafunc.function.__name__)
        cases = [
            pytest.param(name, site, id=f"{name}-{site}", marks=[] if (name, site) in chosen else pytest.mark.full)
            for name, sites in KINDS.items()
            for site in sites
        ]
        metafunc.parametrize(("name", "site"), cases)


def test_the_selection_covers_all_pairs_of_test_method_and_kind():
    chosen = [(test, name, site) for test in properties() for name, site in selected(test)]
    pairs = {(name, site) for name, sites in KINDS.items() for site in sites}
    assert {(name, site) for _, name, site in chosen} == pairs
    assert {(test, name) for test, name, _ in chosen} == set(itertools.product(properties(), METHODS))
    assert {(test, site) for test, _, site in chosen} == set(itertools.product(properties(), SITES))
    assert len(chosen) <= len(properties()) * (len(METHODS) + len(SITES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_at_init_bit_for_bit(name, site, dtype):
    case = Case(name, site, dtype)
    assert torch.equal(case.graft(case.initial, case.x), case.model(case.x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factored_output_is_the_dense_meaning(name, site, dtype):
    case = Case(name, site, dtype)
    twin = copy.deepcopy(case.model)
    twin.load_state_dict(merge(case.graft, case.params))
    y = case.graft(case.params, case.x)
    assert y.dtype == dtype
    close(y, twin(case.x), dtype)
    close(case.graft.view(case.params)(case.x), y, dtype)
    assert not torch.allclose(y.double(), case.model(case.x).double(), atol=1e-2)


def test_model_is_what_it_was(name, site):
    case = Case(name, site)
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    objects = [id(x) for m in case.model.modules() for x in (m, *vars(m).values())]
    merge(case.graft, case.params)
    case.loss(optree.tree_map(lambda t: t.clone().requires_grad_(), case.params), case.x).backward()
    assert all(torch.equal(before[key], value) for key, value in case.model.state_dict().items())
    assert objects == [id(x) for m in case.model.modules() for x in (m, *vars(m).values())]
    assert all(p.requires_grad and p.grad is None for p in case.model.parameters())


def test_gradients_agree(name, site):
    case = Case(name, site)
    leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), case.params)
    expected = torch.autograd.grad(case.loss(leaves, case.x), optree.tree_leaves(leaves))
    value, grads = value_and_grad(case.loss)(case.params, case.x)
    close(value, case.loss(case.params, case.x), torch.float64)
    close(optree.tree_leaves(grads), list(expected), torch.float64)
    close(optree.tree_leaves(grad(case.loss)(case.params, case.x)), list(expected), torch.float64)


def test_vmap_is_a_loop(name, site):
    case = Case(name, site)
    many = stack(case.trees)
    expected = torch.stack([case.graft(tree, case.x) for tree in case.trees])
    close(vmap(case.graft, in_dims=(0, None))(many, case.x), expected, torch.float64)
    xs = torch.stack([case.x.roll(i, 0) for i in range(3)])
    expected = torch.stack([case.graft(tree, x) for tree, x in zip(case.trees, xs, strict=True)])
    close(vmap(case.graft)(many, xs), expected, torch.float64)


def test_vmap_of_grad_is_a_loop(name, site):
    case = Case(name, site)
    many = vmap(grad(case.loss), in_dims=(0, None))(stack(case.trees), case.x)
    for given, tree in zip(unstack(many), case.trees, strict=True):
        close(given, grad(case.loss)(tree, case.x), torch.float64)
    values, grads = vmap(value_and_grad(case.loss), in_dims=(0, None))(stack(case.trees), case.x)
    close(grads, many, torch.float64)
    assert values.shape == (3,)


def test_per_example_gradients(name, site):
    case = Case(name, site)
    grads = vmap(grad(lambda params, x: case.loss(params, x[None])), in_dims=(None, 0))(case.params, case.x)
    for given, x in zip(unstack(grads), case.x, strict=True):
        close(given, grad(case.loss)(case.params, x[None]), torch.float64)


def test_jvp_agrees_with_the_gradient(name, site):
    case = Case(name, site)
    tangent = case.random(7)
    _, given = jvp(lambda params: case.loss(params, case.x), (case.params,), (tangent,))
    grads = grad(case.loss)(case.params, case.x)
    expected = sum((g * t).sum() for g, t in zip(*map(optree.tree_leaves, (grads, tangent)), strict=True))
    close(given, expected, torch.float64)


def test_gradients_of_gradients(name, site):
    case = Case(name, site)
    leaves, treedef = optree.tree_flatten(case.params)
    x = case.x[:2]

    def f(*leaves):
        return case.graft(optree.tree_unflatten(treedef, leaves), x).sum((0,))

    def dense(*leaves):
        state = merge(case.graft, optree.tree_unflatten(treedef, leaves))
        return torch.func.functional_call(case.model, state, (x,)).sum((0,))

    check_second_order(name, f, leaves, dense)


def check_second_order(name, f, leaves, oracle):
    """Gradients of gradients against differences, or an oracle's where a part is detached."""
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    if name not in DETACHED:
        assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)
        return
    results = []
    for function in (f, oracle):
        torch.manual_seed(0)
        y = function(*leaves)
        first = torch.autograd.grad((y * torch.randn(y.shape).to(y)).sum(), leaves, create_graph=True)
        along = sum((g * torch.randn(g.shape).to(g)).sum() for g in first)
        results.append([*first, *torch.autograd.grad(along, leaves, materialize_grads=True)])
    close(*results, torch.float64)


def test_leaves_from_another_network_get_gradients(name, site):
    case = Case(name, site)
    leaves, treedef = optree.tree_flatten(case.params)
    sizes = [leaf.numel() for leaf in leaves]
    network = nn.Linear(3, sum(sizes)).double()
    emitted = network(torch.ones(3, dtype=torch.float64)).split(sizes)
    emitted = [e.view(leaf.shape) * 0.1 + leaf for e, leaf in zip(emitted, leaves, strict=True)]
    case.loss(optree.tree_unflatten(treedef, emitted), case.x).backward()
    assert network.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_compiles_whole_and_once(name, site):
    case = Case(name, site, torch.float32)
    torch._dynamo.reset()
    f = torch.compile(lambda params, x: case.loss(params, x), fullgraph=True, backend="aot_eager")
    close(f(case.trees[0], case.x), case.loss(case.trees[0], case.x), torch.float32)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tree in case.trees[1:]:
            close(f(tree, case.x), case.loss(tree, case.x), torch.float32)


def test_init_is_deterministic_and_has_the_shapes_it_says(name, site):
    case = Case(name, site)
    again = case.graft.init(torch.Generator().manual_seed(0))
    assert optree.tree_all(optree.tree_map(torch.equal, again, case.initial))
    for path, leaves in case.initial.items():
        expected = case.config.method.shapes(case.config, case.graft.sites[""][path])
        assert {leaf: tuple(t.shape) for leaf, t in leaves.items()} == expected
        assert all(type(t) is torch.Tensor and t.dtype == torch.float64 for t in leaves.values())
    half = bind(copy.deepcopy(case.model).bfloat16(), case.config).init()
    assert {t.dtype for t in optree.tree_leaves(half)} == {torch.float32}


def test_leaf_order_is_the_same_everywhere(name, site):
    case = Case(name, site)
    assert [id(t) for t in optree.tree_leaves(case.params)] == [id(t) for t in pytree.tree_leaves(case.params)]
    assert [id(t) for t in optree.tree_leaves(case.initial)] == [id(t) for t in pytree.tree_leaves(case.initial)]


def test_safetensors_and_back(name, site, tmp_path):
    case = Case(name, site)
    paths, leaves, treedef = optree.tree_flatten_with_path(case.params)
    save_file({".".join(path): leaf for path, leaf in zip(paths, leaves, strict=True)}, tmp_path / "a.safetensors")
    loaded = load_file(tmp_path / "a.safetensors")
    tree = optree.tree_unflatten(treedef, [loaded[".".join(path)] for path in paths])
    assert optree.tree_all(optree.tree_map(torch.equal, tree, case.params))
    close(case.graft(tree, case.x), case.graft(case.params, case.x), torch.float64)


def test_base_as_data(name, site):
    case = Case(name, site)
    base = {key: torch.randn_like(value) for key, value in case.model.named_parameters()}
    twin = copy.deepcopy(case.model)
    twin.load_state_dict(base)
    again = Graft(twin, case.graft.binding)  # constants made from the weights are those of the model that was bound
    expected = again(case.params, case.x)
    close(functional_call(case.graft, (base, case.params), (case.x,)), expected, torch.float64)
    bases = stack([base, {key: 2 * value for key, value in base.items()}])
    both = vmap(lambda b: functional_call(case.graft, (b, case.params), (case.x,)))(bases)
    close(both[0], expected, torch.float64)
    grads = grad(lambda b: functional_call(case.graft, (b, case.params), (case.x,)).square().sum())(base)
    assert all(g.abs().sum() > 0 for g in grads.values())


# -- routed rows: each row of a batch with its own adapter, -1 for the base ------------------------------------------

ROWS = {
    "mixed": lambda n: [2, -1, 0, 0, 1, 2, -1][:n],
    "no base": lambda n: [2, 0, 0, 2, 1, 2, 1][:n],
    "one adapter": lambda n: [1] * n,
    "base alone": lambda n: [-1] * n,
}


def looped(case, trees, x, rows):
    """The oracle: one plain call for each row."""
    outputs = [case.graft(trees[i], x) if i >= 0 else case.model(x) for i in rows]
    return torch.stack([y[row] for row, y in enumerate(outputs)])


@pytest.mark.parametrize("kind", ROWS)
def test_routed_rows_are_a_loop(name, site, kind):
    case = Case(name, site)
    rows = ROWS[kind](len(case.x))
    leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), stack(case.trees))
    y = case.graft(route(leaves, torch.tensor(rows)), case.x)
    expected = looped(case, unstack(leaves), case.x, rows)
    close(y, expected, torch.float64)
    seed = torch.randn_like(y)
    flat = optree.tree_leaves(leaves)
    expected_grads = [torch.zeros_like(leaf) for leaf in flat]
    if kind != "base alone":
        expected_grads = list(torch.autograd.grad((expected * seed).sum(), flat, materialize_grads=True))
    close(list(torch.autograd.grad((y * seed).sum(), flat)), expected_grads, torch.float64)

    def loss(many):
        return (case.graft(route(many, torch.tensor(rows)), case.x) * seed).sum()

    close(optree.tree_leaves(grad(loss)(stack(case.trees))), expected_grads, torch.float64)
    close(case.graft.view(route(leaves, torch.tensor(rows)))(case.x), y, torch.float64)


def test_equal_parts_are_a_loop(name, site):
    case = Case(name, site)
    x = torch.cat([case.x, case.x.roll(1, 0), case.x])
    rows = [row // len(case.x) for row in range(len(x))]
    expected = looped(case, case.trees, x, rows)
    close(case.graft(route(stack(case.trees), torch.tensor(rows)), x), expected, torch.float64)
    close(case.graft(route(stack(case.trees), batch_dim=0), x), expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_an_adapter_are_the_bases_bit_for_bit(name, site, dtype):
    case = Case(name, site, dtype)
    rows = torch.tensor(ROWS["mixed"](len(case.x)))
    y = case.graft(route(stack(case.trees), rows), case.x)
    assert y.dtype == dtype
    assert torch.equal(y[rows < 0], case.model(case.x)[rows < 0])
    for row in (rows >= 0).nonzero().flatten().tolist():
        close(y[row], case.graft(case.trees[rows[row]], case.x)[row], dtype)


@pytest.mark.slow
def test_routed_calls_compile_whole_and_once(name, site):
    case = Case(name, site, torch.float32)
    torch._dynamo.reset()
    many, size = stack(case.trees), len(case.x)

    def loss(many, rows, x):
        return case.graft(route(many, rows, batch_dim=0), x).square().flatten(1).mean(1)

    f = torch.compile(loss, fullgraph=True, backend="aot_eager")
    f(many, torch.tensor(ROWS["mixed"](size)), case.x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for kind in ROWS:
            rows = torch.tensor(ROWS[kind](size))
            close(f(many, rows, case.x), loss(many, rows, case.x), torch.float32)


def test_routed_rows_under_vmap_and_second_order(name, site):
    case = Case(name, site)
    many, size = stack(case.trees), len(case.x)
    rows = torch.tensor([ROWS["mixed"](size), ROWS["no base"](size)])
    given = vmap(lambda r: case.graft(route(many, r, batch_dim=0), case.x))(rows)
    close(given, torch.stack([looped(case, case.trees, case.x, r) for r in rows.tolist()]), torch.float64)
    leaves, treedef = optree.tree_flatten(many)

    def f(*leaves):
        return case.graft(route(optree.tree_unflatten(treedef, leaves), rows[0]), case.x).sum((0,))

    def loop(*leaves):
        trees = unstack(optree.tree_unflatten(treedef, leaves))
        return looped(case, trees, case.x, rows[0].tolist()).sum((0,))

    check_second_order(name, f, leaves, loop)
