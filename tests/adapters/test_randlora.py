"""RandLoRA against PEFT: bases of every kind, both shapes of modules, files."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from torchgraft.adapters import RandLoraConfig, load_adapter, load_config, save_adapter
from torchgraft.functional import bind, route, stack

TARGETS = {"target_modules": ["0", "2"]}
BASES = [{}, {"sparse": True}, {"very_sparse": True}, {"projection_prng_key": 5}]


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 10, bias=False)).to(dtype)


def wrapped(model, **fields):
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.RandLoraConfig(**fields), autocast_adapter_dtype=False)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    return theirs.eval()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # those that PEFT has once more
@pytest.mark.parametrize("r", [1, 5, 12, 16])
@pytest.mark.parametrize("fields", BASES, ids=str)
def test_bases_and_outputs_are_pefts_and_files_have_the_bases_once(fields, r, tmp_path):
    model, x = net(), torch.randn(4, 12)
    fields = {"r": r, "randlora_alpha": 3 * r, **fields, **TARGETS}
    theirs = wrapped(model, **fields)
    theirs.save_pretrained(tmp_path / "theirs")
    graft = bind(model, load_config(tmp_path / "theirs"))
    for name in ("randlora_A", "randlora_B"):
        assert torch.equal(getattr(graft.sites[""]["0"].constants, name), getattr(theirs.base_model, name)["default"])
    params = load_adapter(graft, tmp_path / "theirs")
    torch.testing.assert_close(graft(params, x), theirs(x), rtol=1e-4, atol=1e-4)
    save_adapter(graft, tmp_path / "mine", params=params)
    keys = load_file(tmp_path / "mine" / "adapter_model.safetensors").keys()
    assert sum("randlora_B" in key for key in keys) == 1
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "mine", autocast_adapter_dtype=False)
    torch.testing.assert_close(again.eval()(x), theirs(x))


@pytest.mark.parametrize("init", [True, False])
def test_starts_are_pefts_bit_for_bit(init):
    model, fields = net(), {"r": 4, "init_weights": init, **TARGETS}
    torch.manual_seed(3)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.RandLoraConfig(**fields), autocast_adapter_dtype=False)
    params = bind(model, RandLoraConfig(**fields)).init(torch.Generator().manual_seed(3))
    for path, leaves in params.items():
        for leaf, tensor in leaves.items():
            assert torch.equal(tensor, getattr(theirs.base_model.model.get_submodule(path), leaf)["default"])


def test_dropout_is_on_the_input_in_training_mode():
    model, x = net(torch.float64), torch.randn(4, 12).double()
    graft = bind(model, RandLoraConfig(r=4, randlora_dropout=0.5, init_weights=False, target_modules=["0"]))
    params = graft.init(torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    y = graft(params, x)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5)
    plain = bind(model, RandLoraConfig(r=4, init_weights=False, target_modules=["0"]))
    first = plain.view(params)[0](dropped) - model[0](dropped) + model[0](x)
    torch.testing.assert_close(y, model[2](first.tanh()))


def test_rows_are_a_loop_also_where_bases_differ():
    model, x = net(torch.float64), torch.randn(4, 12).double()
    rows = torch.tensor([1, -1, 0, 1])
    configs = [RandLoraConfig(r=4, init_weights=False, projection_prng_key=key, **TARGETS) for key in (0, 1)]
    for members in ([configs[0]] * 2, configs):
        graft = bind(model, members)
        trees = [graft.member(i).init(torch.Generator().manual_seed(i)) for i in range(2)]
        alone = [bind(model, config)(tree, x) for config, tree in zip(members, trees, strict=True)]
        expected = torch.stack([(*alone, model(x))[row][place] for place, row in enumerate(rows)])
        torch.testing.assert_close(graft(route(graft.stack(trees), rows), x), expected)
        torch.testing.assert_close(torch.vmap(bind(model, members[0]), (0, None))(stack(trees), x)[0], alone[0])


def test_bases_and_what_is_made_of_them_are_not_kept_for_the_backward():
    for size in ((64, 96), (96, 64)):
        model, kept = nn.Sequential(nn.Linear(*size)).requires_grad_(False), []
        graft = bind(model, RandLoraConfig(r=4, target_modules=["0"]))
        leaves = {leaf: tensor.requires_grad_() for leaf, tensor in graft.init()["0"].items()}
        constants = graft.sites[""]["0"].constants
        own = {tensor.untyped_storage().data_ptr() for tensor in (constants.randlora_A, constants.randlora_B)}
        own.add(model[0].weight.untyped_storage().data_ptr())
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            graft({"0": leaves}, torch.randn(2, size[0]))
        assert max(t.numel() for t in kept if t.untyped_storage().data_ptr() not in own) <= 16 * 64


def test_a_file_whose_rank_is_not_the_configs_is_an_error(tmp_path):
    graft = bind(net(), RandLoraConfig(r=4, **TARGETS))
    save_adapter(graft, tmp_path, params=graft.init())
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 5'))
    with pytest.raises(ValueError, match="r is 5, and randlora_lambda of 0 has 4 rows, expected r"):
        load_adapter(net(), tmp_path)
