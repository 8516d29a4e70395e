"""BD-LoRA: blocks against whole matrices and PEFT, in place with what is attached, and where blocks are no factors."""

import copy

import peft
import pytest
import torch
from torch import nn

from torchgraft.adapters import (
    BdLoraConfig,
    LoraConfig,
    as_peft,
    combine,
    inject_adapter_in_model,
    load_adapter,
    prepare_model_for_compiled_hotswap,
    save_adapter,
    to_plain,
)
from torchgraft.functional import bind

BLOCKS = {"target_modules_bd_a": ["2"], "target_modules_bd_b": ["0"], "nblocks": 2}
FIELDS = {"r": 4, "target_modules": ["0", "2"]}
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def adapter(**fields):
    config = LoraConfig(use_bdlora={**BLOCKS, **fields}, init_lora_weights=False, **FIELDS)
    graft = bind(net(), config)
    generator = torch.Generator().manual_seed(3)
    tree = graft.init(generator)
    return graft, {
        path: {leaf: torch.randn(t.shape, generator=generator) for leaf, t in leaves.items()}
        for path, leaves in tree.items()
    }


def close(given, wanted):
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_shapes_are_those_of_blocks_and_the_plain_lora_has_the_whole_matrices():
    graft, params = adapter()
    assert {leaf: tuple(t.shape) for leaf, t in params["0"].items()} == {"lora_A": (4, 6), "lora_B": (8, 2)}
    assert {leaf: tuple(t.shape) for leaf, t in params["2"].items()} == {"lora_A": (4, 4), "lora_B": (4, 4)}
    config, tree = to_plain(graft, params)
    assert config.use_bdlora is None
    assert torch.equal(tree["0"]["lora_B"], torch.block_diag(*params["0"]["lora_B"].chunk(2)))
    assert torch.equal(tree["2"]["lora_A"], torch.block_diag(*params["2"]["lora_A"].chunk(2)))
    close(bind(net(), config)(tree, X), graft(params, X))


def test_modules_of_neither_are_plain_where_that_is_allowed():
    _, params = adapter(target_modules_bd_a=None, match_strict=False)
    assert params["2"]["lora_A"].shape == (4, 8) and params["0"]["lora_B"].shape == (8, 2)
    other = peft.get_peft_model(
        net(),
        peft.LoraConfig(
            use_bdlora=peft.tuners.lora.BdLoraConfig(target_modules_bd_b=["0"], nblocks=2, match_strict=False), **FIELDS
        ),
    )
    state = peft.get_peft_model_state_dict(other)
    assert state["base_model.model.0.lora_B.weight"].shape == (8, 2)


def test_hooks_and_other_classes_in_place_take_part(tmp_path):
    graft, params = adapter()
    model = inject_adapter_in_model(graft.configs[""], net(), params=copy.deepcopy(params))
    close(model(X), graft(params, X))
    model[0].lora_B["default"].register_forward_hook(lambda module, inputs, y: 2 * y)
    doubled = {**params, "0": {**params["0"], "lora_B": 2 * params["0"]["lora_B"]}}
    close(model(X), graft(doubled, X))
    assert repr(model[0].lora_B["default"]) == "BlockDiagonalLinear(in_features=4, out_features=8, nblocks=2)"
    save_adapter(model, tmp_path)
    close(load_adapter(net(), tmp_path)(X), graft(params, X))
    close(peft.PeftModel.from_pretrained(net(), tmp_path)(X), graft(params, X))


def test_blocks_are_no_factors_that_are_added_or_grown():
    graft, params = adapter()
    with pytest.raises(ValueError, match="has use_bdlora, so its tree has blocks of its matrices; make it plain first"):
        combine([(graft.configs[""], params)] * 2, [1.0, 1.0])
    plain = to_plain(graft, params)
    assert combine([plain] * 2, [0.5, 0.5])[0].use_bdlora is None
    model = inject_adapter_in_model(graft.configs[""], net(), params=params)
    with pytest.raises(
        ValueError, match="0: adapter 'default' has matrices of blocks and has rank 4, which cannot become"
    ):
        prepare_model_for_compiled_hotswap(model, target_rank=8)


def test_stacks_share_the_rank():
    configs = [LoraConfig(use_bdlora=BLOCKS, r=r, target_modules=["0"]) for r in (2, 4)]
    with pytest.raises(ValueError, match="0: the configs differ in 'blocks', which the adapters of a LORA stack share"):
        bind(net(), configs)


def test_other_layers_are_an_error():
    with pytest.raises(ValueError, match="use_bdlora is given, and 0 is conv1d; it is for linear layers"):
        bind(nn.Sequential(nn.Conv1d(4, 4, 1)), LoraConfig(use_bdlora=BLOCKS, target_modules=["0"]))


def test_the_config_is_found_under_pefts_name_and_compares_by_its_fields():
    with as_peft():
        from peft.tuners.lora import BdLoraConfig as Found
    assert Found is BdLoraConfig
    config = LoraConfig(use_bdlora=BdLoraConfig(**BLOCKS), **FIELDS)
    assert LoraConfig.from_dict(config.to_dict()) == config == LoraConfig(use_bdlora=BLOCKS, **FIELDS)
