"""LoRA on `nn.MultiheadAttention`: the numbers of torch's own module with merged weights, in every mode."""

import copy
import itertools

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchgraft.adapters import IA3Config, LoraConfig
from torchgraft.functional import bind, merge, route, stack

DIM, HEADS, BATCH, LENGTH, SOURCE = 8, 2, 3, 4, 5
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, HEADS, dtype=torch.float64, **options)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, query, key=None, value=None, **options):
        key = query if key is None else key
        return self.attn(query, key, key if value is None else value, **options)


def filled(graft, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: 0.5 * torch.randn(t.shape, generator=generator, dtype=t.dtype), graft.init())


def bound(model, r=2, **fields):
    graft = bind(model, LoraConfig(r=r, target_modules=["attn"], **fields))
    return graft, filled(graft)


def merged(graft, params):
    twin = copy.deepcopy(graft.model)
    twin.load_state_dict(merge(graft, params))
    return twin


def shaped(batch, length, size, batch_first, batched):
    if not batched:
        return torch.randn(length, size, dtype=torch.float64)
    return torch.randn((batch, length, size) if batch_first else (length, batch, size), dtype=torch.float64)


def same(given, expected):
    torch.testing.assert_close(given[0], expected[0], **CLOSE)
    assert (given[1] is None) == (expected[1] is None)
    if given[1] is not None:
        torch.testing.assert_close(given[1], expected[1], **CLOSE)


FLAGS = {
    "batch_first": st.booleans(),
    "batched": st.booleans(),
    "bias": st.booleans(),
    "add_bias_kv": st.booleans(),
    "add_zero_attn": st.booleans(),
    "sizes": st.sampled_from([(DIM, DIM), (6, 10), (DIM, 6)]),
    "inputs": st.sampled_from(["one", "two", "three"]),
    "mask": st.sampled_from([None, "bool", "float", "causal", "per head"]),
    "padding": st.sampled_from([None, "bool", "float"]),
    "need_weights": st.booleans(),
    "average": st.booleans(),
    "training": st.booleans(),
}


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(**FLAGS)
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
def test_every_flag_gives_the_numbers_of_torch(
    batch_first,
    batched,
    bias,
    add_bias_kv,
    add_zero_attn,
    sizes,
    inputs,
    mask,
    padding,
    need_weights,
    average,
    training,
):
    torch.manual_seed(0)
    kdim, vdim = sizes
    options = {"kdim": kdim, "vdim": vdim, "batch_first": batch_first, "bias": bias}
    model = Attention(add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, **options).train(training)
    query = shaped(BATCH, LENGTH, DIM, batch_first, batched)
    if sizes == (DIM, DIM) and inputs == "one":
        arguments, source = (query,), LENGTH
    elif kdim == vdim and inputs != "three":
        arguments, source = (query, shaped(BATCH, SOURCE, kdim, batch_first, batched)), SOURCE
    else:
        parts = [shaped(BATCH, SOURCE, size, batch_first, batched) for size in sizes]
        arguments, source = (query, *parts), SOURCE
    kwargs = {"need_weights": need_weights, "average_attn_weights": average}
    if mask == "float":
        kwargs["attn_mask"] = torch.randn(LENGTH, source, dtype=torch.float64)
    elif mask is not None:
        shape = (LENGTH, source) if mask != "per head" else ((BATCH if batched else 1) * HEADS, LENGTH, source)
        kwargs["attn_mask"] = torch.ones(shape, dtype=torch.bool).triu(1)
        kwargs["is_causal"] = mask == "causal" and source == LENGTH
    if padding is not None:
        shape = (BATCH, source) if batched else (source,)
        kwargs["key_padding_mask"] = torch.zeros(shape, dtype=torch.bool)
        kwargs["key_padding_mask"][..., -1] = True
        if padding == "float":
            kwargs["key_padding_mask"] = kwargs["key_padding_mask"].double() * -2
    graft, params = bound(model)
    same(graft(params, *arguments, **kwargs), merged(graft, params)(*arguments, **kwargs))
    leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), params)
    y = graft(leaves, *arguments, **kwargs)[0]
    seed = torch.randn_like(y)
    grads = torch.autograd.grad(y, optree.tree_leaves(leaves), seed)
    state = merge(graft, leaves)
    expected = torch.func.functional_call(model, state, arguments, kwargs)[0]
    expected = torch.autograd.grad(expected, optree.tree_leaves(leaves), seed)
    torch.testing.assert_close(list(grads), list(expected), rtol=1e-8, atol=1e-10)


def test_identity_at_init_bit_for_bit():
    for batch_first, need_weights in itertools.product([False, True], repeat=2):
        torch.manual_seed(0)
        model = Attention(batch_first=batch_first).float().train()
        graft = bind(model, LoraConfig(target_modules=["attn"]))
        x = torch.randn(3, 4, DIM)
        given = graft(graft.init(), x, need_weights=need_weights)
        assert torch.equal(given[0], model(x, need_weights=need_weights)[0])


def test_dropout_of_the_attention_draws_what_torch_draws():
    model = Attention(dropout=0.4).train()
    graft, params = bound(model)
    x = torch.randn(LENGTH, BATCH, DIM, dtype=torch.float64)
    for need_weights in (True, False):
        torch.manual_seed(3)
        given = graft(params, x, need_weights=need_weights)
        torch.manual_seed(3)
        same(given, merged(graft, params)(x, need_weights=need_weights))


def test_never_a_dense_weight_on_the_training_path():
    model = Attention()
    graft, params = bound(model)
    leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), params)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        before = len(shapes)
        graft(leaves, torch.randn(LENGTH, BATCH, DIM, dtype=torch.float64))[0].sum().backward()
    assert len(shapes) > before

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            y = func(*args, **(kwargs or {}))
            if "mm" in str(func) and isinstance(y, torch.Tensor):
                assert tuple(y.shape) not in {(3 * DIM, DIM), (DIM, 3 * DIM)}
            return y

    with Watch():
        graft(leaves, torch.randn(5, 7, DIM, dtype=torch.float64))[0].sum().backward()


def encoder(kind, batch_first=True):
    torch.manual_seed(0)
    options = {"dim_feedforward": 8, "dropout": 0.0, "batch_first": batch_first, "dtype": torch.float64}
    if kind == "encoder layer":
        return nn.TransformerEncoderLayer(DIM, HEADS, **options)
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(DIM, HEADS, **options)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
    return nn.TransformerDecoderLayer(DIM, HEADS, **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", ["encoder layer", "encoder", "decoder layer"])
@pytest.mark.parametrize("mode", ["train", "eval", "no grad"])
def test_inside_torchs_transformers(kind, mode):
    model = encoder(kind).train(mode == "train").requires_grad_(False)
    targets = ["self_attn", "multihead_attn"] if kind == "decoder layer" else ["self_attn"]
    graft = bind(model, LoraConfig(r=2, target_modules=targets))
    params = filled(graft)
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    arguments = (x, torch.randn(BATCH, SOURCE, DIM, dtype=torch.float64)) if kind == "decoder layer" else (x,)
    padding = torch.tensor([[False] * LENGTH, [False, False, True, True], [False, False, False, True]])
    inputs = [{}]
    if kind != "decoder layer":
        inputs.append({"src_key_padding_mask": padding})
    for kwargs in inputs:
        with torch.set_grad_enabled(mode != "no grad"):
            given = graft(params, *arguments, **kwargs)
            expected = merged(graft, params)(*arguments, **kwargs)
        torch.testing.assert_close(given, expected, **CLOSE)
        assert not torch.allclose(given, model(*arguments, **kwargs), atol=1e-2)
    many = stack([filled(graft, seed) for seed in range(2)])
    rows = torch.tensor([1, -1, 0])
    with torch.set_grad_enabled(mode != "no grad"):
        given = graft(route(many, rows), *arguments)
        loop = [merged(graft, filled(graft, i)) if i >= 0 else model for i in rows.tolist()]
        expected = torch.stack([each(*arguments)[row] for row, each in enumerate(loop)])
    torch.testing.assert_close(given, expected, **CLOSE)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}])
def test_routed_rows_are_a_loop(batch_first, sizes):
    model = Attention(batch_first=batch_first, **sizes)
    graft = bind(model, LoraConfig(r=2, target_modules=["attn"]))
    trees = [filled(graft, seed) for seed in range(3)]
    rows = torch.tensor([2, -1, 0])
    query = shaped(3, 6, DIM, batch_first, True)  # 6 is a multiple of the rows
    others = [shaped(3, 6, size, batch_first, True) for size in sizes.values()]
    arguments = (query, *others)
    given = graft(route(stack(trees), rows, batch_dim=0 if batch_first else 1), *arguments)[0]
    axis = 0 if batch_first else 1
    each = [graft(trees[i], *arguments)[0] if i >= 0 else model(*arguments)[0] for i in rows.tolist()]
    expected = torch.stack([y.select(axis, row) for row, y in enumerate(each)], axis)
    torch.testing.assert_close(given, expected, **CLOSE)
    if batch_first:
        torch.testing.assert_close(graft(route(stack(trees), rows), *arguments)[0], expected, **CLOSE)


def test_transforms_agree_with_loops():
    model = Attention(batch_first=True)
    graft = bind(model, LoraConfig(r=2, target_modules=["attn"]))
    trees = [filled(graft, seed) for seed in range(3)]
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)

    def loss(params):
        return graft(params, x, need_weights=True)[0].square().mean()

    grads = vmap(grad(loss))(stack(trees))
    torch.testing.assert_close(grads, stack([grad(loss)(tree) for tree in trees]), **CLOSE)
    tangent = filled(graft, 9)
    with sdpa_kernel(SDPBackend.MATH):
        _, given = jvp(loss, (trees[0],), (tangent,))
    first = grad(loss)(trees[0])
    expected = sum((g * t).sum() for g, t in zip(*map(optree.tree_leaves, (first, tangent)), strict=True))
    torch.testing.assert_close(given, expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("need_weights", [True, False])
def test_compiles_whole_and_once(need_weights):
    torch._dynamo.reset()
    model = Attention(batch_first=True)
    graft = bind(model, LoraConfig(r=2, target_modules=["attn"]))
    trees = [filled(graft, seed) for seed in range(3)]
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)

    def loss(params, x):
        return graft(params, x, need_weights=need_weights)[0].square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(trees[0], x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tree in trees:
            torch.testing.assert_close(compiled(tree, x), loss(tree, x))


def test_stacks_of_several_ranks():
    model = Attention(batch_first=True)
    graft = bind(model, [LoraConfig(r=r, target_modules=["attn"]) for r in (1, 3)])
    many = graft.init(torch.Generator().manual_seed(0))
    many = optree.tree_map(lambda t: t + 0.1 * (t != 0), many)
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    given = graft(route(many, torch.tensor([1, 0])), x)[0]
    trees = graft.unstack(many)
    for row, i in enumerate([1, 0]):
        torch.testing.assert_close(given[row], graft.member(i)(trees[i], x)[0][row], **CLOSE)


def test_out_proj_alone_is_still_a_target():
    model = Attention()
    graft = bind(model, LoraConfig(r=2, target_modules=["attn.out_proj"]))
    assert list(graft.init()) == ["attn.out_proj"]


def test_what_cannot_be_says_so():
    model = Attention()
    with pytest.raises(ValueError, match=r"attn: IA3 does not support MultiheadAttention \(attention\)"):
        bind(model, IA3Config(target_modules=["attn"], feedforward_modules=[]))
    graft, params = bound(model)
    x = torch.randn(LENGTH, BATCH, DIM, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="attn: is_causal is a hint about attn_mask, which is None"):
        graft(params, x, is_causal=True)
    with pytest.raises(RuntimeError, match=r"attn: attn_mask has shape \(4, 9\)"):
        graft(params, x, attn_mask=torch.zeros(4, 9))
    with pytest.raises(TypeError, match=r"attn: attn_mask has dtype torch\.int64"):
        graft(params, x, attn_mask=torch.zeros(4, 4, dtype=torch.long))
