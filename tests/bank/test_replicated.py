"""A bank on several ranks comes to the numbers of one process, or says what ranks do differently."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torchgraft.adapters import LoraConfig, ReplicatedBank
from torchgraft.functional import bind

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "distributed.md"


def load_cells():
    """The cells as a module that other processes can import, with those whose rules they share."""
    for folder in (HERE, HERE.parent / "clients"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    import replicated_cells

    return replicated_cells


cells = load_cells()


@pytest.fixture(scope="module", params=[2, 4], ids=["two ranks", "four ranks"])
def outcomes(request, tmp_path_factory):
    """What came of every cell, on each rank."""
    size, folder = request.param, tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("PYTHONWARNINGS", "ignore")
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.multiprocessing.spawn(cells.run, (size, str(folder), cells.InStep(size)), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells.CELLS)
def test_is_what_one_process_does(outcomes, cell):
    for rank, outcome in enumerate(outcomes):
        assert not outcome[cell], f"rank {rank}: {outcome[cell]}"


def test_without_a_group_it_says_what_to_do():
    graft = bind(torch.nn.Linear(4, 3), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(RuntimeError, match=r"there is no process group; start the program with torchrun .* a Bank"):
        ReplicatedBank(graft)


def test_the_page_runs_and_has_the_numbers_of_its_model(capsys):
    page = PAGE.read_text()
    program, model = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    try:
        exec(compile(program, PAGE.name, "exec"), {})
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    exec(compile(model, PAGE.name, "exec"), namespace := {})
    assert capsys.readouterr().out in page
    assert namespace["base"] == pytest.approx(70.6e9, rel=1e-3)  # Llama 3 70B
    assert max(map(len, page.splitlines())) <= 120
