"""All methods on one task, in a short run of a few of them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from torchgraft.adapters._config.base import config_types

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def methods():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.delitem(sys.modules, "digits", raising=False)
        spec = importlib.util.spec_from_file_location("methods_example", EXAMPLES / "methods.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "methods_example", module)
        spec.loader.exec_module(module)
        yield module


def test_some_methods_learn_and_are_drawn(methods, tmp_path, capsys):
    args = ["--quick", "--steps", "12", "--only", "LORA", "IA3", "VERA", "--out", str(tmp_path)]
    result = methods.main(args)
    assert list(result["found"]) == ["IA3", "Lora", "Vera"]
    assert all(len(one.accuracies) == 2 and one.parameters > 0 for one in result["found"].values())
    assert result["picture"].read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "methods.json").read_text())["methods"].keys() == result["found"].keys()
    assert "differences below" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_with_the_methods_that_are_left(methods, tmp_path, monkeypatch):
    train, trained = methods.train, []

    def interrupted(*args):
        if trained:
            raise KeyboardInterrupt
        trained.append(args[-1])
        return train(*args)

    args = ["--quick", "--steps", "2", "--only", "LORA", "IA3", "--out", str(tmp_path)]
    monkeypatch.setattr(methods, "train", interrupted)
    with pytest.raises(SystemExit, match="Interrupted. The same command goes on from what is in"):
        methods.main(args)
    first = json.loads((tmp_path / "methods.json").read_text())["methods"]
    assert list(first) == ["IA3"]
    monkeypatch.setattr(methods, "train", train)
    assert vars(methods.main(args)["found"]["IA3"]) == first["IA3"]
    with pytest.raises(SystemExit, match="has methods with other settings: steps was 2 and is 3"):
        methods.main([*args, "--steps", "3"])


def test_every_method_has_a_config_for_the_task(methods):
    there = {config.method.name for config in methods.configs().values()}
    own = {name for name, cls in config_types().items() if cls.__module__.startswith("torchgraft.")}
    assert there == own - {"LN_TUNING", "TRAINABLE_TOKENS"}
