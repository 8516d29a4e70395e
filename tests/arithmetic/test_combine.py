"""Weighted sums of adapters: exact where they claim to be, by merging in float64; and what is refused."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap

from torchgraft.adapters import C3AConfig, IA3Config, LoHaConfig, LoraConfig, combine, gram, interpolate, negate, soup
from torchgraft.functional import UnsupportedConfig, bind, stack, unstack

from .oracle import Experts, Layers, adapter, assert_same, changes, lora, weighted

PATTERNS = {"rank_pattern": {"up": 5, "attention": 3}, "alpha_pattern": {"down": 3.0, "attention": 2.0}}


def model(cls=Layers):
    return cls().double()


def of_each_kind(base):
    """Adapters that differ in rank, scaling, patterns, rank-stabilised scaling, and modules."""
    configs = [
        lora(r=2, lora_alpha=5, **PATTERNS),
        lora(r=3, lora_alpha=7, use_rslora=True),
        lora(r=1, target_modules=["up", "table", "grid"]),
    ]
    return [adapter(base, config, seed) for seed, config in enumerate(configs)]


def test_cat_is_the_sum_on_each_kind_of_layer_whatever_ranks_scalings_and_modules():
    base = model()
    adapters, weights = of_each_kind(base), [0.7, -1.3, 2.0]
    before = [
        {path: {k: t.clone() for k, t in leaves.items()} for path, leaves in tree.items()} for _, tree in adapters
    ]
    config, params = combine(adapters, weights)
    assert_same(changes(base, (config, params)), weighted(base, adapters, weights))
    assert params["down"]["lora_A"].shape[0] == 2 + 3 and params["up"]["lora_A"].shape[0] == 5 + 3 + 1
    for (_, tree), kept in zip(adapters, before, strict=True):
        assert all(torch.equal(tree[path][leaf], kept[path][leaf]) for path in tree for leaf in tree[path])


def test_the_combined_adapter_computes_the_sum():
    base = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    adapters = [adapter(base, LoraConfig(r=r, target_modules=["1"]), r) for r in (1, 2)]
    x = torch.randn(7, 4, dtype=torch.float64)
    config, params = combine(adapters, [2.0, -0.5])
    each = [bind(base, own)(tree, x) - base(x) for own, tree in adapters]
    torch.testing.assert_close(bind(base, config)(params, x) - base(x), 2.0 * each[0] - 0.5 * each[1])


@settings(max_examples=25)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    weights=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    alphas=st.lists(st.floats(0.1, 9), min_size=3, max_size=3),
    rs=st.booleans(),
)
def test_cat_and_a_full_svd_are_the_sum_for_any_numbers(ranks, weights, alphas, rs):
    base = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(3, 4, 2)).double()
    adapters = [
        adapter(base, LoraConfig(r=r, lora_alpha=alpha, use_rslora=rs, target_modules=["0", "1"]), i)
        for i, (r, alpha) in enumerate(zip(ranks, alphas, strict=False))
    ]
    expected = weighted(base, adapters, weights[: len(ranks)])
    assert_same(changes(base, combine(adapters, weights[: len(ranks)])), expected)
    assert_same(changes(base, combine(adapters, weights[: len(ranks)], "svd", rank=sum(ranks))), expected)


def test_svd_is_the_nearest_of_a_rank():
    base = model()
    adapters, weights = of_each_kind(base), [0.7, -1.3, 2.0]
    found = changes(base, combine(adapters, weights, "svd", rank=2))
    for name, change in weighted(base, adapters, weights).items():
        if change.abs().max() > 0:
            u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
            torch.testing.assert_close(found[name].flatten(1), u[:, :2] * s[:2] @ v[:2], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("how", "options"), [("cat", {}), ("svd", {"rank": 5})])
def test_experts_are_summed_expert_by_expert(how, options):
    base = model(Experts)
    adapters = [adapter(base, LoraConfig(r=r, lora_alpha=r + 1, target_parameters=["weights"]), r) for r in (2, 3)]
    combined = combine(adapters, [1.5, -0.5], how, **options)
    assert combined[1]["weights"]["lora_A"].shape == (15, 5)
    assert_same(changes(base, combined), weighted(base, adapters, [1.5, -0.5]))


@pytest.mark.parametrize(("how", "options"), [("cat", {}), ("svd", {"rank": 6})])
def test_grouped_convolutions_are_summed_group_by_group(how, options):
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double()
    adapters = [adapter(base, LoraConfig(r=r, target_modules=["0"]), r) for r in (2, 4)]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    config, params = combine(adapters, [1.5, -0.5], how, **options)
    each = [bind(base, own)(tree, x) - base(x) for own, tree in adapters]
    torch.testing.assert_close(bind(base, config)(params, x) - base(x), 1.5 * each[0] - 0.5 * each[1])


def test_an_attention_with_sizes_of_its_own_is_summed_block_by_block():
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=3, vdim=5)}).double()
    adapters = [adapter(base, LoraConfig(r=r, target_modules=["attention"]), r) for r in (1, 2)]
    assert_same(changes(base, combine(adapters, [1.5, -0.5])), weighted(base, adapters, [1.5, -0.5]))
    for refused in (lambda: combine(adapters, [1.5, -0.5], "svd"), lambda: gram(adapters)):
        with pytest.raises(UnsupportedConfig, match="attention is an attention whose keys .* only blocks count"):
            refused()


def test_biases_of_b_are_summed():
    base = nn.Sequential(nn.Linear(4, 3)).double()
    configs = [LoraConfig(r=r, lora_alpha=3, lora_bias=True, target_modules=["0"]) for r in (1, 2)]
    adapters = [adapter(base, config, i) for i, config in enumerate(configs)]
    assert_same(changes(base, combine(adapters, [0.4, -2.0])), weighted(base, adapters, [0.4, -2.0]))


def test_linear_has_the_cross_terms_that_it_says():
    base = nn.Sequential(nn.Linear(4, 5)).double()
    adapters = [adapter(base, LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"]), alpha) for alpha in (2, 6)]
    (a1, b1), (a2, b2) = ((tree["0"]["lora_A"], tree["0"]["lora_B"]) for _, tree in adapters)
    c1, c2 = (0.5 * 1) ** 0.5, (2 * 3) ** 0.5
    expected = (c1 * b1 + c2 * b2) @ (c1 * a1 - c2 * a2)
    torch.testing.assert_close(changes(base, combine(adapters, [0.5, -2.0], "linear"))["0.weight"], expected)


def test_ties_of_factors_by_hand():
    base = nn.Sequential(nn.Linear(4, 5)).double()
    adapters = [adapter(base, LoraConfig(r=2, lora_alpha=2, target_modules=["0"]), seed) for seed in range(3)]
    params = combine(adapters, [1.0, 4.0, 9.0], "ties", density=0.5)[1]["0"]
    for leaf in ("lora_A", "lora_B"):
        expected = torch.zeros_like(params[leaf])
        for index in range(expected.numel()):
            votes = []
            for root, (_, tree) in zip((1.0, 2.0, 3.0), adapters, strict=True):
                values = tree["0"][leaf].flatten()
                largest = values.abs().sort(descending=True).indices[: values.numel() // 2]
                votes.append((values[index].item() if index in largest else 0.0, root))
            sign = 1 if sum(value for value, _ in votes) >= 0 else -1
            agree = [value * root for value, root in votes if value * sign > 0]
            expected.view(-1)[index] = sum(agree) / max(len(agree), 1)
        torch.testing.assert_close(params[leaf], expected)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("how", ["ties", "dare_ties", "ties_svd", "dare_ties_svd"])
def test_a_negative_weight_is_the_negated_adapter(how, sign):
    base = model()
    adapters = [adapter(base, lora(r=2, lora_alpha=2), seed) for seed in range(3)]
    options = {"density": 0.6, "majority_sign": sign}
    torch.manual_seed(0)
    one = changes(base, combine(adapters, [1.0, -0.7, 0.5], how, **options))
    config, tree = adapters[1]
    flipped = {p: {k: -t if k.endswith("_A") else t for k, t in leaves.items()} for p, leaves in tree.items()}
    torch.manual_seed(0)
    other = changes(base, combine([adapters[0], (config, flipped), adapters[2]], [1.0, 0.7, 0.5], how, **options))
    assert_same(one, other)


def test_dare_is_right_in_the_mean_and_follows_a_generator():
    base = nn.Sequential(nn.Linear(6, 5)).double()
    adapters = [adapter(base, LoraConfig(r=2, lora_alpha=2, target_modules=["0"]), seed) for seed in range(2)]
    generator = torch.Generator().manual_seed(1)
    some = [
        combine(adapters, [1.0, 0.5], "dare_linear_svd", rank=5, density=0.7, generator=generator) for _ in range(2000)
    ]
    mean = torch.stack([tree["0"]["lora_B"] @ tree["0"]["lora_A"] for _, tree in some]).mean(0)
    expected = weighted(base, adapters, [1.0, 0.5])["0.weight"]
    torch.testing.assert_close(mean, expected, atol=0.15, rtol=0.05)
    again = torch.Generator().manual_seed(1)
    first = combine(adapters, [1.0, 0.5], "dare_linear_svd", rank=5, density=0.7, generator=again)
    assert torch.equal(first[1]["0"]["lora_A"], some[0][1]["0"]["lora_A"])


@pytest.mark.parametrize("how", ["magnitude_prune", "magnitude_prune_svd", "dare_linear", "ties_svd"])
def test_with_everything_kept_and_one_adapter_pruning_changes_nothing(how):
    base = model()
    one = adapter(base, lora(r=2, lora_alpha=3))
    options = {"rank": 2} if how.endswith("svd") else {}
    found = changes(base, combine([one], [0.5], how, density=1.0, **options))
    assert_same(found, weighted(base, [one], [0.5]))


def test_pruned_changes_are_those_of_the_weights():
    base = nn.Sequential(nn.Linear(6, 5)).double()
    one = adapter(base, LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    change = changes(base, one)["0.weight"]
    kept = torch.zeros(30, dtype=torch.float64)
    largest = change.abs().flatten().sort(descending=True).indices[:12]
    kept[largest] = change.flatten()[largest]
    found = changes(base, combine([one], [2.0], "magnitude_prune_svd", rank=5, density=0.4))["0.weight"]
    torch.testing.assert_close(found, 2 * kept.view(5, 6))


# -- other methods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cat", "linear"])
def test_ia3_adds_what_its_vectors_change(how):
    base = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    configs = [
        IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]),
        IA3Config(target_modules=["0"]),
    ]
    adapters = [adapter(base, config, i) for i, config in enumerate(configs)]
    assert_same(changes(base, combine(adapters, [0.4, -2.0], how)), weighted(base, adapters, [0.4, -2.0]))


def test_ia3_refuses_what_would_rescale_another_side():
    base = nn.Sequential(nn.Linear(4, 4)).double()
    configs = [IA3Config(target_modules=["0"], feedforward_modules=names) for names in (["0"], None)]
    with pytest.raises(ValueError, match=r"combine: 0 has ia3_l of shapes \(1, 4\), \(4, 1\)"):
        combine([adapter(base, config) for config in configs], [1.0, 1.0])
    conv = nn.Sequential(nn.Conv2d(4, 4, 3)).double()
    with pytest.raises(ValueError, match="combine: feedforward_modules is {'0'} in adapters.0. and None"):
        combine([adapter(conv, config) for config in configs], [1.0, 1.0])


def test_c3a_adds_kernels():
    base = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)).double()
    configs = [C3AConfig(block_size=4, target_modules=names) for names in (["0", "1"], ["1"])]
    adapters = [adapter(base, config, i) for i, config in enumerate(configs)]
    assert_same(changes(base, combine(adapters, [0.4, -2.0])), weighted(base, adapters, [0.4, -2.0]))


def test_what_is_trained_as_a_whole_is_averaged_or_an_error():
    base = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    fields = {"target_modules": ["0"], "modules_to_save": ["1"], "bias": "lora_only"}
    adapters = [adapter(base, LoraConfig(r=r, **fields), r) for r in (1, 2)]
    assert_same(changes(base, soup(adapters)), weighted(base, adapters, [0.5, 0.5]))
    share = torch.tensor(0.25, dtype=torch.float64)
    assert_same(changes(base, interpolate(*adapters, share)), weighted(base, adapters, [0.75, 0.25]))
    with pytest.raises(ValueError, match="0 has bias, which is trained as a whole, .* numbers that add up to 1"):
        combine(adapters, [1.0, 1.0])
    partly = {path: leaves for path, leaves in adapters[1][1].items() if path != "1"}
    with pytest.raises(ValueError, match="1 has bias, which is trained as a whole, .* where each adapter has it"):
        combine([adapters[0], (adapters[1][0], partly)], [0.5, 0.5])


# -- transforms ----------------------------------------------------------------------------------------------------


def small():
    base = nn.Sequential(nn.Linear(4, 5)).double()
    return base, [adapter(base, LoraConfig(r=2, lora_alpha=4, target_modules=["0"]), seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("how", "options"), [("cat", {}), ("svd", {"rank": 3}), ("linear", {}), ("ties", {"density": 0.5})]
)
def test_weights_are_learned_through_combine(how, options):
    base, adapters = small()
    config = combine(adapters, [1.0, 1.0, 1.0], how, **options)[0]
    graft, x = bind(base, config), torch.randn(6, 4, dtype=torch.float64)
    weights = torch.tensor([0.3, -0.6, 0.9], dtype=torch.float64)

    def loss(weights):
        return graft(combine(adapters, weights, how, **options)[1], x).square().sum()

    assert torch.autograd.gradcheck(loss, weights.clone().requires_grad_())
    torch.testing.assert_close(grad(loss)(weights), torch.autograd.functional.jacobian(loss, weights))


def test_a_mixture_that_starts_at_zero_has_finite_gradients():
    _, adapters = small()

    def loss(weights, how):
        params = combine(adapters, weights, how)[1]["0"]
        return (params["lora_B"] @ params["lora_A"] - 1).square().sum()

    zero = torch.zeros(3, dtype=torch.float64)
    assert grad(loss)(zero, "cat").abs().min() > 0
    assert grad(loss)(zero, "linear").isfinite().all()


def test_a_mixture_finds_its_weights_again():
    base, adapters = small()
    target = weighted(base, adapters, [0.5, -1.0, 0.25])["0.weight"]
    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=50)

    def closure():
        optimizer.zero_grad()
        leaves = combine(adapters, weights)[1]["0"]
        loss = (leaves["lora_B"] @ leaves["lora_A"] - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(weights.detach(), torch.tensor([0.5, -1.0, 0.25]).double(), atol=1e-5, rtol=0)


def test_weights_of_each_module():
    base = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    adapters = [adapter(base, LoraConfig(r=r, target_modules=["0", "1"]), r) for r in (1, 2)]
    found = changes(base, combine(adapters, {"0": [1.0, -2.0], "1": torch.tensor([0.0, 3.0], dtype=torch.float64)}))
    each = [changes(base, one) for one in adapters]
    torch.testing.assert_close(found["0.weight"], each[0]["0.weight"] - 2 * each[1]["0.weight"])
    torch.testing.assert_close(found["1.weight"], 3 * each[1]["1.weight"])


@pytest.mark.parametrize(
    ("how", "options"), [("cat", {}), ("svd", {"rank": 3}), ("linear", {}), ("magnitude_prune_svd", {"density": 0.5})]
)
def test_rows_of_weights_and_stacks_are_mapped_over(how, options):
    _, adapters = small()
    rows = torch.randn(4, 3, dtype=torch.float64)
    many = vmap(lambda weights: combine(adapters, weights, how, **options)[1])(rows)
    for weights, tree in zip(rows, unstack(many), strict=True):
        one = combine(adapters, weights, how, **options)[1]["0"]
        torch.testing.assert_close(tree["0"]["lora_B"] @ tree["0"]["lora_A"], one["lora_B"] @ one["lora_A"])
    config, trees = adapters[0][0], [tree for _, tree in adapters]
    stacked = vmap(lambda one, two: combine([(config, one), (config, two)], [1.0, -1.0], how, **options)[1])(
        stack(trees), stack(trees[::-1])
    )
    for i, tree in enumerate(unstack(stacked)):
        one = combine([(config, trees[i]), (config, trees[2 - i])], [1.0, -1.0], how, **options)[1]["0"]
        torch.testing.assert_close(tree["0"]["lora_B"] @ tree["0"]["lora_A"], one["lora_B"] @ one["lora_A"])


def test_members_of_a_stack_of_several_ranks():
    base = nn.Sequential(nn.Linear(4, 5)).double()
    graft = bind(base, [LoraConfig(r=r, target_modules=["0"]) for r in (1, 3)])
    many = {"0": {k: torch.randn_like(t) for k, t in graft.init()["0"].items()}}
    many["0"]["lora_A"][0, 1:], many["0"]["lora_B"][0, :, 1:] = 0, 0
    members = list(zip(graft.members, graft.unstack(many), strict=True))
    assert_same(changes(base, combine(members, [1.0, -1.0])), weighted(base, members, [1.0, -1.0]))


def test_half_precision_is_summed_in_float32_and_rounded_once():
    base = nn.Sequential(nn.Linear(4, 5))
    adapters = [
        (config, {"0": {k: t.bfloat16() for k, t in tree["0"].items()}})
        for config, tree in (adapter(base, LoraConfig(r=2, target_modules=["0"]), seed) for seed in range(3))
    ]
    leaves = combine(adapters, [0.1, 0.2, 0.3])[1]["0"]
    expected = torch.cat(
        [t["0"]["lora_A"].float() * (4 * w) for (_, t), w in zip(adapters, [0.1, 0.2, 0.3], strict=True)]
    )
    assert leaves["lora_A"].dtype == torch.bfloat16 and torch.equal(leaves["lora_A"], expected.bfloat16())


def test_whole_names_where_targets_differ_and_the_given_ones_where_not():
    base = model()
    one, two = (adapter(base, lora(r=2, target_modules=names)) for names in (["up"], ["down"]))
    assert combine([one, one], [1.0, 1.0])[0].target_modules == {"up"}
    assert combine([one, two], [1.0, 1.0])[0].target_modules == {"up", "down"}
    assert negate(one)[0].rank_pattern == {}


# -- errors --------------------------------------------------------------------------------------------------------


def refused(*fields, words, weights=(1.0, 1.0), error=ValueError, **options):
    base = nn.Sequential(nn.Linear(4, 4)).double()
    adapters = [adapter(base, LoraConfig(**{"r": 2, "target_modules": ["0"], **one})) for one in fields]
    with pytest.raises(error, match=words):
        combine(adapters, list(weights) if isinstance(weights, tuple) else weights, **options)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"how": "sum"}, "how is 'sum', expected one of 'cat', 'svd', 'linear', 'ties'"),
        ({"how": "ties"}, "density is None, expected the share of entries that how='ties' keeps, 0 < density <= 1"),
        ({"how": "dare_linear", "density": 0.0}, "density is 0.0, expected"),
        ({"density": 0.5}, "density is 0.5, and how='cat' prunes nothing; leave it out"),
        ({"rank": 3}, "rank is 3, expected none with how='cat', which fixes the rank"),
        ({"how": "svd", "rank": 0}, "rank is 0, expected a positive integer"),
        ({"how": "ties", "density": 0.5, "majority_sign": "most"}, "majority_sign is 'most', expected 'total' or"),
        ({"how": "linear", "clamp": 0.5}, "clamp is 0.5, expected a quantile"),
        ({"weights": (1.0,)}, "weights has 1 numbers, expected one for each of the 2 adapters"),
        ({"weights": (1.0, float("nan"))}, "weights has nan, expected finite numbers"),
        ({"weights": {"1": [1.0, 1.0]}, "error": KeyError}, "weights have '1', which no adapter has; they have '0'"),
        ({"weights": "ab", "error": TypeError}, "weights is of type str, expected a list of numbers"),
    ],
)
def test_options_and_weights_that_are_refused(case, words):
    refused({}, {}, words=words, **case)


def test_adapters_that_are_refused():
    refused({}, {"r": 3}, how="linear", words=r"0 has lora_A of shapes \(1, 2, 4\), \(1, 3, 4\); how='linear' adds fac")
    refused({}, {"use_dora": True}, error=UnsupportedConfig, words=r"adapters\[1\] has use_dora.*to_lora")
    refused({"init_lora_weights": "pissa"}, {}, error=UnsupportedConfig, words=r"adapters\[0\] .*'pissa'.*to_plain")
    refused({"lora_bias": True}, {}, words=r"lora_bias is True in adapters\[0\] and False in adapters\[1\]")
    base = nn.Sequential(nn.Linear(4, 4)).double()
    one = adapter(base, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(UnsupportedConfig, match=r"adapters\[1\] is LOHA, whose change .*to_lora\(graft, params"):
        combine([one, adapter(base, LoHaConfig(target_modules=["0"]))], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"0 has lora_A \(2, 4\) .* its config says a rank of 3 there; give the con"):
        combine([(dataclasses.replace(one[0], r=3), one[1])], [1.0])
    with pytest.raises(ValueError, match="a stack is combined adapter by adapter"):
        combine([(one[0], stack([one[1], one[1]]))], [1.0])
    other = adapter(nn.Sequential(nn.Linear(5, 4)).double(), one[0])
    with pytest.raises(ValueError, match="0 has factors of shapes .* of different modules; combine adapters of one"):
        combine([one, other], [1.0, 1.0])
    with pytest.raises(ValueError, match="no adapter has factors of LoRA in its tree"):
        combine([(one[0], {})], [1.0])
    with pytest.raises(ValueError, match="adapters is empty"):
        combine([], [])
    with pytest.raises(TypeError, match="adapters is of type dict, expected a list of pairs"):
        combine({"a": one}, [1.0])
    with pytest.raises(
        TypeError, match=r"adapters\[0\] has an object of type Graft first, expected the adapter's config; a graft has"
    ):
        combine([(bind(base, one[0]), one[1])], [1.0])
    with pytest.raises(TypeError, match=r"adapters\[0\] has .* second, expected one adapter's tree"):
        combine([(one[0], {"a": one[1]})], [1.0])
