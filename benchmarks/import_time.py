"""Claim: importing torchgraft adds less than 0.3 s to importing torch.

Each sample is a fresh process that has imported torch already and then times one more import. The rounds are
interleaved, so that a slow spell of the machine hits all packages alike; the first round only warms the disk cache
and compiles, and is dropped.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from _results import apart, write

IMPORTS = {"torchgraft": "import torchgraft.adapters, torchgraft.functional", "peft": "import peft"}
LIMIT = 0.3
PROGRAM = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
{statement}
print(between - start, time.perf_counter() - between)
"""


def sample(statement: str) -> tuple[float, float]:
    """Seconds for `import torch` and then for `statement`, in a fresh process."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", PROGRAM.format(statement=statement)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    first, second = map(float, run.stdout.split())
    return first, second


def summary(seconds: list[float]) -> dict[str, float]:
    low, middle, high = (round(value, 4) for value in statistics.quantiles(seconds, n=4, method="inclusive"))
    return {"median_s": middle, "quartile_1_s": low, "quartile_3_s": high, "samples": len(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="samples of each package")
    parser.add_argument("--quick", action="store_true", help="few samples, to see that it runs")
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds
    if args.quick:
        apart()

    seconds: dict[str, list[float]] = {name: [] for name in ("torch", *IMPORTS)}
    for round_ in range(rounds + 1):
        for name, statement in IMPORTS.items():
            torch_seconds, added = sample(statement)
            if round_ > 0:
                seconds["torch"].append(torch_seconds)
                seconds[name].append(added)

    result = {
        "claim": f"importing torchgraft adds less than {LIMIT} s to importing torch",
        "added_to_import_torch": {name: summary(seconds[name]) for name in IMPORTS},
        "import_torch": summary(seconds["torch"]),
    }
    write("import_time", result)

    ours, theirs = (statistics.median(seconds[name]) for name in IMPORTS)
    print(f"import adds to torch: torchgraft {ours:.3f} s, peft {theirs:.3f} s (median of {rounds})")
    if ours >= LIMIT and not args.quick:
        sys.exit(f"torchgraft took {ours:.3f} s, the limit is {LIMIT} s; python -X importtime tells where it goes")


if __name__ == "__main__":
    main()
