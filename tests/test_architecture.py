"""The rules between the folders: who may import what."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchgraft.adapters
import torchgraft.functional

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path.relative_to(ROOT) for folder in ("functional", "adapters") for path in (ROOT / folder).rglob("*.py")
)
UNSAFE = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
"""Modules whose readers run code from the file they read."""

ALLOWED = {
    "functional": {"torch", "optree", "torchgraft.functional"},
    "adapters": {"torch", "optree", "safetensors", "torchgraft.functional", "torchgraft.adapters"},
}

OPTIONAL = {"adapters/calibration/progress.py": {"tqdm"}}
"""What a file imports where it is installed, within a function, and goes without else."""


def imported(source: str, package: str) -> Iterator[str]:
    """Absolute names of all that `source`, a module of `package`, imports, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("__import__", "import_module")):
            yield ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "<computed name>"


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def package_of(file: Path) -> str:
    return ".".join(["torchgraft", *file.parent.parts])


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch.nn", ["torch.nn"]),
        ("from torch import nn", ["torch.nn"]),
        ("from . import trees", ["torchgraft.functional.trees"]),
        ("from .trees import stack", ["torchgraft.functional.trees.stack"]),
        ("from ..adapters import LoraConfig", ["torchgraft.adapters.LoraConfig"]),
        ("from .. import adapters", ["torchgraft.adapters"]),
        ("def f():\n    import peft", ["peft"]),
        ("importlib.import_module('peft')", ["peft"]),
    ],
)
def test_every_form_of_import_is_seen(source: str, names: list[str]) -> None:
    assert list(imported(source, "torchgraft.functional")) == names


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_only_what_its_folder_may(file: Path) -> None:
    allowed = ALLOWED[file.parts[0]] | (set(sys.stdlib_module_names) - UNSAFE)
    names = imported((ROOT / file).read_text(), package_of(file))
    allowed |= OPTIONAL.get(str(file), set())
    refused = sorted({name for name in names if not within(name, allowed)})
    assert not refused, f"{file} imports {refused}; {file.parts[0]}/ may import {sorted(ALLOWED[file.parts[0]])}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_reads_and_writes_no_pickle(file: Path) -> None:
    source = (ROOT / file).read_text()
    reads = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save", "torch.serialization")
    ]
    names = imported(source, package_of(file))
    reads += [name for name in names if within(name, {"torch.load", "torch.save", "torch.serialization"} | UNSAFE)]
    assert not reads, f"{file} uses {reads}; files are safetensors and JSON"


@pytest.mark.slow
def test_import_loads_nothing_that_it_does_not_need() -> None:
    program = """
import sys, torch
torch_alone = set(sys.modules)
import torchgraft.functional
print(*set(sys.modules) - torch_alone)
import torchgraft.adapters
print(*set(sys.modules) - torch_alone)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    functional, both = (line.split() for line in run.stdout.splitlines())
    assert not [name for name in functional if within(name, {"torchgraft.adapters", "safetensors"})]
    heavy = {"accelerate", "matplotlib", "peft", "pytest", "sklearn", "torch._dynamo", "tqdm", "transformers"}
    assert not [name for name in both if within(name, heavy)]


def test_the_version_stands_in_one_place() -> None:
    assert torchgraft.adapters.__version__ is torchgraft.functional.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "torchgraft.functional.__version__"}
    assigned = [
        str(file)
        for file in FILES
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__version__" for target in node.targets)
    ]
    assert assigned == ["functional/__init__.py"]


def test_dependencies_are_what_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {requirement.split(">=")[0] for requirement in project["dependencies"]}
    assert named == {"optree", "safetensors", "torch"}
