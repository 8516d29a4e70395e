"""One network reads a few examples of a task and emits an adapter for it: new tasks without training.

A small transformer learns scikit-learn's handwritten digits and is frozen. Tasks are worlds in which digits are turned
by some angle, and mirrored or inverted. A hypernetwork sees a few labelled digits of a world and emits the LoRA of the
transformer that reads others there: one for each of the worlds in a batch, and one routed forward for all. Gradients
run through the adapters into the hypernetwork. Then it gets worlds that are like none it was trained on, beside
adapters that are trained for each of them.

    pip install torchgraft[demo]
    python examples/hypernet.py --out hypernet-out
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.adapters import LoraConfig
from torchgraft.functional import Graft, Tree, bind, ravel, route, stack, unravel

try:
    import _recipes as recipes
    import digits
    from _panels import FAINT, INK, MUTED, PANEL, PAPER, finish
    from _resume import claim, note, until_interrupted
    from matplotlib.colors import LinearSegmentedColormap
except ImportError as error:
    raise SystemExit(f"This example needs {error.name}, which is not installed: pip install torchgraft[demo]") from None

WORLDS, ASKED = 16, 8
"""Worlds in a batch of the hypernetwork's training, and digits of each that its adapter has to read."""
WAYS = {
    "the base": MUTED,
    "one adapter for all worlds": recipes.VIOLET,
    "trained on the same examples": recipes.ORANGE,
    "emitted": recipes.BLUE,
    "trained on all digits": recipes.GREEN,
}


class Hypernetwork(nn.Module):
    """Labelled images of some worlds to an adapter for each, a stack.

    Each example is seen by itself, what was seen is averaged, and a last layer makes all numbers of an adapter of the
    average. Its bias is an adapter as `init` makes it, so training begins near the frozen model; its input is small, so
    that a step of Adam, which is of one size for each weight, changes adapters by little.
    """

    def __init__(self, like: Tree, width: int = 128):
        super().__init__()
        self.like = like
        self.see = nn.Sequential(nn.Linear(8 * 8 + 10, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.think = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.emit = nn.Linear(width, len(ravel(like)))
        nn.init.normal_(self.emit.weight, std=1e-2)
        self.emit.bias.data.copy_(ravel(like))

    def forward(self, images: Tensor, labels: Tensor) -> Tree:
        """`"world k 32 32"` and `"world k"` to leaves `"world ..."`."""
        small = 2 * F.avg_pool2d(images, 4).flatten(-2) - 1
        seen = self.see(torch.cat([small, F.one_hot(labels, 10)], -1)).mean(-2)
        return unravel(self.emit(self.think(seen) / self.emit.in_features**0.5), self.like)


def logits_of(graft: Graft, adapters: Tree, images: Tensor) -> Tensor:
    """Read images `"world n 32 32"`, those of each world with its adapter; logits `"world n 10"`."""
    worlds, each = images.shape[:2]
    rows = torch.arange(worlds).repeat_interleave(each)
    return graft(route(adapters, rows), images.flatten(0, 1)).unflatten(0, (worlds, each))


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


# -- the hypernetwork, and an adapter for all worlds ------------------------------------------------------------------


def train_hypernetwork(graft: Graft, data: recipes.Digits, steps: int, examples: int, file: Path) -> Hypernetwork:
    """Train it end to end: examples to adapters, adapters to predictions of other digits."""
    torch.manual_seed(0)
    network = Hypernetwork(graft.init(digits.seeded(0)))

    def loss(step: int) -> Tensor:
        images, labels = batch(data, step, examples + ASKED)
        adapters = network(images[:, :examples], labels[:, :examples])
        return loss_of(logits_of(graft, adapters, images[:, examples:]), labels[:, examples:])

    recipes.minimise(loss, list(network.parameters()), steps, 1e-3, "hypernetwork", file)
    return network


def train_one_for_all(graft: Graft, data: recipes.Digits, steps: int, file: Path) -> Tree:
    """Train one adapter on all worlds: as many digits as the hypernetwork's adapters had to read."""
    params = graft.init(digits.seeded(0))

    def loss(step: int) -> Tensor:
        images, labels = batch(data, step, ASKED)
        return loss_of(graft(params, images.flatten(0, 1)), labels.flatten())

    recipes.minimise(loss, optree.tree_leaves(params), steps, 5e-3, "one for all", file)
    return params


def batch(data: recipes.Digits, step: int, each: int) -> tuple[Tensor, Tensor]:
    """Some worlds, and digits as they are there: `"world each 32 32"`."""
    source = digits.seeded(step)
    worlds = recipes.some_worlds(WORLDS, source)
    images, labels = recipes.drawn(WORLDS, each, data.images, data.labels, source)
    return recipes.seen_in(worlds, images), labels


# -- new worlds -------------------------------------------------------------------------------------------------------


def train_each(graft: Graft, choose: Callable[[int], tuple[Tensor, Tensor]], steps: int, what: str) -> Tree:
    """Train an adapter for each world, all in one batch; `choose(step)` has images `"world n 32 32"` and labels."""
    worlds = len(choose(0)[1])
    adapters = stack([graft.init(digits.seeded(i)) for i in range(worlds)])

    def loss(step: int) -> Tensor:
        images, labels = choose(step)
        return worlds * loss_of(logits_of(graft, adapters, images), labels)

    recipes.minimise(loss, optree.tree_leaves(adapters), steps, 5e-3, what)
    return adapters


def compare(
    graft: Graft, model: nn.Module, network: Hypernetwork, for_all: Tree, data: recipes.Digits, args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return what each way reads of each new world, and the processor seconds that an adapter of each takes."""
    worlds, source = recipes.new_worlds(), digits.seeded(1)
    images, labels = recipes.drawn(len(worlds), args.examples, data.images, data.labels, source)
    given = recipes.seen_in(worlds, images), labels

    def more(step: int) -> tuple[Tensor, Tensor]:
        images, labels = recipes.drawn(len(worlds), 16, data.images, data.labels, digits.seeded(step))
        return recipes.seen_in(worlds, images), labels

    adapters, seconds = {}, {}
    began = time.process_time()
    adapters["trained on the same examples"] = train_each(graft, lambda step: given, args.few_steps, "few examples")
    seconds["trained on the same examples"] = (time.process_time() - began) / len(worlds)
    began = time.process_time()
    adapters["trained on all digits"] = train_each(graft, more, args.each_steps, "all digits")
    seconds["trained on all digits"] = (time.process_time() - began) / len(worlds)

    asked = data.test_images[: args.held_out].expand(len(worlds), -1, -1, -1)
    asked, answers = recipes.seen_in(worlds, asked), data.test_labels[: args.held_out]
    with torch.no_grad():
        adapters["emitted"] = network(*given)
        seconds["emitted"] = statistics.median(time_of(lambda: network(given[0][:1], given[1][:1])) for _ in range(20))
        read = {name: logits_of(graft, many, asked) for name, many in adapters.items()}
        read["the base"], read["one adapter for all worlds"] = model(asked), graft(for_all, asked)
    return {name: digits.accuracy(read[name], answers).tolist() for name in WAYS}, seconds


def time_of(call: Callable[[], Any]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def draw(path: Path, found: dict[str, list[float]], seconds: dict[str, float], images: Tensor, examples: int) -> None:
    """Draw what digits look like in each new world, and what each way reads there."""
    worlds = recipes.new_worlds()
    story = (
        f"A network sees {examples} labelled digits of a new world and emits an adapter in "
        f"{1e3 * seconds['emitted']:.0f} ms; training one on all digits takes {seconds['trained on all digits']:.1f} s "
        "of a processor."
    )
    figure = recipes.sheet("Adapters that another network writes", story, 9.4)
    tiles = F.pad(recipes.seen_in(worlds, images[:6].expand(len(worlds), -1, -1, -1)), (1, 1, 1, 1), value=math.nan)
    axes = figure.add_axes((0.17, 0.06, 0.2, 0.76))
    shades = LinearSegmentedColormap.from_list("digits", [PANEL, INK])
    axes.imshow(torch.cat(list(torch.cat(list(tiles), -2)), -1).numpy(), cmap=shades, vmin=0, vmax=1, aspect="auto")
    finish(axes, "")
    height = tiles.shape[-1]
    axes.set_yticks([height * (i + 0.5) for i in range(len(worlds))], [recipes.called(world) for world in worlds])
    axes.set_xticks([])
    dots = figure.add_axes((0.39, 0.06, 0.36, 0.76), ylim=(len(worlds) - 0.5, -0.5), xlim=(-0.03, 1.03))
    finish(dots, "accuracy on held-out digits")
    dots.set_yticks([])
    dots.hlines(range(len(worlds)), 0, 1, color=FAINT, linewidth=1, zorder=0)
    dots.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for name, color in WAYS.items():
        dots.plot(found[name], range(len(worlds)), "o", color=color, markersize=10)
    for i, (name, color) in enumerate(WAYS.items()):
        y = 0.74 - 0.13 * i
        figure.text(0.77, y, f"{statistics.mean(found[name]):.0%}", color=color, fontsize=30, weight="bold")
        figure.text(0.77, y - 0.03, name, color=color, fontsize=14)
        took = f"{seconds[name]:.2g} s each" if name in seconds else ""
        figure.text(0.77, y - 0.055, took, color=MUTED, fontsize=12)
    figure.savefig(path, dpi=90, facecolor=PAPER)


# -- the whole story --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("hypernet-out"), help="folder for results, and to resume from")
    parser.add_argument("--base-steps", type=int, default=400, help="training steps of the base model")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of the hypernetwork")
    parser.add_argument("--examples", type=int, default=16, help="labelled digits of a world that it sees")
    parser.add_argument("--rank", type=int, default=4, help="rank of the adapters")
    parser.add_argument("--quick", action="store_true", help="a short run with weak results")
    parser.set_defaults(few_steps=80, each_steps=300, held_out=300)
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(base_steps=60, steps=20, few_steps=5, each_steps=10, held_out=40)
    if min(args.steps, args.base_steps, args.examples, args.rank) < 1:
        parser.error("--steps, --base-steps, --examples and --rank are at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    return until_interrupted(run, parse(argv))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the hypernetwork, or what is left of it; give it new worlds, compare and draw."""
    began = time.perf_counter()
    claim(args.out, "a hypernetwork", {key: getattr(args, key) for key in ("base_steps", "steps", "examples", "rank")})
    model, data = recipes.frozen_reader(args.out, args.base_steps)
    graft = bind(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=recipes.TARGETS))
    network = train_hypernetwork(graft, data, args.steps, args.examples, args.out / "hypernetwork.safetensors")
    for_all = train_one_for_all(graft, data, args.steps, args.out / "for_all.safetensors")
    found, seconds = compare(graft, model, network, for_all, data, args)

    picture = args.out / "hypernet.png"
    draw(picture, found, seconds, data.test_images, args.examples)
    numbers = len(ravel(graft.init()))
    print(f"\n{'new worlds':<26}" + "".join(f"{name:>30}" for name in WAYS))
    for i, world in enumerate(recipes.new_worlds()):
        print(f"{recipes.called(world):<26}" + "".join(f"{found[name][i]:>30.1%}" for name in WAYS))
    print(f"{'mean':<26}" + "".join(f"{statistics.mean(found[name]):>30.1%}" for name in WAYS))
    print(f"\nan adapter    {numbers:,} numbers, emitted in {1e3 * seconds['emitted']:.1f} ms")
    for name in ("trained on the same examples", "trained on all digits"):
        print(f"{'':<14}{seconds[name]:.2f} s {name}, of a processor")
    print(f"picture       {picture}, after {time.perf_counter() - began:.0f} s in all")
    note({"found": found, "seconds": seconds}, args.out / "hypernet.json")
    return {"found": found, "seconds": seconds, "picture": picture, "network": network, "graft": graft, "data": data}


if __name__ == "__main__":
    main()
