"""The names that packages show: those that they import for others, and no more."""

import ast
import importlib
import pydoc
from pathlib import Path

import pytest

PACKAGES = ["torchgraft.adapters", "torchgraft.functional", "torchgraft.functional.extending"]


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_exactly_what_is_imported(package):
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).read_text())
    imports = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    imports = [
        alias for alias in imports if not (alias.asname or alias.name).startswith("_") or alias.asname == alias.name
    ]
    names = {alias.name for alias in imports} - ({"__version__"} if "extending" not in package else set())
    assert all(alias.asname == alias.name for alias in imports), "`X as X`, by which type checkers see what is public"
    assert sorted({*module.__all__} - {"__version__"}) == sorted(names)
    assert dir(module) == sorted(module.__all__)


@pytest.mark.parametrize(("package", "names"), [*zip(PACKAGES, (["load_adapter"], ["bind", "stack"], []), strict=True)])
def test_help_lists_functions(package, names):
    page = pydoc.plain(pydoc.render_doc(importlib.import_module(package)))
    listed = page.partition("FUNCTIONS")[2]
    assert listed and not [name for name in names if f"\n    {name}(" not in listed]


def test_stars_bring_no_private_names():
    names = {}
    exec("from torchgraft.functional import *", names)
    assert "bind" in names and not [name for name in names if name.startswith("_") and not name.startswith("__")]
