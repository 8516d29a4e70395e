"""`import torchgraft as tg`: the names that users type most, loaded when they are asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchgraft
import torchgraft.adapters
import torchgraft.functional


def test_each_name_is_that_of_its_package():
    for name in torchgraft.__all__:
        found = getattr(torchgraft, name)
        packages = [p for p in (torchgraft.functional, torchgraft.adapters) if getattr(p, name, None) is found]
        assert packages or found in (torchgraft.functional, torchgraft.adapters), name
    assert set(torchgraft.__all__) <= set(dir(torchgraft))


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(torchgraft.__file__).read_text())
    imported = [alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    names = {name for name in imported if name}
    assert names | {"adapters", "functional"} == set(torchgraft.__all__)


def test_every_config_is_there():
    configs = {name for name, one in vars(torchgraft.adapters).items() if hasattr(one, "method")}
    assert configs <= set(torchgraft.__all__)


def test_what_is_not_there_says_where_to_look():
    with pytest.raises(AttributeError, match=r"no attribute 'LoraConfg'; did you mean 'LoraConfig'\?"):
        torchgraft.LoraConfg  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'vmap'; see torchgraft.functional and .adapters"):
        torchgraft.vmap  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Lora'"):
        from torchgraft import Lora  # noqa: F401


@pytest.mark.slow
def test_functional_alone_loads_no_adapters():
    program = "import torchgraft as tg, sys; tg.bind; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "torchgraft.functional" in loaded and not loaded & {"torchgraft.adapters", "safetensors"}
