"""Models that are wrapped, sharded or offloaded: every operation does what it does to the model alone, or says why not.

The table in `adapters/SHARDED.md` is what is found here.
"""

import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "adapters" / "SHARDED.md"
_CELLS = Path(__file__).with_name("sharded_cells.py")


def load_cells():
    """The cells as a module that other processes can import."""
    if str(_CELLS.parent) not in sys.path:
        sys.path.append(str(_CELLS.parent))
    import sharded_cells

    return sharded_cells


cells = load_cells()


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def outcomes(request, once_per_run):
    """How many processes there were, and what came of every cell in each."""
    size = request.param

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GLOO_SOCKET_IFNAME", "lo")
            patch.setenv("PYTHONWARNINGS", "ignore")
            patch.setenv("OMP_NUM_THREADS", "1")
            torch.multiprocessing.spawn(cells.run, (size, str(folder), cells.InStep(size)), nprocs=size)

    folder = once_per_run(f"sharded{size}", make)
    return size, [torch.load(folder / f"{rank}.pt") for rank in range(size)]


@pytest.mark.parametrize("method", cells.CONFIGS)
@pytest.mark.parametrize("operation", cells.OPERATIONS)
@pytest.mark.parametrize("wrapper", cells.WRAPPERS)
def test_is_what_the_model_alone_does(outcomes, wrapper, method, operation):
    size, found = outcomes
    error = cells.error_of(size, wrapper, method, operation)
    for process in found:
        outcome = process[wrapper, method, operation]
        if error is None:
            assert not outcome, outcome
        else:
            kind, words = error
            assert outcome.startswith(f"{kind}: "), outcome
            assert words in outcome, outcome


def test_the_page_has_the_table_that_is_found_here():
    assert cells.table() in PAGE.read_text()


def test_training_merging_saving_and_loading_work_under_fsdp2():
    for operation in ("train", "merge, unmerge", "merge for good", "save", "load"):
        for wrapper in ("FSDP2", "FSDP2, root"):
            assert all(cells.error_of(2, wrapper, method, operation) is None for method in cells.CONFIGS)
