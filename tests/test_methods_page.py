"""`docs/methods.md` says what each method does and costs, from the registry, the contract and measurements.

python -m tests.test_methods_page    writes the page's tables
"""

import ast
import inspect
import json
import re
import sys
import warnings
from pathlib import Path

import optree
import peft
import pytest
import torch
from torch import nn

from torchgraft import adapters
from torchgraft.functional import bind

from .contract.cases import KINDS
from .contract.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"
START, END = "<!-- {}: tests/test_methods_page.py -->", "<!-- end -->"
GROUPS = {
    "transforms": "test_transforms",
    "stacks, rows": "test_rows",
    "in place": "test_in_place",
    "PEFT's numbers, files": "test_peft",
}
HEAD = [
    "config", "`y = base(x)` becomes", "layers", "factored", *GROUPS, "parameters", "training step (PEFT's)",
    "inference (PEFT's)", "paper",
]  # fmt: skip
EVERY = [cls for cls in vars(adapters).values() if isinstance(cls, type) and hasattr(cls, "method")]
CONFIGS = {cls.method.name: cls for cls in EVERY if cls.method.kinds}
"""Configs of the library's own methods, but for those that only replace tensors of the base."""

TARGETS = ["q_proj", "v_proj"]
HIDDEN, LAYERS, VALUES = 576, 30, 192
"""SmolLM2-135M: the width, the number of layers, and the width of its values."""

NEEDED = {
    "ADALORA": {"total_step": 10, "target_r": 4},
    "C3A": {"block_size": 64},
    "OFT": {"oft_block_size": 32},
    "VBLORA": {"vector_length": 64},
}
"""Fields beside the rank that a method needs on these sizes."""


def docstring(name):
    """Return what the module of a method says: a line, the formula in a paragraph of its own, the papers."""
    return inspect.getdoc(sys.modules[CONFIGS[name].__module__])


def formula_of(name):
    found = re.search(r"\n\n    y = (.+)\n", docstring(name))
    assert found, (
        f"{CONFIGS[name].__module__} has no line `    y = ...` of its own that says what an adapted layer does"
    )
    return re.split(r",? {3,}", found[1])[0].rstrip(",. ").replace("|", "\\|")


def papers_of(name):
    places = {"arXiv:": "arxiv.org/abs/", "OpenReview ": "openreview.net/forum?id=", "doi:": "doi.org/"}
    found = re.findall(r"(arXiv:|OpenReview |doi:)((?:10\.[\d.]+/)?\w[\w.]*\w)", " ".join(docstring(name).split()))
    assert found, f"{CONFIGS[name].__module__} names no paper: arXiv:..., doi:10... or OpenReview ..."
    pages = [f"[{paper}](https://{places[place]}{paper})" for place, paper in found]
    return " ".join(dict.fromkeys(pages))


def config_of(name, targets):
    """Return a method's config of rank 8, where it has a rank."""
    cls = CONFIGS[name]
    fields = inspect.signature(cls).parameters
    given = {rank: 8 for rank in ("r", "init_r") if rank in fields and name != "OFT"}
    return cls(target_modules=targets, **{**given, **NEEDED.get(name, {})})


class Block(nn.Module):
    """The two targets of a layer of SmolLM2."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = (nn.Linear(HIDDEN, out, bias=False) for out in (HIDDEN, VALUES))


def parameters_of(name):
    """Count the parameters of an adapter of SmolLM2-135M's queries and values."""
    graft = bind(nn.Sequential(*(Block() for _ in range(LAYERS))), config_of(name, TARGETS))
    return sum(leaf.numel() for leaf in optree.tree_leaves(graft.init()))


def is_factored(name):
    """Return whether the backward of a linear layer keeps nothing as large as the weight, but it and constants."""
    model = nn.Sequential(nn.Linear(256, 320)).requires_grad_(False)
    graft = bind(model, config_of(name, ["0"]))
    params = optree.tree_map(lambda leaf: (leaf + 0.01).requires_grad_(), graft.init())
    constants = [one for _, one in graft.sites[""]["0"].constants.items() if isinstance(one, torch.Tensor)]
    held = (*model.parameters(), *optree.tree_leaves(params), *constants)
    own, large = {tensor.untyped_storage().data_ptr() for tensor in held}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own and tensor.numel() >= 256 * 320:
            large.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graft(params, torch.randn(3, 256, requires_grad=True)).sum()
    return not large


def promises_in(file):
    tests = ast.parse((ROOT / "tests" / "contract" / f"{file}.py").read_text()).body
    return {test.name for test in tests if isinstance(test, ast.FunctionDef)}


def exemptions(name):
    """Yield the exemptions of a method's rows: the variant, the promises, on which sites, and why."""
    for variant, row in METHODS.items():
        if type(row.config) is CONFIGS[name]:
            for exempt in row.exempt:
                yield variant, set(exempt.promises), exempt.sites & set(KINDS[variant]), exempt.reason


def kept(name, group):
    """Say whether all rows of a method keep the contract's promises of a group."""
    if GROUPS[group] == "test_peft" and not hasattr(peft, CONFIGS[name].__name__):
        return "not in PEFT"
    own = promises_in(GROUPS[group])
    missed = [sites for _, promises, sites, _ in exemptions(name) if promises & own]
    if not missed:
        return "yes"
    return "yes, [but](#exemptions)" if all(missed) else "[some](#exemptions)"


def cost(name, setting):
    found = json.loads((ROOT / "benchmarks" / "results" / "methods.json").read_text())["methods"].get(name)
    if found is None:
        return "not measured"
    return "{torchgraft:.2f} ({PEFT:.2f})".format(**{who: one["ratio"] for who, one in found[setting].items()})


def row_of(name):
    cells = [f"`{CONFIGS[name].__name__}`", f"`{formula_of(name)}`", ", ".join(sorted(CONFIGS[name].method.kinds))]
    cells += ["yes" if is_factored(name) else "no", *(kept(name, group) for group in GROUPS)]
    cells += [f"{parameters_of(name):,}", cost(name, "training step"), cost(name, "inference"), papers_of(name)]
    return "| " + " | ".join(cells) + " |"


def lines_of_exemptions():
    found = {}
    for name in CONFIGS:
        for variant, promises, sites, reason in exemptions(name):
            found.setdefault((reason, ", ".join(sorted(sites)), frozenset(promises)), []).append(variant)
    for (reason, sites, promises), variants in found.items():
        tests = ", ".join(f"`{one.removeprefix('test_')}`" for one in sorted(promises))
        yield f"- **{', '.join(variants)}**{f' on {sites}' if sites else ''}: {reason}. ({tests})"


def page():
    return PAGE.read_text(encoding="utf-8")


def between(text, what):
    return text.partition(START.format(what))[2].partition(END)[0].strip().splitlines()


def test_each_method_has_its_row_and_nothing_else_has():
    rows = between(page(), "methods")[2:]
    assert [re.match(r"\| `(\w+)` \|", row)[1] for row in rows] == [cls.__name__ for cls in CONFIGS.values()]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_row_of_a_method_is_true(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = row_of(name)
    assert row in page(), f"python -m tests.test_methods_page writes the page; this row should be\n{row}"


def test_exemptions_are_those_of_the_contract():
    assert between(page(), "exemptions") == list(lines_of_exemptions())


def write():
    """Write the tables into the page."""
    table = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *map(row_of, CONFIGS)]
    text = page()
    for what, lines in (("methods", table), ("exemptions", list(lines_of_exemptions()))):
        start = START.format(what)
        before, _, rest = text.partition(start)
        text = "\n".join([before + start, *lines, END + rest.partition(END)[2]])
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write()
