"""Which training examples made this prediction: attribution by gradients of each example, checked by training again.

A small network learns some of scikit-learn's handwritten digits and is frozen; an adapter learns to read mirrored ones
from 256 examples. How much each of these counts for a prediction is computed from gradients of each example, projected
to a few dimensions (TRAK: Park et al., 2023):

    scores(z) = g(z)^T G^T (G G^T + l I)^-1 diag(1 - p),   g = gradient of log(p / (1 - p)), G those of the examples

Then adapters are trained again, hundreds at once: without half of the examples, chosen at random, and without the
examples that counted most for a digit. What happened to the prediction is held against what the scores said.

    pip install torchgraft[demo]
    python examples/influence.py --out influence-out
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
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

from torchgraft.adapters import LoraConfig
from torchgraft.functional import (
    Graft,
    Tree,
    bind,
    per_example,
    project,
    ravel,
    stack,
    trainable,
    unstack,
    value_and_grad,
)

Pair = tuple[Tensor, Tensor]
BASE, GONE, DAMPING = 600, 20, 0.1
"""Digits that the base learns, examples that are left out for one digit, and `l` relative to the mean diagonal."""


def reader() -> nn.Module:
    """A network that reads images `"... 32 32"`, at an eighth of their size."""
    sizes = [(64, 128), (128, 128), (128, 10)]
    layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.GELU())]
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(-2), *layers[:-1])


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `log(p / (1 - p))` of the right class, `"... 10"` to `"..."`."""
    right = logits.gather(-1, labels[..., None])
    others = logits.scatter(-1, labels[..., None], -torch.inf)
    return right[..., 0] - others.logsumexp(-1)


def train_base(model: nn.Module, x: Tensor, t: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in tqdm(range(steps), desc="base model    ", unit="step"):
        optimizer.zero_grad()
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
    model.requires_grad_(False).eval()


def train(graft: Graft, given: Pair, rows: Tensor, seeds: Sequence[int], steps: int, name: str) -> Tree:
    """Train adapters at once, each from a seed on examples of its own, `"adapters examples"`; returns a stack."""

    def loss(params: Tree, x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(graft(params, x), t)

    many = stack([graft.init(digits.seeded(seed)) for seed in seeds])
    optimizer = torch.optim.Adam(trainable(many), lr=1e-2)  # element by element, so the adapters stay independent
    x, t = (some[rows] for some in given)
    for _ in tqdm(range(steps), desc=f"{len(rows):>3} {name:<10}", unit="step"):
        optimizer.zero_grad()
        torch.vmap(loss)(many, x, t).sum().backward()
        optimizer.step()
    return optree.tree_map(Tensor.detach, many)


@torch.no_grad()
def margins(graft: Graft, many: Tree, x: Tensor, t: Tensor) -> Tensor:
    """Return each adapter's margin on each digit, `"adapters digits"`."""
    return margin(torch.vmap(graft, in_dims=(0, None))(many, x), t.expand(len(ravel(many, stacked=True)), -1))


def features(graft: Graft, params: Tree, given: Pair, size: int | None) -> Tensor:
    """Return the gradient of each digit's margin, `"digits size"`, projected where `size` is no `None`."""

    def total(params: Tree, x: Tensor, t: Tensor) -> Tensor:
        return margin(graft(params, x), t).sum()

    def few(grads: Tree) -> Tensor:
        return ravel(grads, stacked=True) if size is None else project(grads, size, seed=0, stacked=True)

    found: Tensor = per_example(total, chunk_size=128).map(few, params, *given)
    return found


def scores(graft: Graft, many: Tree, data: dict[str, Any], size: int | None, *, inverse: bool = True) -> Tensor:
    """Return how much each example counts for each test digit, the mean over adapters, `"test examples"`.

    Args:
        graft: The model and its adapters' config.
        many: Adapters that were trained on all examples.
        data: `"examples"` and `"test"`, images and labels.
        size: Dimensions of projected gradients, `None` for all numbers.
        inverse: Whether gradients are divided by their covariance; without, they are only multiplied (TracIn).
    """
    found = []
    for params in unstack(many):
        examples, test = (features(graft, params, data[name], size) for name in ("examples", "test"))
        with torch.no_grad():
            wrong = 1 - margin(graft(params, data["examples"][0]), data["examples"][1]).sigmoid()
        kernel = examples @ examples.T
        damped = kernel + DAMPING * kernel.diagonal().mean() * torch.eye(len(kernel))
        alike = test @ examples.T
        found.append((torch.linalg.solve(damped, alike.T).T if inverse else alike) * wrong)
    return torch.stack(found).mean(0)


def correlation(said: Tensor, happened: Tensor) -> Tensor:
    """Return the rank correlation of each column (Spearman's), `"subsets test"` twice to `"test"`."""
    a, b = (some.argsort(0).argsort(0).double() for some in (said, happened))
    return F.cosine_similarity(a - a.mean(0), b - b.mean(0), dim=0)


def by_chance(scores: Tensor, kept: Tensor, happened: Tensor, draws: int) -> float:
    """Return the mean correlation that 97.5 % of scores with shuffled examples stay below."""
    orders = (torch.randperm(scores.shape[1], generator=digits.seeded(i)) for i in range(draws))
    found = torch.stack([correlation(kept @ scores[:, order].T, happened).mean() for order in orders])
    return float(found.quantile(0.975))


def halves(graft: Graft, data: dict[str, Any], args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Train on random halves of the examples; returns which were kept, and what the margins became.

    Returns:
        `"subsets examples"`, 0 or 1; and margins `"subsets test"`, the mean over seeds.
    """
    count = len(data["examples"][0])
    rows = torch.stack([torch.randperm(count, generator=digits.seeded(i))[: count // 2] for i in range(args.subsets)])
    kept = torch.zeros(args.subsets, count).scatter(1, rows, 1.0)
    seeds = [100 + seed for seed in range(args.seeds) for _ in range(args.subsets)]
    many = train(graft, data["examples"], rows.repeat(args.seeds, 1), seeds, args.steps, "halves")
    return kept, margins(graft, many, *data["test"]).unflatten(0, (args.seeds, -1)).mean(0)


def without(graft: Graft, data: dict[str, Any], found: Tensor, args: argparse.Namespace) -> dict[str, Tensor]:
    """Train without some examples for each test digit; returns how much its margin fell, by which were left out."""
    count, test = len(data["examples"][0]), len(found)
    chosen = {
        "those that count most": found.argsort(1, descending=True),
        "any": torch.stack([torch.randperm(count, generator=digits.seeded(1000 + i)) for i in range(test)]),
        "those that count against it": found.argsort(1),
    }
    rows = torch.cat([order[:, GONE:] for order in chosen.values()])
    everything = torch.arange(count).expand(args.seeds, -1)
    seeds = [100 + seed for seed in range(args.seeds) for _ in rows]
    many = train(graft, data["examples"], rows.repeat(args.seeds, 1), seeds, args.steps, "without 20")
    whole = train(graft, data["examples"], everything, range(100, 100 + args.seeds), args.steps, "with all")
    before = margins(graft, whole, *data["test"]).mean(0)
    after = margins(graft, many, *data["test"]).unflatten(0, (args.seeds, len(chosen), test)).mean(0)
    return {name: before - after[i].diagonal() for i, name in enumerate(chosen)}


def clock(graft: Graft, params: Tree, given: Pair, rounds: int) -> dict[str, float]:
    """Return the median time of the examples' gradients, at once and one by one, in seconds."""

    def total(params: Tree, x: Tensor, t: Tensor) -> Tensor:
        return margin(graft(params, x), t).sum()

    def one_by_one() -> Tensor:
        x, t = given
        return torch.stack([ravel(value_and_grad(total)(params, x[i, None], t[i, None])[1]) for i in range(len(x))])

    def at_once() -> Tensor:
        return features(graft, params, given, None)

    seconds: dict[str, list[float]] = {"at once": [], "one by one": []}
    for _ in range(rounds):
        for way, some in zip((at_once, one_by_one), seconds.values(), strict=True):
            began = time.perf_counter()
            way()
            some.append(time.perf_counter() - began)
    return {name: sorted(some)[rounds // 2] for name, some in seconds.items()}


def draw(path: Path, result: dict[str, Any], data: dict[str, Any], found: Tensor) -> None:
    """Draw digits with the examples that counted most and least, and how well the scores foretold."""
    figure = Figure(figsize=(16, 8.4), facecolor=PAPER)
    write = figure.text
    write(0.03, 0.925, "Which examples made this prediction", color=INK, fontsize=26, weight="bold")
    story = "Mirrored digits that an adapter reads; beside each the examples that counted most for it, and against it."
    write(0.03, 0.878, story, color=MUTED, fontsize=15)
    (examples, labels), (test, test_labels) = data["examples"], data["test"]
    for x, title in ((0.03, "digit"), (0.115, "for it"), (0.33, "against it")):
        write(x, 0.81, title, color=INK, fontsize=15)
    for row in range(6):
        order = found[row].argsort(descending=True)
        places = [(0.03, test[row], test_labels[row], INK)]
        places += [(0.115 + 0.05 * i, examples[j], labels[j], "#58b7ff") for i, j in enumerate(order[:4])]
        places += [(0.33 + 0.05 * i, examples[j], labels[j], "#ff7b72") for i, j in enumerate(order.flip(0)[:4])]
        for x, image, label, color in places:
            tile = figure.add_axes((x, 0.68 - 0.126 * row, 0.045, 0.105))
            tile.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, aspect="auto")
            tile.set_title(str(int(label)), color=color, fontsize=11, pad=2)
            tile.axis("off")
    axes = figure.add_axes((0.6, 0.5, 0.37, 0.29))
    finish(axes, "correlation with what training again did, by dimensions")
    names = [name for name in result["correlations"] if name != "multiplied only"]
    values = [result["correlations"][name] for name in names]
    axes.plot(range(len(names)), values, color="#58b7ff", marker="o", linewidth=2.4)
    axes.axhspan(-result["chance"], result["chance"], color=MUTED, alpha=0.25)
    axes.text(0, result["chance"] + 0.02, "chance", color=MUTED, fontsize=12)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(-0.1, 1)
    axes.grid(axis="y", color=FAINT)
    bars = figure.add_axes((0.77, 0.05, 0.2, 0.29))
    finish(bars, "")
    write(0.6, 0.375, f"how much a digit's margin fell without {GONE} examples", color=INK, fontsize=16)
    falls = result["falls"]
    means = [float(fall.mean()) for fall in falls.values()]
    errors = [float(2 * fall.std() / len(fall) ** 0.5) for fall in falls.values()]
    bars.barh(range(len(means)), means, xerr=errors, ecolor=MUTED, color=["#58b7ff", MUTED, "#ff7b72"], height=0.55)
    bars.axvline(0, color=FAINT)
    bars.set_yticks(range(len(means)), list(falls))
    bars.invert_yaxis()
    figure.savefig(path, dpi=90, facecolor=PAPER)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("influence-out"), help="folder for the picture")
    parser.add_argument("--examples", type=int, default=256, help="digits that adapters are trained on")
    parser.add_argument("--test", type=int, default=48, help="digits whose predictions are explained")
    parser.add_argument("--subsets", type=int, default=64, help="random halves of the examples to train on")
    parser.add_argument("--seeds", type=int, default=3, help="adapters of each subset, and of all examples")
    parser.add_argument("--steps", type=int, default=60, help="training steps of the adapters")
    parser.add_argument("--quick", action="store_true", help="a short run with weaker results")
    args = parser.parse_args(argv)
    args.sizes = (16, 64, 256, 1024, None)
    if args.quick:
        args.examples, args.test, args.subsets, args.seeds, args.steps, args.sizes = 64, 8, 12, 1, 20, (64, None)
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    args, start = parse(argv), time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    images, labels, test_images, test_labels = digits.load_images(0)
    torch.manual_seed(0)
    model = reader()
    train_base(model, images[:BASE], labels[:BASE], 150)
    mirrored = digits.DOMAINS["mirrored"](images[BASE:], digits.seeded(0)), labels[BASE:]
    test = digits.DOMAINS["mirrored"](test_images, digits.seeded(0)), test_labels
    data: dict[str, Any] = {
        "examples": tuple(some[: args.examples] for some in mirrored),
        "test": tuple(some[: args.test] for some in test),
    }
    graft = bind(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    everything = torch.arange(args.examples).expand(args.seeds, -1)
    many = train(graft, data["examples"], everything, range(args.seeds), args.steps, "with all")

    # What the scores say, and what training again does.
    kept, happened = halves(graft, data, args)
    by_size = {"all" if size is None else str(size): scores(graft, many, data, size) for size in args.sizes}
    by_size["multiplied only"] = scores(graft, many, data, None, inverse=False)
    correlations = {name: float(correlation(kept @ some.T, happened).mean()) for name, some in by_size.items()}
    found = by_size["all"]
    falls = without(graft, data, found, args)
    chance = by_chance(found, kept, happened, 100)
    times = clock(graft, unstack(many)[0], data["examples"], 3)
    result: dict[str, Any] = {"correlations": correlations, "chance": chance, "falls": falls, "times": times}
    draw(args.out / "influence.png", result, data, found)

    with torch.no_grad():
        read = [float(digits.accuracy(f(test[0]), test[1])) for f in (model, graft.view(unstack(many)[0]))]
    print(f"\nthe base reads {read[0]:.1%} of mirrored digits, the adapter {read[1]:.1%}")
    print(f"rank correlation of scores with what {args.subsets} trainings on halves did, by dimensions of gradients:")
    print("  " + ", ".join(f"{name} {value:.3f}" for name, value in correlations.items()))
    print(f"  by chance: below {result['chance']:.3f} in 97.5 % of shuffled scores")
    print(f"a digit's margin falls, without {GONE} of {args.examples} examples, by")
    print("  " + ", ".join(f"{float(fall.mean()):.2f} ({name})" for name, fall in falls.items()))
    print("gradients of all examples: " + ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in result["times"].items()))
    print(f"picture {args.out / 'influence.png'}, {time.perf_counter() - start:.0f} s in all")
    return result | {"read": read, "picture": args.out / "influence.png"}


if __name__ == "__main__":
    main()
