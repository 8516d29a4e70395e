"""GraLoRA: blocks, the LoRA beside them, dropout, and what it keeps for the backward."""

import pytest
import torch
from torch import nn

from torchgraft.adapters import GraloraConfig, extract_config, inject_adapter_in_model
from torchgraft.functional import bind


def model(inputs=8, outputs=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs)).double()


def config(**fields):
    return GraloraConfig(**{"r": 4, "alpha": 4, "target_modules": ["0"], "init_weights": False, **fields})


@pytest.mark.parametrize("k", [1, 2, 4])
def test_blocks_have_a_rank_of_their_own_and_together_more(k):
    graft = bind(model(), config(gralora_k=k))
    params = {"0": {name: leaf.double() for name, leaf in graft.init(torch.Generator().manual_seed(0))["0"].items()}}
    delta = (graft(params, torch.eye(8, dtype=torch.float64)) - graft.model(torch.eye(8, dtype=torch.float64))).mT
    ranks = [int(torch.linalg.matrix_rank(b)) for rows in delta.chunk(k, 0) for b in rows.chunk(k, 1)]
    assert set(ranks) == {4 // k} and torch.linalg.matrix_rank(delta) == min(8, 4 * k)


def test_each_branch_has_a_mask_of_its_own():
    base, x = model().train(), torch.randn(5, 8, dtype=torch.float64)
    graft = bind(base, config(hybrid_r=2, gralora_dropout=0.5))
    params = graft.init(torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    y = graft(params, x)
    torch.manual_seed(1)
    masks = [nn.functional.dropout(torch.ones_like(x), 0.5) for _ in range(2)]
    assert not torch.equal(*masks)
    alone = [{**params["0"]}, {**params["0"]}]
    alone[0]["gralora_B_general"], alone[1]["gralora_B"] = (
        torch.zeros_like(params["0"][name]) for name in ("gralora_B_general", "gralora_B")
    )
    graft = bind(base.eval(), config(hybrid_r=2))
    parts = [graft({"0": leaves}, x * mask) - base(x * mask) for leaves, mask in zip(alone, masks, strict=True)]
    torch.testing.assert_close(y, base(x) + sum(parts))


def test_nothing_as_large_as_the_weight_is_kept_for_the_backward():
    base = nn.Sequential(nn.Linear(256, 320)).requires_grad_(False)
    graft = bind(base, config(hybrid_r=4))
    leaves, kept = graft.init(), []
    for leaf in leaves["0"].values():
        leaf.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        graft(leaves, torch.randn(8, 256, requires_grad=True)).sum()
    assert not [t for t in kept if t.numel() >= 256 * 320 and t.data_ptr() != base[0].weight.data_ptr()]


def test_ranks_and_blocks_are_found_in_tensors():
    injected = inject_adapter_in_model(config(r=8, gralora_k=4, hybrid_r=3), model())
    state = {name: tensor for name, tensor in injected.state_dict().items() if "gralora" in name}
    state = {name.replace(".default", ""): tensor for name, tensor in state.items()}
    found = inject_adapter_in_model(config(), model(), state_dict=state)
    assert (extract_config(found).r, extract_config(found).gralora_k, extract_config(found).hybrid_r) == (8, 4, 3)
    assert found[0].scaling["default"] == 4 / 11


def test_a_hook_on_the_lora_beside_takes_part():
    injected = inject_adapter_in_model(config(hybrid_r=2), model())
    x = torch.randn(5, 8, dtype=torch.float64)
    before = injected(x)
    called = []
    injected[0].gralora_A_general["default"].register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(injected(x), before)
    assert called
