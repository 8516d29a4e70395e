"""Tensors that torch's pruning and its older norms compute before a call are what they are computed from now."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from torchgraft import adapters
from torchgraft.adapters import inject_adapter_in_model
from torchgraft.functional import bind

LEAVES = {
    "ia3": (
        adapters.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False),
        "ia3_l",
        lambda layer: (layer.ia3_l, "default"),
    ),
    "loha": (
        adapters.LoHaConfig(r=2, target_modules=["0"], init_weights=False),
        "hada_w1_a",
        lambda layer: (layer.hada_w1_a, "default"),
    ),
    "lora": (
        adapters.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
        "lora_A",
        lambda layer: (layer.lora_A["default"], "weight"),
    ),
}
READING = {
    "glora": adapters.GloraConfig(r=2, target_modules=["0"]),
    "deft": adapters.DeftConfig(r=2, target_modules=["0"]),
    "peanut": adapters.PeanutConfig(r=2, target_modules=["0"]),
    "dora": adapters.LoraConfig(r=2, target_modules=["0"], use_dora=True),
}


def scaled(module, name):
    """Prune a tensor of a module, and write to what it is computed from; returns what it is then."""
    prune.l1_unstructured(module, name, 0.5)
    with torch.no_grad():
        getattr(module, f"{name}_orig").mul_(3)
    return (getattr(module, f"{name}_orig") * getattr(module, f"{name}_mask")).detach()


@pytest.mark.parametrize("method", LEAVES)
def test_a_pruned_leaf_is_what_its_original_is_now(method):
    config, leaf, place = LEAVES[method]
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(4, 5)).double(), torch.randn(3, 4).double()
    graft, model = bind(base, config), inject_adapter_in_model(config, copy.deepcopy(base))
    tree = copy.deepcopy(adapters.extract_params(model))
    model(x)
    tree["0"][leaf] = scaled(*place(model[0]))
    expected = graft(tree, x)
    torch.testing.assert_close(adapters.extract_params(model), tree)
    saved = adapters.get_peft_model_state_dict(model)
    assert any(torch.equal(tensor, tree["0"][leaf]) for tensor in saved.values())
    torch.testing.assert_close(model(x), expected)
    adapters.merge_adapter(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("method", LEAVES)
@pytest.mark.parametrize("how", ["prune", "parametrize"])
def test_loading_into_a_leaf_that_is_computed_is_an_error(method, how):
    config, _, place = LEAVES[method]
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 5)))
    saved = adapters.get_peft_model_state_dict(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    module, name = place(model[0])
    if how == "prune":
        prune.l1_unstructured(module, name, 0.5)
        undo = functools.partial(prune.remove, module, name)
    else:
        parametrize.register_parametrization(module, name, nn.Identity())
        undo = functools.partial(parametrize.remove_parametrizations, module, name)
    with pytest.raises(ValueError, match=r"'default' is computed \(a parametrization, .* nothing was loaded"):
        adapters.set_peft_model_state_dict(model, saved)
    undo()
    adapters.set_peft_model_state_dict(model, saved)
    torch.testing.assert_close(dict(model.state_dict()), before)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["prune", "weight_norm"])
@pytest.mark.parametrize("method", READING)
def test_methods_that_read_the_weight_read_what_it_is_now(method, how):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(4, 5)).double(), torch.randn(3, 4).double()
    graft, plain = bind(base, READING[method]), copy.deepcopy(base)
    tree = {"0": {leaf: tensor.double() + torch.randn(tensor.shape) for leaf, tensor in graft.init()["0"].items()}}
    model = inject_adapter_in_model(READING[method], base, params=tree)
    model(x)
    if how == "prune":
        weight = scaled(model[0].base_layer, "weight")
    else:
        layer = nn.utils.weight_norm(model[0].base_layer)
        with torch.no_grad():
            layer.weight_g.mul_(3)
            weight = layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    with torch.no_grad():
        plain[0].weight.copy_(weight)
    expected = bind(plain, READING[method])(tree, x)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["prune", "weight_norm"])
def test_what_is_planned_from_a_weight_is_of_the_weight_as_it_is_now(how):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5)).double(), torch.randn(3, 4).double()
    config, plain = adapters.OSFConfig(target_modules=["0"]), copy.deepcopy(model)
    if how == "prune":
        weight = scaled(model[0], "weight")
    else:
        layer = nn.utils.weight_norm(model[0])
        layer.weight_g.data.mul_(torch.arange(1, 6).view(5, 1))
        weight = layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    with torch.no_grad():
        plain[0].weight.copy_(weight)
    before = model[0].weight.detach().clone()
    graft = bind(model, config)
    assert torch.equal(model[0].weight, before)
    tree = {"0": {leaf: tensor + torch.rand(tensor.shape) for leaf, tensor in graft.init()["0"].items()}}
    expected = bind(plain, config)(tree, x)
    torch.testing.assert_close(graft(tree, x), expected)
    torch.testing.assert_close(inject_adapter_in_model(config, model, params=tree)(x), expected)
