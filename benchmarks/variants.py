"""The cost of LoRA's variants over the frozen base, and of PEFT's: DoRA, and LoRA on `nn.MultiheadAttention`.

DoRA of rank 16 on all linear layers of a Llama with random weights; LoRA of rank 16 on both projections of each
attention module of a plain transformer. Peers in the same rounds: the frozen base, LoRA, PEFT.

    python benchmarks/variants.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import peft
import torch
from _models import lively, llama, tokens, trained
from _picture import bars
from _results import apart, write
from _rounds import Cases, measure, ratios, table
from single import FIELDS, RANK, frozen, step
from torch import Tensor, nn

from torchgraft.adapters import LoraConfig, inject_adapter_in_model
from torchgraft.functional import bind

ATTENTION: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["attention"]}


class Block(nn.Module):
    """A transformer block around torch's own attention."""

    def __init__(self, hidden: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden, hidden // 64, batch_first=True)
        self.first, self.second = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Attention and a feed-forward part, each added to its input."""
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


def steps(model: nn.Module, x: Tensor, fields: dict[str, Any]) -> Cases:
    """Training steps towards zero, whose loss is as cheap as can be."""
    graft = bind(model, LoraConfig(**fields))
    params = lively(graft.init())
    theirs: Any = peft.inject_adapter_in_model(peft.LoraConfig(**fields), copy.deepcopy(model))
    ours: Any = inject_adapter_in_model(LoraConfig(**fields), copy.deepcopy(model))

    def base() -> None:
        model(x.clone().requires_grad_()).square().mean().backward()

    def training(forward: Any, parameters: list[Tensor]) -> Any:
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            forward(x).square().mean().backward()
            optimizer.step()

        return run

    return {
        "frozen base": base,
        "torchgraft, functional": training(lambda x: graft(params, x), trained(params)),
        "torchgraft, in place": training(ours, [p for p in ours.parameters() if p.requires_grad]),
        "PEFT": training(theirs, [p for p in theirs.parameters() if p.requires_grad]),
    }


def passes(model: nn.Module, x: Tensor, fields: dict[str, Any]) -> Cases:
    """Forward passes without gradients."""
    graft = bind(model, LoraConfig(**fields))
    params = lively(graft.init())
    view: Any = graft.view(params)
    constant: Any = graft.view(params, constant=True)
    theirs: Any = peft.inject_adapter_in_model(peft.LoraConfig(**fields), copy.deepcopy(model)).eval()
    ours: Any = inject_adapter_in_model(LoraConfig(**fields, inference_mode=True), copy.deepcopy(model))
    cases = {
        "frozen base": lambda: model(x),
        "torchgraft, functional": lambda: graft(params, x),
        "torchgraft, view": lambda: view(x),
        "torchgraft, constant view": lambda: constant(x),
        "torchgraft, in place": lambda: ours(x),
        "PEFT": lambda: theirs(x),
    }
    return {name: torch.no_grad()(run) for name, run in cases.items()}


def dora(model: Any, ids: Tensor, dropout: float) -> Cases:
    """Training steps of DoRA, and of LoRA beside it."""
    fields = {**FIELDS, "lora_dropout": dropout}
    both = {"DoRA": {**fields, "use_dora": True}, "LoRA": fields}
    cases = {"frozen base": frozen(model, ids)}
    for name, one in both.items():
        cases[f"torchgraft, {name}"] = _ours(model, ids, one)
        cases[f"PEFT, {name}"] = _theirs(model, ids, one)
    return cases


def _ours(model: Any, ids: Tensor, fields: dict[str, Any]) -> Any:
    graft = bind(model, LoraConfig(**fields))
    params = lively(graft.init())
    return step(lambda: graft(params, ids).logits, trained(params), ids)


def _theirs(model: Any, ids: Tensor, fields: dict[str, Any]) -> Any:
    theirs: Any = peft.inject_adapter_in_model(peft.LoraConfig(**fields), copy.deepcopy(model))
    return step(lambda: theirs(ids).logits, [p for p in theirs.parameters() if p.requires_grad], ids)


def main() -> None:
    """Measure, print, write `results/variants.json` and draw `results/variants.png`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small models and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=11)
    quick = parser.parse_args().quick
    if quick:
        apart()
    rounds = 1 if quick else parser.parse_args().rounds
    torch.set_num_threads(2)
    model, ids = (llama(64, 2), tokens(2, 16)) if quick else (llama(512, 8), tokens(4, 128))
    hidden = 64 if quick else 512
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block(hidden) for _ in range(2 if quick else 6))).requires_grad_(False).eval()
    x = torch.randn(*ids.shape, hidden)
    panels = {
        "DoRA: training step": dora(model, ids, 0.0),
        "DoRA: training step with dropout 0.1": dora(model, ids, 0.1),
        "DoRA: inference": passes(model, ids, {**FIELDS, "use_dora": True}),
        "MultiheadAttention: training step": steps(blocks, x, ATTENTION),
        "MultiheadAttention: inference": passes(blocks, x, ATTENTION),
    }
    found = {}
    for setting, cases in panels.items():
        found[setting] = ratios(measure(cases, rounds, label=setting), "frozen base")
        print(f"{setting}\n{table(found[setting], 'frozen base')}")
    result = {
        "claim": "DoRA, and LoRA on torch's own attention, cost less than PEFT's",
        "ratios_to_frozen_base": found,
    }
    write("variants", result)
    bars("variants", "What LoRA's variants cost over the frozen base", found, "the frozen base's")


if __name__ == "__main__":
    main()
