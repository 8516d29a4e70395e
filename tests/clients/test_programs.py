"""Programs of other libraries on torchgraft, where PEFT cannot be imported, and the same programs on real PEFT."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAMS = Path(__file__).parent / "programs"
ON_BOTH = {"trl_trainers": "trl"}
"""Programs that real PEFT runs too, and the package that each needs."""


@pytest.fixture
def recorded(once_per_run):
    """Return `call(program, side)`: the tensors that a program recorded in a process of its own."""

    def call(program, side):
        def make(folder):
            command = [sys.executable, "-W", "ignore", f"{program}.py", side, str(folder / "recorded.safetensors")]
            run = subprocess.run(command, cwd=PROGRAMS, capture_output=True, text=True)
            assert run.returncode == 0, f"{program} on {side}:\n{run.stderr[-3000:]}"

        return load_file(once_per_run(f"{program}-{side}", make) / "recorded.safetensors")

    return call


def need(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'torchgraft[clients]'")


@pytest.mark.parametrize("program", ON_BOTH)
def test_records_what_it_records_on_real_peft(recorded, program):
    need(ON_BOTH[program])
    ours, theirs = recorded(program, "ours"), recorded(program, "real")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
