"""Private training of an adapter: how accurate it is for how much privacy, and the same step as Opacus makes.

A small transformer learns some of scikit-learn's handwritten digits, which are public, and is frozen. Others are
private, and mirrored: an adapter learns to read them by DP-SGD (Abadi et al., 2016). A step draws each private digit
with probability q, clips each one's gradient to norm C, adds Gaussian noise of standard deviation sigma C to the sum
and divides it by the expected size of the batch. Opacus' accountant says which sigma makes a given epsilon.

    pip install torchgraft[demo] opacus
    python examples/privacy.py --out privacy-out
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import digits
import optree
import torch
import torch.nn.functional as F
from _panels import FAINT, INK, MUTED, PAPER, finish
from _resume import claim, note, until_interrupted
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from torchgraft.adapters import AdapterConfig, LoraConfig, LoraXSConfig
from torchgraft.functional import Graft, Tree, bind, per_example, perturb, route, trainable, unravel

try:
    from opacus import GradSampleModule
    from opacus.accountants.utils import get_noise_multiplier
    from opacus.optimizers import DPOptimizer
except ImportError as error:
    raise SystemExit(f"This example needs {error.name}, which is not installed: pip install opacus") from None

TARGETS = ["qkv", "out", "up", "down"]
METHODS: dict[str, AdapterConfig] = {
    "LoRA": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "LoRA-XS": LoraXSConfig(r=8, target_modules=TARGETS),
}
EPSILONS = (1.0, 2.0, 4.0, 8.0, None)
"""`None` is without noise, which is not private; gradients are clipped all the same."""
PUBLIC, DELTA, CLIP, RATE = 500, 1e-5, 1.0, 1.6e-2
Found = dict[str, list[float]]
COLORS = {"LoRA": "#58b7ff", "LoRA-XS": "#ffa657"}


# -- private training --------------------------------------------------------------------------------------------------


def train(graft: Graft, x: Tensor, t: Tensor, share: float, sigma: float, steps: int, seed: int) -> Tree:
    """Train an adapter by DP-SGD, with Adam's steps on the noisy gradients, which costs no privacy."""

    def loss(params: Tree, x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(graft(params, x), t)

    each, params = per_example(loss), graft.init(digits.seeded(seed))
    optimizer, source = torch.optim.Adam(trainable(params), lr=RATE), digits.seeded(seed + 1)
    for _ in range(steps):
        rows = torch.nonzero(torch.rand(len(x), generator=source) < share)[:, 0]
        total = each.clipped_sum(params, x[rows], t[rows], max_norm=CLIP).total
        noisy = perturb(total, source, sigma * CLIP)
        for leaf, gradient in zip(optree.tree_leaves(params), optree.tree_leaves(noisy), strict=True):
            leaf.grad = gradient / (share * len(x))
        optimizer.step()
    return optree.tree_map(Tensor.detach, params)


def noise_for(epsilon: float | None, share: float, steps: int) -> float:
    """Return the sigma with which so many steps are (epsilon, DELTA)-private."""
    if epsilon is None:
        return 0.0
    wanted = {"target_epsilon": epsilon, "target_delta": DELTA, "sample_rate": share, "steps": steps}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the largest alpha")  # at the ends of the search
        return float(get_noise_multiplier(**wanted, accountant="prv"))


def measure(model: nn.Module, data: dict[str, Any], args: argparse.Namespace) -> Found:
    """Return held-out accuracies by method and epsilon, one for each seed; goes on from what the folder has."""
    file = args.out / "accuracies.json"
    found: Found = json.loads(file.read_text()) if file.exists() else {}
    (x, t), (test_x, test_t) = data["private"], data["test"]
    share = args.batch / len(x)
    settings = [(name, epsilon, seed) for name in METHODS for epsilon in args.epsilons for seed in range(args.seeds)]
    sigmas = {epsilon: noise_for(epsilon, share, args.steps) for epsilon in args.epsilons}
    for name, epsilon, seed in tqdm(settings, desc="private       ", unit="adapter"):
        done = found.setdefault(f"{name}, {epsilon}", [])
        if len(done) <= seed:
            graft = bind(model, METHODS[name])
            params = train(graft, x, t, share, sigmas[epsilon], args.steps, seed)
            with torch.no_grad():
                done.append(float(digits.accuracy(graft(params, test_x), test_t)))
            note(found, file)
    return found


# -- the usual way -----------------------------------------------------------------------------------------------------


class GivenNoise(DPOptimizer):
    """Opacus' optimizer with noise that is given, not drawn."""

    noise: list[Tensor]

    def add_noise(self) -> None:
        for parameter, noise in zip(self.params, self.noise, strict=True):
            parameter.grad = (parameter.summed_grad + noise).view_as(parameter)


def usual(model: nn.Module, params: Tree) -> tuple[Any, list[nn.Parameter]]:
    """Return the model with the same LoRA in place, as Opacus takes it, and the adapter's parameters in its order.

    The layers are PEFT's where that is installed, else torchgraft's, which have its names.
    """
    package = importlib.import_module("peft" if importlib.util.find_spec("peft") else "torchgraft.adapters")
    config = package.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    adapted = package.inject_adapter_in_model(config, copy.deepcopy(model)).train()
    parameters = []
    for path, leaves in params.items():
        for name, leaf in leaves.items():
            parameters.append(getattr(adapted.get_submodule(path), name)["default"].weight)
            parameters[-1].data.copy_(leaf)
    return GradSampleModule(adapted), parameters


def both_steps(model: nn.Module, x: Tensor, t: Tensor, sigma: float, seed: int) -> tuple[dict[str, Any], float]:
    """Return one private step of each kind as a function, and how far the first ones of both are apart.

    Returns:
        Functions by name; and the largest difference between the parameters after one step of SGD, here and by Opacus
        with the same noise, divided by the largest change of one.
    """
    graft = bind(model, METHODS["LoRA"])
    start = perturb(graft.init(digits.seeded(seed)), digits.seeded(seed), 0.1)
    count = sum(leaf.numel() for leaf in optree.tree_leaves(start))
    noise = unravel(sigma * CLIP * torch.randn(count, generator=digits.seeded(seed + 1)), start)

    def loss(params: Tree, x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(graft(params, x), t)

    def losses(many: Tree, x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(graft(route(many), x), t, reduction="none")

    def stepped(each: Any) -> Tree:
        total = each.clipped_sum(start, x, t, max_norm=CLIP).total
        return optree.tree_map(lambda p, g, z: p - (g + z) / len(x), start, total, noise)

    module, parameters = usual(model, start)
    kind = {"noise_multiplier": sigma, "max_grad_norm": CLIP, "expected_batch_size": len(x)}
    optimizer = GivenNoise(torch.optim.SGD(parameters, lr=1.0), **kind)
    optimizer.noise = optree.tree_leaves(noise)

    def opacus_step() -> Tree:
        for parameter, leaf in zip(parameters, optree.tree_leaves(start), strict=True):
            parameter.data.copy_(leaf)
        optimizer.zero_grad()
        F.cross_entropy(module(x), t).backward()
        optimizer.step()
        return optree.tree_unflatten(optree.tree_structure(start), parameters)

    steps = {
        "per_example": lambda: stepped(per_example(loss)),
        "per_example, routed": lambda: stepped(per_example(losses, stacked=True)),
        "Opacus": opacus_step,
    }
    ours, theirs = steps["per_example"](), opacus_step()
    change = max(float((a - b).abs().max()) for a, b in leaves_of(ours, start))
    apart = max(float((a - b).detach().abs().max()) for a, b in leaves_of(ours, theirs))
    return steps, apart / change


def leaves_of(*trees: Tree) -> list[tuple[Tensor, ...]]:
    return list(zip(*map(optree.tree_leaves, trees), strict=True))


def clock(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median time of each step in seconds, all of them taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(rounds), desc="time          ", unit="round"):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(some) for name, some in seconds.items()}


# -- the whole story ---------------------------------------------------------------------------------------------------


def draw(path: Path, found: Found, before: float, sizes: dict[str, int], times: dict[str, float]) -> None:
    """Draw accuracy against epsilon, and the time of a step."""
    figure = Figure(figsize=(15, 7.6), facecolor=PAPER)
    figure.text(0.04, 0.92, "Private training of an adapter", color=INK, fontsize=26, weight="bold")
    story = f"Mirrored digits, read by an adapter trained with DP-SGD, delta = {DELTA:g}. Bars: all seeds."
    figure.text(0.04, 0.865, story, color=MUTED, fontsize=15)
    axes = figure.add_axes((0.06, 0.1, 0.53, 0.68))
    finish(axes, "held-out accuracy against epsilon (less is more private)")
    epsilons = list(dict.fromkeys(key.split(", ")[1] for key in found))
    for name, color in COLORS.items():
        means = [statistics.mean(found[f"{name}, {epsilon}"]) for epsilon in epsilons]
        spread = [
            [abs(pick(found[f"{name}, {epsilon}"]) - mean) for epsilon, mean in zip(epsilons, means, strict=True)]
            for pick in (min, max)
        ]
        label = f"{name}, {sizes[name]:,} numbers"
        axes.errorbar(range(len(means)), means, yerr=spread, color=color, marker="o", linewidth=2.4, label=label)
    axes.axhline(before, color=MUTED, linestyle=(0, (4, 4)), linewidth=1)
    axes.text(len(epsilons) - 1, before + 0.015, "the frozen base", color=MUTED, fontsize=13, ha="right")
    axes.set_xticks(range(len(epsilons)), ["not private" if e == "None" else f"{float(e):g}" for e in epsilons])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", color=FAINT)
    axes.legend(facecolor=PAPER, edgecolor=FAINT, labelcolor=INK, fontsize=13, loc="upper left")
    bars = figure.add_axes((0.76, 0.1, 0.22, 0.68))
    finish(bars, "time of a step, Opacus = 1")
    relative = [seconds / times["Opacus"] for seconds in times.values()]
    bars.barh(range(len(times)), relative, color=["#58b7ff", "#58b7ff", MUTED], height=0.5)
    for place, value in enumerate(relative):
        bars.text(value + 0.02, place, f"{value:.2f}", color=INK, fontsize=14, va="center")
    bars.set_yticks(range(len(times)), list(times))
    bars.set_xlim(0, 1.25 * max(relative))
    figure.savefig(path, dpi=90, facecolor=PAPER)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("privacy-out"), help="folder for the picture and the numbers")
    parser.add_argument("--base-steps", type=int, default=250, help="training steps of the base model")
    parser.add_argument("--steps", type=int, default=50, help="private steps of each adapter")
    parser.add_argument("--batch", type=int, default=128, help="expected number of digits in a step")
    parser.add_argument("--seeds", type=int, default=3, help="adapters of each method and epsilon")
    parser.add_argument("--quick", action="store_true", help="a short run with weaker results")
    args = parser.parse_args(argv)
    args.epsilons, args.rounds = EPSILONS, 15
    if args.quick:
        args.base_steps, args.steps, args.seeds, args.epsilons, args.rounds = 80, 12, 1, (4.0, None), 2
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    claim(args.out, "a run", {name: getattr(args, name) for name in ("base_steps", "steps", "batch", "seeds", "quick")})
    images, labels, test_images, test_labels = digits.load_images(0)
    torch.manual_seed(0)
    model = digits.VisionTransformer(depth=2)
    digits.train_base(model, images[:PUBLIC], labels[:PUBLIC], args.base_steps, 0)
    mirrored = digits.DOMAINS["mirrored"]
    private, test = (mirrored(some, digits.seeded(0)) for some in (images[PUBLIC:], test_images))
    data = {"private": (private, labels[PUBLIC:]), "test": (test, test_labels)}
    with torch.no_grad():
        before = float(digits.accuracy(model(test), test_labels))

    found = measure(model, data, args)
    steps, apart = both_steps(model, private[: args.batch], labels[PUBLIC : PUBLIC + args.batch], 1.0, seed=0)
    times = clock(steps, args.rounds)
    sizes = {
        name: sum(leaf.numel() for leaf in optree.tree_leaves(bind(model, config).init()))
        for name, config in METHODS.items()
    }
    draw(args.out / "privacy.png", found, before, sizes, times)
    print(f"\n{'method, epsilon':<20}{'accuracy of each seed':<30}")
    for key, values in found.items():
        print(f"{key:<20}{', '.join(f'{value:.1%}' for value in values)}")
    print(f"the frozen base     {before:.1%}; {len(private)} private digits, delta {DELTA:g}, clipped to {CLIP:g}")
    print(f"one step of Opacus' and of ours from the same noise: {apart:.1e} apart, relative to the step")
    print("time of a step      " + ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in times.items()))
    print(f"picture             {args.out / 'privacy.png'}, {time.perf_counter() - start:.0f} s in all")
    return {"found": found, "before": before, "apart": apart, "times": times, "picture": args.out / "privacy.png"}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    return until_interrupted(run, parse(argv))


if __name__ == "__main__":
    main()
