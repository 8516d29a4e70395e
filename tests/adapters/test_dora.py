"""DoRA and the bias of B: their equations in float64, PEFT's numbers, and norms that are never out of date."""

import contextlib
import copy
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, hessian, vmap
from transformers.pytorch_utils import Conv1D

from torchgraft import adapters
from torchgraft.adapters import LoraConfig, inject_adapter_in_model
from torchgraft.adapters._methods.lora import dora
from torchgraft.functional import Site, bind, functional_call, merge, route, stack

LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), lambda: torch.randn(3, 4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), lambda: torch.randn(3, 2, 4)),
    "conv1d of transformers": (lambda: Conv1D(6, 4), lambda: torch.randn(3, 4)),
    "embedding": (lambda: nn.Embedding(5, 4), lambda: torch.randint(0, 5, (3, 2))),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=1), lambda: torch.randn(2, 4, 6, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: torch.randn(2, 4, 3, 4, 5)),
}
MAGNITUDE = "lora_magnitude_vector"


def built(kind, dtype=torch.float64, **fields):
    torch.manual_seed(0)
    make, inputs = LAYERS[kind]
    model = nn.Sequential()
    model.add_module("layer", make().to(dtype))
    x = inputs() if kind == "embedding" else inputs().to(dtype)
    graft = bind(
        model, LoraConfig(**{"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["layer"], **fields})
    )
    return model, graft, moved(graft.init()), x


def moved(params, seed=1):
    torch.manual_seed(seed)
    return {path: {leaf: t + 0.5 * torch.randn_like(t) for leaf, t in own.items()} for path, own in params.items()}


def injected_by_peft(model, kind, **fields):
    fields = {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["layer"], **fields}
    fields["fan_in_fan_out"] = kind == "conv1d of transformers"
    with pytest.warns(UserWarning, match="groups") if "grouped" in kind else contextlib.nullcontext():
        return peft.inject_adapter_in_model(peft.LoraConfig(**fields), copy.deepcopy(model))


def peft_own(injected):
    state = peft.get_peft_model_state_dict(injected)
    return {key.removeprefix("layer.").removesuffix(".weight"): value for key, value in state.items()}


@pytest.mark.parametrize("kind", LAYERS)
def test_init_output_and_gradients_are_pefts(kind):
    model, graft, _, x = built(kind)
    torch.manual_seed(5)
    own = graft.init()["layer"]
    torch.manual_seed(5)
    injected = injected_by_peft(model, kind)
    assert {leaf: t.shape for leaf, t in own.items()} == {leaf: t.shape for leaf, t in peft_own(injected).items()}
    for leaf, theirs in peft_own(injected).items():
        torch.testing.assert_close(own[leaf], theirs, rtol=1e-12, atol=0)
    params = moved({"layer": own})
    keys = {leaf: leaf if leaf == MAGNITUDE or "embedding" in leaf else f"{leaf}.weight" for leaf in own}
    peft.set_peft_model_state_dict(injected, {f"layer.{keys[leaf]}": t for leaf, t in params["layer"].items()})
    torch.testing.assert_close(graft(params, x), injected(x), rtol=1e-10, atol=1e-10)
    injected(x).square().sum().backward()
    grads = grad(lambda params: graft(params, x).square().sum())(params)["layer"]
    for name, parameter in injected.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(grads[name.split(".")[1]], parameter.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "grouped" not in kind])
def test_equation(kind):
    model, graft, params, x = built(kind)
    layer = model.layer
    transposed = kind in ("embedding", "conv1d of transformers")

    def dense(params):
        a, b, m = (params["layer"][leaf] for leaf in sorted(params["layer"]))
        weight = layer.weight.detach()
        weight = weight.mT if transposed else weight
        v = weight + 3 / 2 * (b.flatten(1) @ a.flatten(1)).view(weight.shape)
        norm = v.flatten(1).norm(dim=1).detach()
        w = (m.flatten() / norm).view(-1, *(1,) * (v.ndim - 1)) * v
        own = {"layer.weight": w.mT if transposed else w}
        return torch.func.functional_call(model, own, (x,))

    torch.testing.assert_close(graft(params, x), dense(params), rtol=1e-11, atol=1e-11)
    own, expected = (grad(lambda params, f=f: f(params).square().sum())(params) for f in (lambda p: graft(p, x), dense))
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)
    # The second order is that of the detached norm, nested transforms or not.
    flat = params["layer"][MAGNITUDE], params["layer"][min(params["layer"])]
    names = MAGNITUDE, min(params["layer"])

    def loss(f):
        return lambda *leaves: f({"layer": {**params["layer"], **dict(zip(names, leaves, strict=True))}}).sin().sum()

    own, expected = (hessian(loss(f), argnums=(0, 1))(*flat) for f in (lambda p: graft(p, x), dense))
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)


def test_dropout_is_on_the_adapters_input_only():
    model, graft, params, x = built("linear", lora_dropout=0.5)
    torch.manual_seed(3)
    d = F.dropout(x, 0.5)
    a, b, m = (params["layer"][leaf] for leaf in sorted(params["layer"]))
    weight, bias = model.layer.weight, model.layer.bias
    g = m / (weight + 3 / 2 * b @ a).norm(dim=1)
    torch.manual_seed(3)
    expected = F.linear(x, weight, bias) + (g - 1) * (d @ weight.T) + g * 3 / 2 * (d @ a.T @ b.T)
    torch.testing.assert_close(graft(params, x), expected)
    model.eval()
    torch.testing.assert_close(graft(params, x), g * (x @ (weight + 3 / 2 * b @ a).T) + bias)


def test_the_base_runs_once_without_dropout(monkeypatch):
    model, graft, params, x = built("linear", lora_dropout=0.5)
    calls, call = [], Site.call
    monkeypatch.setattr(Site, "call", lambda *args: calls.append(args) or call(*args))
    for training in (False, True):
        model.train(training)
        graft(params, x)
        graft(route(stack([params, params]), torch.tensor([0, 1, 0])), x)
        assert len(calls) == 2 * training


def test_rows_of_zeros_stay_finite():
    model, graft, _, x = built("linear")
    with torch.no_grad():
        model.layer.weight[2] = 0
    params = graft.init()
    assert torch.equal(graft(params, x), model(x))
    grads = grad(lambda params: graft(params, x).square().sum())(params)["layer"]
    assert all(g.isfinite().all() for g in grads.values())
    assert torch.equal(merge(graft, params)["layer.weight"], model.layer.weight)
    params["layer"]["lora_B"] = torch.ones(6, 2, dtype=torch.float64)
    params["layer"][MAGNITUDE] = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(
        merge(graft, params)["layer.weight"].norm(dim=1), torch.ones(6, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_starts_as_the_identity_in_half_precision_in_place(kind, dtype):
    model, _, _, x = built(kind, dtype)
    expected, weight = model(x), model.layer.weight.clone()
    injected = inject_adapter_in_model(LoraConfig(r=2, use_dora=True, target_modules=["layer"]), model)
    assert injected.layer.lora_magnitude_vector["default"].weight.dtype == dtype
    assert torch.equal(injected(x), expected)
    if "grouped" not in kind:
        adapters.merge_adapter(injected)
        assert torch.equal(injected.layer.base_layer.weight, weight)
        assert torch.equal(injected.layer.get_delta_weight("default"), torch.zeros_like(weight))


OPTIONS = {"dora": {"use_dora": True}, "lora": {}, "bias": {"lora_bias": True}}
MIXED = [
    ("dora", "lora"),
    ("lora", "dora"),
    ("dora", "bias"),
    ("bias", "dora"),
    ("dora", "dora"),
    ("dora", "lora", "dora"),
]


def named(model, kinds, **fields):
    """A graft of adapters of these kinds on each other, and a tree."""
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["layer"], **fields}
    graft = bind(model, {f"a{i}": LoraConfig(**fields, **OPTIONS[kind]) for i, kind in enumerate(kinds)})
    return graft, {name: moved(own, i + 1) for i, (name, own) in enumerate(graft.init().items())}


def by_equation(weight, bias, kinds, params):
    """Weight and bias: `b + g (y - b + s B A x)` of each DoRA, with `g = m / |W + s B A|` of the base's own weight."""
    w, b = weight, bias
    for kind, tree in zip(kinds, params.values(), strict=True):
        own = tree["layer"]
        delta = 1.5 * own["lora_B"] @ own["lora_A"]
        w = w + delta
        b = b + 1.5 * own["lora_B_bias"] if kind == "bias" else b
        if kind == "dora":
            gain = own[MAGNITUDE] / (weight + delta).norm(dim=1)
            w, b = w * gain[:, None], bias + gain * (b - bias)
    return w, b


@pytest.mark.parametrize("kinds", MIXED, ids=str)
def test_norms_are_those_of_the_base_whatever_is_beneath(kinds):
    model, _, _, x = built("linear")
    graft, params = named(model, kinds)
    weight, bias = by_equation(model.layer.weight, model.layer.bias, kinds, params)
    torch.testing.assert_close(graft(params, x), F.linear(x, weight, bias))
    state = merge(graft, params)
    torch.testing.assert_close((state["layer.weight"], state["layer.bias"]), (weight, bias))
    torch.testing.assert_close(graft.view(params).layer.weight, weight)


@pytest.mark.parametrize("kinds", MIXED, ids=str)
def test_rows_of_several_adapters_on_each_other(kinds):
    model, _, _, x = built("linear")
    graft, params = named(model, kinds)
    other = {name: moved(tree, 9) for name, tree in params.items()}
    rows = torch.tensor([1, 0, 1])
    expected = torch.stack([graft((params, other)[row], x)[i] for i, row in enumerate(rows)])
    torch.testing.assert_close(graft(route(stack([params, other]), rows), x), expected)
    first, *_ = params
    one = {**params, first: route(stack([params[first], other[first]]), rows)}
    expected = torch.stack([graft({**params, first: (params, other)[row][first]}, x)[i] for i, row in enumerate(rows)])
    torch.testing.assert_close(graft(one, x), expected)


def test_a_fresh_adapter_on_another_changes_nothing():
    model, graft, _, x = built("linear")
    graft = bind(model, {name: LoraConfig(use_dora=True, target_modules=["layer"]) for name in ("a", "b")})
    params = graft.init()
    params["a"] = moved(params["a"])
    assert torch.equal(graft(params, x), graft({"a": params["a"]}, x))


MANY = "ignore:Already found a `peft_config` attribute"
ACTIVE = [["a0"], ["a1"], ["a0", "a1"], ["a1", "a0"]]


@pytest.mark.slow
@pytest.mark.filterwarnings(MANY)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kinds", [one for one in MIXED if len(one) == 2], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "grouped" not in kind])
def test_several_active_adapters_are_pefts(kind, kinds, dropout):
    if "bias" in kinds and kind in ("embedding", "linear without bias"):
        return
    model, _, _, x = built(kind)
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    for i, one in enumerate(kinds):
        fields = {"r": 2, "lora_alpha": 3, "target_modules": ["layer"], "lora_dropout": dropout, **OPTIONS[one]}
        with_layout = {"fan_in_fan_out": kind == "conv1d of transformers"}
        peft.inject_adapter_in_model(peft.LoraConfig(**fields, **with_layout), theirs, f"a{i}")
        inject_adapter_in_model(LoraConfig(**fields), ours, f"a{i}")
        state = adapters.get_peft_model_state_dict(ours, adapter_name=f"a{i}")
        torch.manual_seed(i)
        state = {key: t + 0.5 * torch.randn_like(t) for key, t in state.items()}
        adapters.set_peft_model_state_dict(ours, state, f"a{i}")
        peft.set_peft_model_state_dict(theirs, state, f"a{i}")
    for active in ACTIVE:
        theirs.layer.set_adapter(active)
        adapters.set_adapter(ours, active)
        for training in (False, True) if dropout else (False,):
            outputs = []
            for one in (theirs.train(training), ours.train(training)):
                torch.manual_seed(3)
                outputs.append(one(x))
                outputs[-1].square().sum().backward()
            torch.testing.assert_close(*outputs)
        grads = [{n: p.grad for n, p in one.named_parameters() if p.grad is not None} for one in (theirs, ours)]
        torch.testing.assert_close(grads[1], grads[0])
        expected = ours.eval()(x).detach()
        adapters.merge_adapter(ours)
        torch.testing.assert_close(ours(x), expected)
        if "bias" not in kinds:
            theirs.layer.merge()
            torch.testing.assert_close(ours.layer.base_layer.weight, theirs.layer.base_layer.weight)
            theirs.layer.unmerge()
        adapters.unmerge_adapter(ours)
        adapters.merge_adapter(ours, active[:1])
        torch.testing.assert_close(ours(x), expected)
        adapters.unmerge_adapter(ours)
        for one in (theirs, ours):
            one.zero_grad()


class Scaled(nn.Embedding):
    """An embedding with a forward of its own."""

    def forward(self, ids):
        return 3 * super().forward(ids)


@pytest.mark.parametrize("kinds", [("dora", "dora"), ("lora", "dora")], ids=str)
def test_on_merged_ones_in_a_module_with_a_forward_of_its_own(kinds):
    model, ids = nn.ModuleDict({"layer": Scaled(5, 4)}), torch.tensor([0, 3])
    for i, kind in enumerate(kinds):
        config = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False, **OPTIONS[kind])
        inject_adapter_in_model(config, model, f"a{i}")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
    for names in (["a0", "a1"], ["a1", "a0"]):
        adapters.set_adapter(model, names)
        expected = model["layer"](ids)
        adapters.merge_adapter(model, names[:1])
        torch.testing.assert_close(model["layer"](ids), expected)
        adapters.merge_adapter(model)
        torch.testing.assert_close(model["layer"](ids), expected)


def test_a_new_adapter_starts_from_the_weights_without_merged_ones():
    model, _, _, _x = built("linear")
    original = model.layer.weight.detach().clone()
    config = LoraConfig(r=2, use_dora=True, target_modules=["layer"], init_lora_weights=False)
    inject_adapter_in_model(config, model, "first")
    adapters.merge_adapter(model)
    inject_adapter_in_model(LoraConfig(r=2, use_dora=True, target_modules=["layer"]), model, "second")
    torch.testing.assert_close(model.layer.lora_magnitude_vector["second"].weight.detach(), original.norm(dim=1))


def test_configs_of_a_stack_may_differ_in_rank_and_scaling():
    model, _, _, x = built("linear")
    configs = [LoraConfig(r=r, lora_alpha=r + 1, use_dora=True, target_modules=["layer"]) for r in (1, 3)]
    graft = bind(model, configs)
    trees = [moved(graft.member(i).init(), i) for i in range(2)]
    many, rows = graft.stack(trees), [1, -1, 0]
    expected = torch.stack([model(x)[i] if r < 0 else graft.member(r)(trees[r], x)[i] for i, r in enumerate(rows)])
    torch.testing.assert_close(graft(route(many, torch.tensor(rows)), x), expected)
    each = torch.stack([graft.member(i)(trees[i], x) for i in range(2)])
    torch.testing.assert_close(vmap(lambda i, p: graft.at(i)(p, x))(torch.arange(2), many), each)


def test_autocast_does_not_touch_the_norms():
    model, graft, params, x = built("linear", torch.float32)
    many = stack([params, moved(params)])
    with torch.autocast("cpu", torch.bfloat16):
        own = graft(route(many, torch.tensor([0, 0, 0])), x), graft(params, x)
        a, b, _m = (params["layer"][leaf] for leaf in sorted(params["layer"]))
        site = graft.sites[""]["layer"]
        norms = dora.norms(site, a, b, model.layer.weight, 1.5)
    torch.testing.assert_close(norms, (model.layer.weight + 1.5 * b @ a).norm(dim=1))
    assert all(torch.allclose(y.float(), graft(params, x), atol=0.1) for y in own)


# -- norms that follow every write, and those of a view that is said to be constant ----------------------------------


@pytest.fixture
def computed(monkeypatch):
    """How often norms were computed."""
    calls, norms = [], dora.norms
    monkeypatch.setattr(dora, "norms", lambda *args: calls.append(args) or norms(*args))
    return calls


def numpy_write(tensor):
    tensor.detach().numpy()[...] *= 1.5


WRITES = {
    "in place": lambda tensor: tensor.mul_(1.5),
    "data": lambda tensor: tensor.data.mul_(1.5),
    "numpy": numpy_write,
    "new storage": lambda tensor: setattr(tensor, "data", tensor.data * 1.5),
    "inference mode": lambda tensor: torch.inference_mode()(tensor.mul_)(1.5),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv1d of transformers", "conv2d"])
def test_norms_follow_every_write(kind, write):
    model, graft, params, x = built(kind)
    model.requires_grad_(False)
    config = LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["layer"])
    injected = inject_adapter_in_model(config, copy.deepcopy(model), params=params).requires_grad_(False)
    layer, view, own = injected.layer, graft.view(params), params["layer"]
    graft(params, x), view(x), injected(x)
    pairs = [(tensor, layer.leaves("default")[leaf]) for leaf, tensor in own.items()]
    for pair in [*pairs, (model.layer.weight, layer.base_layer.weight)]:
        for tensor in pair:
            WRITES[write](tensor)
        fresh = bind(copy.deepcopy(model), config)({"layer": {leaf: t.clone() for leaf, t in own.items()}}, x)
        moves = write == "new storage" and pair[0] is model.layer.weight  # views do not follow where the base moves
        for y in (graft(params, x), injected(x), graft.view(params)(x) if moves else view(x)):
            torch.testing.assert_close(y, fresh, rtol=1e-12, atol=1e-12)


def test_tensors_of_inference_mode_adapt():
    with torch.inference_mode():
        model, graft, params, x = built("linear")
        expected = (model.layer.weight + 1.5 * params["layer"]["lora_B"] @ params["layer"]["lora_A"]).norm(dim=1)
        expected = (params["layer"][MAGNITUDE] / expected).unsqueeze(1) * (
            model.layer.weight + 1.5 * params["layer"]["lora_B"] @ params["layer"]["lora_A"]
        )
        for call in (lambda x: graft(params, x), graft.view(params), graft.view(params, constant=True)):
            torch.testing.assert_close(call(x), F.linear(x, expected, model.layer.bias))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_view_that_is_said_to_be_constant_computes_norms_once(kind, computed):
    _, graft, params, x = built(kind)
    view = graft.view(params, constant=True)
    assert len(computed) == 1 + len(graft.sites[""])  # at init, and here
    torch.testing.assert_close(view(x), graft(params, x))
    computed.clear()
    torch.testing.assert_close(view.train()(x), view(x))
    torch.testing.assert_close(copy.deepcopy(view)(x), view(x))
    assert not computed
    graft.view(params)(x), graft.view(params)(x)
    assert len(computed) == 2


def test_constant_views_of_several_adapters_compiled_and_with_dropout(computed):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double().eval(), torch.randn(3, 4).double()
    configs = {
        "a": LoraConfig(r=2, use_dora=True, target_modules=["0"], lora_dropout=0.5, init_lora_weights="pissa"),
        "b": adapters.IA3Config(target_modules=["0", "1"], feedforward_modules=[]),
        "c": LoraConfig(r=2, use_dora=True, target_modules=["0", "1"]),
    }
    graft = bind(model, configs)
    params = {name: moved(tree) for name, tree in graft.init().items()}
    view = graft.view(params, constant=True)
    computed.clear()
    torch.testing.assert_close(view(x), graft(params, x))
    assert len(computed) == 3  # by the plain call
    torch.testing.assert_close(torch.compile(view, backend="eager", fullgraph=True)(x), view(x))
    torch.manual_seed(3)
    y = view.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(y, graft.view(params).train()(x))
    assert len(computed) == 6  # three more by the plain view


def test_leaves_that_no_view_can_take_for_constant_are_refused():
    _, graft, params, x = built("linear")
    params["layer"]["lora_B"].requires_grad_()
    with pytest.raises(ValueError, match=r"constant is True, and params\['layer'\]\['lora_B'\] requires a gradient"):
        graft.view(params, constant=True)
    params["layer"]["lora_B"].requires_grad_(False)
    with pytest.raises(ValueError, match="is part of a transform,.* leave constant out"):
        vmap(lambda tree: graft.view(tree, constant=True)(x))(stack([params, params]))
    many = stack([params, moved(params)])
    view = graft.view(route(many, torch.tensor([0, 1, -1])), constant=True)
    torch.testing.assert_close(view(x), graft(route(many, torch.tensor([0, 1, -1])), x))


def test_calls_compute_norms_of_what_they_are_given(computed):
    model, graft, params, x = built("linear")
    one = graft(params, x)
    computed.clear()
    trained = {"layer": {leaf: t.clone().requires_grad_() for leaf, t in params["layer"].items()}}
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(graft(trained, x), one)
            trained["layer"]["lora_B"].data.copy_(params["layer"]["lora_B"])
    assert len(computed) == 2
    tangent = {"layer": {leaf: torch.ones_like(t) for leaf, t in params["layer"].items()}}
    with torch.autograd.forward_ad.dual_level():
        dual = {
            "layer": {
                leaf: torch.autograd.forward_ad.make_dual(t, tangent["layer"][leaf])
                for leaf, t in params["layer"].items()
            }
        }
        assert torch.autograd.forward_ad.unpack_dual(graft(dual, x)).tangent is not None
    assert len(computed) == 3
    base = {name: t.detach().clone() for name, t in model.named_parameters()}
    torch.testing.assert_close(functional_call(graft, (base, params), (x,)), one)
    base["layer.weight"].mul_(2)
    y = functional_call(graft, (base, params), (x,))
    model.load_state_dict(base)
    torch.testing.assert_close(y, graft(moved_back(params), x).detach())


def moved_back(params):
    return {"layer": {leaf: t.clone().requires_grad_() for leaf, t in params["layer"].items()}}


def test_layers_in_place_compute_norms_in_each_forward(computed):
    model, _, _, x = built("linear")
    config = LoraConfig(r=2, use_dora=True, target_modules=["layer"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    adapters.set_requires_grad(model, "default", False)
    computed.clear()
    first = model(x)
    assert torch.equal(model(x), first) and len(computed) == 2
    model.layer.scaling["default"] = 7.0
    assert not torch.allclose(model(x), first)


# -- attributes, files and errors ------------------------------------------------------------------------------------


def test_layers_show_what_pefts_show():
    model, _, _, _x = built("linear")
    theirs = injected_by_peft(model, "linear").layer
    own = inject_adapter_in_model(LoraConfig(r=2, use_dora=True, target_modules=["layer"]), model).layer
    assert own.use_dora["default"] is theirs.use_dora["default"] is True
    assert own.lora_bias["default"] is theirs.lora_bias["default"] is False
    assert [name for name, _ in own.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor:Warning")
def test_files_go_both_ways(options, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(3, 4)
    fields = {"r": 2, "target_modules": ["0", "2"], **options}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    mine = copy.deepcopy(model)
    adapters.load_adapter(mine, tmp_path / "theirs")
    torch.testing.assert_close(mine(x), theirs(x))
    adapters.save_adapter(mine, tmp_path / "mine")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "mine")
    torch.testing.assert_close(again(x), theirs(x))
    graft = bind(model, LoraConfig(**fields))
    params = adapters.load_adapter(graft, tmp_path / "mine")
    torch.testing.assert_close(graft(params, x), theirs(x))
    with pytest.raises(
        ValueError, match=f"{next(iter(options))} is True in the file and False in the graft|differs|has"
    ):
        adapters.load_adapter(bind(model, LoraConfig(r=2, target_modules=["0", "2"])), tmp_path / "mine")


def test_what_cannot_be_says_so():
    model, _, _, x = built("linear")
    with pytest.raises(ValueError, match="LoraConfig: use_dora and lora_bias are both True"):
        LoraConfig(use_dora=True, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias is True and init_lora_weights 'gaussian', expected True or False"):
        LoraConfig(lora_bias=True, init_lora_weights="gaussian")
    with pytest.raises(ValueError, match="lora_bias is True, which layer, an embedding, cannot have; leave it out"):
        built("embedding", use_dora=False, lora_bias=True)
    with pytest.raises(ValueError, match=r"configs\[1\].use_dora is True and configs\[0\].use_dora is False"):
        bind(model, [LoraConfig(target_modules=["layer"], use_dora=use) for use in (False, True)])
    with pytest.warns(
        adapters.PeftWarning, match=r"lora_bias is True, and \['layer'\] have no bias, .* cannot be merged"
    ):
        _, graft, params, x = built("linear without bias", use_dora=False, lora_bias=True)
    with pytest.raises(ValueError, match="layer: lora_bias adds a bias, and this module has none to merge it into"):
        merge(graft, params)
    torch.testing.assert_close(
        graft(params, x) - graft({"layer": {**params["layer"], "lora_B_bias": torch.zeros(6).double()}}, x),
        (1.5 * params["layer"]["lora_B_bias"]).expand(3, 2, 6),
    )
    _, graft, params, _ = built("conv2d grouped")
    with pytest.raises(ValueError, match="layer: LoRA on a convolution with 2 groups sees all channels"):
        merge(graft, params)


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal"])
def test_starts_from_the_weight_as_in_peft(start):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(3, 6)
    fields = {"r": 2, "lora_alpha": 3, "use_dora": True, "init_lora_weights": start, "target_modules": ["0"]}
    graft = bind(model, LoraConfig(**fields))
    torch.manual_seed(1)
    params = graft.init()
    torch.manual_seed(1)
    injected = peft.inject_adapter_in_model(peft.LoraConfig(**fields), copy.deepcopy(model))
    torch.testing.assert_close(params["0"][MAGNITUDE], injected[0].lora_magnitude_vector["default"].weight)
    for leaf in ("lora_A", "lora_B"):
        torch.testing.assert_close(params["0"][leaf], getattr(injected[0], leaf)["default"].weight)
    torch.testing.assert_close(graft(params, x), injected(x), rtol=1e-5, atol=1e-5)
    params = {"0": {leaf: t + 0.3 * torch.randn_like(t) for leaf, t in params["0"].items()}}
    with torch.no_grad():
        for leaf in ("lora_A", "lora_B", MAGNITUDE):
            getattr(injected[0], leaf)["default"].weight.copy_(params["0"][leaf])
    torch.testing.assert_close(graft(params, x), injected(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_trees_empty_weights_and_copies(options):
    model, _, _, x = built("linear", use_dora=False)
    config = LoraConfig(r=2, target_modules=["layer"], **options)
    graft = bind(copy.deepcopy(model), config)
    params = moved(graft.init())
    expected = graft(params, x)
    injected = inject_adapter_in_model(config, copy.deepcopy(model), params=params)
    torch.testing.assert_close(injected(x), expected)
    extracted = adapters.extract_params(injected)
    assert all(extracted["layer"][leaf].data_ptr() == t.data_ptr() for leaf, t in params["layer"].items())
    torch.testing.assert_close(adapters.extract_graft(injected)(extracted, x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(injected))(x), expected)
    torch.testing.assert_close(copy.deepcopy(injected)(x), expected)
    state = adapters.get_peft_model_state_dict(injected)
    empty = inject_adapter_in_model(config, copy.deepcopy(model), low_cpu_mem_usage=True, state_dict=state)
    assert all(p.is_meta for name, p in empty.named_parameters() if "lora_" in name)
    assert adapters.set_peft_model_state_dict(empty, state, low_cpu_mem_usage=True) == ([], [])
    torch.testing.assert_close(empty(x), expected)
    trained = [name for name, p in injected.named_parameters() if p.requires_grad]
    assert len(trained) == len(params["layer"]) == 3
    adapters.set_adapter(injected, [])
    assert not any(p.requires_grad for p in injected.parameters())
    torch.testing.assert_close(injected(x), model(x))
    adapters.delete_adapter(injected, "default")
    assert not any("lora_" in name for name, _ in injected.named_parameters())


def test_a_quantised_weight_is_refused_with_words():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="0: its weight is torch.int8"):
        bind(model, LoraConfig(r=2, use_dora=True, target_modules=["0"])).init()
