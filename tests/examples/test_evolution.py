"""Evolution of an adapter, in a short run: scores and the step are those of the equation."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def evolution():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.delitem(sys.modules, "digits", raising=False)
        spec = importlib.util.spec_from_file_location("evolution", EXAMPLES / "evolution.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_an_adapter_evolves_and_is_drawn(evolution, tmp_path, capsys):
    result = evolution.main(["--quick", "--out", str(tmp_path / "out")])
    assert all(list(curve) == list(range(7)) for curve in result["curves"].values())
    assert [name.split()[0] for name in result["rates"]] == ["the", "8", "one"]
    assert result["picture"].read_bytes().startswith(b"\x89PNG")
    assert "rows a second" in capsys.readouterr().out


def test_an_odd_population_is_refused(evolution, capsys):
    with pytest.raises(SystemExit):
        evolution.parse(["--population", "7"])
    assert "expected an even number" in capsys.readouterr().err


@torch.no_grad()
def test_scores_in_one_forward_are_those_of_each(evolution):
    model = evolution.digits.VisionTransformer(dim=16, heads=2, depth=1)
    graft = evolution.bind(model, evolution.LoraXSConfig(r=4, target_modules=evolution.TARGETS))
    params = graft.init(torch.Generator().manual_seed(0))
    noise, many = evolution.pairs(params, 2.0, 6, 5)
    x, t = torch.rand(8, 32, 32), torch.randint(10, (8,))
    found = evolution.scores(graft, many, x, t)
    orders = [graft(one, x).argsort(-1, descending=True).tolist() for one in evolution.unstack(many)]
    each = [
        sum(1 / (1 + row.index(label)) for row, label in zip(order, t.tolist(), strict=True)) / 8 for order in orders
    ]
    assert len(set(found.tolist())) > 1
    torch.testing.assert_close(found, torch.tensor(each))
    offsets = evolution.ravel(many, stacked=True) - evolution.ravel(params)
    torch.testing.assert_close(offsets, 2.0 * torch.cat([noise, -noise]))
    assert noise.std().item() == pytest.approx(1, rel=0.2)


def test_the_lines_of_its_page_run():
    page = (EXAMPLES.parent / "docs" / "recipes" / "evolution.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    namespace = {}
    exec(compile(block, "evolution.md", "exec"), namespace)
    assert namespace["up"].shape == (32,)
    assert namespace["scores"](namespace["both"], 64).max() <= 1
