"""At init, an adapter leaves every bit of the base's output, whatever the layout of the input."""

import contextlib
import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchgraft.adapters import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    inject_adapter_in_model,
)
from torchgraft.functional import bind, route, stack

CONFIGS = {
    "lora": lambda **fields: LoraConfig(r=2, **fields),
    "lora_bias": lambda **fields: LoraConfig(r=2, lora_bias=True, **fields),
    "dora": lambda **fields: LoraConfig(r=2, use_dora=True, **fields),
    "ia3": IA3Config,
    "loha": lambda **fields: LoHaConfig(r=2, **fields),
    "vera": lambda **fields: VeraConfig(r=2, d_initial=0.0, **fields),
    "adalora": lambda **fields: AdaLoraConfig(init_r=2, target_r=1, total_step=10, **fields),
    "oft": lambda **fields: OFTConfig(r=0, oft_block_size=2, **fields),
}
THROUGH_VMAP = {"loha", "oft"}
"""Methods whose rows go through vmap, on small layers or on all, and that goes through other kernels."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def same_bits(found, expected):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert torch.equal(found, expected), (found - expected).abs().max()


def laid_out(draw, dtype):
    """An input whose axes lie in some order, with some of them expanded or cut."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 7, 16]), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(sizes) + 1)))
    x = torch.randn([*sizes, draw(st.sampled_from([2, 8, 32]))], dtype=dtype).permute(order)
    if x.shape[-1] % 2:
        x = torch.cat([x, x], -1).transpose(0, -1).contiguous().transpose(0, -1)
    change = draw(st.sampled_from(["none", "expand", "cut", "stride"]))
    if change == "expand":
        return x.expand(3, *x.shape)
    if change == "cut":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    return torch.cat([x, x], 0)[::2] if change == "stride" else x


class Conv1D(nn.Module):
    """As `transformers` has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.__module__, Conv1D.forward.__module__ = ("transformers.pytorch_utils",) * 2
Conv1D.forward.__qualname__ = "Conv1D.forward"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("method", CONFIGS)
def test_linear_layers(method, data):
    torch.manual_seed(0)
    dtype = data.draw(st.sampled_from(DTYPES))
    x = laid_out(data.draw, dtype)
    bias, trained, grad = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.booleans())
    kind = data.draw(st.sampled_from(["linear", "conv1d"]))
    if kind == "conv1d":
        try:
            x.view(-1, x.shape[-1])
        except RuntimeError:
            x = x.contiguous()
    layer = nn.Linear(x.shape[-1], 6, bias) if kind == "linear" else Conv1D(6, x.shape[-1])
    model = nn.Sequential(layer).to(dtype).requires_grad_(trained)
    if method == "lora_bias" and not bias and kind == "linear":
        return
    graft = bind(model, CONFIGS[method](target_modules=["0"]))
    params = graft.init(dtype=data.draw(st.sampled_from([None, dtype])))
    x.requires_grad_(data.draw(st.booleans())) if x.is_leaf else None
    with contextlib.nullcontext() if grad else torch.no_grad():
        expected = model(x)
        same_bits(graft(params, x), expected)
        if x.ndim > 1 and len(x) > 1 and method not in THROUGH_VMAP:
            rows = torch.arange(len(x)) % 3 - 1
            same_bits(graft(route(stack([params, params]), rows), x), expected)
        frozen = copy.deepcopy(model).requires_grad_(False)
        expected = frozen(x)
        same_bits(inject_adapter_in_model(CONFIGS[method](target_modules=["0"]), frozen)(x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "adalora", "loha", "oft"])
def test_convolutions_of_channels_last(method, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6, dtype=dtype)
    for layout, trained in itertools.product((torch.contiguous_format, torch.channels_last), (True, False)):
        model = nn.Sequential(nn.Conv2d(4, 6, 3)).to(dtype, memory_format=layout).requires_grad_(trained)
        for y in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:1].expand(3, -1, -1, -1)):
            config = CONFIGS[method](target_modules=["0"])
            graft = bind(model, config)
            expected = model(y)
            same_bits(graft(graft.init(), y), expected)
            same_bits(inject_adapter_in_model(config, copy.deepcopy(model))(y), expected)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(("batch_first", "transposed", "trained"), list(itertools.product((True, False), repeat=3)))
def test_attention(dtype, batch_first, transposed, trained):
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=batch_first)).to(dtype).requires_grad_(trained)
    x = torch.randn(5, 3, 8, dtype=dtype)
    x = x.transpose(0, 1) if transposed else x
    other = torch.randn(x.shape, dtype=dtype)
    config = LoraConfig(r=2, target_modules=["0"])
    graft, injected = bind(model, config), inject_adapter_in_model(config, copy.deepcopy(model))
    view = graft.view(graft.init())
    for inputs in ((x, x, x), (x, other, other), (x, other, x)):
        expected = model[0](*inputs, need_weights=True)[0]
        same_bits(view[0](*inputs)[0], expected)
        frozen = copy.deepcopy(model).requires_grad_(False)
        same_bits(injected[0](*inputs)[0], frozen[0](*inputs)[0])


def test_embeddings_of_ids_in_any_layout():
    model = nn.Sequential(nn.Embedding(9, 4))
    for ids in (torch.arange(6).view(2, 3).t(), torch.tensor(3).expand(2, 5), torch.arange(8)[::2]):
        for method in ("lora", "dora", "oft"):
            graft = bind(model, CONFIGS[method](target_modules=["0"]))
            same_bits(graft(graft.init(), ids), model(ids))
