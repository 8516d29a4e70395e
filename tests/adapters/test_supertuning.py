"""Super-Tuning against its equation and against PEFT: what half precision keeps, hooks, ranks and masks of files."""

import peft
import pytest
import torch
from torch import nn

from torchgraft.adapters import SupertuningConfig, inject_adapter_in_model, load_adapter, load_config, save_adapter
from torchgraft.functional import bind

FIELDS = {"sparsity": 0.75, "target_modules": ["0"]}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8)).to(dtype)


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_are_pefts_in_pefts_order(top, dtype):
    other = peft.inject_adapter_in_model(peft.SupertuningConfig(**FIELDS, select_top=top), net(dtype))
    site = bind(net(dtype), SupertuningConfig(**FIELDS, select_top=top)).sites[""]["0"]
    indices = site.constants.supertuning_indices
    assert torch.equal(indices, other[0].supertuning_indices["default"]) and indices.dtype == torch.int32
    chosen = torch.zeros(96, dtype=torch.bool).index_fill(0, indices.long(), True)
    sizes = net(dtype)[0].weight.abs().flatten()
    assert chosen.sum() == 24
    assert sizes[chosen].min() >= sizes[~chosen].max() if top else sizes[chosen].max() <= sizes[~chosen].min()


def test_a_change_that_is_small_beside_the_weight_counts_in_half_precision():
    graft = bind(net(torch.bfloat16), SupertuningConfig(**FIELDS))
    values = torch.full((24,), 1e-3)
    x = X.bfloat16()
    added = graft({"0": {"supertuning_values": values}}, x).float() - net(torch.bfloat16)(x).float()
    model = peft.inject_adapter_in_model(peft.SupertuningConfig(**FIELDS), net(torch.bfloat16))
    model[0].supertuning_values["default"].data = values
    lost = model(x).float() - net(torch.bfloat16)(x).float()
    indices = graft.sites[""]["0"].constants.supertuning_indices.long()
    exact = x.float() @ torch.zeros(96).index_fill(0, indices, 1e-3).view(8, 12).T
    assert (added - exact).norm() < (lost - exact).norm()


def test_hooks_of_the_base_are_called():
    model, seen = net(), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    inject_adapter_in_model(SupertuningConfig(**FIELDS, r=2), model)
    model(X)
    assert seen == [1]


def test_hooks_of_the_factors_are_called():
    model, seen = inject_adapter_in_model(SupertuningConfig(**FIELDS, r=2, init_weights=False), net()), []
    before = model(X)
    model[0].supertuning_lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(X), before)
    assert seen == [1]


@pytest.mark.parametrize("save", [True, False])
def test_files_have_the_entries_or_find_them_again(save, tmp_path):
    graft = bind(net(), SupertuningConfig(**FIELDS, r=2, init_weights=False, save_precomputed_indices=save))
    params = graft.init(torch.Generator().manual_seed(0))
    save_adapter(graft, tmp_path, params=params)
    model = net()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(X), graft(params, X))
    assert load_config(tmp_path).lora_alpha == 4
    changed = net()
    changed[0].weight.data.copy_(changed[0].weight.data.flip(0))
    if save:
        with pytest.raises(ValueError, match="supertuning_indices' is not what this graft has made of the base's weig"):
            load_adapter(bind(changed, load_config(tmp_path)), tmp_path)
