"""Times injection, and the calls on injected adapters, while a model collects 40 adapters, here and in PEFT.

The model has 224 targets, 32 blocks of 7 linear layers, so small that only the libraries' own work counts. Rounds take
turns between the libraries; times are CPU time of the process, on one thread, without garbage collection (which would
bill one library for what the other left). Run it with

    python benchmarks/injection.py
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import peft
import peft.functional
import torch
from _results import apart, folder, write
from torch import nn
from tqdm import tqdm

from torchgraft import adapters

matplotlib.use("agg")

BLOCKS, NAMES = 32, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS, SHOWN = 40, (1, 10, 20, 40)
LIBRARIES: dict[str, Any] = {
    "torchgraft": adapters,
    "peft": SimpleNamespace(LoraConfig=peft.LoraConfig, **vars(peft.functional)),
}
CALLS = ("get_peft_model_state_dict", "set_peft_model_state_dict", "set_adapter")

Times = dict[str, dict[int, list[float]]]


def model() -> nn.Module:
    """224 linear layers; nothing of it runs."""
    return nn.ModuleList(nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in NAMES}) for _ in range(BLOCKS))


def seconds(call: Callable[[], Any], repeat: int = 1) -> float:
    """The fastest of some calls."""
    taken = []
    for _ in range(repeat):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return min(taken)


def run(library: Any, times: Times) -> None:
    """Inject 40 adapters into a new model; with the first and the last, time the other calls too."""
    gc.collect()
    target = model()
    for number in range(1, ADAPTERS + 1):
        config = library.LoraConfig(r=2, target_modules=list(NAMES))
        taken = seconds(partial(library.inject_adapter_in_model, config, target, f"a{number}"))
        times.setdefault("inject_adapter_in_model", {}).setdefault(number, []).append(taken)
        if number not in (1, ADAPTERS):
            continue
        state = library.get_peft_model_state_dict(target, adapter_name="a1")
        calls = (
            partial(library.get_peft_model_state_dict, target, adapter_name="a1"),
            partial(library.set_peft_model_state_dict, target, state, "a1"),
            partial(library.set_adapter, target, "a1"),
        )
        for name, call in zip(CALLS, calls, strict=True):
            times.setdefault(name, {}).setdefault(number, []).append(seconds(call, 3))


def spread(taken: list[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    low, middle, high = statistics.quantiles(taken, n=4, method="inclusive")
    return {"median": round(middle * 1e3, 2), "low": round(low * 1e3, 2), "high": round(high * 1e3, 2)}


def draw(result: dict[str, dict[str, dict[int, dict[str, float]]]]) -> None:
    """Write `results/injection.png`: injections one by one, and the other calls with 1 and 40 adapters."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colors = {"torchgraft": "tab:blue", "peft": "tab:orange"}
    labels = {"torchgraft": "torchgraft", "peft": f"PEFT {peft.__version__}"}
    for library, calls in result.items():
        inject = calls["inject_adapter_in_model"]
        numbers = list(inject)
        left.plot(numbers, [inject[n]["median"] for n in numbers], color=colors[library], label=labels[library])
        low, high = ([inject[n][side] for n in numbers] for side in ("low", "high"))
        left.fill_between(numbers, low, high, color=colors[library], alpha=0.25, linewidth=0)
    left.set(xlabel="adapters in the model, with the new one", ylabel="CPU time in ms", title="inject_adapter_in_model")
    left.set(xlim=(1, ADAPTERS), ylim=(0, None))
    left.legend(frameon=False)
    for row, (name, library) in enumerate((name, library) for name in CALLS for library in result):
        values = [result[library][name][n]["median"] for n in (1, ADAPTERS)]
        y = row + row // len(result)
        right.plot(values, [y, y], color=colors[library], linewidth=2)
        right.scatter(values, [y, y], color=colors[library], s=(20, 70), zorder=3)
        right.annotate(f"{values[1]:.0f}", (max(values), y), (8, -3), textcoords="offset points", fontsize=9)
    right.set_yticks([0.5 + 3 * i for i in range(len(CALLS))], CALLS)
    right.set(xscale="log", xlabel="CPU time in ms", title=f"with 1 adapter (small dot) and {ADAPTERS} (large)")
    right.set_xticks([2, 10, 50, 200, 500], ["2", "10", "50", "200", "500"])
    right.minorticks_off()
    right.margins(x=0.12)
    right.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(folder() / "injection.png", dpi=150)


def main() -> None:
    """Time, print and write `results/injection.json` and `results/injection.png`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="models that each library fills")
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs")
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds
    if args.quick:
        apart()
    torch.set_num_threads(1)
    gc.disable()
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # PEFT's, at each injection but one
    times: dict[str, Times] = {library: {} for library in LIBRARIES}
    for _ in range(2):
        run(LIBRARIES["torchgraft"], {})  # imports and caches
    for _ in tqdm(range(rounds), unit="round"):
        for library in LIBRARIES:
            run(LIBRARIES[library], times[library])
    result = {
        library: {name: {n: spread(taken) for n, taken in found.items()} for name, found in calls.items()}
        for library, calls in times.items()
    }
    draw(result)
    shown = {
        library: {name: {n: found[n] for n in SHOWN if n in found} for name, found in calls.items()}
        for library, calls in result.items()
    }
    claim = "the 40th adapter is injected as fast as the first, and its state dict is as fast to get and to set"
    targets = BLOCKS * len(NAMES)
    write("injection", {"claim": claim, "targets": targets, "rounds": rounds, "unit": "ms of CPU time", **shown})
    for library, calls in shown.items():
        for name, found in calls.items():
            print(f"{library:<11} {name:<26}", *(f"#{n}: {one['median']:.1f} ms" for n, one in found.items()), sep="  ")


if __name__ == "__main__":
    main()
