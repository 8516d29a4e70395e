"""The README and other pages: their Python runs; the README's tables are what is so, and it stays short."""

import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torchgraft.adapters

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        assert len(block.splitlines()) < 30
        exec(compile(block, "README.md", "exec"), namespace)
    assert set(namespace["state"]) == set(namespace["peft"].get_base_model_state_dict(namespace["model"]))


def test_every_python_block_of_the_page_on_lora_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "adapters" / "LORA.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 7
    namespace = {}
    for block in blocks:
        exec(compile(block, "LORA.md", "exec"), namespace)


def test_every_python_block_of_the_page_on_rows_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "functional" / "ROWS.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    namespace = {}
    for block in blocks:
        exec(compile(block, "ROWS.md", "exec"), namespace)
    assert repr(namespace["routed"]) == "Routed(3 adapters, 4 rows, declared: batch_dim=0)"


def test_the_three_walks_of_the_first_hour_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "first-hour.md").read_text()
    walks = [re.findall(r"```python\n(.*?)```", walk, flags=re.DOTALL) for walk in page.split("\n## ")[1:]]
    assert [len(blocks) for blocks in walks] == [2, 1, 1]
    for blocks in walks:
        namespace = {}
        for block in blocks:
            exec(compile(block, "first-hour.md", "exec"), namespace)
    assert len(page.splitlines()) <= 150 and max(map(len, page.splitlines())) <= 120


def test_the_page_for_contributors_runs_quotes_and_links_what_there_is():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    blocks, namespace = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL), {}
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), namespace)
    with pytest.raises(AttributeError, match="HadamardConfig has no form.*; set HadamardConfig.form = PeftFormat"):
        namespace["HadamardConfig"]().to_dict()
    quoted = re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL)
    assert quoted and all(quote in (ROOT / "tests" / "contract" / "methods.py").read_text() for quote in quoted)
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+?)(?:_?\.\.\.)?`", page)
    assert named and not [name for name in named if f"def {name}" not in tests]
    assert not [target for target in re.findall(r"\]\(([^)]+)\)", page) if not (ROOT / target).exists()]
    assert len(page.splitlines()) <= 120
    namespace.clear()
    gc.collect()  # and its config from the registry


def test_each_method_is_named():
    for name in (name for name, one in vars(torchgraft.adapters).items() if hasattr(one, "method")):
        assert f"`{name}`" in README, f"the paragraph on methods lacks `{name}`"


def test_the_import_times_are_those_measured():
    result = json.loads((ROOT / "benchmarks" / "results" / "import_time.json").read_text())["added_to_import_torch"]
    theirs, ours = (result[name]["median_s"] for name in ("peft", "torchgraft"))
    assert f"| `import` beyond torch | {theirs:.1f} s | {ours:.2f} s |" in README


def test_the_wrong_outputs_are_those_counted():
    result = json.loads((ROOT / "benchmarks" / "results" / "threads.json").read_text())
    assert result["wrong"]["torchgraft"] == 0
    row = f"| {result['threads']} threads, {result['threads']} adapters, {result['calls']:,} calls | "
    assert row + f"{result['wrong']['peft']} wrong outputs | none wrong |" in README


def test_the_costs_are_those_measured():
    command = [sys.executable, str(ROOT / "benchmarks" / "_table.py")]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table in (ROOT / "benchmarks" / "COSTS.md").read_text()
    shown = README.partition("## What it costs")[2].partition("\n## ")[0]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) > 5 and not [row for row in rows if row not in table.splitlines()]


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_page_is_short():
    assert len(README.splitlines()) <= 200
