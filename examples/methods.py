"""All methods on one real task: the same base, the same steps, several learning rates and seeds of each at once.

A small transformer learns scikit-learn's handwritten digits and is frozen; then digits are turned by 90 degrees, and it
reads one in ten. Each method gets the same number of steps to mend that. Its adapters, one for each seed and learning
rate, train together in a bank: one forward and one backward for all of them. The learning rate is chosen on digits that
are neither trained on nor reported; what is drawn is the mean over seeds on held-out ones, and their spread. Stop it at
any time: the same command goes on with the methods that are left.

    pip install torchgraft[demo]
    python examples/methods.py --out methods-out
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digits
import optree
import torch
import torch.nn.functional as F
from _panels import INK, MUTED, PAPER, finish
from _resume import claim, note, until_interrupted
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from torchgraft import adapters
from torchgraft.adapters import AdapterConfig, Bank, adamw
from torchgraft.functional import bind

TARGETS = ["qkv", "out", "up", "down"]
RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256)
SIZES: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {"init_r": 4, "target_r": 4, "total_step": 1000},
    "AdamssConfig": {"r": 32, "num_subspaces": 4, "subspace_rank": 2},
    "ArrowLoraConfig": {"r": 2},
    "BOFTConfig": {"boft_block_size": 4},
    "BottleneckConfig": {"r": 4},
    "C3AConfig": {"block_size": 32},
    "DeftConfig": {"r": 4},
    "DeloraConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 256},
    "GloraConfig": {"r": 4},
    "GraloraConfig": {"r": 4, "gralora_k": 2},
    "HRAConfig": {"r": 4},
    "HiraConfig": {"r": 4},
    "LilyConfig": {"r": 4},
    "IA3Config": {"feedforward_modules": ["down"]},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "LoraConfig": {"r": 4},
    "LoReftConfig": {"r": 4},
    "LoraXSConfig": {"r": 8},
    "MissConfig": {"r": 4},
    "OFTConfig": {"oft_block_size": 8},
    "PeanutConfig": {"r": 4},
    "PolyConfig": {"r": 4, "n_skills": 2},
    "PsoftConfig": {"r": 8},
    "PveraConfig": {"r": 64},
    "RandLoraConfig": {"r": 16, "randlora_alpha": 32},
    "RoadConfig": {"group_size": 32},
    "ShiraConfig": {"r": 4, "random_seed": 0},
    "TinyLoraConfig": {"r": 2, "u": 32},
    "UniLoraConfig": {"r": 4, "theta_d_length": 1024},
    "VBLoRAConfig": {"r": 4, "num_vectors": 64, "vector_length": 32},
    "VeraConfig": {"r": 64},
    "WaveFTConfig": {"n_frequency": 256},
}
"""What fits layers of 64 to 256 numbers, where defaults are for larger ones."""
OTHERWISE = ("LNTuningConfig", "TrainableTokensConfig")
"""Methods that do not adapt linear layers."""


@dataclass(frozen=True)
class Result:
    """What one method reached.

    Attributes:
        parameters: Numbers that one adapter trains.
        seconds: Time of a step of one adapter; all are stepped together.
        rate: The learning rate that was chosen.
        accuracies: Held-out accuracy of each seed at this rate.
    """

    parameters: int
    seconds: float
    rate: float
    accuracies: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def configs(only: Sequence[str] | None = None) -> dict[str, AdapterConfig]:
    """A config of each method, by the method's name."""
    found = {}
    for name in sorted(vars(adapters)):
        cls = getattr(adapters, name)
        if (
            isinstance(cls, type)
            and issubclass(cls, AdapterConfig)
            and cls is not AdapterConfig
            and name not in OTHERWISE
        ):
            config = cls(target_modules=TARGETS, **SIZES.get(name, {}))
            if not only or config.method.name in only:
                found[name.removesuffix("Config")] = config
    return found


def train(
    model: nn.Module,
    config: AdapterConfig,
    data: Mapping[str, tuple[Tensor, Tensor]],
    steps: int,
    seeds: int,
    name: str,
) -> Result:
    """Train an adapter for each rate and seed, all in the same steps, and read held-out digits with the best rate."""
    settings = {f"{rate:g}, {seed}": (rate, seed) for rate in RATES for seed in range(seeds)}
    graft = bind(model, config)
    bank = Bank(graft, slots=len(settings), optimizer=adamw())
    for label, (_, seed) in settings.items():
        bank.add(label, config, generator=digits.seeded(seed))
    images, labels = data["train"]
    sources, seconds = [digits.seeded(seed) for _, seed in settings.values()], []
    for step in tqdm(range(steps), desc=f"{name:<14}", unit="step"):
        chosen = torch.cat([torch.randint(len(images), (digits.BATCH // 4,), generator=source) for source in sources])
        rows = [label for label in settings for _ in range(digits.BATCH // 4)]
        began = time.perf_counter()
        with bank.rows(rows) as adapted:
            F.cross_entropy(adapted(images[chosen]), labels[chosen], reduction="sum").backward()
        slower = 1 - step / steps
        bank.step({label: {"lr": rate * slower, "weight_decay": 0.0} for label, (rate, _) in settings.items()})
        seconds.append(time.perf_counter() - began)
    with torch.no_grad():
        read = {
            split: {label: correct(bank, label, *data[split]) for label in settings} for split in ("choose", "test")
        }
    by_rate = {rate: statistics.mean(read["choose"][f"{rate:g}, {seed}"] for seed in range(seeds)) for rate in RATES}
    best = max(by_rate, key=by_rate.__getitem__)
    count = sum(leaf.numel() for leaf in optree.tree_leaves(graft.init()))
    accuracies = [read["test"][f"{best:g}, {seed}"] for seed in range(seeds)]
    return Result(count, statistics.median(seconds) / len(settings), best, accuracies)


def correct(bank: Bank, label: str, images: Tensor, labels: Tensor) -> float:
    return float(digits.accuracy(bank.view([label] * len(images))(images), labels))


def alike(found: Mapping[str, Result]) -> tuple[float, list[str]]:
    """Return twice the standard error of a mean, and the methods that are no further than that from the best."""
    spread = statistics.median(result.spread for result in found.values())
    noise = 2 * spread * (2 / len(next(iter(found.values())).accuracies)) ** 0.5
    best = max(result.mean for result in found.values())
    return noise, [name for name, result in found.items() if best - result.mean <= noise]


def draw(path: Path, found: Mapping[str, Result], before: float) -> None:
    """Draw accuracy against trained parameters and against the time of a step."""
    noise, near = alike(found)
    figure = Figure(figsize=(16, 8.6), facecolor=PAPER)
    figure.text(0.04, 0.93, f"{len(found)} methods, one task, equal steps", color=INK, fontsize=26, weight="bold")
    story = (
        f"Digits turned by 90 degrees; the frozen base reads {before:.0%}. Bars: one standard deviation over seeds. "
        f"Within {noise:.1%} of the best is noise: {len(near)} of {len(found)}."
    )
    figure.text(0.04, 0.885, story, color=MUTED, fontsize=14)
    reference = found.get("Lora") or next(iter(found.values()))
    across = {
        "trained parameters": {name: float(result.parameters) for name, result in found.items()},
        "time of a step, LoRA = 1": {name: result.seconds / reference.seconds for name, result in found.items()},
    }
    best = max(result.mean for result in found.values())
    for i, (title, x) in enumerate(across.items()):
        axes = figure.add_axes((0.05 + 0.49 * i, 0.09, 0.44, 0.72))
        finish(axes, f"accuracy against {title}")
        axes.axhspan(best - noise, best, color="#58b7ff", alpha=0.15)
        for name, result in found.items():
            color = "#58b7ff" if name in near else MUTED
            axes.errorbar(x[name], result.mean, yerr=result.spread, fmt="o", color=color, markersize=6, linewidth=1)
            axes.annotate(name, (x[name], result.mean), (6, 4), textcoords="offset points", color=color, fontsize=11)
        axes.set_xscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.savefig(path, dpi=90, facecolor=PAPER)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("methods-out"), help="folder for the picture and the numbers")
    parser.add_argument("--base-steps", type=int, default=400, help="training steps of the base model")
    parser.add_argument("--steps", type=int, help="training steps of each adapter; 80, in a quick run 6")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each method and learning rate")
    parser.add_argument("--only", nargs="*", help="methods to run, by the names of their types (LORA)")
    parser.add_argument("--quick", action="store_true", help="a short run with weaker results")
    args = parser.parse_args(argv)
    known = sorted(config.method.name for config in configs().values())
    if unknown := set(args.only or ()) - set(known):
        parser.error(f"--only has {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    if args.quick:
        args.base_steps, args.seeds = 60, 2
    args.steps = args.steps or (6 if args.quick else 80)
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    return until_interrupted(run, parse(argv))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the methods that are not in the folder yet, and draw all of them."""
    start, file = time.perf_counter(), args.out / "methods.json"
    claim(args.out, "methods", {key: getattr(args, key) for key in ("base_steps", "steps", "seeds")})
    images, labels, test_images, test_labels = digits.load_images(0)
    torch.manual_seed(0)
    model = digits.VisionTransformer()
    digits.train_base(model, images, labels, args.base_steps, 0)
    turned, held_out = (digits.DOMAINS["turned"](some, digits.seeded(0)) for some in (images, test_images))
    data = {
        "train": (turned[:-300], labels[:-300]),
        "choose": (turned[-300:], labels[-300:]),
        "test": (held_out, test_labels),
    }
    with torch.no_grad():
        before = float(digits.accuracy(model(held_out), test_labels))
    known = json.loads(file.read_text())["methods"] if file.exists() else {}
    found = {}
    for name, config in configs(args.only).items():
        one = known.get(name)
        found[name] = Result(**one) if one else train(model, config, data, args.steps, args.seeds, name)
        known[name] = vars(found[name])
        note({"before": before, "methods": known}, file)
    draw(args.out / "methods.png", found, before)
    noise, near = alike(found)
    print(f"\n{'':<12}{'parameters':>12}{'accuracy':>10}{'spread':>8}{'rate':>9}{'ms a step':>11}")
    for name, result in sorted(found.items(), key=lambda item: -item[1].mean):
        print(
            f"{name:<12}{result.parameters:>12,}{result.mean:>10.1%}{result.spread:>8.1%}{result.rate:>9g}"
            f"{1e3 * result.seconds:>11.2f}"
        )
    print(f"\nthe frozen base reads {before:.1%}; differences below {noise:.1%} are noise: {', '.join(near)} are alike")
    print(f"picture {args.out / 'methods.png'}, {time.perf_counter() - start:.0f} s in all")
    return {"found": found, "before": before, "noise": noise, "near": near, "picture": args.out / "methods.png"}


if __name__ == "__main__":
    main()
