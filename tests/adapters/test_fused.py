"""The adapted linear layer as one step: the same numbers as torch's own functions, wherever it may run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchgraft.adapters import (
    AdaLoraConfig,
    DeloraConfig,
    IA3Config,
    LoraConfig,
    MissConfig,
    OFTConfig,
    VeraConfig,
    inject_adapter_in_model,
)
from torchgraft.adapters._methods.shared import fused
from torchgraft.functional import bind, functional_call

TRACED = {
    "lora": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    "lora_bias": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_bias=True),
    "dora": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_dora=True),
    "ia3": IA3Config(target_modules=["0"], init_ia3_weights=False),
    "vera": VeraConfig(r=2, target_modules=["0"], init_weights=False),
    "adalora": AdaLoraConfig(target_modules=["0"], total_step=10, init_lora_weights=False),
    "oft": OFTConfig(r=0, oft_block_size=2, target_modules=["0"], init_weights=False),
}


def composed(x, weight, bias, a, b, scaling, keep=None, kept=1.0):
    dropped = x if keep is None else x * keep / kept
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(dropped, a), b)


def tensors(*batch, sizes=(5, 7, 3), bias=True):
    i, o, r = sizes
    shapes = [(*batch, i), (o, i), (o,), (r, i), (o, r)]
    made = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return made if bias else [*made[:2], None, *made[3:]]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.4]),
    wanted=st.sets(st.integers(0, 4), min_size=1),
)
def test_value_and_gradients_are_those_of_the_composed_functions(batch, sizes, bias, p, wanted):
    torch.manual_seed(0)
    made = tensors(*batch, sizes=sizes, bias=bias)
    wanted = [i for i in wanted if made[i] is not None]
    for index, tensor in enumerate(made):
        if tensor is not None:
            tensor.requires_grad_(index in wanted)
    torch.manual_seed(1)
    y = fused.linear(*made, 0.7, p)
    torch.manual_seed(1)
    expected = composed(*made, 0.7, *(fused.draw(made[0], p) if p else ()))
    torch.testing.assert_close(y, expected)
    if wanted:
        g = torch.randn_like(y)
        asked = [made[i] for i in wanted]
        torch.testing.assert_close(torch.autograd.grad(y, asked, g), torch.autograd.grad(expected, asked, g))


STEPS = {
    "lora": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    "vera": VeraConfig(r=2, target_modules=["0"], init_weights=False),
    "miss": MissConfig(r=2, target_modules=["0"], init_weights=False),
    "delora": DeloraConfig(r=2, target_modules=["0"], init_weights=False),
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("config", list(STEPS))
def test_small_and_large_inputs_are_the_same_function(config, bias, trained, monkeypatch):
    """Values and first and second derivatives, also of the base, with the step of large inputs and without."""
    model = nn.Sequential(nn.Linear(6, 4, bias=bias)).double()
    graft = bind(model, STEPS[config])
    params = graft.init(torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    base = {name: p.detach().clone().requires_grad_(trained) for name, p in model.named_parameters()}
    leaves = [x, *(leaf.requires_grad_() for leaf in params["0"].values()), *(base.values() if trained else ())]

    def derivatives(large):
        monkeypatch.setattr(fused, "_LARGE", large)
        y = functional_call(graft, (base, params), (x,))
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)
        with torch.no_grad():
            return y, functional_call(graft, (base, params), (x,)), *first, *second

    torch.testing.assert_close(derivatives(0), derivatives(2**14))


def test_small_inputs_add_no_step_of_autograd(monkeypatch):
    made = tensors(2, 3)
    assert "_Linear" in fused.linear(*made, 0.7).grad_fn.name()
    monkeypatch.setattr(fused, "_LARGE", 2**14)
    assert fused.linear(*made, 0.7).grad_fn.name() == "AddBackward0"


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_second_derivatives(p):
    made = tensors(2, 3)

    def f(*made):
        torch.manual_seed(2)
        return fused.linear(*made, 0.7, p)

    assert torch.autograd.gradcheck(f, made)
    assert torch.autograd.gradgradcheck(f, made)


def test_strided_inputs_and_gradients():
    x = torch.randn(4, 3, 5, dtype=torch.float64).transpose(0, 1).requires_grad_()
    made = [x, *tensors(1)[1:]]
    y, expected = fused.linear(*made, 0.7), composed(*made, 0.7)
    g = torch.randn(7, dtype=torch.float64).expand_as(y)
    torch.testing.assert_close(torch.autograd.grad(y, made, g), torch.autograd.grad(expected, made, g))


def test_output_may_be_written_to_in_place():
    made = tensors(2, 3)
    y, expected = fused.linear(*made, 0.7), composed(*made, 0.7)
    torch.testing.assert_close(
        torch.autograd.grad(y.relu_().square().sum(), made), torch.autograd.grad(expected.relu().square().sum(), made)
    )


@pytest.mark.parametrize("elements", [1000, 2**16 + 3])
@pytest.mark.parametrize("p", [0.1, 0.75, 1 - 1e-9, 1e-9])
def test_mask_keeps_what_it_says(elements, p):
    torch.manual_seed(0)
    keep, kept = fused.draw(torch.empty(elements), p)
    assert keep.shape == (elements,) and set(keep.unique().tolist()) <= {0, 1}
    assert abs(kept - (1 - p)) <= 2**-16 and kept > 0
    assert abs(keep.double().mean() - kept) < 4 * (kept * (1 - kept) / elements) ** 0.5 + 1e-4
    torch.manual_seed(0)
    assert torch.equal(fused.draw(torch.empty(elements), p)[0], keep)


def test_large_masks_are_independent_between_neighbours():
    torch.manual_seed(0)
    keep = fused.draw(torch.empty(2**20), 0.5)[0].double() - 0.5
    for lag in (1, 2, 3, 4, 8):
        assert abs((keep[lag:] * keep[:-lag]).mean()) < 0.002
    assert keep.view(-1, 4).mean(0).abs().max() < 0.004


def test_small_masks_are_those_of_torch():
    x = torch.ones(40, 50)
    torch.manual_seed(3)
    keep, kept = fused.draw(x, 0.3)
    torch.manual_seed(3)
    torch.testing.assert_close(F.dropout(x, 0.3), keep / kept)


def test_keeps_the_input_once_and_no_mask_in_floating_point():
    q, k = nn.Linear(64, 64), nn.Linear(64, 64)
    model = nn.ModuleDict({"q": q, "k": k}).requires_grad_(False)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model["q"](x) + self.model["k"](x)

    graft = bind(Both(), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q", "k"]))
    params = graft.init()
    leaves = [leaf.requires_grad_() for site in params.values() for leaf in site.values()]
    x, kept = torch.randn(1024, 64), {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *leaves)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        graft(params, x)
    sizes = [size for key, size in kept.items() if key not in known]
    assert sum(sizes) == x.nbytes + 2 * x.numel() + 2 * 1024 * 2 * 4


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, a, b: (x[0], w, a, b),
        lambda x, w, a, b: (x, w.double(), a, b),
        lambda x, w, a, b: (x, w, a.bfloat16(), b.bfloat16()),
    ],
    ids=["one axis", "wider base", "narrow adapter"],
)
def test_other_inputs_take_the_composed_functions(change):
    given = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)
    assert fused.fits(*given)
    assert not fused.fits(*change(*given))


def test_transforms_and_autocast_take_the_composed_functions():
    given = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)
    found = []
    torch.vmap(lambda x: found.append(fused.fits(x, *given[1:])) or x)(given[0][None])
    with torch.autocast("cpu"):
        found.append(fused.fits(*given))
    with torch.autograd.forward_ad.dual_level():
        found.append(fused.fits(*given))
    assert found == [False] * 3


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Replaced(nn.Linear):
    def forward(self, x):
        return x.sum(-1, keepdim=True) * self.weight[:, 0]


@pytest.mark.parametrize("cls", [Doubled, Replaced])
def test_layers_with_a_forward_of_their_own_keep_it(cls):
    model = nn.Sequential(cls(3, 4)).double()
    graft = bind(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    params, x = graft.init(torch.Generator().manual_seed(0)), torch.randn(5, 3, dtype=torch.float64)
    weight = model[0].weight + params["0"]["lora_B"] @ params["0"]["lora_A"] * 4
    twin = nn.Sequential(cls(3, 4)).double()
    twin.load_state_dict({"0.weight": weight, "0.bias": model[0].bias})
    torch.testing.assert_close(graft(params, x), twin(x))


def test_base_as_data_gets_its_gradients():
    model = nn.Sequential(nn.Linear(3, 4)).double()
    graft = bind(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    params, x = graft.init(torch.Generator().manual_seed(0)), torch.randn(5, 3, dtype=torch.float64)
    base = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    y = functional_call(graft, (base, params), (x,))
    weight, bias = torch.autograd.grad(y.sum(), list(base.values()))
    torch.testing.assert_close(weight, x.sum(0).expand(4, 3))
    torch.testing.assert_close(bias, torch.full((4,), 5.0, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(
    parts=st.integers(1, 3),
    each=st.integers(1, 3),
    length=st.sampled_from([None, 1, 4]),
    p=st.sampled_from([0.0, 0.4]),
    wanted=st.sets(st.integers(0, 4), min_size=1),
)
def test_parts_of_a_batch_are_each_alone(parts, each, length, p, wanted):
    torch.manual_seed(0)
    shape = (parts * each, *(() if length is None else (length,)), 5)
    shapes = [shape, (7, 5), (7,), (parts, 3, 5), (parts, 7, 3)]
    made = [torch.randn(one, dtype=torch.float64, requires_grad=i in wanted) for i, one in enumerate(shapes)]
    x, weight, bias, a, b = made
    torch.manual_seed(1)
    y = fused.linear(*made, 0.7, p)
    torch.manual_seed(1)
    keep, kept = fused.draw(x, p) if p else (torch.ones_like(x), 1.0)
    expected = torch.cat(
        [
            composed(x_, weight, bias, a_, b_, 0.7, keep_, kept)
            for x_, keep_, a_, b_ in zip(x.chunk(parts), keep.chunk(parts), a, b, strict=True)
        ]
    )
    torch.testing.assert_close(y, expected)
    asked, g = [made[i] for i in wanted], torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, asked, g), torch.autograd.grad(expected, asked, g))


def test_second_derivatives_of_parts():
    shapes = [(4, 2, 5), (7, 5), (7,), (2, 3, 5), (2, 7, 3)]
    made = [torch.randn(one, dtype=torch.float64, requires_grad=True) for one in shapes]
    assert torch.autograd.gradgradcheck(lambda *made: fused.linear(*made, 0.7), made)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("config", list(TRACED))
def test_traces_with_gradients_on(config, tmp_path):
    """A step of autograd of one's own has no place in a traced graph; torch's own functions do."""
    torch.manual_seed(0)
    config = TRACED[config]
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).eval(), torch.randn(3, 6)
    graft = bind(model, config)
    params = graft.init()
    expected = graft(params, x)
    for traced in (graft.view(params), inject_adapter_in_model(config, copy.deepcopy(model), params=params)):
        torch.jit.save(torch.jit.trace(traced, (x,)), tmp_path / "traced.pt")
        loaded = torch.jit.load(tmp_path / "traced.pt")
        torch.testing.assert_close(loaded(x), expected)
        graph = torch.jit.trace(traced, (x,)).inlined_graph
        assert "PythonOp" not in str(graph) and "_Linear" not in str(graph)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(graft.view(params), (x,))(x), expected)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_an_input_is_kept_only_for_a_matrix_that_is_trained(p):
    x, weight, bias, a, b = tensors(4, 3)
    for tensor in (weight, bias, a):
        tensor.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused.linear(x, weight, bias, a, b, 0.5, p)
    assert all(t.data_ptr() != x.data_ptr() and (t.dtype == torch.uint8 or t.shape != x.shape) for t in kept)

    def step(x, b):
        torch.manual_seed(0)
        return fused.linear(x, weight, bias, a, b, 0.5, p)

    assert torch.autograd.gradcheck(step, (x, b))
    assert torch.autograd.gradgradcheck(step, (x, b))
