"""The first `bind` of a process against PEFT's first injection: each sample is a process of its own, in turns.

Without garbage collection, of which one pass over all that the imports made takes longer than either, and which falls
to whichever library is the one to reach the threshold.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import gc, time, torch, peft
from _models import LINEARS, llama
from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind
torch.set_num_threads(1)
model = llama(64, {layers})
gc.disable()
start = time.thread_time()
{statement}
print(time.thread_time() - start)
"""
STATEMENTS = {
    "torchgraft": "bind(model, LoraConfig(r=2, target_modules=LINEARS))",
    "PEFT": "peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=LINEARS), model)",
}


def first_bind(rounds: int, layers: int) -> float:
    """Return the median of `bind` as a multiple of the injection, both the first in a fresh process."""
    found = []
    for _ in range(rounds):
        ours, theirs = (_seconds(statement, layers) for statement in STATEMENTS.values())
        found.append(ours / theirs)
    return statistics.median(found)


def _seconds(statement: str, layers: int) -> float:
    program = PROGRAM.format(statement=statement, layers=layers)
    command, here = [sys.executable, "-c", program], Path(__file__).parent  # where the models are found
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    return float(run.stdout.split()[-1])
