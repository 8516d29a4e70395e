"""Ways to adapt a language model, in a tiny run: all learn, the base keeps every bit, files agree, also with PEFT."""

import contextlib
import copy
import importlib.util
import io
import math
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def text():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        spec = importlib.util.spec_from_file_location("text", EXAMPLES / "text.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "text", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """The folder of a run, its result, what it printed."""
    out, printed = tmp_path_factory.mktemp("text") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = text.main(["--quick", "--out", str(out)])
    return out, result, printed.getvalue()


def test_every_way_learns_from_the_same_base_and_leaves_it_alone(text, run):
    _, result, printed = run
    results = result["results"]
    before = results["base"]["code"][0]
    assert list(results) == ["base", "LoRA", "LoRA+", "DoRA", "PiSSA", "full"]
    for name in list(results)[1:]:
        row = results[name]
        assert all(bits < before - 0.05 for bits in row["code"]), name
        for curve, bits in zip(row["curves"], row["code"], strict=True):  # the same start, but for a sum's rounding
            assert curve[0] == pytest.approx(before, abs=1e-4) and curve[20] == bits
        assert len(row["code"]) == len(row["prose"]) == 2 and math.isfinite(row["seconds"])
    assert results["LoRA"]["trained"] < results["DoRA"]["trained"] < results["full"]["trained"] / 5
    assert results["full"]["trained"] == sum(p.numel() for p in result["model"].parameters())
    assert results["LoRA"]["bytes"] < results["full"]["bytes"] / 5
    assert result["base_unchanged"] and "unchanged, bit for bit" in printed
    assert not any(p.requires_grad for p in result["model"].parameters())


def test_the_numbers_are_those_of_the_equations(text, run):
    """Bits per character in float64 from probabilities; the table shows them."""
    _, result, printed = run
    model = copy.deepcopy(result["model"]).double()
    rows = text.spread_rows(text.source(text.HOLD_OUT), 16)
    with torch.no_grad():
        chances = model(rows[:, :-1]).softmax(-1).gather(2, rows[:, 1:, None])
    expected = float(-chances.log2().mean())
    assert result["results"]["base"]["code"][0] == pytest.approx(expected, rel=1e-5)
    assert f"{expected:>10.3f} (0.000){2**expected:>10.2f}" in printed
    for name, row in list(result["results"].items())[1:]:
        bits = mean(row["code"])
        assert f"{bits:>10.3f} ({max(row['code']) - min(row['code']):.3f}){2**bits:>10.2f}" in printed, name
        assert f"\n{name:<7}{row['rate']:>7g}{row['trained']:>10,}" in printed


def test_files_come_back_and_peft_reads_them(text, run):
    out, result, printed = run
    assert result["reload_equal"] and result["plain_difference"] < 1e-4 and "read back equal" in printed
    peft = pytest.importorskip("peft")
    rows = torch.randint(96, (2, 64), generator=torch.Generator().manual_seed(0))
    for folder, name in [("LoRA", "LoRA"), ("LoRA+", "LoRA+"), ("DoRA", "DoRA"), ("PiSSA-plain", "PiSSA")]:
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(result["model"]), out / folder)
        torch.testing.assert_close(theirs(rows), result["learners"][name][0].run(rows), rtol=1e-4, atol=1e-4)


def test_what_is_said_is_what_the_numbers_show(text):
    assert text.compare("DoRA", [-0.2, -0.1]) == "DoRA   -0.150 (-0.200 to -0.100), better with each of 2 seeds"
    assert text.compare("DoRA", [0.2, 0.1]).endswith("worse with each of 2 seeds")
    for mixed in ([-0.2, 0.1], [0.0, 0.0]):
        assert text.compare("DoRA", mixed).endswith("no clear difference: it depends on the seed")
    assert text.compare("DoRA", [-0.1]).endswith("better with the one seed")


def test_picture_and_samples(text, run):
    _, result, printed = run
    assert result["picture"].read_bytes().startswith(b"\x89PNG")
    for prompt, lines in result["samples"].items():
        assert list(lines) == list(result["results"]) and f"\n{prompt!r} goes on\n" in printed
        assert all(f"\n{name:<7}{line}\n" in printed for name, line in lines.items())


def test_the_texts_are_apart(text):
    learnt, chosen_on, held_out = (set(one.split()) for one in (text.LEARN, text.VALIDATE, text.HOLD_OUT))
    assert not learnt & chosen_on and not learnt & held_out and not chosen_on & held_out


def test_the_search_tries_rates_around_each(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(text, "FACTORS", (0.5, 1.0))
    monkeypatch.setattr(text, "WAYS", text.WAYS[:2])
    assert text.main(["--quick", "--search", "--out", str(tmp_path / "out")]) == {}
    printed = capsys.readouterr().out
    assert f"bits per character on {text.VALIDATE}" in printed and "LoRA+" in printed
    assert all(f"{way.rate * factor:>9g}:" in printed for way in text.WAYS for factor in text.FACTORS)
    assert not (tmp_path / "out").exists()


def test_numbers_that_make_no_run_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        text.main(["--steps", "3"])
    assert "--steps at least 10" in capsys.readouterr().err
