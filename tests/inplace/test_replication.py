"""Layers that run several times, against PEFT."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import LoraConfig, extract_graft, extract_params, load_adapter, save_adapter
from torchgraft.functional import bind, merge, route, stack

from .models import trained

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkp:FutureWarning")
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
IDS = torch.tensor([[1, 3, 4, 9], [7, 2, 1, 0]])
SIZES = {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 11}
FIELDS = {"r": 2, "layer_replication": [(0, 2), (1, 3)]}


def llama():
    sizes = {**SIZES, "intermediate_size": 12, "num_hidden_layers": 3, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation="eager"))


def bert():
    sizes = {**SIZES, "intermediate_size": 12, "num_hidden_layers": 3}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, attn_implementation="eager"))


MODELS = {"llama": (llama, ["q_proj"]), "bert": (bert, ["query"])}


@pytest.fixture(params=MODELS)
def case(request):
    make, targets = MODELS[request.param]

    def model():
        torch.manual_seed(0)
        return make().double().eval()

    return model, {**FIELDS, "target_modules": targets}


def numbers(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def test_in_place_as_in_peft(case):
    make, fields = case
    torch.manual_seed(7)
    mine = adapters.inject_adapter_in_model(LoraConfig(**copy.deepcopy(fields)), make())
    torch.manual_seed(7)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**copy.deepcopy(fields)), make()).eval()
    assert trained(mine) == trained(theirs)
    assert mine.config.num_hidden_layers == theirs.config.num_hidden_layers == 4
    state = peft.get_peft_model_state_dict(theirs)
    own = adapters.get_peft_model_state_dict(mine)
    assert own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in state)
    state = peft.get_peft_model_state_dict(numbers(theirs))
    assert adapters.set_peft_model_state_dict(mine, state) == ([], [])
    torch.testing.assert_close(mine(IDS).logits, theirs(IDS).logits, **CLOSE)
    parts = {id(p) for p in mine.parameters() if not p.requires_grad}
    assert len(parts) == len(list(make().parameters()))


@pytest.mark.slow
def test_the_functional_style_leaves_the_model_alone(case, tmp_path):
    make, fields = case
    config, model = LoraConfig(**fields), make()
    before, plain = repr(model), model(IDS).logits
    graft = bind(model, config)
    mine = numbers(adapters.inject_adapter_in_model(config, make()))
    params, y = extract_params(mine), mine(IDS).logits
    torch.testing.assert_close(graft(params, IDS).logits, y, **CLOSE)
    assert repr(model) == before and torch.equal(model(IDS).logits, plain) and model.config.num_hidden_layers == 3
    assert params.keys() == graft.init().keys() and len(params) == 4
    torch.testing.assert_close(extract_graft(mine)(params, IDS).logits, y, **CLOSE)
    trees = [params, graft.init(dtype=torch.float64)]
    rows = graft(route(stack(trees), torch.tensor([1, 0])), IDS).logits
    expected = torch.cat([graft(trees[1], IDS[:1]).logits, y[1:]])
    torch.testing.assert_close(rows, expected, **CLOSE)
    with pytest.raises(ValueError, match="is tied to .*, which would change with it"):
        merge(graft, params)
    first = save_adapter(graft, tmp_path / "a", params=params)
    torch.testing.assert_close(load_adapter(graft, first), params, rtol=0, atol=0)
    torch.testing.assert_close(load_adapter(make(), first)(IDS).logits, y, **CLOSE)
    theirs = peft.PeftModel.from_pretrained(make(), first).eval()
    torch.testing.assert_close(theirs(IDS).logits, y, **CLOSE)
    theirs.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(load_adapter(make(), tmp_path / "b")(IDS).logits, y, **CLOSE)
    other = bind(make(), LoraConfig(**{**fields, "layer_replication": [(0, 3), (1, 2)]}))
    with pytest.raises(ValueError, match=r"layer_replication is \[\(0, 2\), \(1, 3\)\] in the file and \[\(0, 3\)"):
        load_adapter(other, first)


def test_generation_with_a_cache():
    torch.manual_seed(0)
    model = llama().eval()
    graft = bind(model, LoraConfig(**FIELDS, target_modules=["q_proj"], init_lora_weights=False))
    view = graft.view(graft.init())
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(view.generate(IDS, use_cache=True, **how), view.generate(IDS, use_cache=False, **how))


def test_a_second_adapter():
    config = LoraConfig(**FIELDS, target_modules=["q_proj"])
    model = adapters.inject_adapter_in_model(config, llama())
    adapters.inject_adapter_in_model(config, model, "b")
    adapters.inject_adapter_in_model(LoraConfig(target_modules=["v_proj"]), model, "c")
    assert len(model.model.layers) == 4
    with pytest.raises(
        ValueError, match=r"layer_replication is \[\(0, 1\)\], and the model's layers are replicated as"
    ):
        adapters.inject_adapter_in_model(LoraConfig(layer_replication=[(0, 1)], target_modules=["q_proj"]), model, "d")
    plain = adapters.inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), llama())
    with pytest.raises(
        ValueError, match=r"the model has adapters \['default'\] on its layers; inject the adapter with"
    ):
        adapters.inject_adapter_in_model(config, plain, "b")


def test_an_error_leaves_the_model_as_it_was():
    model = llama()
    layers, before = model.model.layers, repr(model)
    with pytest.raises(ValueError, match="matches no module"):
        adapters.inject_adapter_in_model(LoraConfig(**FIELDS, target_modules=["x"]), model)
    assert model.model.layers is layers and repr(model) == before and model.config.num_hidden_layers == 3
    adapters.inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    assert len(model.model.layers) == 3


@pytest.mark.parametrize(
    ("model", "ranges", "message"),
    [
        (llama, [(0, 4)], r"layer_replication has \(0, 4\), expected 0 <= start < end <= 3, the number of layers"),
        (llama, [(2, 2)], r"layer_replication has \(2, 2\), expected 0 <= start < end"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), [(0, 1)], "found no list of layers in Sequential, expected layers"),
    ],
)
def test_what_is_refused(model, ranges, message):
    with pytest.raises(ValueError, match=message):
        bind(model(), LoraConfig(layer_replication=ranges, target_modules=["q_proj"]))
