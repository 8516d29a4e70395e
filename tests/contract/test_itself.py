"""The contract itself: what `make test` takes of it, what a row must have, and that a broken promise fails."""

import ast
import importlib
import inspect
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torchgraft

from .cases import KINDS, SITES, promises, selected
from .methods import METHODS

HERE = Path(__file__).parent


def test_the_selection_covers_all_pairs_of_test_method_and_kind():
    chosen = [(test, name, site) for test in promises() for name, site in selected(test)]
    pairs = {(name, site) for name, sites in KINDS.items() for site in sites}
    assert {(name, site) for _, name, site in chosen} == pairs
    assert {(test, name) for test, name, _ in chosen} == set(itertools.product(promises(), METHODS))
    assert {(test, site) for test, _, site in chosen} == set(itertools.product(promises(), SITES))
    assert len(chosen) <= len(promises()) * (len(METHODS) + len(SITES))


def test_each_row_is_of_one_method_and_each_method_has_a_row():
    assert all(type(row.other) is type(row.config) for row in METHODS.values())
    configs = {one for one in vars(torchgraft.adapters).values() if isinstance(one, type) and hasattr(one, "method")}
    assert {type(row.config) for row in METHODS.values()} == configs


def test_exemptions_name_promises_and_sites_that_there_are_and_say_why():
    given = [(name, exempt) for name, row in METHODS.items() for exempt in row.exempt]
    for name, exempt in given:
        assert set(exempt.promises) <= set(promises()) and exempt.sites <= set(KINDS[name]) and exempt.reason
    each = [(name, test, site) for name, e in given for test in e.promises for site in e.sites or KINDS[name]]
    assert len(set(each)) == len(each)


# -- methods that break a promise ------------------------------------------------------------------------------------

ROW = "vera"
FORMULAS = {"test_output_is_the_formulas", "test_merged_weights_are_the_formulas"}
STACKS = {"test_a_stack_of_different_configs_is_each_alone"}
PEFTS = {"test_state_dicts_and_seeds_are_pefts"}
FILES = [HERE / f"test_{name}.py" for name in ("outputs", "peft", "rows", "transforms")]
KEPT = {"test_identity_at_init", "test_vmap_is_a_loop", "test_jvp_agrees_with_the_gradient"}
"""Promises that all of these methods keep, so that it is not the copy that is broken."""


class Doubled(ast.NodeTransformer):
    """Changes the formula wherever it stands, in `apply`, `routed` and `merge`: a leaf counts twice."""

    def visit_Subscript(self, node):
        leaf = "leaves['vera_lambda_b']"
        return ast.parse(f"(2 * {leaf})", mode="eval").body if ast.unparse(node) == leaf else node


class WithoutVarying(ast.NodeTransformer):
    """Leaves out what may differ between the adapters of a stack."""

    def visit_keyword(self, node):
        return None if node.arg == "varying" else node


class WithoutForm(ast.NodeTransformer):
    """Leaves out what PEFT calls the parameters."""

    def visit_Call(self, node):
        self.generic_visit(node)
        if ast.unparse(node.func) == "Form":
            node.keywords = [keyword for keyword in node.keywords if keyword.arg not in ("parameters", "values")]
        return node


BROKEN = {
    "nothing": (ast.NodeTransformer, set()),
    "the formula": (Doubled, FORMULAS | STACKS),
    "varying": (WithoutVarying, STACKS),
    "the PEFT form": (WithoutForm, PEFTS),
}


def copy_packages(folder):
    """Copy the packages, under the names that they are imported by; return the copied file of the row's method."""
    if torchgraft.__file__:
        shutil.copytree(Path(torchgraft.__file__).parent, folder / "torchgraft")
    for name in ("functional", "adapters"):
        source = Path(importlib.import_module(f"torchgraft.{name}").__file__).parent
        shutil.copytree(source, folder / "torchgraft" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "torchgraft" / name / Path(inspect.getsourcefile(type(METHODS[ROW].config))).relative_to(source)


@pytest.mark.full
@pytest.mark.parametrize("what", BROKEN)
def test_a_method_that_breaks_a_promise_fails(what, tmp_path):
    change, broken = BROKEN[what]
    file = copy_packages(tmp_path)
    before = ast.unparse(ast.parse(file.read_text()))
    after = ast.unparse(ast.fix_missing_locations(change().visit(ast.parse(before))))
    assert (after == before) == (what == "nothing")
    file.write_text(after)
    chosen = sorted(KEPT | FORMULAS | STACKS | PEFTS)
    names = " or ".join(f"{test}[{ROW}-linear" for test in chosen)
    command = [sys.executable, "-P", "-m", "pytest", *FILES, "-q", "-rfE", "-p", "no:cacheprovider"]
    command += ["-m", "not full", "-k", names]
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, cwd=HERE.parents[1], capture_output=True, text=True
    )
    failed = {test for test in chosen if f"::{test}[" in run.stdout}
    assert run.returncode == (1 if broken else 0), run.stdout + run.stderr
    assert failed == broken, run.stdout
    assert " passed" in run.stdout and "ERROR" not in run.stdout
