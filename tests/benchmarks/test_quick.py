"""The benchmarks run: in a small setting, for their correctness and not for their times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("[!_]*.py")))
def test_it_runs(name):
    command = [sys.executable, f"{name}.py", "--quick"]
    run = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip()
    found = json.loads((BENCHMARKS / "results" / "quick" / f"{name}.json").read_text())
    assert found["claim"] and found["commit"]
