"""Tensors on the meta device have no values: where an input has some, they are refused, not multiplied with."""

import copy

import pytest
import torch
from torch import nn

from torchgraft.adapters import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    merge_adapter,
    set_peft_model_state_dict,
)
from torchgraft.functional import bind, functional_call, merge, route, stack

CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    "lora_bias": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_bias=True),
    "dora": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_dora=True),
    "ia3": IA3Config(target_modules=["0"], init_ia3_weights=False),
    "vera": VeraConfig(r=2, target_modules=["0"], init_weights=False),
    "adalora": AdaLoraConfig(target_modules=["0"], total_step=10, init_lora_weights=False),
    "oft": OFTConfig(r=0, oft_block_size=2, target_modules=["0"], init_weights=False),
    "parameter": LoraConfig(r=2, target_parameters=["0.weight"], init_lora_weights=False),
}
SAYS = "^0(.weight)?: the adapter's .* is on the meta device, without values, and is used with a tensor on cpu; load it"


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6))


@pytest.mark.parametrize("method", CONFIGS)
def test_leaves(method):
    x, config = torch.randn(3, 6), CONFIGS[method]
    graft = bind(model(), config)
    params = graft.init(device="meta")
    calls = [lambda: graft(params, x), lambda: graft.view(params)(x), lambda: merge(graft, params)]
    if method != "parameter":
        many = stack([params, params])
        rows = torch.tensor([0, 1, -1])
        calls += [lambda: graft(route(many, rows), x), lambda: graft.view(route(many, rows))(x)]
    for call in calls:
        with pytest.raises(ValueError, match=SAYS):
            call()


@pytest.mark.parametrize("method", CONFIGS)
def test_in_place_before_loading(method):
    x, config = torch.randn(3, 6), CONFIGS[method]
    injected = inject_adapter_in_model(config, model(), low_cpu_mem_usage=True)
    for call in (lambda: injected(x), lambda: merge_adapter(injected)):
        with pytest.raises(ValueError, match=SAYS):
            call()
    other = inject_adapter_in_model(config, model())
    set_peft_model_state_dict(injected, get_peft_model_state_dict(other), low_cpu_mem_usage=True)
    torch.testing.assert_close(injected(x), other(x))


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 6, 1), nn.Embedding(6, 6), nn.MultiheadAttention(6, 2)], ids=repr)
def test_other_layers(layer):
    class Body(nn.Sequential):
        def forward(self, x):
            return self[0](x, x, x)[0] if hasattr(self[0], "in_proj_weight") else self[0](x)

    x = torch.arange(6) if isinstance(layer, nn.Embedding) else torch.randn(2, 6, 3, 6)[:, :, 0]
    x = x.unsqueeze(-1) if isinstance(layer, nn.Conv2d) else x
    body = Body(copy.deepcopy(layer))
    graft = bind(body, CONFIGS["lora"])
    with pytest.raises(ValueError, match="is on the meta device"):
        graft(graft.init(device="meta"), x)
    with pytest.raises(ValueError, match="is on the meta device"):
        inject_adapter_in_model(CONFIGS["lora"], body, low_cpu_mem_usage=True)(x)


@pytest.mark.parametrize(
    "fields", [{"bias": "all"}, {"modules_to_save": ["1"]}, {"trainable_token_indices": {"1": [2]}}]
)
def test_tensors_that_take_the_place_of_the_bases(fields):
    body = nn.Sequential(
        nn.Linear(6, 6), nn.Embedding(5, 6) if "trainable_token_indices" in fields else nn.Linear(6, 6)
    )
    graft = bind(body, LoraConfig(r=2, target_modules=["0"], **fields), allow_unreached=True)
    params = graft.init()
    own = {"lora_A", "lora_B"}
    params = {path: {k: t if k in own else t.to("meta") for k, t in leaves.items()} for path, leaves in params.items()}
    for call in (lambda: graft(params, torch.randn(3, 6)), lambda: graft.view(params), lambda: merge(graft, params)):
        with pytest.raises(ValueError, match="[01]: the adapter's (weight|bias|trainable_.*) is on the meta device"):
            call()


@pytest.mark.parametrize("method", list(CONFIGS)[:-1])
def test_the_base(method):
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 6))
    x, full = torch.randn(3, 6), model()
    config = LoraConfig(r=2, target_modules=["0"]) if method == "dora" else CONFIGS[method]
    graft = bind(empty, config)
    params = graft.init(device="cpu")
    says = "0: the base's weight is on the meta device, without values, and its input is on cpu; load the model first"
    with pytest.raises(ValueError, match=says):
        graft(params, x)
    with pytest.raises(ValueError, match=says):
        inject_adapter_in_model(config, copy.deepcopy(empty), params=params)(x)
    base = dict(full.named_parameters())
    torch.testing.assert_close(functional_call(graft, (base, params), (x,)), bind(full, config)(params, x))


def test_all_on_the_meta_device_gives_shapes():
    with torch.device("meta"):
        empty, x = nn.Sequential(nn.Linear(6, 5)), torch.empty(3, 6)
    for config in (CONFIGS["lora"], CONFIGS["ia3"], CONFIGS["parameter"], CONFIGS["vera"]):
        graft = bind(empty, config)
        assert graft(graft.init(), x).shape == (3, 5)
        assert inject_adapter_in_model(config, copy.deepcopy(empty), low_cpu_mem_usage=True)(x).is_meta


def test_the_model_itself_is_named_where_it_is_the_site():
    graft = bind(nn.Linear(4, 3), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="^the model: the adapter's lora_A is on the meta device"):
        graft(graft.init(device="meta"), torch.ones(1, 4))
