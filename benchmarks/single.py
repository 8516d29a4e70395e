"""The cost of one adapter over the frozen base: training, with dropout, inference, memory, calls, binding.

A Llama with random weights, LoRA of rank 16 on all linear layers. Peers in the same rounds: the frozen base (forward,
and backward to the embeddings), PEFT, layers written by hand with plain `F.linear`, the library's own kernel with
nothing around it (the limit of what its layers can reach), full fine-tuning, `torch.func.functional_call` with a
materialised `W + s B A`.

    python benchmarks/single.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import optree
import peft
import torch
import torch.nn.functional as F
from _by_hand import Kernel, Plain, by_hand
from _first import first_bind
from _goals import goals, shown
from _memory import saved_bytes
from _models import LINEARS, lively, llama, tokens, trained
from _picture import bars
from _results import apart, write
from _rounds import Cases, measure, ratios, table
from torch import Tensor, nn

from torchgraft.adapters import LoraConfig, inject_adapter_in_model
from torchgraft.functional import bind, merge

RANK = 16
HAND, KERNEL = "plain F.linear, by hand", "torchgraft's kernel alone"
FIELDS: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": LINEARS}


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def step(forward: Callable[[], Tensor], parameters: list[Tensor], ids: Tensor) -> Callable[[], None]:
    """One training step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(forward(), ids).backward()
        optimizer.step()

    return run


def frozen(model: Any, ids: Tensor) -> Callable[[], None]:
    """The floor: forward, and backward through all layers to the embeddings."""

    def run() -> None:
        embeddings = model.get_input_embeddings()(ids).requires_grad_()
        loss_of(model(inputs_embeds=embeddings).logits, ids).backward()

    return run


def training(model: Any, ids: Tensor, dropout: float, peers: bool) -> Cases:
    fields = {**FIELDS, "lora_dropout": dropout}
    graft = bind(model, LoraConfig(**fields))
    params = lively(graft.init())
    theirs: Any = peft.inject_adapter_in_model(peft.LoraConfig(**fields), copy.deepcopy(model))
    ours: Any = inject_adapter_in_model(LoraConfig(**fields), copy.deepcopy(model))
    hand = by_hand(Plain, model, LINEARS, RANK, 2.0, dropout)
    kernel = by_hand(Kernel, model, LINEARS, RANK, 2.0, dropout)
    cases = {
        "frozen base": frozen(model, ids),
        "torchgraft, functional": step(lambda: graft(params, ids).logits, trained(params), ids),
        "torchgraft, in place": step(lambda: ours(ids).logits, [p for p in ours.parameters() if p.requires_grad], ids),
        "PEFT": step(lambda: theirs(ids).logits, [p for p in theirs.parameters() if p.requires_grad], ids),
        HAND: step(lambda: hand(ids).logits, [p for p in hand.parameters() if p.requires_grad], ids),
        KERNEL: step(lambda: kernel(ids).logits, [p for p in kernel.parameters() if p.requires_grad], ids),
    }
    if peers:
        full: Any = copy.deepcopy(model).requires_grad_(True)
        materialised = lively(graft.init())
        cases["full fine-tuning"] = step(lambda: full(ids).logits, list(full.parameters()), ids)
        cases["torch.func, W + sBA"] = step(
            lambda: torch.func.functional_call(model, merge(graft, materialised), (ids,)).logits,
            trained(materialised),
            ids,
        )
    return cases


def inference(model: Any, ids: Tensor) -> Cases:
    graft = bind(model, LoraConfig(**FIELDS))
    params = lively(graft.init())
    view: Any = graft.view(params)
    theirs: Any = peft.inject_adapter_in_model(peft.LoraConfig(**FIELDS), copy.deepcopy(model))
    ours: Any = inject_adapter_in_model(LoraConfig(**FIELDS), copy.deepcopy(model))
    hand, kernel = (by_hand(layer, model, LINEARS, RANK, 2.0) for layer in (Plain, Kernel))
    merged: Any = copy.deepcopy(model)
    merged.load_state_dict(merge(graft, params))
    cases = {
        "frozen base": lambda: model(ids),
        "torchgraft, functional": lambda: graft(params, ids),
        "torchgraft, view": lambda: view(ids),
        "torchgraft, in place": lambda: ours(ids),
        "torchgraft, merged": lambda: merged(ids),
        "PEFT": lambda: theirs(ids),
        HAND: lambda: hand(ids),
        KERNEL: lambda: kernel(ids),
    }
    return {name: torch.no_grad()(run) for name, run in cases.items()}


def memory(model: Any, ids: Tensor, dropout: float) -> dict[str, float]:
    """MiB kept for the backward."""
    fields = {**FIELDS, "lora_dropout": dropout}
    graft = bind(model, LoraConfig(**fields))
    params = lively(graft.init())
    theirs: Any = peft.inject_adapter_in_model(peft.LoraConfig(**fields), copy.deepcopy(model))
    ours: Any = inject_adapter_in_model(LoraConfig(**fields), copy.deepcopy(model))
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()

    def kept(forward: Callable[[], Tensor], *trees: Any) -> float:
        own = [
            t
            for tree in trees
            for t in ([*tree.parameters(), *tree.buffers()] if isinstance(tree, nn.Module) else tree)
        ]
        return round(saved_bytes(lambda: loss_of(forward(), ids), own) / 2**20, 2)

    return {
        "frozen base": kept(lambda: model(inputs_embeds=embeddings).logits, model),
        "torchgraft, functional": kept(lambda: graft(params, ids).logits, model, trained(params)),
        "torchgraft, in place": kept(lambda: ours(ids).logits, ours),
        "PEFT": kept(lambda: theirs(ids).logits, theirs),
    }


def calls(model: Any, ids: Tensor) -> tuple[Cases, int]:
    """A graft's call against a view of the same adapter, whose forward is the same: what a call adds."""
    graft = bind(model, LoraConfig(**{**FIELDS, "target_modules": LINEARS[:4]}))
    params = lively(graft.init())
    view: Any = graft.view(params)
    unchanging = graft.unchanging()
    state = {name: p.detach() for name, p in model.named_parameters()}
    cases = {
        "torchgraft, view": lambda: view(ids),
        "torchgraft, functional": lambda: graft(params, ids),
        "torchgraft, unchanging": lambda: unchanging(params, ids),
        "base": lambda: model(ids),
        "torch.func.functional_call of the base": lambda: torch.func.functional_call(model, state, (ids,)),
    }
    return {name: torch.no_grad()(run) for name, run in cases.items()}, len(optree.tree_leaves(params))


def binding(layers: int) -> Cases:
    """A Llama of 7 targets in each layer."""
    model = llama(64, layers)
    ours, theirs = LoraConfig(r=2, target_modules=LINEARS), peft.LoraConfig(r=2, target_modules=LINEARS)
    params, ids = bind(model, ours).init(), tokens(1, 8)
    return {
        "PEFT, injection": lambda: peft.inject_adapter_in_model(theirs, copy.deepcopy(model)),
        "torchgraft, injection": lambda: inject_adapter_in_model(ours, copy.deepcopy(model)),
        "torchgraft, bind": lambda: bind(model, ours),
        "base, deepcopy alone": lambda: copy.deepcopy(model),
        "PEFT, injection and a call": lambda: peft.inject_adapter_in_model(theirs, copy.deepcopy(model))(ids),
        "torchgraft, bind and a call": lambda: bind(model, ours)(params, ids),
    }


def over_injection(seconds: Mapping[str, list[float]]) -> float:
    """Median of `bind` as a multiple of PEFT's injection alone, without the copy that it is made into."""
    names = ("torchgraft, bind", "PEFT, injection", "base, deepcopy alone")
    rounds = zip(*(seconds[name] for name in names), strict=True)
    return statistics.median(bound / (injected - copied) for bound, injected, copied in rounds)


def main() -> None:
    """Measure, print, write `results/single.json` and draw `results/single.png`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=15)
    quick = parser.parse_args().quick
    if quick:
        apart()
    rounds = 1 if quick else parser.parse_args().rounds
    torch.set_num_threads(2)
    model, ids = (llama(64, 2), tokens(2, 16)) if quick else (llama(512, 8), tokens(4, 128))
    panels = {
        "training step, batch 4 x 128": training(model, ids, 0.0, peers=True),
        "training step with dropout 0.1": training(model, ids, 0.1, peers=False),
        "inference, batch 4 x 128": inference(model, ids),
    }
    found = {}
    for setting, cases in panels.items():
        found[setting] = ratios(measure(cases, rounds, label=setting), "frozen base")
        print(f"{setting}\n{table(found[setting], 'frozen base')}")
    torch.set_num_threads(1)
    small, few = (llama(64, 2), tokens(1, 8)) if quick else (llama(256, 8), tokens(1, 8))
    for setting, cases in {
        "training step, launch-bound: hidden 256, batch 1 x 8, one thread": training(small, few, 0.0, peers=False),
        "inference, launch-bound": inference(small, few),
    }.items():
        found[setting] = ratios(measure(cases, 3 * rounds, label=setting, repeat=1 if quick else 5), "frozen base")
        print(f"{setting}\n{table(found[setting], 'frozen base')}")
    cases, leaves = calls(llama(64, 14), few)
    call = ratios(measure(cases, 5 * rounds, label="a call", repeat=1 if quick else 20), "torchgraft, view")
    print(f"a call with {leaves} tensors\n{table(call, 'torchgraft, view')}")
    layers = 2 if quick else 32
    gc.collect()
    gc.freeze()  # what was imported: to look through it takes longer than an injection, whichever happens to do it
    seconds = measure(binding(layers), rounds, label="224 targets")
    bound = ratios(seconds, "PEFT, injection")
    print(f"224 targets\n{table(bound, 'PEFT, injection')}")
    launch = {name.partition(",")[0]: cases for name, cases in found.items() if "launch-bound" in name}
    first = first_bind(rounds, layers)
    reached = goals(HAND, launch["inference"], launch["training step"], call, over_injection(seconds), first)
    print(f"goals\n{shown(reached)}")
    kept = {f"dropout {dropout}": memory(model, ids, dropout) for dropout in (0.0, 0.1)}
    print("MiB kept for the backward", kept)
    result = {
        "claim": "one adapter costs little more than the frozen base, and less than PEFT's",
        "ratios_to_frozen_base": found,
        "call": {"tensors": leaves, **call},
        "224_targets": bound,
        "goals": reached,
        "kept_for_backward_mib": kept,
    }
    write("single", result)
    bars("single", "What one adapter costs over the frozen base", found, "the frozen base's")


if __name__ == "__main__":
    main()
