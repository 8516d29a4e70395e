"""Clients train an adapter each on digits of their own, which are averaged each round (federated averaging).

A small transformer learns scikit-learn's handwritten digits and is frozen. Clients have the digits turned by 90
degrees, and each has mostly a few of the ten classes. In a round each trains a copy of one adapter on its own digits,
and the copies are averaged. The clients are a stack, so one routed forward trains all. The average of low-rank factors
is not the average of their products, so there is a second way: all share one `lora_A` that is not trained, and averages
are exact. Held against both: an adapter on the digits of all, and adapters that are never averaged.

    pip install torchgraft[demo]
    python examples/federated.py --out federated-out
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.adapters import LoraConfig
from torchgraft.functional import Graft, Tree, bind, route, stack

try:
    import _recipes as recipes
    import digits
    from _panels import FAINT, MUTED, PAPER, finish
    from _resume import claim, note, until_interrupted
    from matplotlib.colors import LinearSegmentedColormap
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"This example needs {error.name}, which is not installed: pip install torchgraft[demo]") from None

ROWS = 16
"""Digits of a client in a step."""
COLORS = {
    "factors averaged": recipes.BLUE,
    "lora_B averaged, lora_A shared": recipes.GREEN,
    "all digits in one place": recipes.VIOLET,
    "never averaged": recipes.ORANGE,
}


def skewed(labels: Tensor, clients: int, skew: float) -> list[Tensor]:
    """Divide digits over clients: the shares of each class are drawn from a Dirichlet distribution.

    Args:
        labels: `"n"`.
        clients: How many, at most `n`.
        skew: The distribution's parameter; small is uneven.

    Returns:
        Which digits each client has. Drawn again until each has some.
    """
    torch.manual_seed(0)
    while True:
        shares = torch.distributions.Dirichlet(torch.full((clients,), skew)).sample((10,))
        owner = torch.multinomial(shares[labels], 1)[:, 0]
        if len(owner.unique()) == clients:
            return [(owner == client).nonzero()[:, 0] for client in range(clients)]


def train_locally(
    graft: Graft,
    many: Tree,
    trained: Sequence[str],
    digits_of: Callable[[int], tuple[Tensor, Tensor]],
    steps: range,
    rate: float,
) -> Tree:
    """Train the adapters of a stack, each on its own digits, from where they are; returns the stack.

    Args:
        graft: The frozen model, bound.
        many: The stack.
        trained: Names of the leaves that are trained.
        digits_of: `step -> images "client n 32 32", labels "client n"`.
        steps: The steps to take.
        rate: The learning rate.
    """
    leaves = {path: {name: leaf.detach().clone() for name, leaf in own.items()} for path, own in many.items()}
    chosen = [leaf.requires_grad_() for own in leaves.values() for name, leaf in own.items() if name in trained]
    optimizer = torch.optim.Adam(chosen, lr=rate)
    for step in steps:
        images, labels = digits_of(step)
        rows = torch.arange(len(labels)).repeat_interleave(labels.shape[1])
        logits = graft(route(leaves, rows), images.flatten(0, 1))
        optimizer.zero_grad()
        (F.cross_entropy(logits, labels.flatten(), reduction="sum") / labels.shape[1]).backward()
        optimizer.step()
    result: Tree = optree.tree_map(torch.Tensor.detach, leaves)
    return result


def averaged(many: Tree, weights: Tensor) -> Tree:
    """The average of a stack's adapters by weights `"client"`, given to all of them again."""
    result: Tree = optree.tree_map(
        lambda leaf: torch.tensordot(weights, leaf, 1).expand(len(weights), *leaf.shape[1:]), many
    )
    return result


def gap(many: Tree, weights: Tensor) -> float:
    """How far the product of averaged factors is from the average of products, relative to that."""
    apart, size = 0.0, 0.0
    for own in many.values():
        exact = torch.einsum("c,cor,cri->oi", weights, own["lora_B"], own["lora_A"])
        factors = torch.tensordot(weights, own["lora_B"], 1) @ torch.tensordot(weights, own["lora_A"], 1)
        apart, size = apart + float((factors - exact).square().sum()), size + float(exact.square().sum())
    return (apart / size) ** 0.5


@torch.no_grad()
def read(graft: Graft, many: Tree, images: Tensor, labels: Tensor) -> list[float]:
    """Accuracy of each adapter of a stack."""
    return [
        float(digits.accuracy(graft(optree.tree_map(lambda leaf, i=i: leaf[i], many), images), labels))
        for i in range(len(optree.tree_leaves(many)[0]))
    ]


def run_way(
    graft: Graft, way: str, data: recipes.Digits, owned: Sequence[Tensor], args: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Train for all rounds in one way; returns accuracy after each, and how inexact averages were."""
    together = way == "all digits in one place"
    parts = [torch.arange(len(data.labels))] if together else list(owned)
    each = ROWS * len(owned) if together else ROWS
    weights = torch.tensor([float(len(part)) for part in parts])
    weights = weights / weights.sum()
    many = stack([graft.init(digits.seeded(0))] * len(parts))
    trained, rate = (["lora_B"], 2e-2) if "shared" in way else (["lora_A", "lora_B"], 1e-2)

    def digits_of(step: int) -> tuple[Tensor, Tensor]:
        source = digits.seeded(step)
        rows = torch.stack([part[torch.randint(len(part), (each,), generator=source)] for part in parts])
        return data.images[rows], data.labels[rows]

    curve, gaps = [], []
    for turn in tqdm(range(args.rounds), desc=f"{way[:14]:<14}", unit="round"):
        many = train_locally(graft, many, trained, digits_of, range(turn * args.local, (turn + 1) * args.local), rate)
        if "averaged" in way and way != "never averaged":
            gaps.append(gap(many, weights))
            many = averaged(many, weights)
        one = many if way == "never averaged" else optree.tree_map(lambda leaf: leaf[:1], many)
        found = read(graft, one, data.test_images, data.test_labels)
        curve.append(sum(found) / len(found))
    return curve, gaps


def draw(path: Path, curves: dict[str, list[float]], counts: Tensor) -> None:
    """Draw accuracy by round, and what classes each client has."""
    story = "Held-out digits, turned by 90 degrees: " + ", ".join(
        f"{values[-1]:.0%} {name}" for name, values in curves.items()
    )
    figure = recipes.sheet("An adapter of many clients, whose digits stay where they are", story, 8)
    axes = figure.add_axes((0.06, 0.1, 0.6, 0.7))
    finish(axes, "accuracy by round of averaging")
    axes.grid(axis="y", color=FAINT)
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, color=COLORS[name], linewidth=3, label=name)
    axes.legend(facecolor=PAPER, edgecolor=PAPER, labelcolor="linecolor", fontsize=14, loc="lower right")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    table = figure.add_axes((0.72, 0.1, 0.25, 0.7))
    table.imshow(counts.numpy(), cmap=LinearSegmentedColormap.from_list("counts", [PAPER, recipes.BLUE]), aspect="auto")
    finish(table, "digits of each client")
    for i, row in enumerate(counts.tolist()):
        for j, value in enumerate(row):
            table.text(j, i, value or "", color=PAPER if 2 * value > counts.max() else MUTED, ha="center", va="center")
    table.set_xticks(range(10))
    table.set_yticks([])
    figure.savefig(path, dpi=90, facecolor=PAPER)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("federated-out"), help="folder for the picture and numbers")
    parser.add_argument("--base-steps", type=int, default=400, help="training steps of the base model")
    parser.add_argument("--clients", type=int, default=8, help="how many have digits")
    parser.add_argument("--skew", type=float, default=0.3, help="how even the classes are; small is uneven")
    parser.add_argument("--rounds", type=int, default=16, help="rounds of averaging")
    parser.add_argument("--local", type=int, default=5, help="steps of a client in a round")
    parser.add_argument("--quick", action="store_true", help="a short run with weak results")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(base_steps=60, clients=3, rounds=2, local=3)
    if min(args.clients, args.rounds, args.local, args.base_steps) < 1 or args.skew <= 0:
        parser.error("--clients, --rounds, --local and --base-steps are at least 1, and --skew is above 0")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    return until_interrupted(run, parse(argv))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train in each way, compare and draw."""
    began = time.perf_counter()
    claim(args.out, "a base model", {"base_steps": args.base_steps})
    model, data = recipes.frozen_reader(args.out, args.base_steps)
    graft = bind(model, LoraConfig(r=4, lora_alpha=8, target_modules=recipes.TARGETS))
    turned = data._replace(images=data.images.rot90(1, (-2, -1)), test_images=data.test_images.rot90(1, (-2, -1)))
    owned = skewed(turned.labels, args.clients, args.skew)
    counts = torch.stack([turned.labels[own].bincount(minlength=10) for own in owned])
    curves, gaps = {}, {}
    for way in COLORS:
        curves[way], gaps[way] = run_way(graft, way, turned, owned, args)

    picture = args.out / "federated.png"
    draw(picture, curves, counts)
    print(f"\n{'':<34}{'held out':>10}{'averages are off by':>22}")
    for way, values in curves.items():
        off = f"{sum(gaps[way]) / len(gaps[way]):.1%}" if gaps[way] else ""
        print(f"{way:<34}{values[-1]:>10.1%}{off:>22}")
    print(f"\nclients       {args.clients}, with {counts.sum(1).min()} to {counts.sum(1).max()} digits each")
    print(f"picture       {picture}, after {time.perf_counter() - began:.0f} s in all")
    note({"curves": curves, "gaps": gaps, "counts": counts.tolist()}, args.out / "federated.json")
    return {"curves": curves, "gaps": gaps, "counts": counts, "owned": owned, "data": turned, "picture": picture}


if __name__ == "__main__":
    main()
