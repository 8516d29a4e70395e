"""Experts in a bank: adapters on their stacked weights are what they are alone, whatever their ranks are."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import torchopt
import transformers
from torch import nn

from torchgraft.adapters import Bank, LoraConfig, adamw, functional_optimizer, load_adapter, muon, save_adapter, sgd
from torchgraft.functional import bind, route

SIZE, WIDE, EXPERTS = 4, 6, 3


class Experts(nn.Module):
    """Experts that get the tokens of all rows, as those of `transformers` do."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDE, SIZE, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(EXPERTS, SIZE, WIDE, dtype=torch.float64))

    def forward(self, tokens: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(tokens)
        for expert in index.unique().tolist():
            token, place = torch.where(index == expert)
            hidden = F.linear(F.linear(tokens[token], self.up[expert]).relu(), self.down[expert])
            y = y.index_add(0, token, hidden * weights[token, place, None])
        return y


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gate = (nn.Linear(SIZE, width, dtype=torch.float64) for width in (SIZE, EXPERTS))
        self.experts, self.last = Experts(), nn.Linear(SIZE, WIDE, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.first(x).flatten(0, 1)
        weights, index = self.gate(tokens).softmax(-1).topk(2)
        y: torch.Tensor = self.last(x + self.experts(tokens, index, weights).view(x.shape))
        return y


def config(r: int, *modules: str) -> LoraConfig:
    targets = ["experts.up", "experts.down"]
    return LoraConfig(
        r=r, lora_alpha=3 + r, target_modules=[*modules], target_parameters=targets, init_lora_weights=False
    )


def test_experts_in_a_bank_are_what_they_are_alone() -> None:
    model = Mixture()
    bank = Bank(bind(model, config(3, "first", "last")), slots=3, optimizer=sgd(lr=1e-4))
    x, given = torch.randn(4, 5, SIZE, dtype=torch.float64), ["a", "b", "a", "b"]
    for name, r in (("a", 1), ("b", 3)):
        bank.add(name, config(r, "first", "last"))
    alone = {name: bank.tensors(name) for name in "ab"}
    for _ in range(3):
        with bank.rows(given) as adapted:
            y = adapted(x)
            y.square().sum().backward()
        bank.step(["a", "b"])
        for name, params in alone.items():
            leaves = [leaf.requires_grad_() for own in params.values() for leaf in own.values()]
            rows = [one == name for one in given]
            own = bind(model, bank.config(name))(params, x[rows])
            torch.testing.assert_close(y.detach()[rows], own.detach(), rtol=1e-10, atol=1e-12)
            for leaf, gradient in zip(leaves, torch.autograd.grad(own.square().sum(), leaves), strict=True):
                leaf.data.sub_(gradient, alpha=1e-4)
            torch.testing.assert_close(bank.tensors(name), params, rtol=1e-10, atol=1e-12)


def test_a_rank_above_the_banks_is_refused() -> None:
    bank = Bank(bind(Mixture(), config(3)), slots=3)
    with pytest.raises(
        ValueError,
        match=r"'a' .* \(12, 6\) at 'experts.down', and a slot has room for \(9, 6\); make it smaller, or the bank "
        r"with a config that is as large \(r is 4, there 3, ",
    ):
        bank.add("a", config(4))
    assert bank.names == []


# -- models of transformers -------------------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20,
    "intermediate_size": 24,
}  # fmt: skip
FEW = {"moe_intermediate_size": 8, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, Any] = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **FEW)),
}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9], [3, 2, 3, 8, 4]])
GIVEN = ["large", "small", None, "odd"]
OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adamw": (adamw(lr=1e-2), torch.optim.AdamW, {"lr": 1e-2}),
    "muon": (muon(lr=1e-2), torch.optim.Muon, {"lr": 1e-2}),
    "torchopt": (
        functional_optimizer(torchopt.sgd, lr=1e-2, momentum=0.9),
        torch.optim.SGD,
        {"lr": 1e-2, "momentum": 0.9},
    ),
}


def language_model(name: str, implementation: str = "eager", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    made = MODELS[name]().to(dtype).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    made.set_experts_implementation(implementation)
    return made


def lora(r: int, **fields: Any) -> LoraConfig:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    more = {"target_modules": ["q_proj"], "target_parameters": parameters, **fields}
    return LoraConfig(r=r, lora_alpha=3 + r, init_lora_weights=False, **more)


CONFIGS = {
    "small": lora(4),
    "large": lora(8),
    "odd": lora(3, rank_pattern={"1.mlp.experts.down_proj": 5}, target_modules=[]),
}


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[: len(logits), 1:].flatten(), reduction="none").sum()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("name", "implementation"), [("mixtral", "eager"), ("qwen3_moe", "batched_mm")])
def test_experts_of_other_ranks_are_trained_as_alone(name: str, implementation: str, optimizer: str) -> None:
    model, (own_optimizer, cls, hyper) = language_model(name, implementation), OPTIMIZERS[optimizer]
    bank = Bank(bind(model, lora(8)), slots=2, resting="memory", optimizer=own_optimizer)
    runs = {}
    for i, (adapter, own) in enumerate(CONFIGS.items()):
        bank.add(adapter, own, generator=torch.Generator().manual_seed(i))
        graft, params = bind(model, own), bank.tensors(adapter)
        leaves = [leaf.requires_grad_() for leaves in params.values() for leaf in leaves.values()]
        runs[adapter] = graft, params, cls(leaves, **hyper)
    for present in (["large", "small"], ["odd"], ["small", "odd"]):
        given = [one if one in present else None for one in GIVEN]
        with bank.rows(given) as adapted:
            y = adapted(IDS).logits
            loss_of(y).backward()
        bank.step({one: {} for one in present})
        for one in present:
            graft, params, theirs = runs[one]
            row = GIVEN.index(one)
            alone = graft(params, IDS[row : row + 1]).logits
            torch.testing.assert_close(y[row : row + 1], alone, rtol=1e-10, atol=1e-12)
            theirs.zero_grad()
            F.cross_entropy(alone[0, :-1], IDS[row, 1:], reduction="sum").backward()
            theirs.step()
    for one, (_, params, _) in runs.items():
        torch.testing.assert_close(bank.tensors(one), params, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "implementation", "dtype", "close"),
    [
        ("mixtral", "grouped_mm", torch.float32, {"rtol": 1e-4, "atol": 1e-5}),  # torch has no such product in float64
        ("qwen3_moe", "eager", torch.float64, {"rtol": 1e-10, "atol": 1e-12}),
    ],
)
def test_experts_of_other_ranks_are_rows_of_one_stack(
    name: str, implementation: str, dtype: torch.dtype, close: dict[str, float]
) -> None:
    model = language_model(name, implementation, dtype)
    graft = bind(model, [*CONFIGS.values()], names=[*CONFIGS])
    trees = [bind(model, own).init(torch.Generator().manual_seed(i), dtype=torch.float64)
             for i, own in enumerate(CONFIGS.values())]  # fmt: skip
    leaves = [leaf.requires_grad_() for tree in trees for own in tree.values() for leaf in own.values()]
    y = graft(route(graft.stack(trees), graft.rows(GIVEN)), IDS).logits
    found = torch.autograd.grad(loss_of(y), leaves)
    alone = [bind(model, own)(tree, IDS[GIVEN.index(one)][None]).logits
             for (one, own), tree in zip(CONFIGS.items(), trees, strict=True)]  # fmt: skip
    for one, own in zip(CONFIGS, alone, strict=True):
        torch.testing.assert_close(y[GIVEN.index(one)], own[0], **close)
    losses = [
        F.cross_entropy(own[0, :-1], IDS[GIVEN.index(one), 1:], reduction="sum")
        for one, own in zip(CONFIGS, alone, strict=True)
    ]
    expected = torch.autograd.grad(torch.stack(losses).sum(), leaves)
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers
def test_files_of_experts_of_other_ranks_are_pefts_both_ways(tmp_path: Path) -> None:
    model = language_model("mixtral")
    bank = Bank(bind(model, lora(8)), slots=2)
    bank.add("small", CONFIGS["small"])
    bank.forward_backward(lambda adapted, ids: loss_of(adapted(ids).logits), IDS[:1], ["small"])
    bank.step(["small"])
    params = bank.tensors("small")
    bank.save("small", tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(language_model("mixtral"), tmp_path / "ours").eval()
    expected = bind(model, CONFIGS["small"])(params, IDS).logits
    torch.testing.assert_close(theirs(IDS).logits, expected)
    theirs.save_pretrained(tmp_path / "theirs")
    bank.load(tmp_path / "theirs", "back")
    torch.testing.assert_close(bank.tensors("back"), params, rtol=0, atol=0)
    torch.testing.assert_close(bank.view(["back"])(IDS[:1]).logits, expected[:1])
    save_adapter(bind(model, CONFIGS["small"]), tmp_path / "again", params=params)
    loaded = load_adapter(bind(model, CONFIGS["small"]), tmp_path / "ours")
    torch.testing.assert_close(loaded, params, rtol=0, atol=0)
    assert (tmp_path / "ours/adapter_model.safetensors").read_bytes() == (
        tmp_path / "again/adapter_model.safetensors"
    ).read_bytes()
