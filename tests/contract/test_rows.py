"""Rows of a batch with adapters of their own, stacks of different configs, and methods beside others."""

import optree
import pytest
import torch
from torch.func import grad, vmap

from torchgraft.adapters import IA3Config, LoraConfig
from torchgraft.functional import Unsupported, bind, merge, route, stack, unstack

from .cases import case, changed, close, moved, same, second_order
from .sites import kind, on

ROWS = {
    "mixed": lambda n: [2, -1, 0, 0, 1, 2, -1][:n],
    "no base": lambda n: [2, 0, 0, 2, 1, 2, 1][:n],
    "one adapter": lambda n: [1] * n,
    "base alone": lambda n: [-1] * n,
}


def looped(one, trees, x, rows):
    """Return the outputs of one plain call for each row."""
    outputs = [one.graft(trees[i], x) if i >= 0 else one.model(x) for i in rows]
    return torch.stack([y[row] for row, y in enumerate(outputs)])


@pytest.mark.parametrize("kind", ROWS)
def test_routed_rows_are_a_loop(name, site, kind):
    one = case(name, site)
    rows = ROWS[kind](len(one.x))
    leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), stack(one.trees))
    y = one.graft(route(leaves, torch.tensor(rows)), one.x)
    expected = looped(one, unstack(leaves), one.x, rows)
    close(y, expected)
    seed = torch.randn_like(y)
    flat = optree.tree_leaves(leaves)
    expected_grads = [torch.zeros_like(leaf) for leaf in flat]
    if kind != "base alone":
        expected_grads = list(torch.autograd.grad((expected * seed).sum(), flat, materialize_grads=True))
    if y.requires_grad or kind != "base alone":  # modules of bare parameters run without any leaf then
        close(list(torch.autograd.grad((y * seed).sum(), flat)), expected_grads)

    def loss(many):
        return (one.graft(route(many, torch.tensor(rows)), one.x) * seed).sum()

    close(optree.tree_leaves(grad(loss)(stack(one.trees))), expected_grads)
    close(one.graft.view(route(leaves, torch.tensor(rows)))(one.x), y)


def test_routed_tokens_are_a_loop(name, site):
    one = case(name, site)
    many, generator = stack(one.trees), torch.Generator().manual_seed(4)
    rows = torch.randint(-1, 3, (3, 5), generator=generator)
    if kind(site) not in ("linear", "embedding"):
        with pytest.raises(Unsupported, match="does not work token by token"):
            one.graft(route(many, rows), one.x)
        return
    x = torch.randint(7, (3, 5), generator=generator)
    x = x if kind(site) == "embedding" else torch.randn(3, 5, 4, generator=generator, dtype=one.dtype)
    outputs = torch.stack([*(one.graft(tree, x) for tree in one.trees), one.model(x)])
    y = one.graft(route(many, rows), x)
    close(y, outputs[rows, torch.arange(3)[:, None], torch.arange(5)])
    assert torch.equal(y[rows < 0], outputs[-1][rows < 0])


def test_equal_parts_are_a_loop(name, site):
    one = case(name, site)
    x = torch.cat([one.x, one.x.roll(1, 0), one.x])
    rows = [row // len(one.x) for row in range(len(x))]
    expected = looped(one, one.trees, x, rows)
    close(one.graft(route(stack(one.trees), torch.tensor(rows)), x), expected)
    close(one.graft(one.route(stack(one.trees), None), x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_an_adapter_are_the_bases_bit_for_bit(name, site, dtype):
    one = case(name, site, dtype)
    rows = torch.tensor(ROWS["mixed"](len(one.x)))
    y = one.graft(route(stack(one.trees), rows), one.x)
    assert y.dtype == dtype
    assert torch.equal(y[rows < 0], one.model(one.x)[rows < 0])
    for row in (rows >= 0).nonzero().flatten().tolist():
        close(y[row], one.graft(one.trees[rows[row]], one.x)[row], dtype)


@pytest.mark.slow
def test_routed_calls_compile_whole_and_once(name, site):
    one = case(name, site, torch.float32)
    torch._dynamo.reset()
    many, size = stack(one.trees), len(one.x)

    def loss(many, rows, x):
        return one.graft(one.route(many, rows), x).square().flatten(1).mean(1)

    f = torch.compile(loss, fullgraph=True, backend="aot_eager")
    f(many, torch.tensor(ROWS["mixed"](size)), one.x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for kind in ROWS:
            rows = torch.tensor(ROWS[kind](size))
            close(f(many, rows, one.x), loss(many, rows, one.x), torch.float32)


def test_routed_rows_under_vmap_and_second_order(name, site):
    one = case(name, site)
    many, size = stack(one.trees), len(one.x)
    rows = torch.tensor([ROWS["mixed"](size), ROWS["no base"](size)])
    given = vmap(lambda r: one.graft(one.route(many, r), one.x))(rows)
    close(given, torch.stack([looped(one, one.trees, one.x, r) for r in rows.tolist()]))
    leaves, treedef = optree.tree_flatten(many)

    def f(*leaves):
        return one.graft(route(optree.tree_unflatten(treedef, leaves), rows[0]), one.x).sum((0,))

    def loop(*leaves):
        trees = unstack(optree.tree_unflatten(treedef, leaves))
        return looped(one, trees, one.x, rows[0].tolist()).sum((0,))

    close(second_order(f, leaves), second_order(loop, leaves))


# -- stacks whose adapters have configs of their own -----------------------------------------------------------------


def test_a_stack_of_different_configs_is_each_alone(name, site):
    one = case(name, site)
    members = [one.config, one.other]
    graft = bind(one.model, members)
    trees = [moved(graft.member(i).init(torch.Generator().manual_seed(i)), i) for i in range(2)]
    many = graft.stack(trees)
    assert all(map(same, graft.unstack(many), trees))
    expected = [one.oracle(tree, one.x, config) for tree, config in zip(trees, members, strict=True)]
    rows = [row % 3 - 1 for row in range(len(one.x))]
    outputs = [*expected, one.model(one.x)]  # the last for -1
    looped = torch.stack([outputs[i][row] for row, i in enumerate(rows)])
    close(graft(route(many, torch.tensor(rows)), one.x), looped)
    alone = torch.vmap(lambda i, params: graft.at(i)(params, one.x))(torch.arange(2), many)
    close(alone, torch.stack(expected))
    seed = torch.randn_like(looped)

    def loss_alone(tree, i):
        mine = torch.tensor(rows) == i
        return (graft.member(i)(tree, one.x)[mine] * seed[mine]).sum()

    own = graft.stack([grad(loss_alone)(tree, i) for i, tree in enumerate(trees)])  # none where there is padding
    given = grad(lambda many: (graft(route(many, torch.tensor(rows)), one.x) * seed).sum())(many)
    close(optree.tree_leaves(given), optree.tree_leaves(own))


def test_a_stack_refuses_configs_that_differ_in_what_one_call_cannot(name):
    one = case(name, "linear")
    with pytest.raises(ValueError, match=next(iter(one.row.apart))):
        bind(one.model, [one.config, changed(one.config, one.row.apart)])


# -- beside others ---------------------------------------------------------------------------------------------------


def beside(one, site):
    """Return a graft with the method beside another on the same layers, with parameters of both."""
    linear, targets = site.startswith("linear"), {"target_modules": ["first", "second"]}
    other = IA3Config(feedforward_modules=[], **targets) if linear else on(LoraConfig(r=1, **targets), site)
    graft = bind(one.model, {"own": one.config, "other": other})
    return graft, {"own": one.params, "other": moved(graft.init()["other"], 5)}


def test_named_beside_others(name, site):
    one = case(name, site)
    graft, params = beside(one, site)
    assert torch.equal(graft({}, one.x), one.model(one.x))
    close(graft({"own": params["own"]}, one.x), one.oracle(params["own"], one.x))
    y, alone = graft(params, one.x), graft({"other": params["other"]}, one.x)
    close(torch.func.functional_call(one.model, merge(graft, params), (one.x,)), y)
    close(graft.view(params)(one.x), y)
    assert not torch.allclose(y, alone, atol=1e-2)
    close(graft({**params, "own": one.initial}, one.x), alone)


def test_rows_of_a_named_stack_beside_others(name, site):
    one = case(name, site)
    graft, params = beside(one, site)
    rows = ROWS["mixed"](len(one.x))
    routed = {**params, "own": route(stack(one.trees), torch.tensor(rows))}
    each = [graft({**params, "own": one.trees[i]} if i >= 0 else {"other": params["other"]}, one.x) for i in rows]
    close(graft(routed, one.x), torch.stack([y[row] for row, y in enumerate(each)]))
