"""Adapters combined, in a short run: sums do what their parts do, and a negated part is gone."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def arithmetic():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.delitem(sys.modules, "digits", raising=False)
        spec = importlib.util.spec_from_file_location("arithmetic", EXAMPLES / "arithmetic.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_new_adapters_are_made_of_trained_ones(arithmetic, tmp_path, capsys):
    result = arithmetic.main(["--quick", "--out", str(tmp_path / "out")])
    found, worlds = result["found"], result["worlds"]
    assert list(found)[:4] == ["the base", "mirrored", "inverted", "noisy"] and len(found) == 14
    unseen, inverted = worlds.index("mirrored, inverted"), worlds.index("inverted")
    assert found["mirrored + inverted"][unseen] > found["the base"][unseen]
    assert found["learned weights"][unseen] > found["the base"][unseen]
    assert found["inverted, negated"][inverted] <= found["inverted"][inverted]
    assert result["weights"].abs().max() > 0.1 and abs(result["cosine"]) < 1
    assert result["picture"].read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*found, *worlds])
