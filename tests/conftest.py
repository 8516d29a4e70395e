"""Every test starts from the same random state, on one thread; marks for what takes long, and a limit on the time."""

import collections
import fcntl
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from torchgraft.adapters._methods.shared import fused

FOLDERS = {"benchmarks": "full", "clients": "full", "examples": "slow"}
"""Marks that all tests of a folder have, those that are added later too."""
START = time.monotonic()

torch.set_num_threads(1)

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--minutes", type=float, default=float("inf"), help="skip what has not begun after as many minutes"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in FOLDERS:
            item.add_marker(FOLDERS[item.path.parent.name])


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if time.monotonic() - START > 60 * minutes:
        pytest.skip(f"the {minutes:g} minutes are over")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the exemptions from the contract that this run met, each with its reason."""
    given = [report.wasxfail for report in terminalreporter.stats.get("xfailed", ())]
    counts = collections.Counter(reason for reason in given if reason.startswith("exempt: "))
    if counts:
        terminalreporter.section("exemptions from the contract")
    for reason, count in sorted(counts.items()):
        terminalreporter.line(f"{reason.removeprefix('exempt: ')} ({count} tests)")


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_step() -> Iterator[None]:
    """Have small inputs take the one step of large ones, the harder of the two ways; `test_fused.py` compares them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_LARGE", 0)
        yield


@pytest.fixture(scope="session")
def once_per_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Return `call(name, make)`: a folder that `make` filled, once for all workers of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # what the workers of this run share

    def call(name: str, make: Callable[[Path], None]) -> Path:
        folder, partial = root / name, root / f"{name}.partial"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released also where a worker is killed; then the next one makes it
            if not folder.exists():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                make(partial)
                partial.rename(folder)
        return folder

    return call
