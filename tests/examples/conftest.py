"""Examples as modules, and a folder with the small base that recipes train first."""

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def load_example():
    """Import an example by name, as it is when it runs; what it imported is forgotten after the tests of a module."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.delitem(sys.modules, "digits", raising=False)
        yield importlib.import_module
        for name in set(sys.modules) - before:
            if (EXAMPLES / f"{name}.py").exists():
                del sys.modules[name]


@pytest.fixture(scope="session")
def run_page():
    """Run the Python of a recipe's page, block after block in one namespace; returns that."""

    def run(name):
        page = (EXAMPLES.parent / "docs" / "recipes" / f"{name}.md").read_text()
        namespace = {}
        for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
            exec(compile(block, f"{name}.md", "exec"), namespace)
        assert namespace
        return namespace

    return run


@pytest.fixture(scope="session")
def reader_file(tmp_path_factory):
    """The folder in which the base of recipes is kept, once it is trained."""
    return tmp_path_factory.mktemp("reader")


@pytest.fixture
def folder(load_example, reader_file, tmp_path):
    """A folder with a base that was trained for 60 steps, as in a quick run."""
    load_example("_recipes").frozen_reader(reader_file, 60)
    shutil.copy(reader_file / "base.safetensors", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tiny(load_example):
    """Make a tiny vision transformer in float64, and some images and labels."""
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    model = load_example("digits").VisionTransformer(dim=8, heads=2, depth=1).double().requires_grad_(False)
    return model, torch.rand(3, 6, 32, 32, dtype=torch.float64), torch.randint(10, (3, 6))
