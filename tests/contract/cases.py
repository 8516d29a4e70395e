"""A method on a model of one kind of site, and which pairs of the two a test runs on in `make test`."""

import ast
import copy
import dataclasses
import functools
from pathlib import Path

import optree
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from torchgraft.functional import bind, route

from .methods import METHODS, Where
from .sites import SITES, kind, leaves_of_expert, on, stored

TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.05},
}


KINDS = {
    name: [site for site in SITES if kind(site) in (row.sites or row.config.method.kinds)]
    for name, row in METHODS.items()
}
"""The sites of each method."""


class Case:
    """A method on two sites of a kind, with parameters away from the initial ones, where nothing vanishes."""

    def __init__(self, name, site, dtype):
        self.row, self.dtype, self.batch_dim = METHODS[name], dtype, SITES[site].batch_dim
        self.config, self.other = on(self.row.config, site), on(self.row.other, site)
        shape = SITES[site].shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = SITES[site].build()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.5)
            self.model = model.to(dtype).train(not self.row.evaluated)
            self.x = torch.arange(7).view(7, 1) if shape is None else torch.randn(shape, dtype=dtype)
        # In place the base is frozen, and which kernel torch takes depends on that.
        self.frozen = copy.deepcopy(self.model).requires_grad_(False)
        self.exact = copy.deepcopy(self.model).double()
        self.graft = bind(self.model, self.config)
        self.initial = self.graft.init(torch.Generator().manual_seed(0))
        self.trees = [moved(self.initial, seed) for seed in range(3)]
        self.params = self.trees[0]

    def loss(self, params, x):
        return self.graft(params, x).square().mean()

    def route(self, many, rows):
        """Return a stack routed by rows, of which it is declared where they are."""
        return route(many, rows, batch_dim=self.batch_dim)

    def dense(self, tree, config=None):
        """Return the state dict, in float64, that the row's formula makes of a tree; differentiable."""
        state = {name: tensor.detach() for name, tensor in self.exact.state_dict().items()}
        places = {path: stored(self.model, path) for path in self.graft.sites[""]}
        weights = {path: place.read(state) for path, place in places.items()}
        sizes = {path: tuple(weight.shape[:2]) for path, weight in weights.items()}
        for path, site in self.graft.sites[""].items():
            place = places[path]
            where = Where(path, place.layer, self.dtype, sizes)
            shared = {leaf: tree["*"][under] for leaf, under in site.shared.items()}
            leaves = {leaf: tensor.double() for leaf, tensor in (tree.get(path, {}) | shared).items()}
            of = functools.partial(self.row.formula, config or self.config, where)
            if place.experts:
                count = len(weights[path])
                each = [leaves_of_expert(leaves, expert, count) for expert in range(count)]
                weight = torch.stack([of(own, w, None)[0] for own, w in zip(each, weights[path], strict=True)])
                bias = None
            else:
                weight, bias = of(leaves, weights[path], state.get(place.bias))
            place.write(state, weight)
            if bias is not None:
                state[place.bias] = bias
        return state

    def oracle(self, tree, x, config=None):
        """Return the output, in float64, of the model whose weights the row's formula has changed."""
        x = x.double() if x.is_floating_point() else x
        if self.row.output is not None:
            return self.changed_outputs(tree, x, config)
        return torch.func.functional_call(self.exact, self.dense(tree, config), (x,), tie_weights=False)

    def changed_outputs(self, tree, x, config=None):
        """Return the output, in float64, of the model whose layers' outputs the row's function has changed."""
        handles = []
        for path in self.graft.sites[""]:
            layer = self.exact.get_submodule(path)
            shared = {leaf: tree["*"][name] for leaf, name in self.graft.sites[""][path].shared.items()}
            leaves = {leaf: tensor.double() for leaf, tensor in (tree[path] | shared).items()}
            where, axis = Where(path, type(layer), self.dtype, {}), 1 if isinstance(layer, _ConvNd) else -1

            def change(layer, inputs, y, where=where, leaves=leaves, axis=axis):
                x, y = inputs[0].movedim(axis, -1), y.movedim(axis, -1)
                return self.row.output(config or self.config, where, leaves, x, y).movedim(-1, axis)

            handles.append(layer.register_forward_hook(change))
        state = {name: tensor.detach() for name, tensor in self.exact.state_dict().items()}
        try:
            return torch.func.functional_call(self.exact, state, (x,), tie_weights=False)
        finally:
            for handle in handles:
                handle.remove()


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

    Each method has its first kind. Each other kind has one method, the next one for the next test, or as many as it
    takes where there are more methods than tests: so every test meets every method and every kind, and every method
    meets each of its kinds.
    """
    turn, pairs = promises().index(test), {(name, sites[0]) for name, sites in KINDS.items()}
    for number, site in enumerate(SITES):
        names = [name for name, sites in KINDS.items() if site in sites[1:]]
        for more in range(0, len(names), len(promises())):
            pairs.add((names[(turn + number + more) % len(names)], site))
    return pairs


def exemptions(name, site):
    """Return what a method, and what a kind of site, is exempt from."""
    own = [exempt for exempt in METHODS[name].exempt if not exempt.sites or site in exempt.sites]
    return [*own, *(SITES[site].exempt if site else ())]
