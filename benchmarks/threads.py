"""Counts wrong outputs when threads use different adapters on one model at once, here and in PEFT.

Four threads, four adapters, the same input; each output is held against the one computed alone. PEFT's active adapter
is a state of the module, so a thread's `set_adapter` reaches the forward of another. Run it with

    python benchmarks/threads.py
"""

from __future__ import annotations

import argparse
import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import peft
import torch
from _results import apart, write
from peft.functional import set_adapter
from torch import Tensor, nn
from tqdm import tqdm

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind

THREADS = 4


def wrong_outputs(call: Callable[[int], Tensor], rounds: int, name: str) -> int:
    """Run `call(i)` in thread `i`, many times, and count outputs that differ from the one computed alone."""
    expected = [call(i) for i in range(THREADS)]
    wrong = [0] * THREADS
    progress = tqdm(total=rounds * THREADS, desc=f"{name:<12}", unit="call")

    def work(i: int) -> None:
        for _ in range(rounds):
            wrong[i] += not torch.allclose(call(i), expected[i], atol=1e-6)
            progress.update()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    progress.close()
    return sum(wrong)


def main() -> None:
    """Count, print and write `results/threads.json`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=250, help="calls of each thread")
    parser.add_argument("--quick", action="store_true", help="few calls, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 5
        apart()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sys.setswitchinterval(1e-4)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))).requires_grad_(False)
    x = torch.randn(8, 64)
    fields: dict[str, Any] = {"r": 4, "target_modules": [str(i) for i in range(8)], "init_lora_weights": False}

    graft = bind(model, LoraConfig(**fields))
    trees = [graft.init(torch.Generator().manual_seed(i)) for i in range(THREADS)]
    injected = copy.deepcopy(model)
    for i in range(THREADS):
        peft.inject_adapter_in_model(peft.LoraConfig(**fields), injected, adapter_name=f"adapter{i}")

    def with_peft(i: int) -> Tensor:
        set_adapter(injected, f"adapter{i}")
        return injected(x)

    with torch.no_grad():
        ours = wrong_outputs(lambda i: graft(trees[i], x), args.rounds, "torchgraft")
    theirs = wrong_outputs(with_peft, args.rounds, "PEFT")
    total = THREADS * args.rounds
    claim = "threads with different adapters share one model without a wrong output"
    write(
        "threads", {"claim": claim, "threads": THREADS, "calls": total, "wrong": {"torchgraft": ours, "peft": theirs}}
    )
    print(f"wrong outputs of {total}: torchgraft {ours}, PEFT {theirs}")


if __name__ == "__main__":
    main()
