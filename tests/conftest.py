"""Every test starts from the same random state, on one thread; marks for what takes long, and a limit on the time."""

import collections
import os
import random
import time
from collections.abc import Iterator

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
