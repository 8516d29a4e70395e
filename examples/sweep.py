"""A hyper-parameter sweep in one run: 32 LoRA adapters of several ranks, scalings and learning rates on one base.

A small transformer learns the language reference that ships with Python, character by character, and is frozen. It is
to write the standard library's source code next, with LoRA. Which rank, alpha and learning rate? Every setting is an
adapter of one stack, and every row of a batch has its own adapter: one forward, one backward and one AdamW, with a
learning rate for each adapter, train them all. Stop it whenever you like: the same command goes on where it was.

    pip install torchgraft[demo]
    python examples/sweep.py --out sweep-out
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor

from torchgraft.adapters import LoraConfig, load_adapter, save_adapter
from torchgraft.functional import StackedGraft, Tree, bind, clip_by_norm, route, value_and_grad

try:
    from _resume import claim, digest, load, save, trained_base, until_interrupted
    from _sweep_alone import in_turns, train_alone, warm
    from _sweep_picture import draw
    from _writer import (
        BITS,
        HOLD_OUT,
        LEARN,
        bits_per_character,
        draw_rows,
        loss_by_row,
        reference,
        source,
        spread_rows,
        write,
    )
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"This example needs {error.name}, which is not installed: pip install torchgraft[demo]") from None

RANKS, RATIOS, RATES, SEEDS = (1, 4, 8, 16), (1, 4), (1e-3, 3e-3, 1e-2, 3e-2), (0, 1)
STARTS = ["from ", "def _", "    self.", "    if not ", "    for name in ", "    return self.", "    raise ValueError("]


@dataclass(frozen=True)
class Setting:
    """What one adapter of the sweep is trained with."""

    rank: int
    alpha: int
    rate: float
    seed: int

    def config(self) -> LoraConfig:
        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=["qkv", "out", "up", "down", "head"])


def settings_of(count: int) -> list[Setting]:
    """The first `count` of all 64; 16 have each rank with each rate, 32 also both seeds and both alphas of each."""
    chosen = []
    for turn, (i, rank), (j, rate) in itertools.product(range(4), enumerate(RANKS), enumerate(RATES)):
        chosen.append(Setting(rank, rank * RATIOS[(i + j + turn) % 2], rate, SEEDS[(turn + 1) // 2 % 2]))
    return chosen[:count]


# -- training ---------------------------------------------------------------------------------------------------------


def start(graft: StackedGraft, settings: Sequence[Setting], steps: int, measurements: int) -> Tree:
    """All that a sweep knows about itself, as one tree of tensors: it goes to disk and comes back as it is."""
    sources = [torch.Generator().manual_seed(setting.seed) for setting in settings]
    adapters = graft.init(sources)
    return {
        "adapters": adapters,
        "mean": optree.tree_map(torch.zeros_like, adapters),
        "square": optree.tree_map(torch.zeros_like, adapters),
        "random": torch.stack([source.get_state() for source in sources]),
        "losses": torch.zeros(steps, len(settings)),
        "curves": torch.full((measurements, len(settings)), math.nan),
        "seconds": torch.zeros((), dtype=torch.float64),
        "step": torch.tensor(0),
    }


def advance(graft: StackedGraft, state: Tree, text: Tensor, rates: Tensor) -> Tree:
    """One step of every adapter: draw a row for each, one forward, one backward, one AdamW.

    Args:
        rates: The learning rate of each adapter, `"N"`.
    """
    began, step, steps = time.perf_counter(), int(state["step"]), len(state["losses"])
    source, rows, random = torch.Generator(), [], []
    for own in state["random"]:
        source.set_state(own.clone())  # torch would read a view as if it began where its storage does
        rows.append(draw_rows(text, 1, source))
        random.append(source.get_state())
    batch = torch.cat(rows)

    def losses(adapters: Tree) -> Tensor:
        return loss_by_row(graft(route(adapters), batch[:, :-1]), batch)

    values, grads = value_and_grad(losses, stacked=True)(state["adapters"])
    adapters, mean, square = adamw(
        state["adapters"], clip_by_norm(grads, 1.0), state["mean"], state["square"], step, rates * warm(step, steps)
    )
    return {
        **state,
        "adapters": adapters,
        "mean": mean,
        "square": square,
        "random": torch.stack(random),
        "losses": state["losses"].index_copy(0, torch.tensor([step]), values[None]),
        "seconds": state["seconds"] + time.perf_counter() - began,
        "step": torch.tensor(step + 1),
    }


def adamw(
    params: Tree, grads: Tree, mean: Tree, square: Tree, step: int, rates: Tensor, decay: float = 0.01
) -> tuple[Tree, Tree, Tree]:
    """`torch.optim.AdamW` as a function of a stack, where each adapter has its own learning rate."""

    def new(p: Tensor, m: Tensor, v: Tensor) -> Tensor:
        slope = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        return p - rates.view(-1, *(1,) * (p.ndim - 1)) * (slope + decay * p)

    mean = optree.tree_map(lambda m, g: m.lerp(g, 1 - 0.9), mean, grads)
    square = optree.tree_map(lambda v, g: v.lerp(g * g, 1 - 0.999), square, grads)
    return optree.tree_map(new, params, mean, square), mean, square


def compare(
    graft: StackedGraft, settings: Sequence[Setting], state: Tree, text: Tensor, rates: Tensor, rounds: int
) -> tuple[float, float, float]:
    """Train four adapters alone, in turns with the whole stack, all from the start; see `in_turns`."""
    steps, count = len(state["losses"]), len(settings)
    sample = sorted({i * (count - 1) // 3 for i in range(4)})
    singles = {i: train_alone(graft.member(i), settings[i].rate, settings[i].seed, text, steps) for i in sample}
    again = start(graft, settings, steps, 0)

    def advance_all() -> None:
        nonlocal again
        again = advance(graft, again, text, rates)

    return in_turns(singles, advance_all, state["losses"], rounds)


@torch.no_grad()
def measure(graft: StackedGraft, adapters: Tree, rows: Tensor) -> Tensor:
    """Bits per character of each adapter on the same rows, `"N"`."""
    count = len(graft.members)
    total = torch.zeros(count)
    for few in rows.split(8):
        batch = few.repeat(count, 1)
        total += loss_by_row(graft(route(adapters), batch[:, :-1]), batch).view(count, -1).sum(1)
    return (total / len(rows) * BITS).nan_to_num(nan=math.inf)  # a number that ranks, where training went astray


def written_by(model: Any) -> list[str]:
    return [write(model, prompt, i) for i, prompt in enumerate(STARTS)]


# -- the whole story --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("sweep-out"), help="folder for results, and to resume from")
    parser.add_argument("--adapters", type=int, default=32, help="number of settings to try, 1 to 64")
    parser.add_argument("--steps", type=int, default=800, help="training steps of the adapters")
    parser.add_argument("--base-steps", type=int, default=1000, help="training steps of the base model")
    parser.add_argument("--save-every", type=int, default=100, help="steps from one checkpoint to the next")
    parser.add_argument("--quick", action="store_true", help="a tiny run with weak results")
    args = parser.parse_args(argv)
    args.dim, args.depth, args.rows, args.rounds = 128, 4, 48, 12
    if args.quick:
        args.base_steps, args.steps, args.save_every = 60, 30, 10
        args.dim, args.depth, args.rows, args.rounds = 32, 2, 16, 4
    if not 1 <= args.adapters <= 64:
        parser.error(f"--adapters is {args.adapters}, expected 1 to 64")
    if min(args.steps, args.base_steps, args.save_every) < 2:
        parser.error("--steps, --base-steps and --save-every are at least 2")
    return args


def train(
    graft: StackedGraft,
    state: Tree,
    text: Tensor,
    held_out: Tensor,
    rates: Tensor,
    marks: Sequence[int],
    file: Path,
    save_every: int,
) -> Tree:
    """Go on with a sweep to its end, with a checkpoint every so many steps."""
    steps, count, saved = len(state["losses"]), len(rates), int(state["step"])
    with tqdm(initial=saved, total=steps, desc=f"{count} adapters".ljust(13), unit="step") as progress:
        while True:
            step = int(state["step"])
            if step in marks:
                bits = measure(graft, state["adapters"], held_out)
                row = torch.tensor([marks.index(step)])
                state = {**state, "curves": state["curves"].index_copy(0, row, bits[None])}
                progress.set_postfix_str(f"best {bits.min():.2f} bits per character")
            if step > saved and (step % save_every == 0 or step == steps):
                save(state, file)
                saved = step
            if step == steps:
                return state
            state = advance(graft, state, text, rates)
            progress.update()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    return until_interrupted(run, parse(argv))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the base and the sweep, or what is left of them; rank, save, compare and draw."""
    began = time.perf_counter()
    (docs, docs_held_out), code = reference(), source(LEARN)
    rows = spread_rows(source(HOLD_OUT), args.rows)
    facts = {key: getattr(args, key) for key in ("adapters", "steps", "base_steps", "dim", "depth", "rows")}
    settings, texts = settings_of(args.adapters), digest((docs, code, rows))
    grid = hashlib.sha256(repr(settings_of(64)).encode()).hexdigest()[:16]
    claim(args.out, "a sweep", {**facts, "texts": texts, "grid": grid, "torch": torch.__version__})

    # A model, trained and frozen.
    model = trained_base(args.out / "base.safetensors", docs, args.dim, args.depth, args.base_steps)

    # Every setting is an adapter of one stack.
    rates = torch.tensor([setting.rate for setting in settings])
    graft = bind(model, [setting.config() for setting in settings])
    marks = sorted({args.steps * k // 10 for k in range(11)})
    state, file = start(graft, settings, args.steps, len(marks)), args.out / "state.safetensors"
    if file.exists():
        state = load(state, file)
    state = train(graft, state, code, rows, rates, marks, file, args.save_every)
    after = state["curves"][-1].tolist()

    # The best of them, as a checkpoint that PEFT reads too.
    ranked = sorted(range(len(settings)), key=after.__getitem__)
    best, folder = ranked[0], args.out / "best"
    chosen, adapter = graft.member(best), graft.unstack(state["adapters"])[best]
    save_adapter(chosen, folder, params=adapter)
    loaded = load_adapter(chosen, folder)
    reload_equal = optree.tree_all(optree.tree_map(torch.equal, loaded, adapter))

    # What it saved, and whether an adapter of the stack is what it would have been alone.
    alone, together, difference = compare(graft, settings, state, code, rates, min(args.rounds, args.steps))
    speedup, seconds = alone * len(settings) / together, float(state["seconds"])
    before = bits_per_character(model, rows)
    on_docs = bits_per_character(model, spread_rows(docs_held_out, args.rows))

    print(f"\n    {'rank':>6}{'alpha':>7}{'rate':>8}{'seed':>6}{'before':>9}{'after':>8}   held-out bits per character")
    for place, (i, one) in enumerate([(i, settings[i]) for i in ranked], start=1):
        print(f"{place:>3}.{one.rank:>6}{one.alpha:>7}{one.rate:>8g}{one.seed:>6}{before:>9.3f}{after[i]:>8.3f}")
    picture, count, own = args.out / "sweep.png", len(settings), settings[best]
    title = f"What the best writes: rank {own.rank}, alpha {own.alpha}, rate {own.rate:g}"
    took = f"Training: {seconds:.0f} s at once, {seconds * speedup:.0f} s one by one."
    draw(
        picture,
        f"{count} adapters in one run: {before:.2f} bits per character become {after[best]:.2f}",
        f"A model of Python's language reference learns its source code. {took}",
        [setting.rank for setting in settings],
        [setting.rate for setting in settings],
        dict(zip(marks, state["curves"], strict=True)),
        after,
        {"What the base writes": written_by(model), title: written_by(lambda x: chosen(loaded, x))},
        STARTS,
    )
    print(f"\nbase model    {on_docs:.3f} bits per character on held-out topics of the reference, {before:.3f} on code")
    print(f"training      {seconds:.0f} s at once; one by one: {seconds * speedup:.0f} s, {speedup:.1f} times as much")
    print(f"              ({1000 * together:.0f} ms for a step of all, {1000 * alone:.1f} ms for one of one, in turns)")
    print(f"alone         a loss differs by at most {difference:.1e} from the same adapter's in the stack")
    print(f"best adapter  {folder}, read back {'equal' if reload_equal else 'DIFFERENT'}")
    print(f"picture       {picture}, after {time.perf_counter() - began:.0f} s in all")
    return {
        "settings": settings, "before": before, "after": after, "best": best, "folder": folder, "picture": picture,
        "state": state, "graft": graft, "model": model, "reload_equal": reload_equal, "difference": difference,
        "speedup": speedup,
    }  # fmt: skip


if __name__ == "__main__":
    measured = main()
    if not (measured["reload_equal"] and measured["difference"] < 1e-3):
        raise SystemExit("A check failed; see above.")
