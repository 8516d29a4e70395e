"""The example of many processes, in a short run under `torchrun`: two ranks, then one that goes on from there."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"


def run(ranks, out, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(EXAMPLE)]
    more = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(out), *options], env={**os.environ, **more}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_ranks_come_to_the_numbers_of_one_and_another_number_goes_on(tmp_path):
    printed = run(2, tmp_path, "--steps", "8", "--check")
    first, last = map(float, re.search(r"2 ranks, steps 1 to 8: (\S+) to (\S+) nats", printed).groups())
    assert last < first
    assert float(re.search(r"apart from one process by (\S+) of", printed)[1]) < 1e-3  # float32, under Adam
    printed = run(1, tmp_path, "--steps", "2", "--shard")
    assert "1 ranks, steps 9 to 10" in printed and "shouted 10" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-8"]
