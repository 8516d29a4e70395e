"""One small language model learns another register: LoRA, LoRA+, DoRA, PiSSA and full fine-tuning side by side.

A small transformer learns the language reference that ships with Python, character by character, and is frozen. It is
to write the standard library's source code next. Every way to adapt it starts from the same base and sees the same
rows in the same order, for the same number of steps, with several seeds: what does each learn, what does each forget,
what does it cost? DoRA and PiSSA are LoRA with another field in the config. The learning rates in WAYS are the best of
a search (`--search`) on modules that are neither learnt from nor measured on.

    pip install torchgraft[demo]
    python examples/text.py --out text-out
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import optree
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from torchgraft.adapters import LoraConfig, load_adapter, load_config, lora_plus_groups, save_adapter
from torchgraft.functional import Graft, Tree, bind

try:
    from _text_picture import draw
    from _writer import (
        HOLD_OUT,
        LEARN,
        Writer,
        bits_per_character,
        draw_rows,
        loss_by_row,
        reference,
        source,
        spread_rows,
        train_base,
        write,
    )
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"This example needs {error.name}, which is not installed: pip install torchgraft[demo]") from None

VALIDATE = "calendar copy heapq queue string"
TARGETS = ["qkv", "out", "up", "down", "head"]
PROMPTS = ["    if not ", "    return self.", "def _"]
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Way:
    """A way to adapt the base: fields of a `LoraConfig`, or none to train all of a copy of it."""

    name: str
    rate: float
    fields: dict[str, Any] | None = field(default_factory=dict)
    ratio: float = 1.0
    """How much faster `B` learns than `A`."""

    def config(self, rank: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, **(self.fields or {}))


WAYS = [
    Way("LoRA", 1e-2),
    Way("LoRA+", 4e-3, ratio=4.0),
    Way("DoRA", 1e-2, {"use_dora": True}),
    Way("PiSSA", 8e-3, {"init_lora_weights": "pissa"}),
    Way("full", 4e-3, None),
]


# -- training ---------------------------------------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Learner:
    """One way at work.

    Attributes:
        run: Symbols to logits, with what was learnt so far.
        graft, params: For adapters: the function, and the tree that is trained. Else `None`, and `run` is the model.
        curve: Held-out bits per character by step.
        seconds: What each step took.
    """

    graft: Graft | None = None
    params: Tree | None = None
    run: Callable[[Tensor], Tensor]

    def __init__(self, model: nn.Module, way: Way, rank: int, steps: int, seed: int):
        self.way = way
        if way.fields is None:
            self.run = own = copy.deepcopy(model).requires_grad_()
            self.leaves = list(own.parameters())
        else:
            self.graft = bind(model, way.config(rank))
            self.params = self.graft.init(seeded(seed))
            self.run = functools.partial(self.graft, self.params)
            self.leaves = [leaf.requires_grad_() for leaf in optree.tree_leaves(self.params)]
        groups: list[dict[str, Any]] = [{"params": self.leaves, "lr": way.rate}]
        if self.params is not None and way.ratio != 1:
            groups = lora_plus_groups(self.params, way.rate, way.ratio)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0)
        rates = [group["lr"] for group in groups]
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rates, total_steps=steps, pct_start=0.15)
        self.curve: dict[int, float] = {}
        self.seconds: list[float] = []

    def step(self, rows: Tensor) -> None:
        began = time.perf_counter()
        self.optimizer.zero_grad()
        loss_by_row(self.run(rows[:, :-1]), rows).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.leaves, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.seconds.append(time.perf_counter() - began)

    @property
    def trained(self) -> int:
        return sum(leaf.numel() for leaf in self.leaves)


def train(
    model: nn.Module, ways: Sequence[Way], text: Tensor, held_out: Tensor, args: argparse.Namespace, seed: int
) -> list[Learner]:
    """Train every way on the same rows, step by step in turns, so that time and data are shared alike."""
    learners = [Learner(model, way, args.rank, args.steps, seed) for way in ways]
    marks = {args.steps * k // args.marks for k in range(args.marks + 1)}
    choose = seeded(seed)
    progress = tqdm(range(args.steps + 1), desc=f"seed {seed}".ljust(13), unit="step")
    for step in progress:
        if step in marks:
            for learner in learners:
                learner.curve[step] = bits_per_character(learner.run, held_out)
            progress.set_postfix_str(f"best {min(learner.curve[step] for learner in learners):.2f} bits")
        if step < args.steps:
            rows = draw_rows(text, args.batch, choose)
            for learner in learners:
                learner.step(rows)
    return learners


def search(model: nn.Module, text: Tensor, validation: Tensor, args: argparse.Namespace) -> None:
    """Try other learning rates for every way, on text of its own; prints what they give."""
    tries = [replace(way, rate=way.rate * factor) for way in WAYS for factor in FACTORS]
    learners = train(model, tries, text, validation, args, seed=1000)
    print(f"\nbits per character on {VALIDATE}, by learning rate")
    for i, way in enumerate(WAYS):
        own = learners[i * len(FACTORS) : (i + 1) * len(FACTORS)]
        results = "".join(f"{one.way.rate:>9g}:{one.curve[args.steps]:.3f}" for one in own)
        print(f"{way.name:<7}{results}   best {min(own, key=lambda one: one.curve[args.steps]).way.rate:g}")


# -- files ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def difference(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """The largest difference of two models' logits; exactly 0 where they are equal."""
    return float((one(rows[:, :-1]) - other(rows[:, :-1])).abs().max())


def save(learner: Learner, folder: Path) -> Path:
    """Write what was learnt; returns the file with the weights."""
    if learner.graft is None:
        assert isinstance(learner.run, nn.Module)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(learner.run.state_dict(), folder / "model.safetensors")
        return folder / "model.safetensors"
    return save_adapter(learner.graft, folder, params=learner.params) / "adapter_model.safetensors"


def reread_plain(model: nn.Module, learner: Learner, folder: Path) -> Callable[[Tensor], Tensor]:
    """Write a PiSSA as a plain LoRA of twice the rank, which fits the untouched base anywhere; read it back."""
    assert learner.graft is not None
    save_adapter(learner.graft, folder, params=learner.params, plain=True)
    graft = bind(model, load_config(folder))
    return functools.partial(graft, load_adapter(graft, folder))


# -- the whole story --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("text-out"), help="folder for the adapters and the picture")
    parser.add_argument("--base-steps", type=int, default=1000, help="training steps of the base model")
    parser.add_argument("--steps", type=int, default=250, help="training steps of every way to adapt it")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--seeds", type=int, default=3, help="how many times all are trained, on other rows")
    parser.add_argument("--search", action="store_true", help="only try learning rates, on modules of their own")
    parser.add_argument("--quick", action="store_true", help="a tiny run with weak results")
    parser.set_defaults(dim=128, depth=4, batch=12, rows=256, marks=10)
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(base_steps=60, steps=20, rank=4, seeds=2, dim=32, depth=2, batch=8, rows=16, marks=4)
    if min(args.base_steps, args.steps, args.rank, args.seeds) < 1 or args.steps < args.marks:
        parser.error(f"--base-steps, --rank and --seeds are at least 1, and --steps at least {args.marks}")
    return args


def compare(name: str, differences: Sequence[float]) -> str:
    """What the numbers say about one way beside LoRA, seed by seed, and no more."""
    seeds = f"each of {len(differences)} seeds" if len(differences) > 1 else "the one seed"
    if all(d < 0 for d in differences):
        found = f"better with {seeds}"
    elif all(d > 0 for d in differences):
        found = f"worse with {seeds}"
    else:
        found = "no clear difference: it depends on the seed"
    return f"{name:<7}{mean(differences):+.3f} ({min(differences):+.3f} to {max(differences):+.3f}), {found}"


def table(results: dict[str, Any]) -> str:
    """The base and every way: what it trains, stores and takes, and bits per character on both texts."""
    on_code, on_prose = "held-out code", "held-out prose"
    lines = [
        f"{'':<7}{'rate':>7}{'trained':>10}{'file':>9}{'ms/step':>9}{on_code:>24}{on_prose:>24}",
        f"{'':<42}{'bits (spread)  perplexity':>24}{'bits (spread)':>23}",
    ]
    for name, row in results.items():
        how = " " * 35
        if name != "base":
            how = f"{row['rate']:>7g}{row['trained']:>10,}{row['bytes'] / 1000:>6.0f} kB{1000 * row['seconds']:>9.1f}"
        code, prose = ((mean(row[key]), max(row[key]) - min(row[key])) for key in ("code", "prose"))
        lines.append(
            f"{name:<7}{how}{code[0]:>10.3f} ({code[1]:.3f}){2 ** code[0]:>10.2f}{prose[0]:>15.3f} ({prose[1]:.3f})"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    args, began = parse(argv), time.perf_counter()
    (prose, prose_held_out), code = reference(), source(LEARN)
    prose_rows, code_rows = spread_rows(prose_held_out, args.rows), spread_rows(source(HOLD_OUT), args.rows)

    # A model, trained and frozen.
    torch.manual_seed(0)
    model = Writer(args.dim, args.depth)
    train_base(model, prose, args.base_steps)
    model.requires_grad_(False).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if args.search:
        search(model, code, spread_rows(source(VALIDATE), args.rows), args)
        return {}
    base = {key: [bits_per_character(model, rows)] for key, rows in (("code", code_rows), ("prose", prose_rows))}

    # Every way, with every seed; those of one seed see the same rows.
    runs = [train(model, WAYS, code, code_rows, args, seed) for seed in range(args.seeds)]
    by_way = {way.name: learners for way, learners in zip(WAYS, zip(*runs, strict=True), strict=True)}

    # To disk and back, for the first seed.
    results: dict[str, dict[str, Any]] = {"base": base}
    reloaded: dict[str, float] = {}
    for name, learners in by_way.items():
        first = learners[0]
        file = save(first, args.out / name)
        if first.graft is not None:
            loaded = functools.partial(first.graft, load_adapter(first.graft, file.parent))
            reloaded[name] = difference(first.run, loaded, code_rows)
        results[name] = {
            "rate": first.way.rate,
            "trained": first.trained,
            "bytes": file.stat().st_size,
            "seconds": median(second for learner in learners for second in learner.seconds),
            "code": [learner.curve[args.steps] for learner in learners],
            "prose": [bits_per_character(learner.run, prose_rows) for learner in learners],
            "curves": [learner.curve for learner in learners],
        }
    pissa = by_way["PiSSA"][0]
    plain_difference = difference(pissa.run, reread_plain(model, pissa, args.out / "PiSSA-plain"), code_rows)
    after = model.state_dict()
    unchanged = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    for row in list(results.values())[1:]:
        row["beside"] = [own - lora for own, lora in zip(row["code"], results["LoRA"]["code"], strict=True)]

    runners = {"base": model, **{name: learners[0].run for name, learners in by_way.items()}}
    samples = {p: {name: write(run, p, seed=0) for name, run in runners.items()} for p in PROMPTS}
    picture = args.out / "text.png"
    draw(picture, results, samples, args.seeds)

    print(f"\nThe base has learnt prose to {base['prose'][0]:.2f} bits per held-out character.")
    print(f"Bits per character, mean of {args.seeds} seeds (spread: largest less smallest); rank {args.rank}")
    print(table(results))
    print("\nbits on held-out code, less LoRA's on the same rows in the same order")
    for name in list(by_way)[1:]:
        print(compare(name, results[name]["beside"]))
    print(f"Ways that are equally good agree like that over all seeds in {2 ** (1 - args.seeds):.0%} of cases.")
    print("One small model and one pair of texts: with others, or more steps, the order may be another.")
    for prompt, lines in samples.items():
        print(f"\n{prompt!r} goes on")
        for name, line in lines.items():
            print(f"{name:<7}{line}")
    equal = not any(reloaded.values())
    print(f"\nbase model    {'unchanged, bit for bit' if unchanged else 'CHANGED'}")
    print(f"adapters      {args.out}, read back {'equal' if equal else 'DIFFERENT'}: {', '.join(reloaded)}")
    print(f"PiSSA plain   as a LoRA of rank {2 * args.rank}, logits differ by at most {plain_difference:.1e}")
    print(f"picture       {picture}, after {time.perf_counter() - began:.0f} s in all")
    return {
        "results": results,
        "learners": by_way,
        "samples": samples,
        "model": model,
        "base_unchanged": unchanged,
        "reload_equal": equal,
        "plain_difference": plain_difference,
        "picture": picture,
    }


if __name__ == "__main__":
    measured = main()
    if measured and not (
        measured["base_unchanged"] and measured["reload_equal"] and measured["plain_difference"] < 1e-3
    ):
        raise SystemExit("A check failed; see above.")
