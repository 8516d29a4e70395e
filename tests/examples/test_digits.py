"""The demo, in a short run: eight adapters learn, the base keeps every bit, files and merged weights agree."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def digits():
    spec = importlib.util.spec_from_file_location("digits", EXAMPLES / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_eight_adapters_learn_at_once(digits, tmp_path, capsys):
    result = digits.main(["--quick", "--out", str(tmp_path / "out")])
    base, adapted = (sum(result[key].values()) / 8 for key in ("base", "adapted"))
    assert len(result["adapted"]) == 8
    assert adapted > base + 0.15, (base, adapted)
    assert result["base_unchanged"] and result["reload_equal"] and result["merged_equal"]
    assert len(result["files"]) == 8 and all(file.stat().st_size > 1000 for file in result["files"])
    assert result["picture"].read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for name in digits.DOMAINS:
        assert f"{name:<12}{result['base'][name]:>8.1%}{result['adapted'][name]:>10.1%}" in printed
    assert "unchanged, bit for bit" in printed


def test_the_held_out_digits_are_not_trained_on(digits):
    images, labels, test_images, test_labels = digits.load_images(0)
    assert len(images) + len(test_images) == 1797 and len(labels) == len(images) and len(test_labels) == 500
    seen = {image.numpy().tobytes() for image in images}
    assert sum(image.numpy().tobytes() in seen for image in test_images) == 0
