"""The posterior of an adapter: Langevin dynamics, variational inference and Laplace, and how well each is calibrated.

A small transformer learns scikit-learn's handwritten digits and is frozen, and an adapter learns from few examples to
read them turned by 90 degrees: it is right more often than not, and far too sure of it. Samplers of the package
`posteriors` take the adapter as it is, a tree of tensors. What they draw is a stack, which predicts as an ensemble in
one routed forward; Laplace's samples go through `torch.func.jvp` of the graft, the linearised network. Held against
each other: accuracy, log likelihood and calibration on held-out digits, beside one adapter alone, its logits divided by
a temperature, and an ensemble of adapters that are each trained from another start.

    pip install torchgraft[demo]
    python examples/posterior.py --out posterior-out
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap

from torchgraft.adapters import LoraConfig
from torchgraft.functional import Graft, Tree, bind, perturb, route, stack, unstack

try:
    import _recipes as recipes
    import digits
    from _calibration import Score, draw, score
    from _resume import claim, note, until_interrupted
    from tqdm import tqdm

    with warnings.catch_warnings():  # tensordict says of defaults in posteriors what will be otherwise
        warnings.simplefilter("ignore", FutureWarning)
        import posteriors
        import torchopt
except ImportError as error:
    raise SystemExit(f"This example needs {error.name}, which is not installed: pip install torchgraft[demo]") from None

BATCH, PRIOR = 32, 0.1
"""Examples of a batch, and the standard deviation of the prior of each number."""
PRIORS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""Deviations that Laplace chooses from."""
TEMPERED = "... at a temperature"
Batch = tuple[Tensor, Tensor]


class Task(NamedTuple):
    """The adapter's problem.

    Attributes:
        graft: The frozen model, bound.
        images: What it learns from, `"n 32 32"`, and
        labels: `"n"`.
        spare: Examples for the temperature alone.
        test: Held-out ones.
    """

    graft: Graft
    images: Tensor
    labels: Tensor
    spare: Batch
    test: Batch

    def batch(self, step: int) -> Batch:
        rows = torch.randint(len(self.images), (BATCH,), generator=digits.seeded(step))
        return self.images[rows], self.labels[rows]


# -- likelihood and prior ---------------------------------------------------------------------------------------------


def likelihoods(graft: Graft, many: Tree, batch: Batch) -> Tensor:
    """Log likelihood of each example under each adapter of a stack, `"adapter n"`, in one routed forward."""
    return predicted(graft, many, batch[0]).gather(-1, batch[1].expand(count(many), -1)[..., None])[..., 0]


def predicted(graft: Graft, many: Tree, images: Tensor) -> Tensor:
    """Log probabilities of classes under each adapter of a stack, `"adapter n 10"`."""
    size = count(many)
    rows = torch.arange(size).repeat_interleave(len(images))
    logits = graft(route(many, rows), images.repeat(size, 1, 1))
    return logits.unflatten(0, (size, len(images))).log_softmax(-1)


def count(many: Tree) -> int:
    return len(optree.tree_leaves(many)[0])


def log_posterior(task: Task, many: Tree, batch: Batch) -> Tensor:
    """Log posterior of each adapter of a stack, over the number of examples.

    `log p(theta | D) / n = mean_i log p(y_i | x_i, theta) - |theta|^2 / (2 n PRIOR^2)`, up to a constant; a sampler at
    temperature `1 / n` samples the posterior.
    """
    squares = torch.stack([leaf.square().flatten(1).sum(1) for leaf in optree.tree_leaves(many)]).sum(0)
    return likelihoods(task.graft, many, batch).mean(1) - squares / (2 * len(task.images) * PRIOR**2)


def of_one(task: Task) -> Callable[[Tree, Batch], tuple[Tensor, Tensor]]:
    """The log posterior of one adapter as `posteriors` takes it, with nothing beside it."""
    return lambda params, batch: (log_posterior(task, stack([params]), batch)[0], torch.zeros(()))


# -- ways to have an ensemble -----------------------------------------------------------------------------------------


def trained(task: Task, members: int, steps: int, file: Path) -> Tree:
    """Train adapters from different starts, all at once: each a mode of the posterior."""
    many = stack([task.graft.init(digits.seeded(i)) for i in range(members)])
    leaves = optree.tree_leaves(many)
    recipes.minimise(
        lambda step: -log_posterior(task, many, task.batch(step)).sum(), leaves, steps, 1e-2, "modes", file
    )
    return many


def langevin(task: Task, params: Tree, chains: int, steps: int, rate: float = 1e-3) -> Tree:
    """Walk from the mode by SGLD; the chains are a stack, and a sample is where each has arrived.

    The sum over a stack of log posteriors has each chain's own gradient, so one state of `posteriors` holds all.
    """
    transform = posteriors.sgmcmc.sgld.build(
        lambda many, batch: (log_posterior(task, many, batch).sum(), torch.zeros(())),
        rate,
        temperature=1 / len(task.images),
    )
    state = transform.init(stack([params] * chains))
    for step in tqdm(range(steps), desc=f"{'Langevin':<14}", unit="step"):
        state, _ = transform.update(state, task.batch(step))
    return plain(state.params)


def variational(task: Task, params: Tree, samples: int, steps: int) -> Tree:
    """Fit a normal distribution with a diagonal covariance, from the mode, and draw from it."""
    optimizer = torchopt.adam(lr=3e-3)
    transform = posteriors.vi.diag.build(of_one(task), optimizer, temperature=1 / len(task.images), init_log_sds=-4.0)
    state = transform.init(params)
    for step in tqdm(range(steps), desc=f"{'variational':<14}", unit="step"):
        state, _ = transform.update(state, task.batch(step))
    return plain(posteriors.vi.diag.sample(state, (samples,)))


def fisher(task: Task, params: Tree) -> Tree:
    """Diagonal of the empirical Fisher information at the mode: squares of each example's gradient, summed."""

    def each(params: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        return likelihoods(task.graft, stack([params]), batch)[0], torch.zeros(())

    transform = posteriors.laplace.diag_fisher.build(each, per_sample=True)
    state = transform.init(params)
    for images, labels in zip(task.images.split(16), task.labels.split(16), strict=True):
        state, _ = transform.update(state, (images, labels))
    return plain(state.prec_diag)


def laplace(params: Tree, information: Tree, prior: float, samples: int) -> Tree:
    """Draw from Laplace's approximation, `N(theta*, 1 / (F + 1 / prior^2))`."""
    deviations = optree.tree_map(lambda own: (own + prior**-2).rsqrt(), information)
    return perturb(params, [digits.seeded(i) for i in range(samples)], deviations)


def linearised(graft: Graft, params: Tree, many: Tree, images: Tensor) -> Tensor:
    """Log probabilities `"adapter n 10"` of the network's linearisation, `f(theta*) + J (theta - theta*)`."""

    def logits(there: Tree) -> Tensor:
        away: Tree = optree.tree_map(torch.sub, there, params)
        found = jvp(lambda params: graft(params, images), (params,), (away,))
        return found[0] + found[1]

    return vmap(logits)(many).log_softmax(-1)


def plain(tree: Tree) -> Tree:
    result: Tree = optree.tree_map(torch.Tensor.detach, tree)
    return result


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that logits are best divided by, of 61 from 1/4 to 16."""
    candidates = 2 ** torch.linspace(-2, 4, 61)
    return min(candidates.tolist(), key=lambda t: float(F.cross_entropy(logits / t, labels)))


# -- the whole story --------------------------------------------------------------------------------------------------


def compare(task: Task, args: argparse.Namespace) -> tuple[dict[str, Score], dict[str, float]]:
    """Score each way to predict; returns what was chosen on spare digits too: a temperature, and priors of Laplace."""
    torch.manual_seed(0)
    modes = trained(task, args.members, args.steps, args.out / "modes.safetensors")
    one = unstack(modes)[0]
    images, labels = task.test
    with torch.no_grad():
        temperature = best_temperature(task.graft(one, task.spare[0]), task.spare[1])
        chosen = {TEMPERED: temperature}
        scaled = (task.graft(one, images) / temperature).log_softmax(-1)[None]
    sampled = {
        "Langevin": langevin(task, one, args.members, args.walk),
        "variational": variational(task, one, args.members, args.walk),
    }
    information = fisher(task, one)
    ways: dict[str, Callable[[Tree, Tensor], Tensor]] = {
        "Laplace": partial(predicted, task.graft),
        "Laplace, linearised": partial(linearised, task.graft, one),
    }
    with torch.no_grad():
        found = {"one adapter": predicted(task.graft, stack([one]), images), TEMPERED: scaled}
        found |= {name: predicted(task.graft, many, images) for name, many in sampled.items()}
        for name, predict in ways.items():
            drawn = {prior: laplace(one, information, prior, 4 * args.members) for prior in PRIORS}
            chosen[name] = min(PRIORS, key=lambda prior: score(predict(drawn[prior], task.spare[0]), task.spare[1]).nll)
            found[name] = predict(drawn[chosen[name]], images)
        found[f"{args.members} adapters"] = predicted(task.graft, modes, images)
    return {name: score(log_probs, labels) for name, log_probs in found.items()}, chosen


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("posterior-out"), help="folder for results, and to resume from"
    )
    parser.add_argument("--base-steps", type=int, default=400, help="training steps of the base model")
    parser.add_argument("--examples", type=int, default=256, help="turned digits that an adapter learns from")
    parser.add_argument("--steps", type=int, default=160, help="training steps of an adapter")
    parser.add_argument(
        "--walk", type=int, default=120, help="steps of Langevin dynamics, and of variational inference"
    )
    parser.add_argument("--members", type=int, default=8, help="adapters of each ensemble")
    parser.add_argument("--quick", action="store_true", help="a short run with weak results")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(base_steps=60, examples=32, steps=20, walk=4, members=3)
    if min(args.examples, args.steps, args.walk, args.members, args.base_steps) < 1:
        parser.error("--examples, --steps, --walk, --members and --base-steps are at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    return until_interrupted(run, parse(argv))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train an adapter, or what is left of it; sample around it, compare and draw."""
    began = time.perf_counter()
    claim(args.out, "posteriors", {key: getattr(args, key) for key in ("base_steps", "examples", "steps", "members")})
    model, data = recipes.frozen_reader(args.out, args.base_steps)
    graft = bind(model, LoraConfig(r=2, lora_alpha=8, target_modules=recipes.TARGETS))
    turned, held_out = data.images.rot90(1, (-2, -1)), data.test_images.rot90(1, (-2, -1))
    n = args.examples
    task = Task(
        graft, turned[:n], data.labels[:n], (turned[n : 2 * n], data.labels[n : 2 * n]), (held_out, data.test_labels)
    )
    scores, chosen = compare(task, args)

    picture = args.out / "posterior.png"
    draw(picture, scores, n)
    print(f"\n{'':<22}{'accuracy':>10}{'neg. log likelihood':>22}{'calibration error':>20}")
    for name, one in scores.items():
        print(f"{name:<22}{one.accuracy:>10.1%}{one.nll:>22.3f}{one.ece:>20.3f}")
    print(f"\nchosen        on {len(task.spare[1])} more labelled digits: a temperature of {chosen[TEMPERED]:.2f},")
    priors = ", ".join(f"{chosen[name]:g} for {name}" for name in ("Laplace", "Laplace, linearised"))
    print(f"{'':<14}deviations of the prior {priors}")
    print(f"picture       {picture}, after {time.perf_counter() - began:.0f} s in all")
    note({name: one._asdict() for name, one in scores.items()}, args.out / "posterior.json")
    return {"scores": scores, "chosen": chosen, "task": task, "picture": picture}


if __name__ == "__main__":
    main()
