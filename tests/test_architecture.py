"""The rules between the folders: who may import what."""

import ast
import os
import re
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

OPTIONAL = {
    "adapters/_calibration/progress.py": {"tqdm"},
    "adapters/_command/inspecting.py": {"matplotlib"},
    "adapters/_command/output.py": {"tqdm"},
    "adapters/_methods/adamss/adamss.py": {"sklearn"},
    "adapters/_methods/unilora.py": {"numpy"},
    "adapters/_peft/auto.py": {"transformers", "<computed name>"},  # a base model's library, of a list of few
}
"""What a file imports within a function, where it is installed."""

ORDER = {
    "adapters": """
        _files/disk: folder strict_json headers shards hub config_file
        _config: layers given_objects tasks peft_format messages errors patterns peft_type fields matching
            target_parameters experts architectures ties targets tokens replaced base token_fields replication keys
        _calibration/initial: configs spectral corda eva loftq lora_ga statistics initial_values __init__
        _methods/shared: called embedding_grad fused low_rank padded principal projections remade rotated scalings
            siteless lycoris sparse spectra wavelets
        _methods: *
        _methods/lora: activated blocks constants bases dora fields parameters forward leaves lora to_plain
        _methods/adalora: adalora budget
        _methods/adamss: adamss budget
        _inplace: bound_states root switched placed
        _inplace/tensors: checksum gathering originals
        _inplace/beside: biases modules_to_save token_rows tokens
        _inplace/layer: reads containers gradients holders leaves weights called_base shell decided active values scaled
            names tuner_layer parameters
        _inplace: walk switch merging
        _inplace/states: bare layouts embeddings base_state extract state summaries
        _inplace/injection: overlaps restoring targets_from_keys initial_leaves bound positions placing
        _inplace/rows: attached copied stacking bound generating rows
        _inplace: inject __init__
        _arithmetic: products mixing truncated given experts combine vectors soups weighted
        _calibration: progress
        _conversion: wanted report changes shrink to_lora sources extract factors fused original_unet adapterhub
            pipelines formats requantized
        _files/servers: engines rules form check
        _files: configs packed fit stored save into_graft into_model load inspected stacks
        _checkpoints: stacked folder skeleton rows changes shard merge
        _calibration: observing redistributed statistics
        _optim: lora_plus lora_fa osf
        _bank: layout state optimizers fused together functional_optimizer muon fit kind resident stepping arguments
            gathered_stack batch slots isolation record resting roster files residents bank ranks collected checkpoint
            replicated
        _peft: names absent by_rows configs conversion tuners card tuner_classes status weights wrapper ranks hotswap
            peft_model arrow tasks auto layer_classes helpers lookups optimizers packages precision preprocess eva
            renamed_keys
            peft_modules alias
        _command: output files inspecting making main
        .: __init__
    """,
    "functional": """
        .: _messages _unsupported _constants _places _rows _versions
        _tensors: placement wrappers
        _sites: tensors geometry site kernels linear embedding convolution attention kinds parameters factored
        .: _abilities _method _trees _trainable _norms _grads _vectors _perturb _copy_rows _project _per_example
        _locating: layout finder inputs observed look looking marks positions tokens
        _layers: around noise base adapted projection routed gathered no_weight compose
        _binding: tied replaced plan leaves binding padding joined stacking stacked padded members
        _skeleton: context marking saving reach recorded references sharded attention runtime row_outputs entries
            row_weights followed row_groups parameters skeleton swaps
        _routing: route owners
        _execution: call traced pool fill bound_model watched constant token_rows trial run entered shared_tensors views
        .: _graft _given _call _dense _dequantized _merge _module _stacks _base_with_weights _bind extending __init__
    """,
}
"""The rooms of a folder from the bottom up, and the files of each: a file imports those that stand before it.

A star is every file of a room, none of which imports another. An `__init__` that imports nothing stands nowhere.
"""

STARRED = {"adapters/_methods"}
"""Rooms with a star."""


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
        ("from . import _trees", ["torchgraft.functional._trees"]),
        ("from ._trees import stack", ["torchgraft.functional._trees.stack"]),
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


def rooms(folder: str) -> Iterator[tuple[str, list[str]]]:
    """The rooms of a folder in their declared order, as paths, and the names of their files."""
    for room, names in re.findall(r"([\w./]+):([^:]*)(?=\s[\w./]+:|$)", ORDER[folder]):
        path = os.path.normpath(f"{folder}/{room}")
        every = sorted(file.stem for file in FILES if str(file.parent) == path and file.stem != "__init__")
        yield path, every if names.split() == ["*"] else names.split()


def ordered(folder: str) -> list[str]:
    """The files of a folder in their declared order, as paths."""
    return [f"{room}/{name}.py" for room, names in rooms(folder) for name in names]


def at_runtime(source: str) -> str:
    """A module without what only type checkers see."""

    class Strip(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            self.generic_visit(node)
            return (node.orelse or ast.Pass()) if ast.unparse(node.test).endswith("TYPE_CHECKING") else node

    return ast.unparse(Strip().visit(ast.parse(source)))


def files_of(name: str) -> list[str]:
    """The files that an import of a name within `torchgraft` runs: the packages that it is in, and the module."""
    parts = name.split(".")[1:]
    found = [os.path.join(*parts[:count], "__init__.py") for count in range(1, len(parts) + 1)]
    found += [os.path.join(*parts[:count]) + ".py" for count in (len(parts) - 1, len(parts)) if count]
    return [file for file in found if (ROOT / file).exists()]


def upward(file: Path, order: list[str], source: str) -> list[str]:
    """The imports of a module that do not go down in an order, each with the file that it reaches."""
    below, package = set(order[: order.index(str(file))]), package_of(file)
    if str(file.parent) in STARRED:
        below -= {one for one in below if os.path.dirname(one) == str(file.parent)}
    around = {str(parent / "__init__.py") for parent in file.parents}
    found = []
    for name in imported(at_runtime(source), package):
        *packages, target = files_of(name) if within(name, {f"torchgraft.{file.parts[0]}"}) else [""]
        reached = [one for one in packages if one not in around] + [target]
        found += [f"{name} ({one})" for one in reached if one in order and one not in below]
    return found


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from .base import AdapterConfig", []),
        ("from .._calibration.initial.configs import made", ["configs", "__init__"]),
        ("def f():\n    from .._inplace import inject_adapter_in_model", ["__init__"]),
        ("from .._methods.lora import lora", ["lora"]),
        ("from .. import LoraConfig", ["__init__"]),
        ("if TYPE_CHECKING:\n    from .._methods.lora.lora import LoraConfig", []),
    ],
)
def test_an_import_that_goes_up_is_seen(source: str, names: list[str]) -> None:
    found = upward(Path("adapters/_config/keys.py"), ordered("adapters"), source)
    assert sorted(Path(one.split(" (")[1].rstrip(")")).stem for one in found) == sorted(names)


def test_a_method_that_imports_another_is_seen() -> None:
    source = "from .ia3 import IA3Config"
    assert len(upward(Path("adapters/_methods/vera.py"), ordered("adapters"), source)) == 1


@pytest.mark.parametrize("folder", ORDER)
def test_the_order_names_each_file_once(folder: str) -> None:
    order = ordered(folder)
    bare = [
        str(file) for file in FILES if file.name == "__init__.py" and not [*imported((ROOT / file).read_text(), "")]
    ]
    files = {str(file) for file in FILES if file.parts[0] == folder} - set(bare)
    assert len(order) == len(set(order)), "a file stands twice in ORDER"
    assert set(order) == files, f"ORDER lacks {sorted(files - set(order))}, and has {sorted(set(order) - files)} more"


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] in ORDER], ids=str)
def test_imports_go_down(file: Path) -> None:
    order = ordered(file.parts[0])
    if str(file) in order:
        found = upward(file, order, (ROOT / file).read_text())
        assert not found, (
            f"{file} imports {', '.join(found)}, which stands above it. From the bottom up:{ORDER[file.parts[0]]}"
            "Move what is needed to a lower file, pass it in, or have the lower file declare a protocol for it"
        )


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
