"""LoRA on the stacked weights of experts: time and memory of training and inference, for each way to run them.

A Qwen3-MoE with random weights, LoRA of rank 16 on `gate_up_proj` and `down_proj` of all experts (`target_parameters`).
`transformers` runs experts one by one, with weights gathered for each token, or with one grouped product. Peers in the
same rounds: the frozen base (forward, and backward to the embeddings), PEFT, which adds each adapter to the weights of
all experts in every forward.

    python benchmarks/experts.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from _memory import peak_bytes, saved_bytes
from _models import VOCABULARY, lively, tokens, trained
from _picture import bars
from _results import apart, write
from _rounds import Cases, measure, ratios, table
from single import frozen, loss_of, step
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from torchgraft.adapters import LoraConfig, inject_adapter_in_model
from torchgraft.functional import bind, merge, route, stack

FIELDS: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": [],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
WAYS = {"eager": "one expert after the other", "batched_mm": "gathered for each token", "grouped_mm": "grouped product"}


def experts(hidden: int, layers: int, count: int, way: str) -> Any:
    """A frozen mixture of experts with random weights, four experts for each token."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": hidden // 8,
        "intermediate_size": hidden,
        "moe_intermediate_size": hidden // 2,
        "num_experts": count,
        "num_experts_per_tok": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, use_cache=False)).requires_grad_(False)
    model.set_experts_implementation(way)
    return model


def adapted(model: Any) -> tuple[Any, Any, Any, Any]:
    """A graft and its parameters, and the model with the adapter injected by torchgraft and by PEFT."""
    graft = bind(model, LoraConfig(**FIELDS), allow_unreached=True)
    ours: Any = inject_adapter_in_model(LoraConfig(**FIELDS), copy.deepcopy(model))
    theirs: Any = peft.inject_adapter_in_model(peft.LoraConfig(**FIELDS), copy.deepcopy(model))
    return graft, lively(graft.init()), ours, theirs


def training(model: Any, ids: Tensor) -> tuple[Cases, dict[str, float]]:
    """Training steps, and the MiB that each keeps for its backward."""
    graft, params, ours, theirs = adapted(model)
    leaves = trained(params)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    forwards: dict[str, tuple[Callable[[], Tensor], list[Tensor], nn.Module]] = {
        "torchgraft, functional": (lambda: graft(params, ids).logits, leaves, model),
        "torchgraft, in place": (lambda: ours(ids).logits, _trainable(ours), ours),
        "PEFT": (lambda: theirs(ids).logits, _trainable(theirs), theirs),
    }
    cases = {"frozen base": frozen(model, ids)} | {
        name: step(forward, own, ids) for name, (forward, own, _) in forwards.items()
    }
    held = {"frozen base": (lambda: model(inputs_embeds=embeddings).logits, [], model), **forwards}
    kept = {name: _kept(forward, ids, [*own, *base.parameters()]) for name, (forward, own, base) in held.items()}
    return cases, kept


def _kept(forward: Callable[[], Tensor], ids: Tensor, own: list[Tensor]) -> float:
    return _mib(saved_bytes(lambda: loss_of(forward(), ids), own))


def inference(model: Any, ids: Tensor) -> Cases:
    """Forwards without gradients, also of a batch whose rows have adapters of their own."""
    graft, params, ours, theirs = adapted(model)
    merged: Any = copy.deepcopy(model)
    merged.load_state_dict(merge(graft, params))
    cases = {
        "frozen base": lambda: model(ids),
        "torchgraft, functional": lambda: graft(params, ids),
        "torchgraft, in place": lambda: ours(ids),
        "torchgraft, merged": lambda: merged(ids),
        "PEFT": lambda: theirs(ids),
    }
    if len(ids) > 1:
        many = stack([params] * len(ids))
        cases["torchgraft, an adapter for each row"] = lambda: graft(route(many), ids)
        cases["torchgraft, each row by itself"] = lambda: [graft(params, row) for row in ids.split(1)]
    return {name: torch.no_grad()(run) for name, run in cases.items()}


def peaks(cases: Cases) -> dict[str, float]:
    """The most MiB that each case holds at once, over what is there before it."""
    for run in cases.values():
        run()
    return {name: _mib(peak_bytes(run)) for name, run in cases.items()}


def _mib(size: int) -> float:
    return round(size / 2**20, 2)


def _trainable(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _line(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:,.1f}" for name, value in found.items())


def main() -> None:
    """Measure, print, write `results/experts.json` and draw `results/experts.png`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=15)
    quick = parser.parse_args().quick
    if quick:
        apart()
    rounds = 1 if quick else parser.parse_args().rounds
    torch.set_num_threads(2)
    found: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    most: dict[str, Any] = {}
    for way, meaning in WAYS.items():
        model = experts(64, 2, 4, way) if quick else experts(512, 4, 32, way)
        # Gathered weights are as large as the tokens are many, so that way is for few.
        few = (1, 16) if way == "batched_mm" else (4, 64)
        ids = tokens(min(few[0], 2), 4) if quick else tokens(*few)
        steps, kept[meaning] = training(model, ids)
        for kind, cases in {"training step": steps, "inference": inference(model, ids)}.items():
            setting = f"{kind}, {meaning}, batch {few[0]} x {few[1]}"
            found[setting] = ratios(measure(cases, rounds, label=setting), "frozen base")
            most[setting] = peaks(cases)
            print(f"{setting}\n{table(found[setting], 'frozen base')}\n  peak MiB: {_line(most[setting])}")
        print(f"  kept for the backward, MiB: {_line(kept[meaning])}")
    result = {
        "claim": "adapters on stacked experts cost what their thin products cost, and never a copy of all experts",
        "ratios_to_frozen_base": found,
        "peak_mib": most,
        "kept_for_backward_mib": kept,
    }
    write("experts", result)
    bars("experts", "What LoRA on all experts costs over the frozen base", found, "the frozen base's")


if __name__ == "__main__":
    main()
