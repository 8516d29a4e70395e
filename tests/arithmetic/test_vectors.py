"""Angles, differences, projections and soups of adapters, against dense algebra in float64."""

import pytest
import torch
from torch import nn

from torchgraft.adapters import (
    LoraConfig,
    combine,
    cosine,
    difference,
    gram,
    greedy_soup,
    interpolate,
    negate,
    project_out,
    soup,
    subspace_similarity,
)

from .oracle import Layers, adapter, assert_same, changes, lora, weighted


@pytest.fixture
def base():
    return Layers().double()


@pytest.fixture
def adapters(base):
    return [
        adapter(base, lora(r=2, lora_alpha=5, rank_pattern={"up": 4}), 0),
        adapter(base, lora(r=3, use_rslora=True), 1),
        adapter(base, lora(r=1, target_modules=["up", "grid"]), 2),
    ]


def flat(base, one):
    return torch.cat([change.flatten() for change in changes(base, one).values()])


def test_differences_negations_and_points_between(base, adapters):
    one, two, _ = adapters
    assert_same(changes(base, difference(one, two)), weighted(base, [one, two], [1, -1]))
    assert_same(changes(base, negate(one)), weighted(base, [one], [-1]))
    for share in (0.0, 0.3, 1.0, 1.5):
        assert_same(changes(base, interpolate(one, two, share)), weighted(base, [one, two], [1 - share, share]))
    assert_same(changes(base, soup(adapters)), weighted(base, adapters, [1 / 3] * 3))


def test_task_arithmetic_undoes_itself(base, adapters):
    one, two, three = adapters
    moved = combine([one, two, three], [1.0, 1.0, -1.0])
    assert_same(changes(base, combine([moved, two, three], [1.0, -1.0, 1.0])), changes(base, one))


def test_inner_products_are_those_of_the_changes(base, adapters):
    vectors = [flat(base, one) for one in adapters]
    expected = torch.stack(vectors) @ torch.stack(vectors).T
    torch.testing.assert_close(torch.stack([*gram(adapters).values()]).sum(0), expected)
    one, two = changes(base, adapters[0])["down.weight"], changes(base, adapters[1])["down.weight"]
    angle = cosine(adapters[0], adapters[1])
    torch.testing.assert_close(angle["down"], (one * two).sum() / (one.norm() * two.norm()))
    torch.testing.assert_close(angle["*"], torch.nn.functional.cosine_similarity(vectors[0], vectors[1], 0))
    assert gram(adapters)["down"][2].eq(0).all() and cosine(adapters[0], adapters[2])["down"] == 0


def test_inner_products_are_differentiable(base, adapters):
    config, tree = adapters[0]
    a = tree["up"]["lora_A"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a: gram([(config, {"up": {**tree["up"], "lora_A": a}}), adapters[1]])["up"], a
    )


@pytest.mark.parametrize("by_module", [True, False])
def test_what_is_left_is_at_right_angles(base, adapters, by_module):
    one, two, three = adapters
    rest = project_out(one, [two, three, two], by_module=by_module)  # one of them twice
    inner = gram([rest, two, three])
    products = torch.stack([*inner.values()])[:, 0, 1:]
    products = products if by_module else products.sum(0)
    torch.testing.assert_close(products, torch.zeros_like(products), atol=1e-7, rtol=0)
    taken = flat(base, one) - flat(base, rest)
    assert abs(taken @ flat(base, rest)) < 1e-7 and taken.norm() > 0.1


@pytest.mark.parametrize("side", ["input", "output"])
def test_similarity_of_subspaces_is_that_of_singular_vectors(base, adapters, side):
    found = subspace_similarity(adapters[0], adapters[1], rank=2, side=side)
    spaces = []
    for one in adapters[:2]:
        u, _, v = torch.linalg.svd(changes(base, one)["up.weight"])
        spaces.append(v[:2].T if side == "input" else u[:, :2])
    torch.testing.assert_close(found["up"], (spaces[0].T @ spaces[1]).square().sum() / 2)
    assert "down" not in subspace_similarity(adapters[0], adapters[2])
    same = subspace_similarity(adapters[0], negate(adapters[0]), side=side)
    torch.testing.assert_close(torch.stack([*same.values()]), torch.ones(len(same), dtype=torch.float64))


def test_a_greedy_soup_has_what_helps():
    base = nn.Sequential(nn.Linear(3, 3)).double()
    adapters = [adapter(base, LoraConfig(r=1, target_modules=["0"]), seed) for seed in range(5)]
    target = sum(changes(base, adapters[i])["0.weight"] for i in (1, 3)) / 2
    tried = []

    def score(config, params):
        tried.append(config.r)
        return -float((changes(base, (config, params))["0.weight"] - target).norm())

    found = greedy_soup(adapters, score)
    assert len(tried) == 2 * 5 - 1 and found.score == max(
        [found.score, *(-float((changes(base, one)["0.weight"] - target).norm()) for one in adapters)]
    )
    assert_same(
        changes(base, found[:2]),
        weighted(base, [adapters[i] for i in found.members], [1 / len(found.members)] * len(found.members)),
    )
    with pytest.raises(ValueError, match=r"the score of adapters\[0\] is not a number"):
        greedy_soup(adapters, lambda config, params: float("nan"))


def test_what_is_refused(base, adapters):
    one, two, _ = adapters
    with pytest.raises(ValueError, match="side is 'left', expected 'input' or 'output'"):
        subspace_similarity(one, two, side="left")
    with pytest.raises(ValueError, match="rank is 0, expected a positive integer"):
        subspace_similarity(one, two, rank=0)
    zero = (one[0], {path: {k: torch.zeros_like(t) for k, t in leaves.items()} for path, leaves in one[1].items()})
    with pytest.raises(ValueError, match="attention changes nothing in one of the adapters, so has no directions"):
        subspace_similarity(one, zero)
    assert cosine(one, zero)["*"] == 0
    narrow = adapter(nn.ModuleDict({"up": nn.Linear(5, 8)}).double(), lora(target_modules=["up"]))
    with pytest.raises(ValueError, match="gram: up has factors of shapes .* of different modules"):
        gram([one, narrow])
