"""Inference with a batch whose rows have different adapters, against one adapter for all rows.

A Llama with random weights, eight LoRA adapters of rank 16 on all linear layers. Peers in the same rounds: the bare
base, PEFT with a single adapter (what a mixed batch should not exceed), and PEFT's `adapter_names`. In place, each call
stacks the parameters of the adapters that its rows have.

    python benchmarks/mixed.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import peft
import torch
from _models import LINEARS, lively, llama, tokens
from _picture import bars
from _results import apart, write
from _rounds import Cases, measure, ratios, table

from torchgraft import adapters
from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind, route, stack

ADAPTERS = 8
FIELDS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": LINEARS, "init_lora_weights": False}
BATCHES = [(8, 1), (32, 1), (4, 128)]


def cases(model: Any, batch: int, length: int) -> Cases:
    ids = tokens(batch, length)
    graft = bind(model, LoraConfig(**FIELDS))
    trees = [lively(graft.init(), seed) for seed in range(ADAPTERS)]
    many = stack(trees)
    rows = torch.randperm(batch, generator=torch.Generator().manual_seed(3)) % ADAPTERS
    single: Any = peft.inject_adapter_in_model(peft.LoraConfig(**FIELDS), copy.deepcopy(model))
    mixed: Any = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**FIELDS), adapter_name="0")
    for index in range(1, ADAPTERS):
        mixed.add_adapter(str(index), peft.LoraConfig(**FIELDS))
    mixed.eval()
    in_place: Any = copy.deepcopy(model)
    for name, tree in enumerate(trees):
        adapters.inject_adapter_in_model(LoraConfig(**FIELDS), in_place, str(name), params=tree)
    names = [str(row) for row in rows.tolist()]
    each = torch.randint(ADAPTERS, (batch, length), generator=torch.Generator().manual_seed(4))
    found = {
        "bare base": lambda: model(ids),
        "torchgraft, one adapter": lambda: graft(trees[0], ids),
        "torchgraft, mixed": lambda: graft(route(many, rows), ids),
        "torchgraft, mixed in place": lambda: adapters.adapter_rows(in_place, names)(ids),
        "torchgraft, mixed token by token": lambda: graft(route(many, each), ids),
        "PEFT, one adapter": lambda: single(ids),
        "PEFT, mixed (adapter_names)": lambda: mixed(ids, adapter_names=names),
    }
    return {name: torch.no_grad()(run) for name, run in found.items()}


def main() -> None:
    """Measure, print, write `results/mixed.json` and draw `results/mixed.png`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    if args.quick:
        apart()
    torch.set_num_threads(2)
    model = (llama(64, 2) if args.quick else llama(512, 8)).eval()
    found = {}
    for batch, length in [(3, 2)] if args.quick else BATCHES:
        setting = f"{batch} rows of {length} token{'s' if length > 1 else ''}, {ADAPTERS} adapters"
        seconds = measure(cases(model, batch, length), 1 if args.quick else args.rounds, label=setting)
        found[setting] = ratios(seconds, "PEFT, one adapter")
        print(f"{setting}\n{table(found[setting], 'PEFT, one adapter')}")
    claim = "a batch with a different adapter in each row costs little more than one with a single adapter"
    write("mixed", {"claim": claim, "ratios_to_peft_with_one_adapter": found})
    bars("mixed", "Inference with a different adapter in each row", found, "PEFT's with one adapter for all rows")


if __name__ == "__main__":
    main()
