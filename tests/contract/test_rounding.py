"""What every method rounds in half precision: once, at one place, whatever the way it is called.

The base is in bfloat16 or float16, the adapter's leaves are in float32, as `init` makes them. The base's own output is
rounded by its kernel. What the adapter does to it is computed in float32, and one rounding of that is the output:

    "sum"        y = round(base(x) + (W' - W) x + (b' - b))
    "product"    y = round(G base(x)),     G what the formula makes of the identity
    "input"      y = base(round(R x)),     R likewise; of an embedding, which has no input, it is a product
    "input, then s"  y = round(s (base(round(R x)) - b) + b),    s a leaf without which R is made

Where a base gets an input that `vmap` batches, torch runs another kernel, which also rounds before it adds the bias. So
under `vmap` and for rows `"input"` allows for one unit in the last place of the largest output.

A merged weight is one rounding of the formula's. Of several adapters each has a rounding of its own, for each is a
layer around the ones before it. Float32's own error is allowed for: results have to lie between the roundings of what
is that much smaller and larger, so nearly all are compared bit for bit.
"""

import copy
import functools

import optree
import pytest
import torch
from torch import nn
from torch.func import vmap

from torchgraft.adapters import inject_adapter_in_model
from torchgraft.functional import bind, merge, route, stack

from .cases import KINDS, Case, case, moved
from .methods import Where
from .sites import kind, stored

HALF = (torch.bfloat16, torch.float16)
ERROR = 2.0**-17
"""Float32's error, of sums of some terms, as a part of what is summed."""


class Apart(nn.Module):
    """Both layers of a model side by side, so that neither sees what the other rounded."""

    def __init__(self, model):
        super().__init__()
        self.first, self.second = model.first, model.second

    def forward(self, x, z):
        return self.first(x), self.second(z)


class HalfCase:
    """A method on two layers in half precision, with leaves in float32."""

    def __init__(self, name, site, dtype):
        one = Case(name, site, dtype)
        self.row, self.config, self.dtype, self.model = one.row, one.config, dtype, Apart(one.model)
        self.graft = bind(self.model, one.config)
        initial = self.graft.init(torch.Generator().manual_seed(0))
        assert {leaf.dtype for leaf in optree.tree_leaves(initial)} == {torch.float32}
        self.trees = [moved(initial, seed) for seed in range(3)]
        self.places = {path: stored(self.model, path) for path in ("first", "second")}
        self.state = {name: tensor.double() for name, tensor in self.model.state_dict().items()}
        self.sizes = {path: tuple(place.read(self.state).shape) for path, place in self.places.items()}
        generator = torch.Generator().manual_seed(1)
        self.inputs = [
            torch.arange(7) if kind(site) == "embedding" else torch.randn(24, size, generator=generator).to(dtype)
            for _, size in self.sizes.values()
        ]
        self.base = self.model(*self.inputs)

    def exact(self, tree, path, x, y, batched):
        """Return bounds on an output, between which the rounding of the exact one lies."""
        place, layer = self.places[path], getattr(self.model, path)
        if not tree or path not in self.graft.sites[""]:
            return y, y
        shared = {leaf: tree["*"][name] for leaf, name in self.graft.sites[""][path].shared.items()}
        leaves = {leaf: tensor.double() for leaf, tensor in (tree.get(path, {}) | shared).items()}
        formula = functools.partial(self.row.formula, self.config, Where(path, place.layer, self.dtype, self.sizes))
        weight, bias = place.read(self.state), self.state.get(place.bias)
        rounds = self.row.rounds[path] if isinstance(self.row.rounds, dict) else self.row.rounds
        lookup = isinstance(layer, nn.Embedding)
        given = nn.functional.one_hot(x, weight.shape[1]).double() if lookup else x.double()
        y = y.double()
        if self.row.output is not None:
            where = Where(path, place.layer, self.dtype, self.sizes)
            return self.rounded(self.row.output(self.config, where, leaves, x.double(), y), y.abs().max())
        if callable(rounds):
            where = Where(path, place.layer, self.dtype, self.sizes)
            return self.rounded(rounds(self.config, where, leaves, weight, bias, given, y), y.abs().max())
        if rounds == "sum":
            changed, shifted = formula(leaves, weight, bias)
            added = given @ (changed - weight).mT + (0 if bias is None else shifted - bias)
            return self.rounded(y + added, y.abs().max() + added.abs().max())
        if rounds == "product" or lookup:
            factor, _ = formula(leaves, torch.eye(len(weight), dtype=torch.float64), None)
            return self.rounded(y @ factor.mT, y.abs().max())
        scale = leaves.pop(rounds.removeprefix("input, then ")).flatten() if rounds != "input" else None
        factor, _ = formula(leaves, torch.eye(weight.shape[1], dtype=torch.float64), None)
        low, high = self.rounded(given @ factor.mT, given.abs().max())
        y = layer(low).double()
        slack = (high.double() - low.double()) @ weight.abs().mT  # of what float32's error may round otherwise
        slack = torch.where((slack > 0) | batched, 2 * slack + y.abs().max() * torch.finfo(self.dtype).eps, 0)
        if scale is not None:
            exact, slack = (
                scale * (y - (0 if bias is None else bias)) + (0 if bias is None else bias),
                scale.abs() * slack,
            )
            return tuple(self.rounded(exact + side * slack, y.abs().max())[place] for place, side in enumerate((-1, 1)))
        return (y - slack).to(self.dtype), (y + slack).to(self.dtype)

    def rounded(self, exact, scale):
        return (exact - ERROR * scale).to(self.dtype), (exact + ERROR * scale).to(self.dtype)

    def check(self, tree, outputs, rows=slice(None), batched=False):
        """Assert that outputs, of some rows, are what a tree makes of the inputs' rows, rounded once."""
        for path, x, base, y in zip(self.places, self.inputs, self.base, outputs, strict=True):
            low, high = self.exact(tree, path, x, base, batched)
            assert y.dtype == self.dtype
            assert ((low[rows] <= y[rows]) & (y[rows] <= high[rows])).all(), path


@functools.lru_cache(maxsize=2)
def halves(name, dtype):
    """Return a method on each kind of layer whose features are on the last axis."""
    sites = [site for site in KINDS[name] if kind(site) in ("linear", "embedding") and site != "linear (tied)"]
    return [HalfCase(name, site, dtype) for site in sites]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_outputs_are_rounded_once(name, dtype):
    for one in halves(name, dtype):
        tree, leaves = one.trees[0], optree.tree_map(lambda t: t.clone().requires_grad_(), one.trees[0])
        one.check(tree, one.graft(tree, *one.inputs))
        one.check(tree, one.graft(leaves, *one.inputs))
        one.check(tree, one.graft.view(tree)(*one.inputs))
        injected = inject_adapter_in_model(one.config, copy.deepcopy(one.model), params=tree)
        one.check(tree, injected(*one.inputs))
        many = vmap(one.graft, in_dims=(0, None, None))(stack(one.trees), *one.inputs)
        for i, tree in enumerate(one.trees):
            one.check(tree, [y[i] for y in many], batched=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rows", [[2, -1, 0, 0, 1, 2, -1], [0, 0, 1, 1, 2, 2], [1]], ids=str)
def test_outputs_of_rows_are_rounded_once(name, dtype, rows):
    for one in halves(name, dtype):
        count = len(one.inputs[0])
        each = sorted(rows * count)[:: len(rows)] if rows == sorted(rows) else (rows * count)[:count]
        each = torch.tensor(each)
        outputs = one.graft(route(stack(one.trees), each, batch_dim=0), *one.inputs)
        for i, tree in enumerate(one.trees):
            one.check(tree, outputs, each == i, batched=True)
        one.check({}, outputs, each < 0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_merged_weights_are_rounded_once(name, site, dtype):
    one = case(name, site, dtype)
    state, expected = merge(one.graft, one.params), one.dense(one.params)
    for key, given in state.items():
        slack = ERROR * expected[key].abs().max()
        low, high = ((expected[key] + side * slack).to(dtype) for side in (-1, 1))
        assert given.dtype == dtype and ((low <= given) & (given <= high)).all(), key
