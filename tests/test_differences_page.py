"""The page that says where this differs from PEFT: its rows name tests, which are there."""

import ast
import re
from pathlib import Path

import pytest

from tests.peft_suite import kinds

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "differences.md").read_text()
HEADS = ("| PEFT |", "| method |")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(HEADS)]


def names_in(path):
    tree = ast.parse((ROOT / "tests" / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:60])
def test_each_row_names_its_test(row):
    found = re.search(r"\[`(test_\w+)`\]\(\.\./tests/([\w/]+\.py)\) \|$", row)
    assert found, row
    assert found[1] in names_in(found[2])


def test_each_kind_of_what_fails_of_pefts_tests_is_on_its_page():
    page = (ROOT / "docs" / "peft-suite.md").read_text().partition("| kind |")[2]
    named = set(re.findall(r"(?m)^\| ([^|]+) \| [^|]+ \|$", page)) - {"---"}
    assert named == {*kinds.ERRORS, *kinds.TESTS} - {"absent"}
