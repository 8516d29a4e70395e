"""Biases of the base that an adapter trains, in place, against PEFT; and that they are the base's again without it."""

import copy
import pickle
from collections import OrderedDict

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import LoraConfig, extract_graft, extract_params, load_adapter, save_adapter
from torchgraft.functional import bind

from .models import both, configs, inject, inject_peft, inputs, net, parameters, peft_state, trained

pytestmark = pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
METHODS = ["LORA", "ADALORA", "OFT", "VERA"]
BIAS = ["all", "only"]


def fields(bias, method="LORA"):
    return {"bias": "all" if bias == "all" else f"{method.lower()}_only", "target_modules": ["first"]}


def numbers(model, seed=5):
    """Other numbers in all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and "ranknum" not in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@pytest.mark.parametrize("bias", BIAS)
@pytest.mark.parametrize("method", METHODS)
def test_names_numbers_keys_and_gradients_are_pefts(method, bias):
    mine, theirs = both(method, **fields(bias, method))
    if method == "VERA":
        theirs = vars(theirs)["wrapper"].base_model.model
    assert [name for name in trained(mine) if "bias" in name] == [name for name in trained(theirs) if "bias" in name]
    assert any("bias" in name for name in trained(mine))
    state = peft_state(numbers(theirs)) if method != "VERA" else None
    if state is None:
        return
    assert adapters.set_peft_model_state_dict(mine, state) == ([], [])
    own = adapters.get_peft_model_state_dict(mine)
    assert own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in state)
    x = inputs()
    torch.testing.assert_close(mine(x), theirs(x), rtol=0, atol=1e-10)
    for model in (mine, theirs):
        model(x).square().sum().backward()
    grads = [
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "ranknum" not in n}
        for model in (mine, theirs)
    ]
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-9, atol=1e-10)


def test_only_one_adapter_may_have_biases():
    mine, theirs = both("LORA", **fields("all"))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        inject_peft(theirs, "LORA", "b", **fields("only"))
    before = list(parameters(mine))
    with pytest.raises(ValueError, match=r"bias is 'lora_only', and adapter 'default' trains biases of this model"):
        inject(mine, "LORA", "b", **fields("only"))
    assert list(parameters(mine)) == before
    inject(mine, "LORA", "c", target_modules=["second"])
    adapters.delete_adapter(mine, "default")
    inject(mine, "LORA", "b", **fields("only"))


def test_without_the_adapter_the_bases_biases_are_back_bit_for_bit():
    model, x = inject(net(), "LORA", **fields("all")), inputs()
    plain = net()(x)
    y = numbers(model)(x)
    assert not torch.allclose(y, plain, atol=1e-2)
    with adapters.disable_adapter(model):
        torch.testing.assert_close(model(x), plain)
        assert torch.equal(model.head.bias, net().head.bias)
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), y) and model.head.bias.requires_grad
    inject(model, "LORA", "other", target_modules=["second"])
    torch.testing.assert_close(model(x), plain)
    assert not model.head.bias.requires_grad
    key = adapters.get_peft_model_state_dict(model)["head.bias"]
    assert not torch.equal(key, model.head.bias)
    adapters.set_adapter(model, "default")
    assert torch.equal(model(x), y) and torch.equal(model.head.bias, key)
    adapters.set_adapter(model, "default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        adapters.set_adapter(one, "other")
        torch.testing.assert_close(one(x), plain)
        assert torch.equal(model(x), y)
    base = {key: tensor.clone() for key, tensor in adapters.get_base_model_state_dict(model).items()}
    assert all(torch.equal(base[key], tensor) for key, tensor in net().state_dict().items())
    adapters.set_base_model_state_dict(model, base | {"head.bias": base["head.bias"] + 1})
    assert torch.equal(model(x), y)
    adapters.set_base_model_state_dict(model, base)
    assert all(
        torch.equal(tensor, net().state_dict()[key]) for key, tensor in adapters.unload(model).state_dict().items()
    )
    torch.testing.assert_close(model(x), plain)


def test_deleted_or_merged_for_good():
    x = inputs()
    model = numbers(inject(net(), "LORA", **fields("all")))
    y = model(x)
    merged = adapters.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), y)
    assert type(merged.first) is nn.Linear and "_trained_biases" not in vars(merged)
    adapters.merge_adapter(model)
    torch.testing.assert_close(model(x), y)
    adapters.unmerge_adapter(model)
    assert torch.equal(model(x), y)
    adapters.delete_adapter(model, "default")
    torch.testing.assert_close(model(x), net()(x))


@pytest.mark.parametrize("bias", BIAS)
def test_there_and_back_between_the_styles_and_files(bias, tmp_path):
    x, config = inputs(), configs("LORA", **fields(bias), r=3)[0]
    model = numbers(adapters.inject_adapter_in_model(config, net()))
    y = model(x)
    graft, params = bind(net(), config), extract_params(model)
    assert params.keys() == graft.init().keys()
    torch.testing.assert_close(graft(params, x), y)
    torch.testing.assert_close(extract_graft(model)(params, x), y)
    assert params["first"]["bias"].data_ptr() == model.first.base_layer.bias.data_ptr()
    planted = adapters.inject_adapter_in_model(config, net(), params=params)
    torch.testing.assert_close(planted(x), y)
    first, second = save_adapter(model, tmp_path / "a"), save_adapter(graft, tmp_path / "b", params=params)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    torch.testing.assert_close(load_adapter(graft, first), params, rtol=0, atol=0)
    torch.testing.assert_close(load_adapter(net(), first)(x), y)
    theirs = peft.PeftModel.from_pretrained(net(), first).eval()
    torch.testing.assert_close(theirs(x), y)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, written = (load_file(folder / "adapter_model.safetensors") for folder in (first, tmp_path / "theirs"))
    assert ours.keys() == written.keys()
    torch.testing.assert_close(load_adapter(net(), tmp_path / "theirs")(x), y)
    row = adapters.summary(model).rows[0]
    assert row.parameters == adapters.summary(graft, params).rows[0].parameters


def test_files_of_peft_with_saved_modules_and_biases(tmp_path):
    """PEFT writes a saved module's bias up to three times; the adapter's is one of them."""
    x, both_fields = inputs(), {**fields("all"), "modules_to_save": ["head"], "r": 3}
    theirs = numbers(peft.get_peft_model(net(), configs("LORA", **both_fields)[1]))
    theirs.eval().save_pretrained(tmp_path)
    assert "base_model.model.head.original_module.bias" in load_file(tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(load_adapter(net(), tmp_path)(x), theirs(x))
    graft = bind(net(), configs("LORA", **both_fields)[0])
    torch.testing.assert_close(graft(load_adapter(graft, tmp_path), x), theirs(x))


@pytest.mark.parametrize("bias", BIAS)
@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_biases_has_none_to_train(method, bias, tmp_path):
    mine, theirs = configs(method, **fields(bias, method))
    make = lambda: nn.Sequential(OrderedDict(first=nn.Linear(8, 8, bias=False)))  # noqa: E731
    model, other, x = make(), make(), torch.randn(2, 8)
    other.load_state_dict(model.state_dict())
    wrapped = numbers(peft.get_peft_model(copy.deepcopy(model), theirs).eval())
    wrapped.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match=f"bias is '{mine.bias}', and none of the modules that it means has a bias"):
        load_adapter(other, tmp_path / "theirs")
    torch.testing.assert_close(other(x), wrapped(x))
    with pytest.warns(UserWarning, match="so none is trained"):
        graft = bind(model, mine)
    with pytest.warns(UserWarning, match="so none is trained"):
        params = load_adapter(graft, tmp_path / "theirs")
    assert list(params["first"]) == sorted(graft.init()["first"]) and "bias" not in params["first"]
    torch.testing.assert_close(graft(params, x), wrapped(x))
    save_adapter(other, tmp_path / "mine")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "mine").eval()
    torch.testing.assert_close(again(x), wrapped(x))
    with pytest.warns(UserWarning, match="so none is trained"):
        adapters.inject_adapter_in_model(mine, other, "second")
    assert all(".second" in name for name, p in other.named_parameters() if p.requires_grad)


def test_nothing_to_train_is_said():
    with pytest.warns(UserWarning, match=r"bias is 'lora_only', and none of the modules that it means has a bias"):
        bind(
            nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)),
            LoraConfig(target_modules=["0"], bias="lora_only"),
        )
    with pytest.raises(ValueError, match=r"bias is 'most', expected 'none', 'all' or 'lora_only'"):
        LoraConfig(bias="most")
