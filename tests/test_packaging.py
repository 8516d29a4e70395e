"""What users get: the source distribution, the wheel made from it, and the wheel installed elsewhere."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import optree
import pytest
import safetensors
import torch

import torchgraft.functional

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
FOLDERS = ("functional", "adapters", "torchgraft")
VERSION = torchgraft.functional.__version__
PROGRAM = """
import importlib.metadata
import torchgraft as tg
assert tg.bind is tg.functional.bind and tg.LoraConfig is tg.adapters.LoraConfig
import torchgraft.adapters, torchgraft.functional
print(torchgraft.adapters.__file__)
print(torchgraft.functional.__file__)
print(torchgraft.adapters.__version__)
print(torchgraft.functional.__version__)
print(importlib.metadata.version("torchgraft"))
"""


def run(*command: object, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was built from it, out of a copy of the tree."""
    tree = tmp_path_factory.mktemp("build") / "tree"
    unwanted = (".*", "__pycache__", "*.egg-info", "build", "dist", "*-out", "results")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*unwanted))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=tree)
    return tree / "dist"


def sources() -> set[str]:
    return {
        f"{folder}/{path.relative_to(ROOT / folder)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
    }


@pytest.mark.slow
def test_wheel_has_the_packages_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(dist / f"torchgraft-{VERSION}-py3-none-any.whl") as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = sources() | {f"{folder}/py.typed" for folder in FOLDERS}
    assert names == {f"torchgraft/{name}".replace("torchgraft/torchgraft/", "torchgraft/") for name in expected}


def test_wheel_metadata(dist: Path) -> None:
    folder = f"torchgraft-{VERSION}.dist-info"
    with zipfile.ZipFile(dist / f"torchgraft-{VERSION}-py3-none-any.whl") as wheel:
        metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
        assert wheel.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.split(">=")[0] for line in required) == ["optree", "safetensors", "torch"]


def test_source_distribution_has_what_a_build_needs(dist: Path) -> None:
    with tarfile.open(dist / f"torchgraft-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sources() | {"LICENSE", "pyproject.toml", "adapters/py.typed", "functional/py.typed"} <= names


@pytest.mark.slow
def test_wheel_works_in_another_environment(dist: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    wheel = dist / f"torchgraft-{VERSION}-py3-none-any.whl"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # What it needs is borrowed from where the tests have it, after the wheel's own packages. A .pth file inside of a
    # borrowed folder is not read, so that the editable install stays out.
    (packages,) = home.glob("lib/python*/site-packages")
    borrowed = {str(Path(module.__file__ or "").parents[1]) for module in (optree, safetensors, torch)}
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    adapters, functional, *versions = run(python, "-c", PROGRAM, cwd=elsewhere).split()
    assert Path(adapters) == packages / "torchgraft" / "adapters" / "__init__.py"
    assert Path(functional) == packages / "torchgraft" / "functional" / "__init__.py"
    assert versions == [VERSION] * 3
