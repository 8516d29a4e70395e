"""A bank of adapters that train in mixed batches, against a stack of the same rows and against one after the other.

A Llama with random weights, LoRA of rank 16 on all linear layers, unequally many rows of 32 tokens for each adapter, in
random order, one step of AdamW for each. Peers in the same rounds: the frozen base on the combined batch (the floor), a
stack of as many adapters with one optimizer (what a bank should not exceed by more than 0.15), PEFT with `set_adapter`
and an optimizer for each adapter, and PEFT with a single adapter in the model on each one's rows in turn, which is the
work of one process per adapter on one machine, without what processes cost beside it. Memory is what is held between
steps, the base and each adapter's parameters, gradients and moments, and on top of it the most that the allocator
recorded in a step; processes hold a base each, and are taken to step one after the other. A bank's step is compared
with one fused AdamW over as many numbers, and a curve shows what it costs that more adapters than slots take turns.

    python benchmarks/bank.py [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _apart import floor, one_by_one
from _memory import peak_bytes
from _models import LINEARS, llama, tokens, trained
from _picture import bars, curves
from _results import apart, write
from _rounds import Cases, measure, ratios, table
from torch import Tensor, nn

from torchgraft.adapters import Bank, LoraConfig
from torchgraft.functional import bind, route, stack

FIELDS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": LINEARS}
LENGTH = 32
BANK, STACK = "torchgraft, bank", "torchgraft, stack"
FLOOR, TURNS, PROCESSES = "frozen base, combined batch", "PEFT, set_adapter", "PEFT, one process each"


class Setting(NamedTuple):
    """How many adapters, the rows of each, and the model's size."""

    adapters: int
    rows: tuple[int, ...]
    hidden: int
    layers: int

    def __str__(self) -> str:
        mix = ", ".join(map(str, self.rows))
        return f"{self.adapters} adapters, {mix} ... rows each, hidden {self.hidden}, {self.layers} layers"

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return the adapter of each row, `"rows"`, and the tokens, `"rows tokens"`."""
        counts = torch.tensor([self.rows[i % len(self.rows)] for i in range(self.adapters)])
        order = torch.randperm(int(counts.sum()), generator=torch.Generator().manual_seed(3))
        rows = torch.arange(self.adapters).repeat_interleave(counts)[order]
        return rows, tokens(len(rows), LENGTH)


SETTINGS = [Setting(8, (1, 4, 2), 256, 8), Setting(64, (1, 3, 1), 128, 4), Setting(512, (1, 2, 1), 64, 2)]


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The sum of each row's own mean."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1).sum()


def filled(model: nn.Module, adapters: int, slots: int) -> Bank:
    """A bank with adapters in it, which rest in memory where they have no slot."""
    graft = bind(model, LoraConfig(**FIELDS))
    bank = Bank(graft, slots=slots, resting="memory" if slots < adapters else None)
    for index in range(adapters):
        generator = torch.Generator().manual_seed(index)
        bank.add(str(index), LoraConfig(**FIELDS), generator=generator)
    return bank


def banked(bank: Bank, rows: Tensor, ids: Tensor) -> Callable[[], None]:
    names = [str(row) for row in rows.tolist()]
    hyper = {name: {"lr": 1e-5 * (1 + index % 7)} for index, name in enumerate(dict.fromkeys(names))}

    def run() -> None:
        with bank.rows(names) as adapted:
            loss_of(adapted(ids).logits, ids).backward()
        bank.step(hyper)

    return run


def stacked(model: nn.Module, rows: Tensor, ids: Tensor, adapters: int) -> Callable[[], None]:
    graft = bind(model, LoraConfig(**FIELDS))
    many = stack([graft.init(torch.Generator().manual_seed(index)) for index in range(adapters)])
    optimizer = torch.optim.AdamW(trained(many), lr=1e-5, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(graft(route(many, rows), ids).logits, ids).backward()
        optimizer.step()

    return run


def cases(setting: Setting) -> tuple[Cases, dict[str, int]]:
    """Return what to measure, and the bytes that each holds between steps."""
    model, (rows, ids) = llama(setting.hidden, setting.layers), setting.batch()
    parts = [ids[rows == index] for index in range(setting.adapters)]
    bank = filled(model, setting.adapters, setting.adapters)
    runs: Cases = {
        FLOOR: floor(model, ids, loss_of),
        BANK: banked(bank, rows, ids),
        STACK: stacked(model, rows, ids, setting.adapters),
        TURNS: one_by_one(model, FIELDS, parts, loss_of),
        PROCESSES: one_by_one(model, FIELDS, parts, loss_of, together=False),
    }
    base = sum(parameter.nbytes for parameter in model.parameters())
    own = 4 * sum(leaf.nbytes for leaves in bank.tensors("0").values() for leaf in leaves.values())
    held = {FLOOR: base, BANK: base + sum(buffer.nbytes for buffer in bank.state.buffers().values())}
    held |= dict.fromkeys((STACK, TURNS), base + own * setting.adapters)
    return runs, held | {PROCESSES: (base + own) * setting.adapters}


def in_rounds(setting: Setting, runs: Cases, rounds: int) -> dict[str, dict[str, float]]:
    """Measure cases; of many adapters, whose turns take a minute, these in a few rounds of their own."""
    apart_from = {TURNS} if setting.adapters > 64 else set()
    together = {case: run for case, run in runs.items() if case not in apart_from}
    found = ratios(measure(together, rounds, label=str(setting), warmup=1), STACK)
    for case in apart_from:
        few = measure({case: runs[case], STACK: runs[STACK]}, max(1, rounds // 4), label=case, warmup=0)
        found[case] = ratios(few, STACK)[case]
    return {case: found[case] for case in runs}


def memory_of(setting: Setting, runs: Cases, held: dict[str, int]) -> dict[str, dict[str, float]]:
    """Return the bytes that each case holds, the most that a step has on top, and both as a multiple of the floor's.

    One adapter after the other has the most at its largest part, which alone is run then.
    """
    rows, ids = setting.batch()
    largest = ids[rows == rows.bincount().argmax()]
    turn = one_by_one(llama(setting.hidden, setting.layers), FIELDS, [largest], loss_of)
    turn()  # which makes the moments, that are held
    runs = {**runs, TURNS: turn, PROCESSES: turn}
    on_top = {case: peak_bytes(run) for case, run in runs.items()}
    all_ = {case: held[case] + on_top[case] for case in runs}
    ratio = {case: all_[case] / all_[FLOOR] for case in runs}
    return {
        case: {"held": held[case], "on_top": on_top[case], **dict.fromkeys(("ratio", "quartile_1", "quartile_3"), r)}
        for case, r in ratio.items()
    }


def optimizer_steps(adapters: int, numbers: int) -> Cases:
    """A bank's step, each adapter with its own rate, and one fused call over as many numbers."""
    side = int((numbers / (2 * 16 * 4)) ** 0.5) or 1
    model = nn.Sequential(*[nn.Linear(side, side) for _ in range(max(1, numbers // (2 * 16 * side)))])
    config = LoraConfig(r=16, target_modules="all-linear")
    bank = Bank(bind(model, config), slots=adapters)
    for index in range(adapters):
        bank.add(str(index), config)
    bank.state.norms.copy_(torch.linalg.vector_norm(bank.state.sums.normal_(), dim=1))  # as batches leave them
    parameter = torch.randn(bank.state.parameters.numel()).requires_grad_()
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], lr=1e-5, fused=True)
    hyper = {name: {"lr": 1e-5 * (1 + index)} for index, name in enumerate(bank.names)}

    def step() -> None:
        for resident in bank._roster.residents.values():
            resident.pending = True  # as after a batch, whose time is not of interest here
        bank.step(hyper)

    return {BANK: step, "one fused AdamW": optimizer.step}


def paging(model: nn.Module, slots: int, adapters: int) -> Callable[[], None]:
    """Batches of as many adapters as there are slots, and always those that were named least lately."""
    bank, turn = filled(model, adapters, slots), [0]
    ids = tokens(slots, LENGTH)

    def run() -> None:
        rows = torch.tensor([(turn[0] + index) % adapters for index in range(slots)])
        turn[0] += slots
        banked(bank, rows, ids)()

    return run


def main() -> None:
    """Measure, print, write `results/bank.json` and draw `results/bank.png`, `bank_memory.png` and `bank_curve.png`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    if args.quick:
        apart()
    rounds = 1 if args.quick else args.rounds
    torch.set_num_threads(1)  # and first, in memory that no model has left in pieces
    runs = optimizer_steps(3, 512) if args.quick else optimizer_steps(64, 100_000)
    steps = ratios(
        measure(runs, 3 * rounds, label="optimizer steps", warmup=3, clock=time.thread_time), "one fused AdamW"
    )
    print(f"a step of 64 adapters, one thread\n{table(steps, 'one fused AdamW')}")
    torch.set_num_threads(2)
    found, memory = {}, {}
    for setting in [Setting(3, (1, 2), 64, 2)] if args.quick else SETTINGS:
        (runs, held), name = cases(setting), str(setting)
        found[name] = in_rounds(setting, runs, rounds)
        memory[name] = memory_of(setting, runs, held)
        print(f"{name}\n{table(found[name], STACK)}\n  memory, of the floor's:")
        print("\n".join(f"    {case:30}{one['ratio']:8.2f}" for case, one in memory[name].items()))
    lines: dict[str, list[tuple[int, float]]] = {BANK: []}
    model, slots = llama(64, 2), 2 if args.quick else 64
    counts = [slots * 2**power for power in range(2 if args.quick else 7)]
    for count in counts:
        times = measure({BANK: paging(model, slots, count)}, rounds, label=f"{count} adapters", warmup=2)
        lines[BANK].append((count, ratios(times, BANK)[BANK]["median_s"]))
    claim = "adapters that come and go train in a mixed batch in about the time of a stack of the same rows"
    write(
        "bank",
        {
            "claim": claim,
            "goals": {"bank_to_stack": 1.15, "step_to_fused_adamw": 1.2},
            "ratios_to_stack": found,
            "bytes": memory,
            "step_ratios_to_one_fused_adamw": steps,
            "seconds_by_adapters": lines,
        },
    )
    bars("bank", "A bank of adapters in mixed batches", found, "a stack's of the same rows")
    bars("bank_memory", "Memory of adapters in mixed batches", memory, "the frozen base's", "memory at most")
    curves("bank_curve", f"A step on {slots} slots against the number of adapters", lines, "adapters")


if __name__ == "__main__":
    main()
