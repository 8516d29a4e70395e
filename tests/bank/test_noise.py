"""Noise of each adapter's own: dropout is what a batch of its rows alone would draw, whoever shares the batch."""

from typing import Any

import pytest
import torch
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import Bank, LoraConfig
from torchgraft.functional import UnsupportedCall, bind

from .alone import drawing_from, lora, model

ALL = {"target_modules": ["0", "2"]}
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=2, lora_dropout=0.4, init_lora_weights=False, **ALL),
    "dora": LoraConfig(r=2, lora_dropout=0.4, init_lora_weights=False, use_dora=True, **ALL),
    "lora bias": LoraConfig(r=2, lora_dropout=0.4, init_lora_weights=False, lora_bias=True, **ALL),
    "pissa": LoraConfig(r=2, lora_dropout=0.4, init_lora_weights="pissa", **ALL),
    "adalora": adapters.AdaLoraConfig(init_r=2, lora_dropout=0.4, init_lora_weights=False, **ALL),
    "loha": adapters.LoHaConfig(r=2, rank_dropout=0.4, module_dropout=0.3, init_weights=False, **ALL),
    "lokr": adapters.LoKrConfig(r=2, rank_dropout=0.4, module_dropout=0.3, init_weights=False, **ALL),
    "oft": adapters.OFTConfig(r=1, oft_block_size=0, module_dropout=0.4, init_weights=False, target_modules=["2"]),
    "delora": adapters.DeloraConfig(r=2, module_dropout=0.4, init_weights=False, **ALL),
    "hira": adapters.HiraConfig(r=2, hira_dropout=0.4, init_weights=False, **ALL),
    "miss": adapters.MissConfig(r=1, miss_dropout=0.4, init_weights=False, **ALL),
    "pvera": adapters.PveraConfig(r=2, init_weights=False, **ALL),
    "randlora": adapters.RandLoraConfig(r=2, randlora_alpha=2, randlora_dropout=0.4, init_weights=False, **ALL),
    "vera": adapters.VeraConfig(r=2, vera_dropout=0.4, init_weights=False, **ALL),
    "tinylora": adapters.TinyLoraConfig(r=2, tinylora_dropout=0.4, init_weights=False, **ALL),
    "gralora": adapters.GraloraConfig(r=1, gralora_k=1, gralora_dropout=0.4, init_weights=False, **ALL),
    "vblora": adapters.VBLoRAConfig(r=2, vector_length=1, num_vectors=4, topk=2, vblora_dropout=0.4, **ALL),
}
GIVEN = ["a", "b", None, "a", "c", "b", "a"]


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_is_what_the_rows_alone_would_draw(name: str) -> None:
    base, config = model(), CONFIGS[name]
    graft = bind(base, config)
    bank = Bank(graft, slots=4)
    x = torch.randn(len(GIVEN), 5, dtype=torch.float64)
    sources = {name: torch.Generator().manual_seed(i) for i, name in enumerate("abc")}
    for one, source in sources.items():
        params = graft.init(source)
        params = {p: {n: t + 0.1 * torch.randn_like(t) for n, t in leaves.items()} for p, leaves in params.items()}
        bank.add(one, config, params=params, generator=source)
    outputs = []
    for _ in range(2):
        state = torch.get_rng_state()
        with bank.rows(GIVEN) as adapted:
            y = adapted(x)
            y.sum().backward()
        assert torch.equal(state, torch.get_rng_state())
        outputs.append(y)
        torch.testing.assert_close(y[2], base(x)[2])
        for one, source in sources.items():
            mine = torch.tensor([given == one for given in GIVEN])
            with drawing_from(source):
                alone = graft(bank.tensors(one), x[mine])
            torch.testing.assert_close(y[mine], alone, rtol=1e-12, atol=1e-12)
    assert name == "oft" or not torch.allclose(*outputs)  # whose one block is drawn as a whole
    with torch.no_grad(), bank.rows(GIVEN) as adapted:
        base.eval()
        y = adapted(x)
        torch.testing.assert_close(y[4:5], graft(bank.tensors("c"), x[4:5]), rtol=1e-12, atol=1e-12)


def test_large_inputs_draw_as_they_do_alone() -> None:
    base = nn.Sequential(nn.Linear(64, 8))
    config = LoraConfig(r=2, lora_dropout=0.25, init_lora_weights=False, target_modules=["0"])
    graft, source = bind(base, config), torch.Generator().manual_seed(3)
    bank = Bank(graft, slots=2)
    for name in "ab":
        bank.add(name, config, generator=source)
    x = torch.randn(6, 256, 64)
    with bank.rows([*"abbaab"]) as adapted:
        y = adapted(x)
    with drawing_from(source):
        alone = graft(bank.tensors("b"), x[[1, 2, 5]])
    torch.testing.assert_close(y[[1, 2, 5]], alone)


def test_dropout_of_ones_own_is_not_drawn_twice() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()

        def forward(self, x: torch.Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    config = LoraConfig(r=2, lora_dropout=0.5, target_modules=["inner.0"])
    bank = Bank(bind(Checkpointed(), config), slots=1)
    bank.add("a", config)

    def train() -> None:
        with bank.rows(["a", "a"]) as adapted:
            adapted(torch.randn(2, 5, dtype=torch.float64)).sum().backward()

    with pytest.raises(UnsupportedCall, match="would draw anew where a part of the model is run again"):
        train()


def test_configs_without_dropout_take_the_fast_ways() -> None:
    bank = Bank(bind(model(), lora(2)), slots=1)
    bank.add("a", lora(2))
    with bank.rows(["a"]) as adapted:
        assert adapted._stack is not None
        assert adapted._stack.rows.noise is None
