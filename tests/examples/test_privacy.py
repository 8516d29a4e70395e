"""Private training of an adapter, in a short run: Opacus' own numbers, and epsilons that another library finds."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import optree
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
pytest.importorskip("opacus")


@pytest.fixture
def privacy():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.delitem(sys.modules, "digits", raising=False)
        spec = importlib.util.spec_from_file_location("privacy", EXAMPLES / "privacy.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_a_step_from_the_same_noise_is_opacus(privacy):
    model = privacy.digits.VisionTransformer(dim=16, heads=2, depth=1).requires_grad_(False)
    x, t = torch.rand(6, 32, 32), torch.randint(10, (6,))
    steps, apart = privacy.both_steps(model, x, t, 0.7, seed=3)
    assert apart < 1e-5
    first, *others = [[leaf.detach().clone() for leaf in optree.tree_leaves(step())] for step in steps.values()]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-6)


def test_epsilons_are_those_of_another_accountant(privacy):
    accounting = pytest.importorskip("dp_accounting")
    for epsilon in (1.0, 8.0):
        sigma, accountant = privacy.noise_for(epsilon, 0.16, 50), accounting.pld.PLDAccountant()
        step = accounting.PoissonSampledDpEvent(0.16, accounting.GaussianDpEvent(sigma))
        found = accountant.compose(step, 50).get_epsilon(privacy.DELTA)
        assert math.isclose(found, epsilon, rel_tol=0.02)
    assert privacy.noise_for(None, 0.16, 50) == 0


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_a_short_run_is_drawn_and_goes_on_where_it_was(privacy, tmp_path, capsys):
    args = ["--quick", "--steps", "3", "--base-steps", "30", "--batch", "32", "--out", str(tmp_path)]
    file = tmp_path / "accuracies.json"
    result = privacy.main(args)
    assert list(result["found"]) == ["LoRA, 4.0", "LoRA, None", "LoRA-XS, 4.0", "LoRA-XS, None"]
    assert result["picture"].read_bytes().startswith(b"\x89PNG") and set(result["times"]) > {"Opacus"}
    file.write_text(json.dumps(result["found"] | {"LoRA, 4.0": [0.5]}))
    assert privacy.main(args)["found"] == result["found"] | {"LoRA, 4.0": [0.5]}
    assert "from the same noise" in capsys.readouterr().out


def test_the_lines_of_its_page_run():
    page = (EXAMPLES.parent / "docs" / "recipes" / "privacy.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    namespace = {}
    exec(compile(block, "privacy.md", "exec"), namespace)
    assert all(leaf.isfinite().all() for leaf in optree.tree_leaves(namespace["params"]))
