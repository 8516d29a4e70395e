"""The sweep, in a tiny run: it ranks, draws, saves what PEFT reads, and an interrupt changes nothing."""

import contextlib
import importlib.util
import io
import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from torchgraft.adapters import load_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def sweep():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        spec = importlib.util.spec_from_file_location("sweep", EXAMPLES / "sweep.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "sweep", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def whole(sweep, tmp_path_factory):
    """A sweep that nothing interrupted: its folder, its result, what it printed."""
    out, printed = tmp_path_factory.mktemp("whole"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = quick(sweep, out)
    return out, result, printed.getvalue()


def quick(sweep, folder, *more):
    return sweep.main(["--quick", "--adapters", "5", "--out", str(folder), *more])


def stored(folder):
    return {name: tensor for name, tensor in load_file(folder / "state.safetensors").items() if name != "seconds"}


def test_it_ranks_draws_and_saves_the_best(sweep, whole):
    out, result, printed = whole
    after, best = result["after"], result["best"]
    assert after[best] == min(after) < result["before"]
    assert result["reload_equal"] and result["difference"] < 1e-4 and math.isfinite(result["speedup"])
    assert result["picture"].read_bytes().startswith(b"\x89PNG")
    own = result["settings"][best]
    row = f"  1.{own.rank:>6}{own.alpha:>7}{own.rate:>8g}{own.seed:>6}"
    assert (
        f"{row}{result['before']:>9.3f}{after[best]:>8.3f}" in printed
        and "  5." in printed
        and "read back equal" in printed
        and "times as much" in printed
    )

    model, rows = importlib.import_module("_writer").Writer(32, 2).eval(), torch.randint(96, (2, 64))
    model.load_state_dict(load_file(out / "base.safetensors"))
    chosen = result["graft"].member(best)
    expected = chosen(result["graft"].unstack(result["state"]["adapters"])[best], rows)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(model, result["folder"])
    torch.testing.assert_close(theirs(rows), expected)
    ours = importlib.import_module("_writer").Writer(32, 2).eval()
    ours.load_state_dict(load_file(out / "base.safetensors"))
    torch.testing.assert_close(load_adapter(ours, result["folder"])(rows), expected)


@pytest.mark.parametrize("stop", [3, 10, 27])
def test_an_interrupted_sweep_ends_as_an_uninterrupted_one(sweep, whole, tmp_path, monkeypatch, stop):
    folder, result, _ = whole
    advance, calls = sweep.advance, itertools.count(1)

    def interrupted(*args):
        if next(calls) > stop:
            raise KeyboardInterrupt
        return advance(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "advance", interrupted)
        with pytest.raises(SystemExit, match="Interrupted. The same command goes on"):
            quick(sweep, tmp_path / "parts")
    assert (tmp_path / "parts" / "state.safetensors").exists() == (stop >= 10)
    parts = quick(sweep, tmp_path / "parts")
    # a state that was read lies elsewhere in memory than one that was computed, where sums may be rounded otherwise
    torch.testing.assert_close(parts["after"], result["after"], rtol=1e-3, atol=1e-3)
    one, other = stored(folder), stored(tmp_path / "parts")
    torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)
    assert int(one["step"]) == 30 and not one["curves"].isnan().any()
    assert not list(tmp_path.rglob("*.new"))


def test_a_sweep_of_other_settings_is_refused(sweep, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    kept = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="other settings: adapters was 5 and is 6. Give another --out"):
        quick(sweep, tmp_path, "--adapters", "6")
    facts = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**facts, "texts": "other"}))
    with pytest.raises(SystemExit, match=f"texts was 'other' and is {facts['texts']!r}"):
        quick(sweep, tmp_path)
    assert (tmp_path / "state.safetensors").read_bytes() == kept


def test_an_adapter_that_diverges_ranks_last(sweep, whole):
    _, result, _ = whole
    lost = {
        path: {name: leaf * torch.nan for name, leaf in leaves.items()}
        for path, leaves in result["state"]["adapters"].items()
    }
    assert sweep.measure(result["graft"], lost, torch.zeros(2, 65, dtype=torch.long)).tolist() == [float("inf")] * 5


def test_settings_are_balanced(sweep):
    settings = sweep.settings_of(64)
    assert len(set(settings)) == 64
    for count, each in [(16, 1), (32, 2), (64, 4)]:
        cells = [(setting.rank, setting.rate) for setting in settings[:count]]
        assert all(cells.count(cell) == each for cell in itertools.product(sweep.RANKS, sweep.RATES))
    half = [(s.rank, s.rate, s.seed) for s in settings[:32]]
    assert len(set(half)) == 32
    ratios = [(s.alpha // s.rank, s.seed) for s in settings[:32]]
    assert all(ratios.count(pair) == 8 for pair in itertools.product(sweep.RATIOS, sweep.SEEDS))


def test_each_adapter_has_its_own_learning_rate(sweep):
    """The stack's AdamW against torch's, in float64."""
    source, rates = torch.Generator().manual_seed(0), torch.tensor([0.1, 0.01, 0.0], dtype=torch.float64)
    start = torch.randn(3, 4, 2, generator=source, dtype=torch.float64)
    params, mean, square = {"w": start}, {"w": torch.zeros_like(start)}, {"w": torch.zeros_like(start)}
    single = [torch.nn.Parameter(one.clone()) for one in start]
    optimizers = [torch.optim.AdamW([p], lr=float(r), weight_decay=0.01) for p, r in zip(single, rates, strict=True)]
    for step in range(5):
        grads = torch.randn(3, 4, 2, generator=source, dtype=torch.float64)
        params, mean, square = sweep.adamw(params, {"w": grads}, mean, square, step, rates)
        for parameter, grad, optimizer in zip(single, grads, optimizers, strict=True):
            parameter.grad = grad
            optimizer.step()
    torch.testing.assert_close(params["w"], torch.stack(list(single)), rtol=1e-9, atol=1e-9)
    assert torch.equal(params["w"][2], start[2])


def test_held_out_text_is_not_learnt(sweep):
    assert not set(sweep.LEARN.split()) & set(sweep.HOLD_OUT.split())
    learnt, held_out = sweep.reference()
    assert len(learnt) > 10 * len(held_out) > 10_000
