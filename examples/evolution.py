"""Evolution of an adapter: 128 perturbed adapters in one forward, and a score that has no gradient.

A small transformer learns scikit-learn's handwritten digits and is frozen; an adapter learns to read mirrored ones. The
score is the mean reciprocal rank of the right answer, whose gradient is zero everywhere. Each step adds noise to the
adapter, which makes perturbations of the weights that have the adapter's low rank, reads the same digits with each
perturbed adapter (`route`), and moves the adapter towards the noise that scored well (Salimans et al., 2017):

    step = 1 / (2 n sigma) sum_i (score(p + sigma z_i) - score(p - sigma z_i)) z_i

    pip install torchgraft[demo]
    python examples/evolution.py --out evolution-out
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import digits
import optree
import torch
import torch.nn.functional as F
from _panels import FAINT, INK, MUTED, PAPER, finish
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from torchgraft.adapters import LoraXSConfig
from torchgraft.functional import Graft, Tree, bind, perturb, ravel, route, trainable, unravel, unstack, value_and_grad

TARGETS = ["qkv", "out", "up", "down"]
Curve = dict[int, float]


def scores(graft: Graft, many: Tree, x: Tensor, t: Tensor) -> Tensor:
    """Return each adapter's mean of `1 / rank of the right digit`, `"N"`, from one forward of all adapters."""
    count = len(ravel(many, stacked=True))
    rows = torch.arange(count).repeat_interleave(len(x))
    logits = graft(route(many, rows), x.repeat(count, 1, 1))
    return reciprocal_rank(logits, t.repeat(count)).unflatten(0, (count, -1)).mean(1)


def reciprocal_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 where the right class is first, 1/2 where it is second, ..., `"rows classes"` to `"rows"`."""
    return 1 / (1 + (logits > logits.gather(-1, labels[:, None])).sum(-1))


def pairs(params: Tree, sigma: float, count: int, seed: int) -> tuple[Tensor, Tree]:
    """Return noise `"N/2 P"`, and a stack of `N` adapters: those with the noise, then those with its negative."""
    plus = perturb(params, [digits.seeded(seed + i) for i in range(count // 2)], sigma)
    offset = ravel(plus, stacked=True) - ravel(params)
    both = torch.cat([ravel(params) + offset, ravel(params) - offset])
    return offset / sigma, unravel(both, params)


@torch.no_grad()
def evolve(graft: Graft, x: Tensor, t: Tensor, measure: Callable[[Tree], float], args: argparse.Namespace) -> Curve:
    """Improve an adapter by the scores of its perturbations; returns held-out accuracy by step."""
    params, choose = graft.init(digits.seeded(0)), digits.seeded(1)
    optimizer = torch.optim.Adam(trainable(params), lr=args.rate, maximize=True)
    curve = {0: measure(params)}
    progress = tqdm(range(1, args.steps + 1), desc="evolution     ", unit="step")
    for step in progress:
        rows = torch.randint(len(x), (args.rows,), generator=choose)
        noise, many = pairs(params, args.sigma, args.population, 10_000 * step)
        plus, minus = scores(graft, many, x[rows], t[rows]).chunk(2)
        gradient = unravel((plus - minus) @ noise / (2 * len(noise) * args.sigma), params)
        for leaf, change in zip(optree.tree_leaves(params), optree.tree_leaves(gradient), strict=True):
            leaf.grad = change
        optimizer.step()
        if step % max(1, args.steps // 16) == 0 or step == args.steps:
            curve[step] = measure(params)
            progress.set_postfix_str(f"held-out accuracy {curve[step]:.1%}")
    return curve


def descend(graft: Graft, x: Tensor, t: Tensor, measure: Callable[[Tree], float], args: argparse.Namespace) -> Curve:
    """Train the same adapter by gradients of the cross entropy, on as many digits a step."""

    def loss(params: Tree, x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(graft(params, x), t)

    params, choose = graft.init(digits.seeded(0)), digits.seeded(1)
    optimizer = torch.optim.Adam(trainable(params), lr=args.rate)
    curve = {0: measure(params)}
    for step in tqdm(range(1, args.steps + 1), desc="gradients     ", unit="step"):
        rows = torch.randint(len(x), (args.rows,), generator=choose)
        _, grads = value_and_grad(loss)(params, x[rows], t[rows])
        for leaf, gradient in zip(optree.tree_leaves(params), optree.tree_leaves(grads), strict=True):
            leaf.grad = gradient
        optimizer.step()
        if step % max(1, args.steps // 16) == 0 or step == args.steps:
            curve[step] = measure(params)
    return curve


def one_by_one(graft: Graft, many: Tree, x: Tensor) -> list[Any]:
    return [graft(one, x) for one in unstack(many)]


@torch.no_grad()
def throughput(graft: Graft, x: Tensor, t: Tensor, count: int, sizes: Sequence[int], rounds: int) -> dict[str, float]:
    """Return rows a second: of the base alone, of perturbed adapters at once, and of one after the other.

    Each adapter reads as many digits as a size says, the base the same rows. Of rounds that take turns the fastest
    counts, which is what other programs on the machine disturb least.
    """
    params, model = graft.init(digits.seeded(0)), graft.model
    _, many = pairs(params, 0.02, count, 0)
    found: dict[str, float] = {}
    for size in sizes:
        some, labels = x[:size], t[:size]
        everything = some.repeat(count, 1, 1)
        ways: dict[str, Callable[[], Any]] = {
            f"the base, {count} x {size} rows": functools.partial(model, everything),
            f"{count} adapters, {size} rows each": functools.partial(scores, graft, many, some, labels),
            f"one by one, {size} rows each": functools.partial(one_by_one, graft, many, some),
        }
        for _ in range(rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                rate = count * size / (time.perf_counter() - began)
                found[name] = max(rate, found.get(name, 0.0))
    return found


def draw(path: Path, curves: dict[str, Curve], rates: dict[str, float], args: argparse.Namespace) -> None:
    """Draw accuracy by step, and rows a second."""
    figure = Figure(figsize=(15, 7.2), facecolor=PAPER)
    figure.text(0.04, 0.92, "An adapter evolves", color=INK, fontsize=26, weight="bold")
    story = f"The score is the rank of the right digit; {args.population} perturbed adapters in one forward."
    figure.text(0.04, 0.865, story, color=MUTED, fontsize=15)
    axes = figure.add_axes((0.06, 0.1, 0.5, 0.68), ylim=(0, 1))
    finish(axes, "held-out accuracy by step")
    for (name, curve), color in zip(curves.items(), ["#58b7ff", MUTED], strict=True):
        axes.plot(list(curve), list(curve.values()), color=color, linewidth=2.6, label=name)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", color=FAINT)
    axes.legend(facecolor=PAPER, edgecolor=FAINT, labelcolor=INK, fontsize=13, loc="lower right")
    bars = figure.add_axes((0.76, 0.1, 0.21, 0.68))
    finish(bars, "rows a second")
    kinds = [MUTED, "#58b7ff", "#30465c"]
    bars.barh(range(len(rates)), list(rates.values()), color=[kinds[i % 3] for i in range(len(rates))], height=0.6)
    for place, value in enumerate(rates.values()):
        bars.text(value, place, f" {value:,.0f}", color=INK, fontsize=13, va="center")
    bars.set_yticks(range(len(rates)), list(rates))
    bars.set_xticks([])
    bars.set_xlim(0, 1.3 * max(rates.values()))
    bars.invert_yaxis()
    figure.savefig(path, dpi=90, facecolor=PAPER)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("evolution-out"), help="folder for the picture")
    parser.add_argument("--base-steps", type=int, default=250, help="training steps of the base model")
    parser.add_argument("--steps", type=int, default=80, help="steps of the adapter")
    parser.add_argument("--population", type=int, default=128, help="perturbed adapters in a step, an even number")
    parser.add_argument("--rows", type=int, default=32, help="digits that each of them reads in a step")
    parser.add_argument("--sigma", type=float, default=0.02, help="standard deviation of the noise")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--quick", action="store_true", help="a short run with weaker results")
    args = parser.parse_args(argv)
    if args.population < 2 or args.population % 2:
        parser.error(f"--population is {args.population}, expected an even number: each noise is added and subtracted")
    args.adapters, args.sizes, args.rounds = 64, (4, 32), 10
    if args.quick:
        args.base_steps, args.steps, args.population = 80, 6, 8
        args.adapters, args.sizes, args.rounds = 8, (4,), 1
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    args, start = parse(argv), time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    images, labels, test_images, test_labels = digits.load_images(0)
    torch.manual_seed(0)
    model: nn.Module = digits.VisionTransformer(dim=32, heads=2, depth=2)
    digits.train_base(model, images, labels, args.base_steps, 0)
    x, test = images.flip(-1), test_images.flip(-1)
    graft = bind(model, LoraXSConfig(r=4, target_modules=TARGETS))

    @torch.no_grad()
    def measure(params: Tree) -> float:
        return float(digits.accuracy(graft(params, test), test_labels))

    curves = {
        f"evolution, {args.population} adapters a step": evolve(graft, x, labels, measure, args),
        "gradients of the cross entropy": descend(graft, x, labels, measure, args),
    }
    rates = throughput(graft, x, labels, args.adapters, args.sizes, args.rounds)
    picture = args.out / "evolution.png"
    draw(picture, curves, rates, args)
    numbers = sum(leaf.numel() for leaf in optree.tree_leaves(graft.init()))
    print(f"\naccuracy on held-out mirrored digits, of an adapter of {numbers} numbers:")
    for name, curve in curves.items():
        print(f"  {name:<34}{curve[0]:.1%} before, {curve[args.steps]:.1%} after {args.steps} steps")
    print("rows a second: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
    print(f"picture {picture}, {time.perf_counter() - start:.0f} s in all")
    return {"curves": curves, "rates": rates, "picture": picture}


if __name__ == "__main__":
    main()
