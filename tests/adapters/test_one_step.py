"""Sites whose calls are one step, decided beforehand: the bits of `apply`, and every change after the decision."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchgraft.adapters import LoraConfig, MissConfig, VeraConfig, inject_adapter_in_model, set_adapter
from torchgraft.adapters._methods.shared import fused
from torchgraft.functional import bind, route, stack
from torchgraft.functional.extending import SiteRuntime

FIELDS = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}
DROPOUTS = {LoraConfig: "lora_dropout", VeraConfig: "vera_dropout", MissConfig: "miss_dropout"}
"""Methods that run in one step."""


def sequential(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=bias))


def step_at(model, config):
    graft = bind(model, config)
    view = graft.view(graft.init())
    return vars(view[0])["_runtime"].step


@settings(max_examples=80, deadline=None)
@given(
    cls=st.sampled_from(list(DROPOUTS)),
    large=st.sampled_from([0, 2**14]),
    batch=st.lists(st.integers(0, 3), min_size=0, max_size=3),
    layout=st.sampled_from(["rows", "transposed", "sliced", "expanded"]),
    bias=st.booleans(),
    trained=st.booleans(),
    grad=st.booleans(),
    p=st.sampled_from([0.0, 0.5]),
    dtypes=st.sampled_from([("float32", "float32"), ("float64", "float64"), ("bfloat16", "float32")]),
)
def test_the_step_gives_the_bits_of_apply(cls, large, batch, layout, bias, trained, grad, p, dtypes):
    base, own = (getattr(torch, name) for name in dtypes)
    model = sequential(bias).to(base).requires_grad_(trained)
    graft = bind(model, cls(r=3, target_modules=["0"], **{DROPOUTS[cls]: p}))
    params = graft.init(torch.Generator().manual_seed(0), dtype=own)
    for leaf in params["0"].values():
        nn.init.normal_(leaf)
    leaves = [leaf.requires_grad_(grad) for leaf in params["0"].values()]
    x = torch.randn(*batch, 3).to(base)
    if layout == "transposed" and len(batch) > 1:
        x = x.transpose(0, 1)
    elif layout == "sliced":
        x = torch.cat([x, x], -1)[..., :3]
    elif layout == "expanded":
        x = x.expand(2, *x.shape)
    assert step_at(model, graft.configs[""]) is not None

    def run():
        torch.manual_seed(1)
        y = graft(params, x)
        return [y.detach(), *(torch.autograd.grad(y.double().square().sum(), leaves) if grad else ())]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_LARGE", large)
        found = run()
        patch.setattr(SiteRuntime, "decide", lambda runtime: None)
        graft = bind(model, graft.configs[""])
        expected = run()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "loftq", "lora_alpha": 2},
    ],
    ids=lambda fields: "-".join(map(str, fields)),
)
def test_sites_that_are_more_than_a_product_take_apply(fields):
    assert step_at(sequential(), LoraConfig(**{**FIELDS, **fields})) is None


def test_several_adapters_and_rows_of_many_are_each_right():
    model, x = sequential().double(), torch.randn(3, 3, dtype=torch.float64)
    graft = bind(model, {name: LoraConfig(**FIELDS) for name in "ab"})
    params = graft.init()
    products = {name: 4 * x @ (tree["0"]["lora_B"] @ tree["0"]["lora_A"]).mT for name, tree in params.items()}
    torch.testing.assert_close(graft(params, x), model(x) + products["a"] + products["b"])
    torch.testing.assert_close(graft({"b": params["b"]}, x), model(x) + products["b"])
    one = bind(model, LoraConfig(**FIELDS))
    many = stack([params["a"], params["b"]])
    rows = torch.stack([products["b"][0], products["a"][1], torch.zeros(4).double()])
    torch.testing.assert_close(one(route(many, torch.tensor([1, 0, -1])), x), model(x) + rows)


def scaled(layer):
    layer.scaling["default"] = 3.0
    return lambda base, product: base + 3 / 4 * product


def hooked_base(layer):
    layer.base_layer.register_forward_hook(lambda module, args, y: y + 1)
    return lambda base, product: base + 1 + product


def hooked_factor(layer):
    layer.lora_A["default"].register_forward_hook(lambda module, args, y: 2 * y)
    return lambda base, product: base + 2 * product


def own_forward(layer):
    layer.base_layer.forward = lambda x: torch.zeros(*x.shape[:-1], 4, dtype=x.dtype)
    return lambda base, product: product


def replaced_base(layer):
    layer.base_layer = copy.deepcopy(layer.base_layer)
    nn.init.zeros_(layer.base_layer.weight)
    nn.init.zeros_(layer.base_layer.bias)
    return lambda base, product: product


def replaced_weight(layer):
    layer.base_layer.weight = nn.Parameter(torch.zeros_like(layer.base_layer.weight))
    return lambda base, product: layer.base_layer.bias + product


def replaced_factor(layer):
    layer.lora_B["default"].weight = nn.Parameter(2 * layer.lora_B["default"].weight.detach())
    return lambda base, product: base + 2 * product


def written_factor(layer):
    layer.lora_B["default"].weight.data.mul_(2)
    return lambda base, product: base + 2 * product


def parametrised_factor(layer):
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    nn.utils.parametrize.register_parametrization(layer.lora_A["default"], "weight", Doubled())
    return lambda base, product: base + 2 * product


def biased_factor(layer):
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(4, dtype=torch.float64))
    return lambda base, product: base + product + 4


def another_class(layer):
    class Negated(nn.Linear):
        def forward(self, x):
            return -super().forward(x)

    layer.base_layer.__class__ = Negated
    layer.refresh()
    return lambda base, product: -(base + product)


def nothing_active(layer):
    layer.enable_adapters(False)
    return lambda base, product: base


def merged(layer):
    layer.merge()
    return lambda base, product: base + product


CHANGES = [
    scaled, hooked_base, hooked_factor, own_forward, replaced_base, replaced_weight, replaced_factor, written_factor,
    parametrised_factor, biased_factor, another_class, nothing_active, merged,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_after_the_decision_is_in_the_next_call(change):
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    model = inject_adapter_in_model(LoraConfig(**FIELDS), sequential().double())
    layer = model[0]
    base = layer.base_layer(x)
    product = 4 * x @ (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).mT
    torch.testing.assert_close(model(x), base + product)
    assert layer._live.step is not None
    expected = change(layer)(base, product)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), expected)


def test_another_adapter_another_dtype_and_dropout_after_the_decision():
    x = torch.randn(2, 3, dtype=torch.float64)
    model = inject_adapter_in_model(LoraConfig(**FIELDS, lora_dropout=0.5), sequential().double().eval())
    inject_adapter_in_model(LoraConfig(**FIELDS), model, "other")
    layer = model[0]
    for name in ("default", "other", "default"):
        set_adapter(model, name)
        product = 4 * x @ (layer.lora_B[name].weight @ layer.lora_A[name].weight).mT
        torch.testing.assert_close(model(x), layer.base_layer(x) + product)
    model.train()
    torch.manual_seed(0)
    y = model(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    product = 4 * dropped @ (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).mT
    torch.testing.assert_close(y, layer.base_layer(x) + product)
    model.eval().float()
    assert model(x.float()).dtype == torch.float32


def grown(params):
    for leaf, axis in (("lora_A", 0), ("lora_B", 1)):
        tensor = params["0"][leaf]
        tensor.data = torch.cat([tensor.data, tensor.data], axis)


def stacked(params):
    for tensor in params["0"].values():
        tensor.data = torch.stack([tensor.data, tensor.data])


def transposed(params):
    params["0"]["lora_A"].data = params["0"]["lora_A"].data.mT.contiguous()


@pytest.mark.parametrize("change", [grown, stacked, transposed], ids=lambda change: change.__name__)
@pytest.mark.parametrize("unchanging", [False, True])
def test_leaves_that_get_another_shape_after_a_call_are_an_error(change, unchanging):
    graft = bind(sequential(), LoraConfig(**FIELDS))
    graft = graft.unchanging() if unchanging else graft
    params, x = graft.init(), torch.ones(2, 3)
    graft(params, x)
    change(params)
    with pytest.raises((ValueError, RuntimeError), match="has shape|shapes cannot be multiplied"):
        graft(params, x)


def test_a_tree_that_was_accepted_is_looked_at_again_when_it_changes():
    graft, x = bind(sequential(), LoraConfig(**FIELDS)), torch.ones(2, 3)
    params, other = graft.init(), graft.init(torch.Generator().manual_seed(1))
    expected = graft(other, x)
    graft(params, x)
    params["0"]["lora_A"] = other["0"]["lora_A"]
    params["0"] |= {"lora_B": other["0"]["lora_B"]}
    torch.testing.assert_close(graft(params, x), expected, rtol=0, atol=0)
    params["0"]["lora_C"] = params["0"].pop("lora_B")
    with pytest.raises(KeyError, match="unknown leaf 'lora_C'"):
        graft(params, x)
    with pytest.raises(KeyError, match="unknown site '1'"):
        graft({**other, "1": other["0"]}, x)
    with pytest.raises(KeyError, match="lacks site '0'"):
        graft({}, x)


def test_a_pickled_graft_knows_no_tree():
    graft, x = bind(sequential(), LoraConfig(**FIELDS)), torch.ones(2, 3)
    params = graft.init()
    y = graft(params, x)
    (form,) = graft.binding._forms.values()
    assert form.knows(params)
    again = pickle.loads(pickle.dumps(graft))
    assert not any(form.knows(params) for form in again.binding._forms.values())
    torch.testing.assert_close(again(params, x), y, rtol=0, atol=0)


def shortened(leaf):
    leaf.data = leaf.data[:1]  # which torch would repeat


def test_leaves_that_torch_would_repeat_are_an_error_in_calls_views_and_in_place():
    model, x = sequential(), torch.ones(2, 3)
    graft = bind(model, LoraConfig(**FIELDS))
    params = graft.init()
    view, placed = graft.view(params), inject_adapter_in_model(LoraConfig(**FIELDS), copy.deepcopy(model))
    calls = [lambda: graft(params, x), lambda: view(x), lambda: placed(x)]
    for call in calls:
        call()
    shortened(params["0"]["lora_B"])
    shortened(placed[0].lora_B["default"].weight)
    for call in calls:
        with pytest.raises(ValueError, match=r"0: the adapter's lora_B has shape \(1, 2\), expected \(4, 2\)"):
            call()


@pytest.mark.parametrize("layout", ["rows", "last of a sequence", "transposed"])
def test_small_inputs_give_the_bits_of_apply_where_the_output_is_large(layout):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2**14, bias=False)), torch.randn(1, 5, 3)
    x = {"rows": x, "last of a sequence": x[:, -1:], "transposed": x.transpose(0, 1)}[layout]
    graft = bind(model, LoraConfig(**FIELDS))
    params = graft.init()
    y = graft(params, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiteRuntime, "decide", lambda runtime: None)
        assert torch.equal(bind(model, LoraConfig(**FIELDS))(params, x), y)
