"""LoHa against its equation and against PEFT: both forms of the forward, dropouts, patterns, what is kept."""

import copy
import json

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

from torchgraft.adapters import (
    LoHaConfig,
    extract_params,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    merge_adapter,
    save_adapter,
    set_peft_model_state_dict,
)
from torchgraft.functional import bind, merge, route, stack, value_and_grad

LAYERS = {
    "linear": lambda: (nn.Linear(24, 20), (3, 5, 24)),
    "vector": lambda: (nn.Linear(24, 20), (24,)),
    "conv1d": lambda: (nn.Conv1d(12, 20, 5, stride=2, padding=2, padding_mode="replicate"), (3, 12, 9)),
    "conv2d": lambda: (nn.Conv2d(12, 20, (3, 5), stride=(2, 1), padding=(1, 3), dilation=(1, 2)), (2, 12, 9, 11)),
    "conv2d (circular)": lambda: (nn.Conv2d(12, 20, 3, padding=1, padding_mode="circular"), (2, 12, 5, 5)),
    "conv2d (same)": lambda: (nn.Conv2d(12, 20, 3, padding="same", bias=False), (12, 5, 5)),
    "conv2d (groups)": lambda: (nn.Conv2d(12, 20, 3, groups=4), (2, 12, 5, 5)),
    "conv2d (depthwise)": lambda: (nn.Conv2d(12, 24, 3, groups=12), (2, 12, 5, 5)),
    "conv2d (1 x 1)": lambda: (nn.Conv2d(12, 20, 1), (2, 12, 5, 5)),
}
FACTORED = {
    (1, False): {"linear", "vector", "conv1d", "conv2d", "conv2d (circular)", "conv2d (same)", "conv2d (1 x 1)"},
    (1, True): {"linear", "vector", "conv1d", "conv2d", "conv2d (circular)", "conv2d (same)", "conv2d (1 x 1)"},
    (3, False): {"linear", "vector", "conv1d", "conv2d", "conv2d (circular)", "conv2d (same)"},
    (3, True): {"linear", "vector", "conv1d", "conv2d", "conv2d (circular)", "conv2d (same)"},
    (5, False): set(),
    (5, True): set(),
}
"""Where the weight is not made, by rank and `use_effective_conv2d`."""


def made(name, dtype=torch.float64):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]()
    return nn.Sequential(layer).to(dtype), torch.randn(shape, dtype=dtype)


def randomised(params, seed=1):
    torch.manual_seed(seed)
    return {path: {leaf: torch.randn_like(p) for leaf, p in leaves.items()} for path, leaves in params.items()}


def entries(leaves, weight):
    """Return the product, one entry of the weight after the other."""
    product = torch.ones(weight.shape, dtype=torch.float64)
    for i in "12":
        b, a = leaves[f"hada_w{i}_a"], leaves[f"hada_w{i}_b"]
        for index in torch.cartesian_prod(*map(torch.arange, (weight.shape[0], weight[0].numel()))).tolist():
            out, place = index
            if f"hada_t{i}" in leaves:
                source, at = divmod(place, weight[0, 0].numel())
                entry = b[:, out] @ leaves[f"hada_t{i}"].flatten(2)[:, :, at] @ a[:, source]
            else:
                entry = b[out] @ a[:, place]
            product.view(len(weight), -1)[out, place] *= entry
    return product


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("r", [1, 3, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_merged_weights_are_the_equation_and_no_dense_weight_is_kept(name, r, tucker):
    model, x = made(name)
    graft = bind(model, LoHaConfig(r=r, alpha=2, use_effective_conv2d=tucker, target_modules=["0"]))
    params = randomised(graft.init())
    weight = model[0].weight.detach()
    expected = weight + 2 / r * entries(params["0"], weight)
    torch.testing.assert_close(merge(graft, params)["0.weight"], expected)
    y = functional_call(model, {"0.weight": expected}, (x,))
    for leaf in params["0"].values():
        leaf.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = graft(params, x)
    torch.testing.assert_close(found, y)
    same = [
        t for t in kept if t.numel() == weight.numel() and len(t) == len(weight) and t.data_ptr() != weight.data_ptr()
    ]
    assert (not same) == (name in FACTORED[r, tucker])


@pytest.mark.parametrize("fields", [{}, {"use_effective_conv2d": True}], ids=str)
@pytest.mark.parametrize("name", ["conv1d", "conv2d (circular)", "conv2d (groups)", "conv2d (1 x 1)"])
def test_leaves_have_pefts_shapes_and_numbers(name, fields):
    model, _ = made(name, torch.float32)
    fields = {"r": 3, "target_modules": ["0"], "init_weights": False, **fields}
    torch.manual_seed(3)
    theirs = peft.inject_adapter_in_model(peft.LoHaConfig(**fields), copy.deepcopy(model))
    after = torch.rand(1)
    generator = torch.Generator().manual_seed(3)
    params = bind(model, LoHaConfig(**fields)).init(generator)
    assert torch.equal(torch.rand(1, generator=generator), after)
    expected = peft.get_peft_model_state_dict(theirs)
    assert {f"0.{leaf}" for leaf in params["0"]} == set(expected)
    assert all(torch.equal(leaf, expected[f"0.{name}"]) for name, leaf in params["0"].items())


# -- dropouts --------------------------------------------------------------------------------------------------------


def in_training(r=2, layer=None, **fields):
    """Return a graft of a model in training mode, parameters, an input, and the adapter's part without dropout."""
    model = nn.Sequential(nn.Linear(16, 12) if layer is None else layer).double().train()
    graft = bind(model, LoHaConfig(r=r, target_modules=["0"], **fields))
    params = randomised(graft.init())
    x = torch.randn(5, *model[0].weight.shape[1:], dtype=torch.float64)
    plain = bind(model, LoHaConfig(r=r, target_modules=["0"]))
    part = plain(params, x) - model(x)
    return graft, params, x, part


@pytest.mark.parametrize("r", [2, 6])
@pytest.mark.parametrize("layer", [None, lambda: nn.Conv2d(4, 12, 3)], ids=["linear", "conv2d"])
def test_rank_dropout_drops_outputs_and_scales_up_the_others(r, layer):
    graft, params, x, part = in_training(r, layer and layer(), rank_dropout=0.5)
    torch.manual_seed(6)
    torch.rand(1)
    kept = torch.rand(12) > 0.5
    assert 0 < kept.sum() < 12
    torch.manual_seed(6)
    y = graft(params, x) - graft.model(x)
    factor = (kept / kept.double().mean()).view(-1, *(1 for _ in y.shape[2:]))
    torch.testing.assert_close(y, part * factor)
    graft.model.eval()
    torch.testing.assert_close(graft(params, x) - graft.model(x), part)


def test_module_dropout_leaves_the_bases_output_or_all_of_it():
    graft, params, x, part = in_training(module_dropout=0.5)
    base, seen = graft.model(x), set()
    for seed in range(20):
        torch.manual_seed(seed)
        kept = bool(torch.rand(1) > 0.5)
        torch.manual_seed(seed)
        y = graft(params, x)
        assert torch.equal(y, base) if not kept else torch.allclose(y, base + part)
        seen.add(kept)
    assert seen == {False, True}


def test_where_all_outputs_are_dropped_the_base_is_left():
    graft, params, x, _ = in_training(rank_dropout=0.999)
    assert torch.equal(graft(params, x), graft.model(x))


@pytest.mark.parametrize("fields", [{"rank_dropout": 0.5}, {"module_dropout": 0.5}], ids=str)
def test_dropouts_are_each_adapters_own_under_vmap_and_never_left_out(fields):
    graft, params, x, part = in_training(**fields)
    many = stack([params] * 16)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(graft, in_dims=(0, None))(many, x)
    torch.manual_seed(0)
    same = vmap(graft, in_dims=(0, None), randomness="same")(many, x) - graft.model(x)
    assert torch.equal(same[0], same[1])
    different = vmap(graft, in_dims=(0, None), randomness="different")(many, x) - graft.model(x)
    patterns = {tuple(y[0].ne(0).tolist()) for y in different}
    assert len(patterns) > 1
    routed = graft(route(many, torch.arange(16)), x[:1].expand(16, -1)) - graft.model(x[:1])
    assert len({tuple(y.ne(0).tolist()) for y in routed}) > 1
    graft.model.eval()
    routed = graft(route(many, torch.arange(16)), x[:1].expand(16, -1)) - graft.model(x[:1])
    torch.testing.assert_close(routed, part[:1].expand(16, -1))


# -- configs and files -----------------------------------------------------------------------------------------------

FIELDS = {
    "r": 4,
    "alpha": 3,
    "rank_pattern": {"^0": 2},
    "alpha_pattern": {"2": 5.0},
    "use_effective_conv2d": True,
    "init_weights": False,
    "target_modules": ["0", "2"],
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(80, 4))


def test_patterns_go_to_peft_and_back(tmp_path):
    x = torch.randn(2, 3, 4, 4)
    mine, theirs = LoHaConfig(**FIELDS), peft.LoHaConfig(**FIELDS)
    torch.manual_seed(4)
    model = inject_adapter_in_model(mine, net())
    torch.manual_seed(4)
    other = peft.get_peft_model(net(), theirs)
    expected = {key.removeprefix("base_model.model."): t for key, t in peft.get_peft_model_state_dict(other).items()}
    state = get_peft_model_state_dict(model)
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    trained = {name.removeprefix("base_model.model."): p.requires_grad for name, p in other.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    torch.testing.assert_close(model(x), other(x))
    assert not torch.equal(model(x), net()(x))
    save_adapter(model, tmp_path / "mine")
    other.save_pretrained(tmp_path / "theirs")
    files = [json.loads((tmp_path / whose / "adapter_config.json").read_text()) for whose in ("mine", "theirs")]
    assert files[0].keys() == files[1].keys()
    torch.testing.assert_close(peft.PeftModel.from_pretrained(net(), tmp_path / "mine")(x), model(x))
    graft = bind(net(), load_config(tmp_path / "theirs"))
    torch.testing.assert_close(graft(load_adapter(graft, tmp_path / "theirs"), x), model(x))


def test_patterns_that_match_nothing_are_a_warning():
    with pytest.warns(RuntimeWarning, match=r"LoHaConfig: \['third'\] in rank_pattern or alpha_pattern match none"):
        bind(net(), LoHaConfig(target_modules=["0"], rank_pattern={"third": 2}))


def test_a_config_is_found_from_tensors():
    source = inject_adapter_in_model(LoHaConfig(**FIELDS), net())
    state = get_peft_model_state_dict(source)
    plain = LoHaConfig(r=4, alpha=3, alpha_pattern=FIELDS["alpha_pattern"], target_modules=["0", "2"])
    model = inject_adapter_in_model(plain, net(), state_dict=state)
    assert set_peft_model_state_dict(model, state) == ([], [])
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x), source(x))


def test_scaling_that_is_written_is_kept_in_files(tmp_path):
    model = inject_adapter_in_model(LoHaConfig(**FIELDS), net())
    assert [model[i].scaling["default"] for i in (0, 2)] == [1.5, 1.25]
    model[0].scaling["default"] = 0.75
    x = torch.randn(2, 3, 4, 4)
    save_adapter(model, tmp_path)
    again = net()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(x), model(x))
    assert [again[i].scaling["default"] for i in (0, 2)] == [0.75, 1.25]
    torch.testing.assert_close(peft.PeftModel.from_pretrained(net(), tmp_path)(x), model(x))


# -- training --------------------------------------------------------------------------------------------------------


def test_a_stack_of_ranks_trains_as_each_alone():
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    configs = [LoHaConfig(r=r, alpha=a, target_modules=["0", "2"]) for r, a in ((1, 2), (3, 1))]
    graft = bind(model, configs)
    trees = [randomised(graft.member(i).init(), i) for i in range(2)]
    x, t = torch.randn(6, 16, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)

    def loss(y):
        return F.mse_loss(y, t, reduction="none").mean(1)

    rows = torch.tensor([0, 1, 1, 0, -1, 1])
    _, grads = value_and_grad(lambda many: loss(graft(route(many, rows), x)).sum())(graft.stack(trees))
    for i, given in enumerate(graft.unstack(grads)):
        alone = bind(model, configs[i])
        _, expected = value_and_grad(lambda tree, alone=alone, i=i: loss(alone(tree, x))[rows == i].sum())(trees[i])
        for path, leaves in expected.items():
            for leaf, g in leaves.items():
                torch.testing.assert_close(given[path][leaf], g)


def test_merged_in_place_in_training_mode_has_no_dropout():
    model = inject_adapter_in_model(LoHaConfig(rank_dropout=0.5, init_weights=False, target_modules=["2"]), net())
    x = torch.randn(2, 3, 4, 4)
    expected = model.eval()(x)
    merge_adapter(model.train())
    torch.testing.assert_close(model(x), expected)
    assert set(extract_params(model)) == {"2"}
