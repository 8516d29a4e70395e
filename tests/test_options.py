"""LoRA's options on every layer type, in every way there is; the table in `adapters/LORA.md` is what is found here.

python tests/test_options.py    writes the table
"""

import contextlib
import copy
import tempfile
import warnings
from pathlib import Path

import optree
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from torchgraft.adapters import (
    LoraConfig,
    fit_corda,
    fit_eva,
    fit_lora_ga,
    inject_adapter_in_model,
    load_adapter,
    save_adapter,
)
from torchgraft.functional import Unsupported, bind, merge, route, stack

PAGE = Path(__file__).parents[1] / "adapters" / "LORA.md"
START, END = "<!-- table: tests/test_options.py -->", "<!-- end of table -->"
WAYS = {"F": "functional", "I": "in place", "M": "merge", "S": "stack and vmap", "R": "route", "D": "save and load"}
CLOSE = {"rtol": 1e-7, "atol": 1e-9}


class Attended(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


class Bare(nn.Module):
    """A matrix, or one for each expert, all of which see each token."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return (x.unsqueeze(1) @ self.weight).mean(1)


class Around(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


ids, dense = (lambda: torch.randint(7, (4, 5))), (lambda: torch.randn(4, 5, 8))
LAYERS = {
    "Linear": (lambda: Around(nn.Linear(8, 6)), dense),
    "Conv1D": (lambda: Around(Conv1D(6, 8)), dense),
    "Embedding": (lambda: Around(nn.Embedding(7, 8)), ids),
    "Conv1d": (lambda: Around(nn.Conv1d(4, 6, 3)), lambda: torch.randn(4, 4, 7)),
    "Conv2d": (lambda: Around(nn.Conv2d(4, 6, 3)), lambda: torch.randn(4, 4, 5, 5)),
    "Conv2d, groups": (lambda: Around(nn.Conv2d(4, 6, 3, groups=2)), lambda: torch.randn(4, 4, 5, 5)),
    "Conv3d": (lambda: Around(nn.Conv3d(4, 6, 2)), lambda: torch.randn(4, 4, 3, 3, 3)),
    "attention": (Attended, dense),
    "parameter": (lambda: Around(Bare(8, 6)), dense),
    "experts": (lambda: Around(Bare(4, 8, 6)), dense),
}
FITTED = {
    "eva": lambda model, config, x: fit_eva(model, config, [x] * 4, passes=9, progress=False),
    "corda": lambda model, config, x: fit_corda(model, config, [x], progress=False),
    "lora_ga": lambda model, config, x: fit_lora_ga(
        model, config, [x], lambda model, x: model(x).square().mean(), progress=False
    ),
}
OPTIONS = {
    "plain": {},
    "`use_rslora`": {"use_rslora": True},
    "`rank_pattern`, `alpha_pattern`": {"rank_pattern": {"layer": 4}, "alpha_pattern": {"layer": 5}},
    "`lora_dropout` (training)": {"lora_dropout": 0.5},
    "`lora_bias`": {"lora_bias": True},
    "`use_dora`": {"use_dora": True},
    '`bias="lora_only"`': {"bias": "lora_only"},
    **{
        f'`"{name}"`': {"init_lora_weights": name}
        for name in ("gaussian", "pissa", "olora", "orthogonal", "mica", "loftq", *FITTED)
    },
}


def spread(tree, seed):
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype), tree)


class Trial:
    """One option on one layer type; each way raises where it is refused, and asserts where it is not."""

    def __init__(self, option, layer):
        torch.manual_seed(0)
        make, inputs = LAYERS[layer]
        self.model, self.x = make().double().eval(), inputs()
        self.x = self.x if layer == "Embedding" else self.x.double()
        bare = layer in ("parameter", "experts")
        targets = {"target_parameters": ["layer.weight"]} if bare else {"target_modules": ["layer"]}
        fields = OPTIONS[option]
        self.config = LoraConfig(r=2, lora_alpha=3, **targets, **fields)
        fit = FITTED.get(fields.get("init_lora_weights"))
        if fit is not None:
            self.config = fit(self.model, self.config, self.x)

    def start(self):
        self.graft = bind(self.model, self.config)
        self.trees = [spread(self.graft.init(torch.Generator().manual_seed(i)), i) for i in range(4)]
        self.ys = [self.graft(tree, self.x) for tree in self.trees]

    def f(self):
        self.start()
        if self.config.lora_dropout:
            self.model.train()
            masked = [self.graft(self.trees[0], self.x) for _ in range(2)]
            self.model.eval()
            assert torch.equal(*masked) == (self.x.dtype == torch.long)  # embeddings ignore it, as in PEFT
        assert not torch.allclose(self.ys[0], self.model(self.x), atol=1e-3)

    def i(self):
        model = inject_adapter_in_model(self.config, copy.deepcopy(self.model), params=self.trees[0])
        torch.testing.assert_close(model(self.x), self.ys[0], **CLOSE)

    def m(self):
        twin = copy.deepcopy(self.model)
        twin.load_state_dict(merge(self.graft, self.trees[0]))
        torch.testing.assert_close(twin(self.x), self.ys[0], **CLOSE)

    def s(self):
        y = torch.vmap(lambda tree: self.graft(tree, self.x))(stack(self.trees))
        torch.testing.assert_close(y, torch.stack(self.ys), **CLOSE)

    def r(self):
        rows = torch.tensor([2, 0, -1, 2])
        expected = torch.stack([(self.model(self.x) if row < 0 else self.ys[row])[i] for i, row in enumerate(rows)])
        torch.testing.assert_close(self.graft(route(stack(self.trees), rows), self.x), expected, **CLOSE)

    def d(self):
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(self.graft, folder, params=self.trees[0])
            loaded = load_adapter(bind(self.model, self.config), folder)
        torch.testing.assert_close(self.graft(loaded, self.x), self.ys[0], **CLOSE)


def works(option, layer):
    """Return the letters of the ways in which an option works on a layer type; it is refused in the others."""
    found = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial = Trial(option, layer)
            trial.f()
        except Unsupported:
            return "-"
        found = "F"
        for way in "IMSRD":
            with contextlib.suppress(Unsupported):
                getattr(trial, way.lower())()
                found += way
    return found


def row_of(option):
    cells = [works(option, layer) for layer in LAYERS]
    return f"| {option} | " + " | ".join("all" if cell == "".join(WAYS) else cell for cell in cells) + " |"


def page():
    return PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_the_table_says_what_works(option):
    assert row_of(option) in page()


def test_the_table_has_nothing_else():
    rows = page().partition(START)[2].partition(END)[0].strip().splitlines()[2:]
    assert len(rows) == len(OPTIONS)


if __name__ == "__main__":
    head = ["| option | " + " | ".join(f"`{layer}`" for layer in LAYERS) + " |", "|---" * (len(LAYERS) + 1) + "|"]
    before, _, rest = page().partition(START)
    table = "\n".join([*head, *map(row_of, OPTIONS)])
    PAGE.write_text(f"{before}{START}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(table)
