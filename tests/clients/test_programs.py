"""Programs of other libraries on torchgraft, where PEFT cannot be imported, and the same programs on real PEFT."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAMS = Path(__file__).parent / "programs"
PACKAGES = {
    "accelerate_loop": "accelerate",
    "diffusers_models": "diffusers",
    "diffusers_pipelines": "diffusers",
    "laplace_kron": "laplace",
    "lightning_fit": "lightning",
    "opacus_private": "opacus",
    "sentence_embeddings": "sentence_transformers",
    "trl_trainers": "trl",
}
"""The package that each program is about."""
ONLY_HERE = {"sentence_embeddings"}
"""Programs for which PEFT 0.21 is too old, by transformers' word."""
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


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


@pytest.mark.parametrize("program", PACKAGES)
def test_the_program_runs_and_records_what_it_records_on_real_peft(recorded, program):
    if importlib.util.find_spec(PACKAGES[program]) is None:
        pytest.skip(f"{PACKAGES[program]} is not installed: pip install 'torchgraft[clients]'")
    ours = recorded(program, "ours")
    theirs = ours if program in ONLY_HERE else recorded(program, "real")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_each_program_is_run():
    assert {file.stem for file in PROGRAMS.glob("*.py")} == {*PACKAGES, "side", "without_peft"}
