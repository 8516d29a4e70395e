"""Bases and adapters of different precision, and autocast: PEFT's numbers up to rounding, in both styles."""

import copy

import pytest
import torch
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn

from torchgraft import adapters
from torchgraft.adapters._config.base import config_types
from torchgraft.functional import bind, route, stack

from .models import APART, KINDS, SIZES, X, both, configs, inputs, net, peft_state, randomise

CASES = [("LORA", kind, {}) for kind in KINDS]
CASES += [("LORA", kind, {"use_dora": True}) for kind in ("linear", "embedding", "conv2d")]
CASES += [("LORA", "linear", {"lora_bias": True}), ("LORA", "linear", {"init_lora_weights": "olora"})]
CASES += [(method, "linear", {}) for method in SIZES if method != "LORA"]
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .default.. 2 LoRA tensor")
cases = pytest.mark.parametrize(("method", "kind", "fields"), CASES, ids=lambda x: str(x))


def gradients(model, y):
    """Gradients of the adapter's parameters, by name."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and ".ranknum." not in name}
    return dict(zip(named, torch.autograd.grad(y.float().square().sum(), list(named.values())), strict=True))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_computes_what_peft_computes(method, kind, fields, dtype):
    mine, theirs = both(method, kind, torch.float32, **fields)
    randomise(theirs, scale=0.2)
    adapters.set_peft_model_state_dict(mine, peft_state(theirs))
    for model in (mine, theirs):
        model.to(dtype)
    adapters.cast_adapter_dtype(mine, "default")
    cast_adapter_dtype(theirs, "default")
    x = inputs(kind, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ys = [model(x) for model in (mine, theirs)]
    assert ys[0].dtype == ys[1].dtype
    torch.testing.assert_close(*(y.float() for y in ys), rtol=0.04, atol=0.04)
    found = [gradients(model, y) for model, y in zip((mine, theirs), ys, strict=True)]
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        size = found[1][name].float().abs().max().item()
        torch.testing.assert_close(
            found[0][name].float(), found[1][name].float(), rtol=0.08, atol=0.08 * max(size, 0.1), msg=name
        )


@cases
def test_functional_calls_under_autocast_are_those_in_place(method, kind, fields):
    mine, _ = both(method, kind, torch.float32, **fields)
    randomise(mine, scale=0.2)
    params, graft = adapters.extract_params(mine, "default"), adapters.extract_graft(mine, "default")
    x = inputs(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = mine(x)
        torch.testing.assert_close(graft(params, x), expected, rtol=0.02, atol=0.02)
        many = stack([params, params])
        torch.testing.assert_close(graft(route(many, torch.tensor([0, 1])), x), expected, rtol=0.04, atol=0.04)
        if kind.startswith("conv"):  # torch.vmap takes no notice of autocast, and fails on a convolution in it
            return
        several = torch.vmap(lambda tree: graft(tree, x))(many)
    torch.testing.assert_close(several[1].float(), expected.float(), rtol=0.04, atol=0.04)


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_adapters_on_a_half_precision_base_are_summed_once(method, kind, fields, dtype):
    """Against the same numbers in float64: the error is that of the base and of one rounding."""
    model = net(kind, dtype)
    config = configs(method, **fields)[0]
    graft = bind(model, config)
    params = graft.init(torch.Generator().manual_seed(0))
    assert {leaf.dtype for leaves in params.values() for leaf in leaves.values()} == {torch.float32}
    x = inputs(kind, dtype)
    y = graft(params, x)
    wide = copy.deepcopy(model).double()
    exact = bind(wide, config)
    started = exact.init(torch.Generator().manual_seed(0))
    for path, leaves in started.items():
        for leaf in leaves:
            leaves[leaf] = params[path][leaf].double()
    assert y.dtype == dtype
    expected = exact(started, x if kind in ("embedding",) else x.double())
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02)


def test_attention_under_autocast_is_pefts_formula_applied_once():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x, need_weights=False)[0]

    model, x = Model(), torch.randn(2, 5, 8)
    graft = bind(model, adapters.LoraConfig(r=2, target_modules=["attn"], init_lora_weights=False))
    params = graft.init(torch.Generator().manual_seed(0))
    expected = graft(params, x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(graft(params, x).float(), expected, rtol=0.05, atol=0.05)


def test_every_kind_is_tried():
    methods = {name for name, cls in config_types().items() if cls.__module__.startswith("torchgraft.")}
    assert set(X) < set(KINDS) and set(SIZES) | APART == methods
