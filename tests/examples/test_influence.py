"""Attribution by gradients of each example, in a short run: what scores say, and what training again does."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from torchgraft.functional import perturb

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def influence():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.delitem(sys.modules, "digits", raising=False)
        spec = importlib.util.spec_from_file_location("influence", EXAMPLES / "influence.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_examples_that_count_most_are_those_that_are_missed(influence, tmp_path, capsys):
    result = influence.main(["--quick", "--out", str(tmp_path / "out")])
    falls = [float(fall.mean()) for fall in result["falls"].values()]
    assert falls[0] > falls[1] > falls[2]
    assert result["correlations"]["all"] > 0.1
    assert list(result["correlations"]) == ["64", "all", "multiplied only"] and result["chance"] > 0
    assert result["read"][1] > result["read"][0]
    assert result["picture"].read_bytes().startswith(b"\x89PNG")
    assert "by chance: below" in capsys.readouterr().out


def test_the_margin_is_the_log_odds(influence):
    logits, labels = torch.randn(5, 10, dtype=torch.float64), torch.arange(5)
    p = logits.softmax(-1)[torch.arange(5), labels]
    torch.testing.assert_close(influence.margin(logits, labels), (p / (1 - p)).log())


def test_correlations_are_of_ranks(influence):
    said = torch.tensor([[1.0, 3.0], [2.0, 2.0], [9.0, 1.0], [10.0, 0.0]])
    assert influence.correlation(said, said**3).tolist() == pytest.approx([1, 1])
    assert influence.correlation(said, -said).tolist() == pytest.approx([-1, -1])
    assert influence.correlation(said[:, :1], torch.tensor([[1.0], [3.0], [2.0], [4.0]])).item() == pytest.approx(0.8)


def test_scores_are_the_equation(influence):
    torch.manual_seed(0)
    model = influence.reader().double()
    graft = influence.bind(model, influence.LoraConfig(r=2, target_modules="all-linear"))
    many = perturb(graft.init(), [torch.Generator().manual_seed(3)], 0.1)
    x, t = torch.rand(6, 32, 32, dtype=torch.float64), torch.randint(10, (6,))
    data = {"examples": (x[:4], t[:4]), "test": (x[4:], t[4:])}
    params = influence.unstack(many)[0]

    def g(i):
        grads = torch.func.grad(lambda p: influence.margin(graft(p, x[i : i + 1]), t[i : i + 1]).sum())(params)
        return influence.ravel(grads)

    examples, test = torch.stack([g(i) for i in range(4)]), torch.stack([g(4), g(5)])
    gram = examples @ examples.T
    wrong = 1 - graft(params, x[:4]).softmax(-1)[torch.arange(4), t[:4]]
    inverse = torch.linalg.inv(gram + influence.DAMPING * gram.trace() / 4 * torch.eye(4))
    torch.testing.assert_close(
        influence.scores(graft, many, data, None), test @ examples.T @ inverse @ torch.diag(wrong)
    )


def test_the_lines_of_its_page_run():
    page = (EXAMPLES.parent / "docs" / "recipes" / "influence.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    namespace = {}
    exec(compile(block, "influence.md", "exec"), namespace)
    assert namespace["scores"].shape == (100, 100)
    assert namespace["scores"].diagonal().mean() > namespace["scores"].mean()
