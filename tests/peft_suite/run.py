"""PEFT's own tests, with torchgraft standing in for `peft` and with PEFT itself: `make peft-tests`.

    .venv/bin/python -m tests.peft_suite.run config vera helpers

runs `tests/test_config.py` and so on of the source distribution of the PEFT that is installed, each file twice, and
prints how many tests pass of those that pass with PEFT and are about methods that are here, and why others fail
(`kinds.py`). Nothing of PEFT's text is kept: the distribution is unpacked into a temporary folder, unless `--source`
names one that is unpacked already. Models that the tests look up on the Hub are small random ones (`stand_ins.py`).
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from .kinds import kind_of

HERE = Path(__file__).parent
FILES = [
    *("config", "custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "helpers"),
    *("hub_features", "initialization", "lora_ga", "lora_variants", "lorafa", "loraplus", "low_level_api", "mapping"),
    *("mixed", "other", "seq_classifier", "shira", "target_parameters", "token_classification_qa"),
    *("trainable_tokens", "tuners_utils", "vblora", "vera"),
]
"""What is run where nothing is named: files that are about methods, or about what all share."""


MARKERS = ("bitsandbytes", "multi_gpu_tests", "regression", "single_gpu_tests", "slow")
"""Marks of PEFT's tests."""


def unpacked(folder: Path) -> Path:
    """Fetch PEFT's source distribution, of the version that is installed, and return where it is unpacked."""
    version = importlib.metadata.version("peft")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    subprocess.run([*fetch, "--dest", folder, f"peft=={version}"], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"peft-{version}"


def prepare(source: Path) -> None:
    """Put our own conftest beside the tests, which are a package, and our settings in the place of PEFT's."""
    (source / "tests" / "__init__.py").touch()
    shutil.copy(HERE / "suite_conftest.py", source / "tests" / "conftest.py")
    (source / "pytest.ini").write_text("[pytest]\nmarkers =\n" + "".join(f"    {name}\n" for name in MARKERS))


def results(source: Path, name: str, home: Path, real: bool, every: int, limit: int) -> dict[str, list[str]]:
    """Run a file of tests in a process of its own; return outcome, error and place by name of the test."""
    report = home / "report.json"
    report.unlink(missing_ok=True)
    own = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    own |= {"REPORT": str(report), "REAL": "1" if real else "", "EVERY": str(every)}
    flags = ["--tb=short", "-q", "-p", "no:cacheprovider", "-W", "ignore", f"tests/test_{name}.py"]
    command = [sys.executable, "-m", "pytest", *flags]
    output = home / f"{name}-{'peft' if real else 'here'}.log"
    with open(output, "w") as log:
        try:
            subprocess.run(command, cwd=source, env=os.environ | own, stdout=log, stderr=log, timeout=limit)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{name}: not done after {limit} seconds; give a longer --limit, or --every") from None
    found: dict[str, list[str]] = json.loads(report.read_text()) if report.exists() else {}
    if not found:
        raise SystemExit(f"{name}: no test ran. The end of what pytest said:\n{output.read_text()[-2000:]}")
    return found


def compared(mine: dict[str, list[str]], theirs: dict[str, list[str]]) -> collections.Counter[str]:
    """Count, of the tests that pass with PEFT, those that pass here, if only in other words, and the others by kind."""
    passed = [name for name, (outcome, *_) in theirs.items() if outcome == "passed" and name in mine]
    counts: collections.Counter[str] = collections.Counter()
    for name in passed:
        outcome, words, where = mine[name]
        kind = {"passed": "passed", "words": "but for words"}.get(outcome) or kind_of(name, words, where)
        counts[kind] += 1
        if kind == "unexpected":
            print(f"  {name}\n    {words[:300]}")
    return counts


def main() -> int:
    """Run the files that are named; return 1 if a test fails for no reason that is known."""
    parser = argparse.ArgumentParser(description="PEFT's own tests with torchgraft in its place")
    parser.add_argument("files", nargs="*", default=FILES, help="names of files, without test_ and .py")
    parser.add_argument("--source", type=Path, help="PEFT's source distribution, unpacked")
    parser.add_argument("--home", type=Path, help="a folder for models and logs, kept and used again")
    parser.add_argument("--every", type=int, default=1, help="run each so many-th test only")
    parser.add_argument("--limit", type=int, default=3600, help="seconds for a file")
    given = parser.parse_args()
    total: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = given.source or unpacked(folder)
        home = (given.home or folder / "home").resolve()
        home.mkdir(parents=True, exist_ok=True)
        prepare(source)
        if not (home / "hub").is_dir():
            subprocess.run([sys.executable, HERE / "stand_ins.py", home], check=True)
        for name in given.files or FILES:
            here, peft = (results(source, name, home, real, given.every, given.limit) for real in (False, True))
            counts = compared(here, peft)
            total += counts
            print(f"{name:28} {row(counts)}", flush=True)
    print(f"{'all':28} {row(total)}")
    return 1 if total["unexpected"] else 0


def row(counts: collections.Counter[str]) -> str:
    """Return a line of the table: how many pass of those that concern what is here, and the rest by kind."""
    about = counts.total() - counts["absent"]
    rest = ", ".join(f"{kind} {count}" for kind, count in counts.most_common() if kind != "passed")
    return f"{counts['passed']:5} of {about:5} pass" + (f"; others: {rest}" if rest else "")


if __name__ == "__main__":
    sys.exit(main())
