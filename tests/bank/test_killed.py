"""A process that is killed while it saves, or while adapters rest: what is on disk is old or new, and complete."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from torchgraft.adapters import Bank
from torchgraft.adapters._bank.record import read_record
from torchgraft.functional import bind

from .alone import lora, model

PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from bank.alone import lora, model
from torchgraft.adapters import Bank, sgd
from torchgraft.functional import bind

torch.set_num_threads(1)
bank = Bank(bind(model(), lora(4)), slots=1, resting=sys.argv[1] + "/resting", optimizer=sgd(lr=0.0, momentum=0.9))
for name in "ab":
    bank.add(name, lora(2))
count = 0
while True:
    count += 1
    for name in "ab":  # every number of an adapter says how often this went round
        bank.prefetch([name])
        slot = bank._roster.get(name, "").place
        for buffer in bank.state.buffers().values():
            if buffer is not bank.state.sums:
                buffer[slot].fill_(count)
        bank._roster.get(name, "").steps = count
        bank.save(name, f"{sys.argv[1]}/{name}")
    if count == 2:
        print("going", flush=True)
"""


def numbers(bank: Bank, name: str) -> set[float]:
    values = [leaf for leaves in bank.tensors(name).values() for leaf in leaves.values()]
    values += [value for key, value in bank._slots.lift(bank._roster.get(name, "")).items() if key != "sums"]
    return {float(bank.steps(name)), *(float(one) for value in values for one in value.unique())}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_what_is_on_disk_is_old_or_new(tmp_path: Path, seed: int) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "going\n"
            time.sleep(random.Random(seed).uniform(0, 0.3))
        finally:
            process.send_signal(signal.SIGKILL)
    bank = Bank(bind(model(), lora(4)), slots=2)
    for name in "ab":
        bank.load(tmp_path / name, name)
        assert len(numbers(bank, name)) == 1
        assert bank.steps(name) >= 2
        record, resting, _ = read_record(tmp_path / "resting" / f"{name}.safetensors")
        assert len({float(record["steps"]), *(float(v) for one in resting.values() for v in one.unique())}) == 1
    torch.testing.assert_close(bank.steps("a"), bank.steps("b"), atol=1, rtol=0)
