"""The contract itself: what `make test` takes of it, what a row must have, and that a broken promise fails."""

import ast
import inspect
import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torchgraft.adapters
import torchgraft.functional

from .cases import KINDS, exemptions, promises, selected
from .methods import METHODS
from .sites import SITES

HERE = Path(__file__).parent


def test_the_selection_covers_all_pairs_of_test_method_and_kind():
    chosen = [(test, name, site) for test in promises() for name, site in selected(test)]
    pairs = {(name, site) for name, sites in KINDS.items() for site in sites}
    assert {(name, site) for _, name, site in chosen} == pairs
    assert {(test, name) for test, name, _ in chosen} == set(itertools.product(promises(), METHODS))
    assert {(test, site) for test, _, site in chosen} == set(itertools.product(promises(), SITES))
    methods_of_a_kind = math.ceil(len(METHODS) / len(promises()))
    assert len(chosen) <= len(promises()) * (len(METHODS) + len(SITES) * methods_of_a_kind)


def test_each_row_is_of_one_method_and_each_method_has_a_row():
    assert all(type(row.other) is type(row.config) for row in METHODS.values())
    every = {one for one in vars(torchgraft.adapters).values() if isinstance(one, type) and hasattr(one, "method")}
    configs = {one for one in every if one.method.kinds}  # tests/adapters/test_siteless.py has the others
    assert {type(row.config) for row in METHODS.values()} == configs


def test_exemptions_name_promises_and_sites_that_there_are_and_say_why():
    for name, exempt in ((name, exempt) for name, row in METHODS.items() for exempt in row.exempt):
        assert set(exempt.promises) <= set(promises()) and exempt.sites <= set(KINDS[name]) and exempt.reason
    for exempt in (exempt for setting in SITES.values() for exempt in setting.exempt):
        assert set(exempt.promises) <= set(promises()) and not exempt.sites and exempt.reason
    for name, sites in KINDS.items():
        for site in sites:
            each = [promise for exempt in exemptions(name, site) for promise in exempt.promises]
            assert len(set(each)) == len(each)


# -- methods that break a promise ------------------------------------------------------------------------------------

ROW = "vera"
FORMULAS = {"test_output_is_the_formulas", "test_merged_weights_are_the_formulas"}
STACKS = {"test_a_stack_of_different_configs_is_each_alone"}
PEFTS = {"test_state_dicts_and_seeds_are_pefts"}
ROUNDED = {"test_outputs_are_rounded_once", "test_outputs_of_rows_are_rounded_once"}
FILES = [HERE / f"test_{name}.py" for name in ("outputs", "peft", "rounding", "rows", "transforms")]
KEPT = {"test_identity_at_init", "test_vmap_is_a_loop", "test_jvp_agrees_with_the_gradient"}
"""Promises that all of these methods keep, so that it is not the copy that is broken."""
CHOSEN = sorted(KEPT | FORMULAS | STACKS | PEFTS | ROUNDED)


class Doubled(ast.NodeTransformer):
    """Changes the formula wherever it stands, in `apply`, `routed` and `merge`: a leaf counts twice."""

    def visit_Subscript(self, node):
        leaf = "leaves['vera_lambda_b']"
        return ast.parse(f"(2 * {leaf})", mode="eval").body if ast.unparse(node) == leaf else node


class RoundedTwice(ast.NodeTransformer):
    """Rounds what is added to the base's output before it is added, in `apply` and `routed`."""

    def visit_Call(self, node):
        if ast.unparse(node.func) == "torch.addcmul":
            wide, *factors = map(ast.unparse, node.args)
            return ast.parse(f"{wide} + ({' * '.join(factors)}).to(y.dtype)", mode="eval").body
        return self.generic_visit(node)


class Without(ast.NodeTransformer):
    """Leaves out what is said under a name."""

    def __init__(self, name):
        self.name = name

    def visit_keyword(self, node):
        return None if node.arg == self.name else node


BROKEN = {
    "nothing": (ast.NodeTransformer(), set()),
    "the formula": (Doubled(), FORMULAS | STACKS | ROUNDED),
    "the one rounding": (RoundedTwice(), ROUNDED),
    "varying, what may differ in a stack": (Without("varying"), STACKS),
    "parameters, by their names in PEFT": (Without("parameters"), PEFTS | {"test_outputs_are_rounded_once"}),
}
"""What is broken in a copy of the method, and which of the chosen promises that breaks."""


def copy_packages(folder):
    """Copy the packages, under the names that they are imported by; return the copied file of the row's method."""
    if torchgraft.__file__:
        shutil.copytree(Path(torchgraft.__file__).parent, folder / "torchgraft")
    for package in (torchgraft.functional, torchgraft.adapters):
        source, copied = Path(package.__file__).parent, folder / package.__name__.replace(".", "/")
        shutil.copytree(source, copied, ignore=shutil.ignore_patterns("__pycache__"))
    return copied / Path(inspect.getsourcefile(type(METHODS[ROW].config))).relative_to(source)


RUNNER = """
import os, sys
import peft, pytest, safetensors.torch, torch, transformers.pytorch_utils  # once, for they take longer than the tests
for folder in sys.argv[2:]:
    child = os.fork()
    if not child:
        sys.path.insert(0, folder)
        with open(os.path.join(folder, "report"), "w") as file:
            os.dup2(file.fileno(), 1)
            os._exit(pytest.main(sys.argv[1].split("|")))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def runs_of_copies(folder):
    """Return the exit status and the report of some promises for each way in which the method is broken."""
    folders = {what: folder / what.split()[-1] for what in BROKEN}
    for what, (change, _) in BROKEN.items():
        file = copy_packages(folders[what])
        before = ast.unparse(ast.parse(file.read_text()))
        after = ast.unparse(ast.fix_missing_locations(change.visit(ast.parse(before))))
        assert (after == before) == (what == "nothing")
        file.write_text(after)
    names = " or ".join(f"{test}[{ROW}-{'linear' if test in promises() else ''}" for test in CHOSEN)
    options = ["-q", "-rfE", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    arguments = "|".join([*map(str, FILES), *options, "-m", "not full", "-k", names])
    command = [sys.executable, "-P", "-c", RUNNER, arguments, *map(str, folders.values())]
    run = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    reports = [(folder / "report").read_text() for folder in folders.values()]
    return dict(zip(BROKEN, zip(map(int, run.stdout.split()), reports, strict=True), strict=True))


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs share what they import")
def test_a_method_that_breaks_a_promise_fails(tmp_path):
    for what, (status, report) in runs_of_copies(tmp_path).items():
        broken = BROKEN[what][1]
        assert {test for test in CHOSEN if f"::{test}[" in report} == broken, f"{what}: {report}"
        assert status == (1 if broken else 0), f"{what}: {report}"
        assert " passed" in report and "ERROR" not in report, f"{what}: {report}"
