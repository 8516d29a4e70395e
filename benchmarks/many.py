"""Training many adapters on one frozen base: in one pass over the combined batch, against one after the other.

A Llama with random weights, LoRA of rank 16 on all linear layers, each adapter with its own rows of the batch. Peers in
the same rounds: the frozen base on the combined batch (the floor), the same with an optimizer step for all adapters
(what cannot be undercut), and PEFT, which trains one adapter after the other (`set_adapter`, forward, backward, AdamW).
A second picture shows the cost against the number of adapters.

    python benchmarks/many.py [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _apart import floor, one_by_one
from _models import LINEARS, lively, llama, tokens, trained
from _picture import bars, curves
from _results import apart, write
from _rounds import Cases, measure, ratios, table
from torch import Tensor

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind, route, stack

FIELDS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": LINEARS}


class Setting(NamedTuple):
    """How many adapters, and how much work each has."""

    adapters: int
    batch: int
    length: int
    hidden: int
    layers: int

    def __str__(self) -> str:
        size = f"hidden {self.hidden}, {self.layers} layers"
        return f"{self.adapters} adapters, {self.batch} x {self.length} tokens each, {size}"


SETTINGS = [
    Setting(8, 1, 8, 512, 8),
    Setting(8, 1, 32, 512, 8),
    Setting(8, 4, 128, 512, 8),
    Setting(32, 1, 32, 128, 4),
]


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def limit(model: Any, ids: Tensor, adapters: int) -> Callable[[], None]:
    """The floor, and the optimizer's step for all adapters: what is left if the adapters' own products cost nothing."""
    graft = bind(model, LoraConfig(**FIELDS))
    leaves = trained(stack([lively(graft.init(), seed) for seed in range(adapters)]))
    optimizer, base = torch.optim.AdamW(leaves, lr=1e-5, fused=True), floor(model, ids, loss_of)
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)

    def run() -> None:
        base()
        optimizer.step()

    return run


def routed(model: Any, ids: Tensor, adapters: int) -> Callable[[], None]:
    """One forward with a row index, one backward, one optimizer step for all."""
    graft = bind(model, LoraConfig(**FIELDS))
    many = stack([lively(graft.init(), seed) for seed in range(adapters)])
    optimizer = torch.optim.AdamW(trained(many), lr=1e-5, fused=True)
    rows = torch.arange(adapters).repeat_interleave(len(ids) // adapters)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(graft(route(many, rows), ids).logits, ids) * adapters
        loss.backward()
        optimizer.step()

    return run


def vmapped(model: Any, ids: Tensor, adapters: int) -> Callable[[], None]:
    """The same with `torch.vmap` over the stack, and one backward outside of it."""
    graft = bind(model, LoraConfig(**FIELDS))
    many = stack([lively(graft.init(), seed) for seed in range(adapters)])
    optimizer = torch.optim.AdamW(trained(many), lr=1e-5, fused=True)
    each = ids.unflatten(0, (adapters, -1))
    losses = torch.vmap(lambda params, ids: loss_of(graft(params, ids).logits, ids))

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses(many, each).sum().backward()
        optimizer.step()

    return run


def cases(setting: Setting, peers: bool = True) -> Cases:
    model, ids = llama(setting.hidden, setting.layers), tokens(setting.adapters * setting.batch, setting.length)
    found = {
        "frozen base, combined batch": floor(model, ids, loss_of),
        "frozen base and AdamW": limit(model, ids, setting.adapters),
        "torchgraft, route": routed(model, ids, setting.adapters),
    }
    if peers:
        found["torchgraft, vmap"] = vmapped(model, ids, setting.adapters)
    return found | {
        "PEFT, one by one": one_by_one(model, FIELDS, ids.unflatten(0, (setting.adapters, -1)).unbind(), loss_of)
    }


def main() -> None:
    """Measure, print, write `results/many.json` and draw `results/many.png` and `results/many_curve.png`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    if args.quick:
        apart()
    rounds = 1 if args.quick else args.rounds
    torch.set_num_threads(2)
    found = {}
    for setting in [Setting(3, 1, 8, 64, 2)] if args.quick else SETTINGS:
        found[str(setting)] = ratios(measure(cases(setting), rounds, label=str(setting)), "PEFT, one by one")
        print(f"{setting}\n{table(found[str(setting)], 'PEFT, one by one')}")
    lines: dict[str, list[tuple[int, float]]] = {}
    for adapters in (1, 2) if args.quick else (1, 2, 4, 8, 16, 32, 64, 128, 256):
        setting = Setting(adapters, 1, 32, 64 if args.quick else 128, 2 if args.quick else 4)
        few = args.quick or adapters > 32
        times = measure(
            cases(setting, peers=False), 1 if few else 5, label=f"{adapters} adapters", warmup=1 if few else 2
        )
        seconds = ratios(times, "PEFT, one by one")
        del seconds["frozen base and AdamW"]  # in the picture it lies on the base's own line
        for name, row in seconds.items():
            lines.setdefault(name, []).append((adapters, row["median_s"]))
    claim = "many adapters train in about the time of the base's own work on the combined batch"
    write("many", {"claim": claim, "ratios_to_peft": found, "seconds_by_adapters": lines})
    bars("many", "Training many adapters on one frozen base", found, "PEFT's, one adapter after the other")
    curves("many_curve", "A training step against the number of adapters", lines, "adapters, 1 x 32 tokens each")


if __name__ == "__main__":
    main()
