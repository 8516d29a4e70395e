"""An adapter that is made to be trained: gradients through its own training steps (MAML).

A small transformer learns scikit-learn's handwritten digits and is frozen. Tasks are worlds in which digits are turned
by some angle. An adapter is trained on all of them, and then as a start, with a rate for each of its leaves, so that a
step or two of gradient descent on ten labelled digits of a world read others there. The inner step is a function of a
tree, `torch.vmap` runs it for all worlds of a batch, and the outer gradient goes through it, second derivatives too.
Held against it, on angles that no training saw: the same without second derivatives, going on with the adapter of all
worlds instead for as many steps, and a fresh one.

    pip install torchgraft[demo]
    python examples/maml.py --out maml-out
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from torchgraft.adapters import LoraConfig
from torchgraft.functional import Graft, Tree, bind

try:
    import _recipes as recipes
    import digits
    from _panels import FAINT, MUTED, PAPER, finish
    from _resume import claim, note, until_interrupted
except ImportError as error:
    raise SystemExit(f"This example needs {error.name}, which is not installed: pip install torchgraft[demo]") from None

EXAMPLES, ASKED, INNER = 10, 8, 2
"""Labelled digits of a world, digits that are asked for, and inner steps in training."""
COLORS = {
    "MAML": recipes.BLUE,
    "MAML, first order": recipes.GREEN,
    "from one for all": recipes.VIOLET,
    "from a fresh one": recipes.ORANGE,
}


def loss_of(graft: Graft, params: Tree, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(graft(params, images), labels)


def stepped(graft: Graft, params: Tree, rates: Tree, images: Tensor, labels: Tensor, first_order: bool) -> Tree:
    """Take one step of gradient descent: a function of the tree, so the step itself has a gradient."""
    grads = grad(partial(loss_of, graft))(params, images, labels)
    if first_order:
        grads = optree.tree_map(torch.Tensor.detach, grads)
    result: Tree = optree.tree_map(lambda leaf, rate, g: leaf - rate.exp() * g, params, rates, grads)
    return result


def after(
    graft: Graft, params: Tree, rates: Tree, images: Tensor, labels: Tensor, steps: int, first_order: bool = False
) -> Tree:
    """Return the adapter after some inner steps on a world's examples."""
    for _ in range(steps):
        params = stepped(graft, params, rates, images, labels, first_order)
    return params


def meta_train(
    graft: Graft,
    start: Tree,
    choose: Callable[[int, int], tuple[Tensor, Tensor]],
    steps: int,
    first_order: bool,
    file: Path,
) -> tuple[Tree, Tree]:
    """Learn a start, from one that is there, and a rate for each leaf; returns both."""
    params: Tree = optree.tree_map(torch.clone, start)
    rates = equal_rates(params, 0.01)

    def outer(images: Tensor, labels: Tensor) -> Tensor:
        there = after(graft, params, rates, images[:EXAMPLES], labels[:EXAMPLES], INNER, first_order)
        return loss_of(graft, there, images[EXAMPLES:], labels[EXAMPLES:])

    def loss(step: int) -> Tensor:
        return vmap(outer)(*choose(steps + step, EXAMPLES + ASKED)).mean()

    leaves = optree.tree_leaves([params, rates])
    recipes.minimise(loss, leaves, steps, 5e-3, "first order" if first_order else "second order", file)
    return params, rates


def equal_rates(params: Tree, rate: float) -> Tree:
    """Return a tree with the logarithm of a rate for each leaf."""
    result: Tree = optree.tree_map(lambda leaf: torch.tensor(rate).log(), params)
    return result


def train_one_for_all(
    graft: Graft,
    start: Tree,
    choose: Callable[[int, int], tuple[Tensor, Tensor]],
    steps: range,
    rate: float,
    file: Path,
) -> Tree:
    """Train one adapter on all worlds, on all digits that MAML sees."""
    params: Tree = optree.tree_map(torch.clone, start)

    def loss(step: int) -> Tensor:
        images, labels = choose(steps[step], EXAMPLES + ASKED)
        return loss_of(graft, params, images.flatten(0, 1), labels.flatten())

    recipes.minimise(loss, optree.tree_leaves(params), len(steps), rate, "one for all", file)
    return params


def best_rates(graft: Graft, params: Tree, choose: Callable[[int, int], tuple[Tensor, Tensor]]) -> tuple[Tree, Tree]:
    """Give a start that knows no rates the one of five that is best for worlds of the training."""
    images, labels = choose(-1, 8 * EXAMPLES)

    def right(rate: float) -> float:
        rates = equal_rates(params, rate)
        many = vmap(lambda x, t: after(graft, params, rates, x, t, INNER))(images[:, :EXAMPLES], labels[:, :EXAMPLES])
        return float(digits.accuracy(vmap(graft)(many, images[:, EXAMPLES:]), labels[:, EXAMPLES:]).mean())

    return params, equal_rates(params, max((0.003, 0.01, 0.03, 0.1, 0.3), key=right))


@torch.no_grad()
def read(
    graft: Graft, start: tuple[Tree, Tree], data: recipes.Digits, repeats: int, held_out: int, most: int
) -> list[float]:
    """Accuracy on held-out digits of new worlds after 0, 1, ... inner steps, over draws of the examples."""
    worlds = recipes.turned_only(recipes.new_worlds()).repeat(repeats, 1)
    images, labels = recipes.drawn(len(worlds), EXAMPLES, data.images, data.labels, digits.seeded(1))
    given = recipes.seen_in(worlds, images)
    asked = recipes.seen_in(worlds, data.test_images[:held_out].expand(len(worlds), -1, -1, -1))
    params, rates = start
    many, found = vmap(lambda _: params)(labels), []
    for step in range(most + 1):
        if step:
            many = vmap(lambda p, x, t: stepped(graft, p, rates, x, t, True))(many, given, labels)
        found.append(float(digits.accuracy(vmap(graft)(many, asked), data.test_labels[:held_out]).mean()))
    return found


def draw(path: Path, found: dict[str, list[float]]) -> None:
    """Draw accuracy by inner steps."""
    story = (
        f"Ten labelled digits of a new angle: {found['MAML'][INNER]:.0%} after {INNER} steps from the learned start, "
        f"{found['from one for all'][INNER]:.0%} from an adapter of all angles, "
        f"{found['from a fresh one'][INNER]:.0%} from a fresh one."
    )
    figure = recipes.sheet("An adapter that is made to be trained", story, 8)
    axes = figure.add_axes((0.06, 0.1, 0.91, 0.7))
    finish(axes, "accuracy on held-out digits of new angles, by steps of gradient descent")
    axes.grid(axis="y", color=FAINT)
    for name, values in found.items():
        axes.plot(range(len(values)), values, "o-", color=COLORS[name], linewidth=3, markersize=8, label=name)
    axes.legend(facecolor=PAPER, edgecolor=PAPER, labelcolor="linecolor", fontsize=14, loc="center right")
    axes.set_xlabel(f"steps; starts are learned through {INNER}", color=MUTED, fontsize=13)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.savefig(path, dpi=90, facecolor=PAPER)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("maml-out"), help="folder for results, and to resume from")
    parser.add_argument("--base-steps", type=int, default=400, help="training steps of the base model")
    parser.add_argument("--steps", type=int, default=200, help="steps on all worlds, and then outer steps")
    parser.add_argument("--worlds", type=int, default=6, help="worlds of a batch")
    parser.add_argument("--quick", action="store_true", help="a short run with weak results")
    parser.set_defaults(repeats=3, held_out=100, most=5)
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(base_steps=60, steps=4, worlds=2, repeats=1, held_out=20, most=3)
    if min(args.steps, args.worlds, args.base_steps) < 1:
        parser.error("--steps, --worlds and --base-steps are at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    return until_interrupted(run, parse(argv))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Learn starts, or what is left of them; train from each on new worlds, compare and draw."""
    began = time.perf_counter()
    claim(args.out, "starts", {key: getattr(args, key) for key in ("base_steps", "steps", "worlds")})
    model, data = recipes.frozen_reader(args.out, args.base_steps)
    graft = bind(model, LoraConfig(r=4, lora_alpha=8, target_modules=recipes.TARGETS))

    def choose(step: int, each: int) -> tuple[Tensor, Tensor]:
        source = digits.seeded(10_000 + step)
        worlds = recipes.turned_only(recipes.some_worlds(args.worlds, source))
        images, labels = recipes.drawn(args.worlds, each, data.images, data.labels, source)
        return recipes.seen_in(worlds, images), labels

    fresh, more = graft.init(digits.seeded(0)), range(args.steps, 2 * args.steps)
    shared = train_one_for_all(graft, fresh, choose, range(args.steps), 1e-2, args.out / "shared.safetensors")
    for_all = train_one_for_all(graft, shared, choose, more, 5e-3, args.out / "all.safetensors")
    starts = {
        "MAML": meta_train(graft, shared, choose, args.steps, False, args.out / "second.safetensors"),
        "MAML, first order": meta_train(graft, shared, choose, args.steps, True, args.out / "first.safetensors"),
        "from one for all": best_rates(graft, for_all, choose),
        "from a fresh one": best_rates(graft, fresh, choose),
    }
    found = {name: read(graft, start, data, args.repeats, args.held_out, args.most) for name, start in starts.items()}

    picture = args.out / "maml.png"
    draw(picture, found)
    print(f"\n{'inner steps':<20}" + "".join(f"{step:>8}" for step in range(args.most + 1)))
    for name, values in found.items():
        print(f"{name:<20}" + "".join(f"{value:>8.1%}" for value in values))
    print(f"\npicture       {picture}, after {time.perf_counter() - began:.0f} s in all")
    note({"found": found}, args.out / "maml.json")
    return {"found": found, "starts": starts, "graft": graft, "choose": choose, "picture": picture}


if __name__ == "__main__":
    main()
