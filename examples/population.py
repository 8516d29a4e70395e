"""Population-based training on a bank: the worst adapters become copies of the best, and go on with other settings.

A small transformer learns scikit-learn's handwritten digits and is frozen, and adapters learn to read them swirled.
Each has a learning rate and a weight decay of its own, drawn at random, and all train in one bank. Now and then those
that read other digits worst are replaced by copies of the best ones, with the moments and the step count of their
optimizers, and go on with settings that were a little changed. Beside each there is a twin in the same batches, with
the same start, settings and digits, that is never copied: a random search with the same compute.

    pip install torchgraft[demo]
    python examples/population.py --out population-out
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.adapters import Bank, LoraConfig
from torchgraft.functional import bind

try:
    import _recipes as recipes
    import digits
    from _panels import FAINT, INK, MUTED, PAPER, finish
    from _resume import claim, note, until_interrupted
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"This example needs {error.name}, which is not installed: pip install torchgraft[demo]") from None

CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules=recipes.TARGETS)
ROWS, FACTORS = 8, (0.5, 2.0)
"""Digits of an adapter in a batch, and what the settings of a copy are multiplied by."""


@dataclass
class Member:
    """An adapter of a population.

    Attributes:
        name: Its name in the bank.
        twin: Which twins it is one of: those of one number have the same start, settings and digits.
        hyper: Its settings as they are now.
        losses: Its loss on digits to choose by, after each round.
        rates: Its learning rate in each round.
    """

    name: str
    twin: int
    hyper: dict[str, float]
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def members_of(way: str, population: int, size: int) -> list[Member]:
    """A population with settings of its seed: rates from 1e-4 to 1e-1 and decays from 1e-3 to 10."""
    source, members = digits.seeded(population), []
    for i in range(size):
        rate, decay = torch.rand(2, generator=source).tolist()
        hyper = {"lr": 10 ** (3 * rate - 4), "weight_decay": 10 ** (4 * decay - 3)}
        members.append(Member(f"{way} {population}.{i}", population * size + i, hyper))
    return members


def train(bank: Bank, members: Sequence[Member], images: Tensor, labels: Tensor, steps: range) -> None:
    """Train all members at once, each with its settings and on its digits."""
    for step in steps:
        source = [digits.seeded(10_000 * (member.twin + 1) + step) for member in members]
        rows = torch.cat([torch.randint(len(images), (ROWS,), generator=own) for own in source])
        names = [member.name for member in members for _ in range(ROWS)]
        with bank.rows(names) as adapted:
            (F.cross_entropy(adapted(images[rows]), labels[rows], reduction="sum") / ROWS).backward()
        bank.step({member.name: member.hyper for member in members})


@torch.no_grad()
def logits_of(bank: Bank, member: Member, images: Tensor) -> Tensor:
    logits: Tensor = bank.view([member.name] * len(images))(images)
    return logits


def copy(bank: Bank, from_: str, to: str) -> None:
    """Replace an adapter by a copy of another one, with its optimizer's moments and its step count."""
    with tempfile.TemporaryDirectory() as folder:
        bank.save(from_, folder)
        bank.remove(to)
        bank.load(folder, to)


def evolve(bank: Bank, members: Sequence[Member], share: float, source: torch.Generator) -> list[tuple[str, str]]:
    """Replace the worst by copies of the best, and change the settings of copies; returns who came from whom."""
    count = max(1, int(share * len(members)))
    ranked = sorted(members, key=lambda member: member.losses[-1])
    copies = []
    for best, worst in zip(ranked[:count], reversed(ranked[-count:]), strict=True):
        copy(bank, best.name, worst.name)
        turns = torch.randint(2, (len(best.hyper),), generator=source).tolist()
        worst.hyper = {key: value * FACTORS[turn] for (key, value), turn in zip(best.hyper.items(), turns, strict=True)}
        copies.append((best.name, worst.name))
    return copies


# -- the whole story --------------------------------------------------------------------------------------------------


def draw(path: Path, ways: dict[str, list[list[Member]]], best: dict[str, list[float]], every: int) -> None:
    """Draw losses and learning rates of the first populations, and what the chosen adapters read in each."""
    colors = dict(zip(ways, [recipes.BLUE, recipes.ORANGE], strict=True))
    means = {way: statistics.mean(found) for way, found in best.items()}
    story = (
        "Swirled digits, held out: the adapters that were chosen read "
        + ", ".join(f"{mean:.1%} {way}" for way, mean in means.items())
        + f"; the mean of {len(best['copied'])} populations."
    )
    figure = recipes.sheet("A population of adapters in a bank", story)
    rounds = len(ways["copied"][0][0].losses)
    steps = [every * (i + 1) for i in range(rounds)]
    for i, (title, key) in enumerate([("loss on digits to choose by", "losses"), ("learning rates", "rates")]):
        axes = figure.add_axes((0.05 + 0.35 * i, 0.09, 0.31, 0.72))
        finish(axes, title)
        axes.set_yscale("log")
        axes.grid(axis="y", color=FAINT)
        axes.tick_params(which="minor", colors=MUTED, length=0, labelsize=10)
        for way, populations in ways.items():
            curves = [getattr(member, key) for member in populations[0]]
            for curve in curves:
                axes.plot(steps, curve, color=colors[way], alpha=0.45, linewidth=1.2)
            if key == "losses":
                axes.plot(steps, [min(at) for at in zip(*curves, strict=True)], color=colors[way], linewidth=3.5)
        axes.set_xlabel("step", color=MUTED, fontsize=13)
    axes = figure.add_axes((0.76, 0.09, 0.21, 0.72))
    finish(axes, "accuracy of the chosen")
    for x, (way, found) in enumerate(best.items()):
        axes.bar(x, means[way], color=colors[way], width=0.6, alpha=0.5)
        axes.plot([x] * len(found), found, "o", color=colors[way], markersize=9)
        axes.text(x, 1.005 * max(found), f"{means[way]:.1%}", color=INK, fontsize=16, ha="center", va="bottom")
    low, high = min(map(min, best.values())), max(map(max, best.values()))
    axes.set_ylim(max(0, low - 2 * (high - low) - 0.02), high + 0.02)
    axes.set_xticks(range(len(best)), list(best))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.savefig(path, dpi=90, facecolor=PAPER)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("population-out"), help="folder for the picture and numbers")
    parser.add_argument("--base-steps", type=int, default=400, help="training steps of the base model")
    parser.add_argument("--rounds", type=int, default=10, help="rounds, after each of which some are copied")
    parser.add_argument("--every", type=int, default=16, help="training steps of a round")
    parser.add_argument("--size", type=int, default=10, help="adapters of a population")
    parser.add_argument("--populations", type=int, default=3, help="populations, each with settings of its own seed")
    parser.add_argument("--share", type=float, default=0.25, help="share of a population that is replaced in a round")
    parser.add_argument("--quick", action="store_true", help="a short run with weak results")
    parser.set_defaults(examples=300, choose=150)
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(base_steps=60, rounds=3, every=3, size=4, populations=2, choose=20)
    if (
        min(args.rounds, args.every, args.populations, args.base_steps) < 1
        or args.size < 2
        or not 0 < args.share <= 0.5
    ):
        parser.error("--rounds, --every and --populations are at least 1, --size 2, and --share is from 0 to 0.5")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    return until_interrupted(run, parse(argv))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train populations, with copies and without, choose one adapter of each, and draw."""
    began = time.perf_counter()
    claim(args.out, "a base model", {"base_steps": args.base_steps})
    model, data = recipes.frozen_reader(args.out, args.base_steps)
    images, held_out = (digits.swirled(some, digits.seeded(0)) for some in (data.images, data.test_images))
    learnt, chosen_by = slice(args.examples), slice(args.examples, args.examples + args.choose)

    ways = {
        way: [members_of(way, i, args.size) for i in range(args.populations)] for way in ("copied", "each by itself")
    }
    everyone = [member for populations in ways.values() for members in populations for member in members]
    bank = Bank(bind(model, CONFIG), slots=len(everyone))
    for member in everyone:
        bank.add(member.name, CONFIG, generator=digits.seeded(member.twin))
    source, copies, copying = digits.seeded(0), [], 0.0
    for turn in tqdm(range(args.rounds), desc=f"{len(everyone)} adapters".ljust(14), unit="round"):
        train(bank, everyone, images[learnt], data.labels[learnt], range(turn * args.every, (turn + 1) * args.every))
        for member in everyone:
            logits = logits_of(bank, member, images[chosen_by])
            member.losses.append(float(F.cross_entropy(logits, data.labels[chosen_by])))
            member.rates.append(member.hyper["lr"])
        if turn + 1 < args.rounds:
            start = time.perf_counter()
            for members in ways["copied"]:
                copies += evolve(bank, members, args.share, source)
            copying += time.perf_counter() - start

    best: dict[str, list[float]] = {}
    for way, populations in ways.items():
        chosen = [min(members, key=lambda member: member.losses[-1]) for members in populations]
        best[way] = [float(digits.accuracy(logits_of(bank, one, held_out), data.test_labels)) for one in chosen]
    picture = args.out / "population.png"
    draw(picture, ways, best, args.every)
    print(f"\n{'':<18}{'loss to choose by: best':>24}{'median':>10}{'chosen, held out':>20}")
    for way, populations in ways.items():
        last = [[member.losses[-1] for member in members] for members in populations]
        lowest, middle = statistics.mean(map(min, last)), statistics.mean(map(statistics.median, last))
        print(f"{way:<18}{lowest:>24.3f}{middle:>10.3f}{statistics.mean(best[way]):>20.1%}")
    print(f"\ncopies        {len(copies)}, {1e3 * copying / max(1, len(copies)):.0f} ms each, through files")
    print(f"picture       {picture}, after {time.perf_counter() - began:.0f} s in all")
    note({"best": best, "members": [vars(member) for member in everyone]}, args.out / "population.json")
    return {"ways": ways, "best": best, "copies": copies, "bank": bank, "picture": picture}


if __name__ == "__main__":
    main()
