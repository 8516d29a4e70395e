"""A page for each method, from its docstring, the tables of other pages, and measurements."""

from __future__ import annotations

import ast
import doctest
import inspect
import json
import re
import statistics
import sys
from typing import Any

from links import ROOT, moved, relative

CHOOSING, METHODS, DIFFERENCES = "docs/choosing.md", "docs/methods.md", "docs/differences.md"
BENCHMARK, RESULTS = "benchmarks/methods.py", "benchmarks/results/methods.json"
TASK, TASK_PAGE = "examples/methods.json", "docs/recipes/methods.md"
MEASURED = ("training step", "inference", "training step, launch-bound", "inference, launch-bound")


def configs() -> dict[str, type]:
    """Return the config of each method, by the path of its page."""
    from torchgraft import adapters

    found = [one for one in vars(adapters).values() if isinstance(one, type) and hasattr(one, "method")]
    pairs = ((f"docs/methods/{config.method.name.lower()}.md", config) for config in found)
    return dict(sorted(pairs, key=lambda pair: title(pair[1]).lower()))


def title(config: type) -> str:
    """Return a method's name, which its module's docstring begins with."""
    return _docstring(config).partition(":")[0]


def page(path: str, config: type) -> str:
    """Return the text of a method's page, with links as paths of the repository."""

    def link(words: str, page: str) -> str:
        return f"[{words}]({relative(page, path)})"

    _, line, rest = re.split(r": |\n\n", _docstring(config), maxsplit=2)
    source = str(config.__module__).replace("torchgraft.", "").replace(".", "/") + ".py"
    parts = [
        f"# {title(config)}",
        line[0].upper() + line[1:],
        rest,
        f"Source: {link(f'`{source}`', source)}",
        f"## In three lines\n\n```python\n{code(config)}```",
        "`model` is any module that has such targets, `x` its input; `params` is a tree of tensors to train: "
        + link("from a model to eight adapters", "docs/tutorial.md"),
        _section("When to use it", _advice(config, path), f"Of others: {link('which method?', CHOOSING)}"),
        _section("What works", _row(config, path), f"The words are explained {link('above the table', METHODS)}."),
        _section(
            "What it costs",
            _costs(config),
            f"Times over the frozen base's, and what a step keeps for its backward: {link('`methods.py`', BENCHMARK)}",
        ),
        _section(
            "On one task",
            _on_one_task(config),
            f"Digits turned by 90 degrees, 80 steps, the best of five rates: {link('all methods', TASK_PAGE)}",
        ),
        _section("What differs from PEFT", _differences(config, path), link("All differences", DIFFERENCES)),
        f"## The config\n\n::: torchgraft.adapters.{config.__name__}\n    options:\n      heading_level: 3",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def code(config: type) -> str:
    """Return three lines that adapt a model, with the config of the example in its docstring."""
    name = config.__name__
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(config) or "")
    trees = [node for example in examples for node in ast.walk(ast.parse(example.source))]
    calls = [node for node in trees if isinstance(node, ast.Call) and ast.unparse(node.func) == name]
    if not calls:
        raise ValueError(f"{name}: its docstring has no example; begin one with `>>> {name}(...)`")
    given = ast.unparse(calls[0]).replace("'", '"')
    if vars(config)["form"].tasks is not None:  # one adapter for each task
        return (
            f"import torch\nfrom torchgraft import {name}, bind, route\nfrom torchgraft.adapters import split_tasks\n\n"
            f"config = {given}\nsingle, tasks = split_tasks(config, bind(model, config).init())\n"
            "y = bind(model, single)(route(tasks, torch.arange(len(x))), x)  # the task of each row\n"
        )
    return (
        f"import torch\nfrom torchgraft import {name}, bind\n\n"
        f"graft = bind(model, {given})\nparams = graft.init(torch.Generator().manual_seed(0))\ny = graft(params, x)\n"
    )


def with_links_to_pages(table: str) -> str:
    """Return the text of the page of all methods with the name of each config as a link to its page."""
    for path, config in configs().items():
        link = f"[`{config.__name__}`]({relative(path, METHODS)})"
        table = table.replace(f"| `{config.__name__}` |", f"| {link} |")
    return table


def _docstring(config: type) -> str:
    return inspect.getdoc(sys.modules[config.__module__]) or ""


def _section(head: str, content: str, more: str) -> str:
    return f"## {head}\n\n{content}\n\n{more}".rstrip() if content else ""


def _mentions(config: type, text: str) -> bool:
    name = title(config)
    names = {name, name[0].lower() + name[1:], config.__name__.removesuffix("Config"), config.__name__}
    return any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) for name in names)


def _read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _advice(config: type, path: str) -> str:
    items = re.findall(r"^\d+\. (.*?)(?=^\d+\. |\n\n|\Z)", _read(CHOOSING), flags=re.DOTALL | re.MULTILINE)
    found = [" ".join(item.split()) for item in items if _mentions(config, item)]
    lines = [f"- {moved(item, CHOOSING, path)}" for item in found]
    return "\n".join(lines) or "No advice names it yet; its formula says what it can change."


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def _row(config: type, path: str) -> str:
    rows = [line for line in _read(METHODS).splitlines() if line.startswith("| ")]
    found = next((row for row in rows if row.startswith(f"| `{config.__name__}` |")), "")
    if not found:
        return ""
    pairs = zip(_cells(rows[0]), _cells(moved(found, METHODS, path)), strict=True)
    lines = [f"| {head} | {cell} |" for head, cell in pairs if head not in ("config", "`y = base(x)` becomes")]
    return "\n".join(["| what | |", "|---|---|", *lines])


def _costs(config: Any) -> str:
    measured = json.loads(_read(RESULTS))["methods"].get(config.method.name)
    if not measured:
        return ""
    who = list(measured["kept_bytes"])
    settings = [name for name in MEASURED if name in measured]
    ratios = [[f"{measured[name][one]['ratio']:.2f}" for one in who] for name in settings]
    kept = [f"{measured['kept_bytes'][one] / 1e6:.0f} MB" for one in who]
    lines = [["", *who], *([name, *row] for name, row in zip(settings, ratios, strict=True)), ["kept", *kept]]
    head, *rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rows])


def _on_one_task(config: type) -> str:
    results = json.loads(_read(TASK))["methods"]
    name = config.__name__.removesuffix("Config")
    if name not in results:
        return ""
    mine, means = results[name], {one: statistics.mean(each["accuracies"]) for one, each in results.items()}
    place = sorted(means, key=means.__getitem__, reverse=True).index(name) + 1
    seconds = mine["seconds"] / results["Lora"]["seconds"]
    return "\n".join(
        [
            "| accuracy | spread of seeds | place | parameters | rate | time of a step, LoRA = 1 |",
            "|---|---|---|---|---|---|",
            f"| {means[name]:.1%} | {statistics.stdev(mine['accuracies']):.1%} | {place} of {len(means)} "
            f"| {mine['parameters']:,} | {mine['rate']:g} | {seconds:.2f} |",
        ]
    )


def _differences(config: type, path: str) -> str:
    table = _read(DIFFERENCES).partition("## By method")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    found = [row for row in rows if _mentions(config, _cells(row)[0])]
    if not found:
        return ""
    return "\n".join(
        ["| | PEFT | here | test |", "|---|---|---|---|", *(moved(row, DIFFERENCES, path) for row in found)]
    )
