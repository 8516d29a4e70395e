"""LoKr against its equation and against PEFT: all forms of its factors, dropouts, patterns, what is kept."""

import copy
import json

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import nn
from torch.func import functional_call

from torchgraft.adapters import (
    LoKrConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    save_adapter,
    set_peft_model_state_dict,
)
from torchgraft.adapters._methods.lokr import split
from torchgraft.functional import bind, merge, route, stack

LAYERS = {
    "linear": lambda: (nn.Linear(24, 20), (3, 5, 24)),
    "vector": lambda: (nn.Linear(24, 20), (24,)),
    "embedding": lambda: (nn.Embedding(24, 20), None),
    "conv1d": lambda: (nn.Conv1d(12, 20, 5, stride=2, padding=2, padding_mode="replicate"), (3, 12, 9)),
    "conv1d (1)": lambda: (nn.Conv1d(12, 20, 1), (3, 12, 9)),
    "conv2d": lambda: (nn.Conv2d(12, 20, (3, 5), stride=(2, 1), padding=(1, 3), dilation=(1, 2)), (2, 12, 9, 11)),
    "conv2d (circular)": lambda: (nn.Conv2d(12, 20, 3, padding=1, padding_mode="circular"), (2, 12, 5, 5)),
    "conv2d (same)": lambda: (nn.Conv2d(12, 20, 3, padding="same", bias=False), (12, 5, 5)),
    "conv2d (groups)": lambda: (nn.Conv2d(12, 20, 3, groups=4), (2, 12, 5, 5)),
    "conv2d (1 x 1)": lambda: (nn.Conv2d(12, 20, 1), (2, 12, 5, 5)),
    "conv3d": lambda: (nn.Conv3d(12, 20, (1, 2, 2), padding=1), (2, 12, 3, 3, 3)),
}
FORMS = {
    "whole": {"r": 6},
    "low rank": {"r": 1},
    "both": {"r": 1, "decompose_both": True},
    "tucker": {"r": 1, "use_effective_conv2d": True},
    "by factor": {"r": 1, "decompose_factor": 8, "decompose_both": True},
}
layers, forms = pytest.mark.parametrize("name", LAYERS), pytest.mark.parametrize("form", FORMS)


def made(name, dtype=torch.float64):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]()
    x = torch.arange(24).view(4, 6) if shape is None else torch.randn(shape, dtype=dtype)
    return nn.Sequential(layer).to(dtype), x


def randomised(params, seed=1):
    torch.manual_seed(seed)
    return {path: {leaf: torch.randn_like(p) for leaf, p in leaves.items()} for path, leaves in params.items()}


def entries(leaves, shape):
    """Return the product of a weight's shape, entry by entry: `C[a, b] D[c, d]` at `(a k + c, b n + d)`."""
    c = leaves["lokr_w1"] if "lokr_w1" in leaves else leaves["lokr_w1_a"] @ leaves["lokr_w1_b"]
    places = torch.Size(shape[2:]).numel()
    if "lokr_w2" in leaves:
        d = leaves["lokr_w2"]
    elif "lokr_t2" in leaves:
        d = torch.einsum("ip,ij...,jq->pq...", leaves["lokr_w2_a"], leaves["lokr_t2"], leaves["lokr_w2_b"])
    else:
        d = leaves["lokr_w2_a"] @ leaves["lokr_w2_b"]
    k, n = shape[0] // len(c), shape[1] // c.shape[1]
    d = d.reshape(k, n, places)
    delta = torch.empty(shape[0], shape[1], places, dtype=c.dtype)
    for out in range(shape[0]):
        for source in range(shape[1]):
            delta[out, source] = c[out // k, source // n] * d[out % k, source % n]
    return delta.reshape(shape)


@layers
@forms
def test_outputs_and_merged_weights_are_the_equation_and_the_product_is_not_kept(name, form):
    model, x = made(name)
    if name.startswith("conv1d") and form == "whole":
        pytest.skip("another product, PEFT's")
    graft = bind(model, LoKrConfig(alpha=2, target_modules=["0"], **FORMS[form]))
    params = randomised(graft.init())
    weight = model[0].weight.detach()
    delta = 2 / FORMS[form]["r"] * entries(params["0"], weight.mT.shape if name == "embedding" else weight.shape)
    expected = weight + (delta.mT if name == "embedding" else delta)
    torch.testing.assert_close(merge(graft, params)["0.weight"], expected)
    for leaf in params["0"].values():
        leaf.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = graft(params, x)
    torch.testing.assert_close(found, functional_call(model, {"0.weight": expected}, (x,)))
    dense = [t for t in kept if sorted(t.shape) == sorted(weight.shape) and t.data_ptr() != weight.data_ptr()]
    assert bool(dense) == (name == "conv2d (groups)")


def test_a_whole_kernel_of_a_1d_convolution_is_pefts():
    model, x = made("conv1d (1)", torch.float32)
    theirs = peft.inject_adapter_in_model(
        peft.LoKrConfig(r=6, target_modules=["0"], init_weights=False), copy.deepcopy(model)
    )
    graft = bind(model, LoKrConfig(r=6, target_modules=["0"]))
    params = {"0": {key.removeprefix("0."): tensor for key, tensor in peft.get_peft_model_state_dict(theirs).items()}}
    assert params["0"]["lokr_w2"].ndim == 3
    torch.testing.assert_close(graft(params, x), theirs(x))
    delta = merge(graft, params)["0.weight"] - model[0].weight
    torch.testing.assert_close(delta, theirs[0].get_delta_weight("default"))
    assert not torch.allclose(delta, entries(params["0"], delta.shape), atol=1e-2)


def test_axes_are_split_as_in_peft():
    for size in range(1, 200):
        for factor in (-1, *range(1, 30), 199, 300):
            assert split(size, factor) == factorization(size, factor), (size, factor)


@pytest.mark.parametrize("start", [True, False, "lycoris"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("vector", "embedding", "conv3d")])
@forms
def test_leaves_have_pefts_shapes_and_numbers(name, form, start):
    model, _ = made(name, torch.float32)
    fields = {"target_modules": ["0"], "init_weights": start, **FORMS[form]}
    torch.manual_seed(3)
    theirs = peft.inject_adapter_in_model(peft.LoKrConfig(**fields), copy.deepcopy(model))
    after = torch.rand(1)
    generator = torch.Generator().manual_seed(3)
    params = bind(model, LoKrConfig(**fields)).init(generator)
    assert torch.equal(torch.rand(1, generator=generator), after)
    expected = peft.get_peft_model_state_dict(theirs)
    assert {f"0.{leaf}" for leaf in params["0"]} == set(expected)
    assert all(torch.equal(leaf, expected[f"0.{name}"]) for name, leaf in params["0"].items())


# -- dropouts --------------------------------------------------------------------------------------------------------


def in_training(layer, **fields):
    """Return a graft of a model in training mode, parameters, an input, and the adapter's part without dropout."""
    model = nn.Sequential(layer).double().train()
    graft, plain = (bind(model, LoKrConfig(r=2, target_modules=["0"], **more)) for more in (fields, {}))
    params = randomised(graft.init())
    embedding = isinstance(layer, nn.Embedding)
    x = torch.arange(5) if embedding else torch.randn(5, *layer.weight.shape[1:], dtype=torch.float64)
    return graft, params, x, plain(params, x) - model(x)


KINDS = {
    "linear": lambda: nn.Linear(16, 12),
    "embedding": lambda: nn.Embedding(16, 12),
    "conv2d": lambda: nn.Conv2d(4, 12, 3),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rank_dropout_drops_outputs_and_scales_up_the_others_where_asked(kind, scaled):
    graft, params, x, part = in_training(KINDS[kind](), rank_dropout=0.5, rank_dropout_scale=scaled)
    torch.manual_seed(6)
    torch.rand(1)
    kept = (torch.rand(12) > 0.5).double()
    assert 0 < kept.sum() < 12
    torch.manual_seed(6)
    y = graft(params, x) - graft.model(x)
    factor = kept / kept.mean() if scaled else kept
    torch.testing.assert_close(y, part * factor.view(-1, *(1 for _ in y.shape[2:])))
    graft.model.eval()
    torch.testing.assert_close(graft(params, x) - graft.model(x), part)


def test_where_all_outputs_are_dropped_the_base_is_left():
    graft, params, x, _ = in_training(nn.Linear(16, 12), rank_dropout=0.999, rank_dropout_scale=True)
    assert torch.equal(graft(params, x), graft.model(x))


def test_module_dropout_leaves_the_bases_output_or_all_of_it():
    graft, params, x, part = in_training(nn.Linear(16, 12), module_dropout=0.5)
    base, seen = graft.model(x), set()
    for seed in range(20):
        torch.manual_seed(seed)
        kept = bool(torch.rand(1) > 0.5)
        torch.manual_seed(seed)
        y = graft(params, x)
        assert torch.equal(y, base) if not kept else torch.allclose(y, base + part)
        seen.add(kept)
    assert seen == {False, True}


def test_dropouts_of_routed_rows_are_each_rows_own():
    graft, params, x, _ = in_training(nn.Linear(16, 12), rank_dropout=0.5)
    rows = route(stack([params] * 16), torch.arange(16))
    routed = graft(rows, x[:1].expand(16, -1)) - graft.model(x[:1])
    assert len({tuple(y.ne(0).tolist()) for y in routed}) > 1


# -- configs and files -----------------------------------------------------------------------------------------------

FIELDS = {
    "r": 4,
    "alpha": 3,
    "rank_pattern": {"^0": 1},
    "alpha_pattern": {"2": 5.0},
    "use_effective_conv2d": True,
    "decompose_both": True,
    "decompose_factor": 8,
    "init_weights": False,
    "rank_dropout_scale": True,
    "target_modules": ["0", "2", "4"],
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(80, 24))


def test_patterns_go_to_peft_and_back(tmp_path):
    x = torch.randn(2, 3, 4, 4)
    mine, theirs = LoKrConfig(**FIELDS), peft.LoKrConfig(**FIELDS)
    torch.manual_seed(4)
    model = inject_adapter_in_model(mine, net())
    torch.manual_seed(4)
    other = peft.get_peft_model(net(), theirs)
    expected = {key.removeprefix("base_model.model."): t for key, t in peft.get_peft_model_state_dict(other).items()}
    state = get_peft_model_state_dict(model)
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    trained = {name.removeprefix("base_model.model."): p.requires_grad for name, p in other.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert model[0].rank_dropout_scale["default"] is other.base_model.model[0].rank_dropout_scale["default"] is True
    torch.testing.assert_close(model.eval()(x), other.eval()(x))
    assert not torch.equal(model(x), net()(x))
    save_adapter(model, tmp_path / "mine")
    other.save_pretrained(tmp_path / "theirs")
    files = [json.loads((tmp_path / whose / "adapter_config.json").read_text()) for whose in ("mine", "theirs")]
    assert files[0].keys() == files[1].keys()
    torch.testing.assert_close(peft.PeftModel.from_pretrained(net(), tmp_path / "mine")(x), model(x))
    graft = bind(net(), load_config(tmp_path / "theirs"))
    torch.testing.assert_close(graft(load_adapter(graft, tmp_path / "theirs"), x), model(x))


def test_a_config_is_found_from_tensors():
    source = inject_adapter_in_model(LoKrConfig(**FIELDS), net())
    state = get_peft_model_state_dict(source)
    plain = LoKrConfig(r=4, alpha=3, alpha_pattern=FIELDS["alpha_pattern"], target_modules=["0", "2", "4"])
    model = inject_adapter_in_model(plain, net(), state_dict=state)
    assert set_peft_model_state_dict(model, state) == ([], [])
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x), source(x))


def test_scaling_that_is_written_is_kept_in_files(tmp_path):
    model = inject_adapter_in_model(LoKrConfig(**FIELDS), net())
    assert [model[i].scaling["default"] for i in (0, 2, 4)] == [3, 1.25, 0.75]
    model[0].scaling["default"] = 0.5
    x = torch.randn(2, 3, 4, 4)
    save_adapter(model, tmp_path)
    again = load_adapter(net(), tmp_path)
    torch.testing.assert_close(again(x), model(x))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(net(), tmp_path)(x), model(x))
