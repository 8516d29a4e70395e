"""Adapters added, negated, averaged, pruned and mixed, and what each result can read.

A small transformer learns scikit-learn's handwritten digits and is frozen, and adapters learn worlds in which digits
are mirrored, inverted or noisy (examples/digits.py). Then nothing more is trained but a handful of weights: `combine`
makes new adapters of these, and each reads digits of each world, and of one that no adapter has seen, where digits are
both mirrored and inverted.

    pip install torchgraft[demo]
    python examples/arithmetic.py --out arithmetic-out
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
from _panels import INK, MUTED, PANEL, PAPER, finish
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from torchgraft.adapters import AdapterConfig, LoraConfig, combine, cosine, negate, soup
from torchgraft.functional import bind

Pair = tuple[AdapterConfig, dict[str, Any]]
TASKS = ["mirrored", "inverted", "noisy"]


def both(images: Tensor) -> Tensor:
    """The world that no adapter has seen."""
    return 1 - images.flip(-1)


def worlds_of(images: Tensor, seed: int) -> dict[str, Tensor]:
    """Images in each world, by name."""
    made = {"as they are": images}
    for index, (name, world) in enumerate(digits.DOMAINS.items()):
        if name in TASKS:
            made[name] = world(images, digits.seeded(seed + index))
    return made | {"mirrored, inverted": both(images)}


def train(
    model: nn.Module, config: LoraConfig, task: str, images: Tensor, labels: Tensor, steps: int, seed: int
) -> Pair:
    """Train the adapter of one world."""
    graft, choose = bind(model, config), digits.seeded(seed)
    params = graft.init(digits.seeded(seed))
    leaves = [leaf.requires_grad_() for leaf in optree.tree_leaves(params)]
    optimizer = torch.optim.AdamW(leaves, lr=5e-3, weight_decay=0)
    for step in tqdm(range(steps), desc=f"{task:<14}", unit="step"):
        rows = torch.randint(len(images), (digits.BATCH,), generator=choose)
        x = digits.DOMAINS[task](images[rows], digits.seeded(seed + 1000 * step))
        optimizer.zero_grad()
        F.cross_entropy(graft(params, x), labels[rows]).backward()
        optimizer.step()
    return config, optree.tree_map(torch.Tensor.detach, params)


def made_of(trained: dict[str, Pair], rank: int) -> dict[str, Pair]:
    """Return new adapters of those that were trained, by what was done."""
    all_three = [trained[name] for name in TASKS]
    pair = [trained["mirrored"], trained["inverted"]]
    return {
        "inverted, negated": negate(trained["inverted"]),
        "mirrored + inverted": combine(pair, [1, 1]),
        "the sum of three": combine(all_three, [1, 1, 1]),
        "... less inverted": combine([*all_three, trained["inverted"]], [1, 1, 1, -1]),
        "... cut to rank " + str(rank): combine(all_three, [1, 1, 1], "svd", rank=rank),
        "... factors added": combine(all_three, [1, 1, 1], "linear"),
        "... pruned to 30 %": combine(all_three, [1, 1, 1], "magnitude_prune_svd", density=0.3, rank=rank),
        "... TIES, 50 %": combine(all_three, [1, 1, 1], "ties_svd", density=0.5, rank=rank),
        "the average of three": soup(all_three),
    }


def learn_weights(model: nn.Module, some: Sequence[Pair], images: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Return the weights of a mixture that reads these images, learned through `combine`."""
    weights = torch.zeros(len(some), requires_grad=True)
    graft = bind(model, combine(some, weights)[0])
    optimizer = torch.optim.Adam([weights], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(graft(combine(some, weights)[1], images), labels).backward()
        optimizer.step()
    return weights.detach()


@torch.no_grad()
def read(
    model: nn.Module, adapters: dict[str, Pair], worlds: dict[str, Tensor], labels: Tensor
) -> dict[str, list[float]]:
    """Measure the accuracy of the base and of each adapter in each world."""
    found = {"the base": [float(digits.accuracy(model(images), labels)) for images in worlds.values()]}
    for name, (config, params) in adapters.items():
        graft = bind(model, config)
        found[name] = [float(digits.accuracy(graft(params, images), labels)) for images in worlds.values()]
    return found


def draw(path: Path, found: dict[str, list[float]], worlds: Sequence[str]) -> None:
    """Draw what each adapter (row) reads in each world (column)."""
    figure = Figure(figsize=(13, 0.52 * len(found) + 3.2), facecolor=PAPER)
    figure.text(0.03, 0.93, "Adapters as numbers: added, negated, pruned, mixed", color=INK, fontsize=26, weight="bold")
    story = "Accuracy on held-out digits, %. Trained are the three below the base; the others are arithmetic."
    figure.text(0.03, 0.885, story, color=MUTED, fontsize=15)
    table = figure.add_axes((0.23, 0.03, 0.74, 0.77))
    shades = LinearSegmentedColormap.from_list("accuracy", [PANEL, "#1f4f7d", "#58b7ff"])
    table.imshow(list(found.values()), cmap=shades, vmin=0, vmax=1, aspect="auto")
    finish(table, "")
    for i, values in enumerate(found.values()):
        for j, value in enumerate(values):
            ink = PAPER if value > 0.6 else MUTED
            table.text(j, i, f"{100 * value:.0f}", color=ink, fontsize=14, ha="center", va="center")
    table.set_yticks(range(len(found)), list(found))
    table.set_xticks(range(len(worlds)), list(worlds))
    table.tick_params(top=True, labeltop=True, labelbottom=False)
    figure.savefig(path, dpi=90, facecolor=PAPER)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("arithmetic-out"), help="folder for the picture")
    parser.add_argument("--base-steps", type=int, default=400, help="training steps of the base model")
    parser.add_argument("--steps", type=int, default=160, help="training steps of the adapters")
    parser.add_argument("--rank", type=int, default=4, help="rank of the adapters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a short run with weaker results")
    args = parser.parse_args(argv)
    if args.quick:
        args.base_steps, args.steps = 100, 30
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    args, start = parse(argv), time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    images, labels, test_images, test_labels = digits.load_images(args.seed)
    torch.manual_seed(args.seed)
    model = digits.VisionTransformer()
    digits.train_base(model, images, labels, args.base_steps, args.seed)

    # Three adapters, each trained in its own world.
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=["qkv", "out", "up", "down"])
    trained = {name: train(model, config, name, images, labels, args.steps, args.seed) for name in TASKS}

    # Arithmetic, and three weights that are learned on 128 digits of the unseen world.
    some = [trained[name] for name in TASKS]
    weights = learn_weights(model, some, both(images[:128]), labels[:128], 10 if args.quick else 40)
    adapters = trained | made_of(trained, args.rank) | {"learned weights": combine(some, weights)}
    worlds = worlds_of(test_images, args.seed)
    found = read(model, adapters, worlds, test_labels)

    picture = args.out / "arithmetic.png"
    draw(picture, found, list(worlds))
    print(f"\n{'':<24}" + "".join(f"{name:>20}" for name in worlds))
    for name, values in found.items():
        print(f"{name:<24}" + "".join(f"{value:>20.1%}" for value in values))
    angle = float(cosine(trained["mirrored"], trained["inverted"])["*"])
    print(f"\nlearned weights  {', '.join(f'{w:.2f} {name}' for name, w in zip(TASKS, weights.tolist(), strict=True))}")
    print(f"cosine           {angle:.3f} between mirrored and inverted")
    print(f"picture          {picture}, {time.perf_counter() - start:.0f} s in all")
    return {"found": found, "worlds": list(worlds), "weights": weights, "cosine": angle, "picture": picture}


if __name__ == "__main__":
    main()
