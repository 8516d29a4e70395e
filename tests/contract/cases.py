"""Models of each kind of site, a method on one of them, and which pairs of the two a test runs on in `make test`."""

import ast
import copy
import dataclasses
import functools
from pathlib import Path

import optree
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from torchgraft.functional import bind

from .methods import METHODS, Where

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


def kind(site):
    """Return the kind of layer that a site is, without what is special about it."""
    return site.split(" ")[0]


KINDS = {
    name: [site for site in SITES if kind(site) in (row.sites or row.config.method.kinds)]
    for name, row in METHODS.items()
}
"""The sites of each method."""


class Case:
    """A method on two layers of a kind, with parameters away from the initial ones, where nothing vanishes."""

    def __init__(self, name, site, dtype):
        self.row, self.config, self.dtype = METHODS[name], METHODS[name].config, dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model, shape = SITES[site]()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.5)
            self.model = model.to(dtype)
            self.x = torch.arange(7).view(7, 1) if shape is None else torch.randn(shape, dtype=dtype)
        self.exact = copy.deepcopy(self.model).double()
        self.graft = bind(self.model, self.config)
        self.initial = self.graft.init(torch.Generator().manual_seed(0))
        self.trees = [moved(self.initial, seed) for seed in range(3)]
        self.params = self.trees[0]

    def loss(self, params, x):
        return self.graft(params, x).square().mean()

    def dense(self, tree, config=None):
        """Return the state dict, in float64, that the row's formula makes of a tree; differentiable."""
        state = {name: tensor.detach() for name, tensor in self.exact.state_dict().items()}
        layers = {path: (getattr(self.model, path), f"{path}.weight", f"{path}.bias") for path in ("first", "second")}
        turned = {path for path, (layer, *_) in layers.items() if isinstance(layer, (Conv1D, nn.Embedding))}
        weights = {path: state[name].mT if path in turned else state[name] for path, (_, name, _) in layers.items()}
        sizes = {path: tuple(weight.shape[:2]) for path, weight in weights.items()}
        for path, site in self.graft.binding.sites[""].items():
            layer, name, bias = layers[path]
            where = Where(path, type(layer), self.dtype, sizes)
            shared = {leaf: tree["*"][under] for leaf, under in site.shared.items()}
            leaves = {leaf: tensor.double() for leaf, tensor in (tree.get(path, {}) | shared).items()}
            weight, adapted = self.row.formula(config or self.config, where, leaves, weights[path], state.get(bias))
            state[name] = weight.mT if path in turned else weight
            if adapted is not None:
                state[bias] = adapted
        return state

    def oracle(self, tree, x, config=None):
        """Return the output, in float64, of the model whose weights the row's formula has changed."""
        x = x.double() if x.is_floating_point() else x
        return torch.func.functional_call(self.exact, self.dense(tree, config), (x,))


@functools.lru_cache(maxsize=64)
def case(name, site, dtype=torch.float64):
    """Return a case that tests share; they change nothing in it."""
    return Case(name, site, dtype)


def moved(tree, seed):
    """Return a tree with noise added."""
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype), tree)


def changed(config, fields):
    """Return a config with other fields."""
    return dataclasses.replace(config, **fields)


def close(a, b, dtype=torch.float64):
    torch.testing.assert_close(a, b, **TOLERANCE[dtype])


def same(a, b):
    """Return whether two trees are equal bit for bit."""
    return optree.tree_structure(a) == optree.tree_structure(b) and optree.tree_all(optree.tree_map(torch.equal, a, b))


def second_order(f, leaves):
    """Return gradients of a random sum of outputs, and gradients of a random sum of those."""
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    y = f(*leaves)
    torch.manual_seed(0)
    first = torch.autograd.grad((y * torch.randn(y.shape).to(y)).sum(), leaves, create_graph=True)
    along = sum((g * torch.randn(g.shape).to(g)).sum() for g in first)
    return [*first, *torch.autograd.grad(along, leaves, materialize_grads=True)]


@functools.cache
def promises():
    """Return the names of the tests that every method passes on every kind of site, whichever files are run."""
    found = []
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        tests = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
        found += [test.name for test in tests if {"name", "site"} <= {argument.arg for argument in test.args.args}]
    return found


def selected(test):
    """Return the pairs of a method and a kind of site on which a test runs in `make test`.

    Each method has its first kind. Each other kind has one method, the next one for the next test: so every test meets
    every method and every kind, and every method meets each of its kinds, as long as there are not fewer tests than
    methods.
    """
    turn, pairs = promises().index(test), {(name, sites[0]) for name, sites in KINDS.items()}
    for number, site in enumerate(SITES):
        names = [name for name, sites in KINDS.items() if site in sites[1:]]
        if names:
            pairs.add((names[(turn + number) % len(names)], site))
    return pairs
