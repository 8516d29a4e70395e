"""24 tenants train adapters of their own on one base in 8 slots: they come, wait, train at their own pace, and leave.

A small transformer learns the language reference that ships with Python, and is frozen. Each tenant is a thread that
wants it to write one module of the standard library, with a rank, learning rate, batch size and lifetime of its own,
and knows nothing of the others. A bank holds the adapters, and a scheduler mixes waiting work into one batch. Each
tenant is then trained once more alone, with `bind` and torch's AdamW: the curves coincide. Stop it at any time:
the same command goes on where it was.

    pip install torchgraft[demo]
    python examples/tenants.py --out tenants-out
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import optree
import torch
from torch import nn

from torchgraft.adapters import Bank
from torchgraft.functional import bind

try:
    from _house import House, Request, Scheduler, Tenant
    from _resume import claim, digest, note, trained_base, until_interrupted
    from _tenants_picture import draw
    from _writer import CONTEXT, bits_per_character, loss_by_row, reference, spread_rows
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"This example needs {error.name}, which is not installed: pip install torchgraft[demo]") from None

MODULES = [
    *("argparse", "ast", "calendar", "configparser", "copy", "csv", "dataclasses", "difflib"),
    *("fractions", "functools", "heapq", "inspect", "ipaddress", "locale", "optparse", "pdb"),
    *("pickle", "queue", "shutil", "statistics", "string", "subprocess", "tarfile", "threading"),
]
RANKS, RATES, ROWS = (1, 2, 4, 8, 16), (3e-3, 6e-3, 1e-2), (1, 2, 3, 4)


def tenants_of(count: int, steps: int, every: int) -> list[Tenant]:
    """Some tenants, no two of whom are alike; the first few come at once, then one after so many batches."""
    chosen = []
    for i, name in enumerate(MODULES[:count]):
        lifetime = steps // 2 + (i * 7 % count) * steps // count
        arrives = max(0, i - 4) * every
        chosen.append(Tenant(name, i, RANKS[i % 5], RATES[i % 3], ROWS[i % 4], arrives, max(1, lifetime)))
    return chosen


# -- alone ------------------------------------------------------------------------------------------------------------


class Alone:
    """A tenant without a bank: `bind`, and an optimizer of torch's."""

    def __init__(self, model: nn.Module, tenant: Tenant):
        self.tenant, self.graft = tenant, bind(model, tenant.config())
        self.params = self.graft.init(tenant.fresh())
        self.leaves = [leaf.requires_grad_() for leaf in optree.tree_leaves(self.params)]
        self.optimizer = torch.optim.AdamW(self.leaves)

    def train(self, step: int) -> float:
        rows, hyper = self.tenant.draw(step), self.tenant.hyper(step)
        loss = loss_by_row(self.graft(self.params, rows[:, :-1]), rows).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.leaves, hyper.pop("max_norm"))
        self.optimizer.param_groups[0].update(hyper)
        self.optimizer.step()
        return loss.item()


def train_alone(model: nn.Module, tenants: Sequence[Tenant], folder: Path) -> dict[str, list[float]]:
    """Train every tenant once more, each by itself; returns losses by name. Goes on with those that are missing."""
    losses: dict[str, list[float]] = {}
    done = 0
    with tqdm(total=sum(tenant.steps for tenant in tenants), desc="each alone".ljust(13), unit="step") as progress:
        for tenant in tenants:
            file = folder / tenant.name / "alone.json"
            if not file.exists():
                alone = Alone(model, tenant)
                note([alone.train(step) for step in range(tenant.steps) if progress.update() or True], file)
            losses[tenant.name] = json.loads(file.read_text())
            done += tenant.steps
            progress.update(done - progress.n)
    return losses


def race(model: nn.Module, tenants: Sequence[Tenant], rounds: int) -> dict[str, float]:
    """Train some tenants together and one at a time, in turns; returns characters per second."""
    bank = Bank(bind(model, max(tenants, key=lambda tenant: tenant.rank).config()), slots=len(tenants))
    for tenant in tenants:
        bank.add(tenant.name, tenant.config(), generator=tenant.fresh())
    scheduler, each = Scheduler(bank, len(tenants) * max(ROWS)), [Alone(model, tenant) for tenant in tenants]

    def mixed(step: int) -> None:
        scheduler.run([Request(tenant, step, tenant.draw(step)) for tenant in tenants])

    def one_by_one(step: int) -> None:
        for alone in each:
            alone.train(step)

    ways: dict[str, Callable[[int], None]] = {"together": mixed, "one at a time": one_by_one}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for step in tqdm(range(rounds), desc="in turns".ljust(13), unit="step"):
        for way, train in ways.items():
            began = time.perf_counter()
            train(step)
            seconds[way].append(time.perf_counter() - began)
    characters = CONTEXT * sum(tenant.rows for tenant in tenants)
    return {way: characters / median(own[1:]) for way, own in seconds.items()}


# -- the whole story --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tenants-out"), help="folder for results, and to resume from")
    parser.add_argument("--tenants", type=int, default=24, help=f"how many tenants, 1 to {len(MODULES)}")
    parser.add_argument("--slots", type=int, default=8, help="how many of them have a place at one time")
    parser.add_argument(
        "--steps", type=int, default=120, help="steps of a tenant, half to one and a half times as many"
    )
    parser.add_argument("--base-steps", type=int, default=1000, help="training steps of the base model")
    parser.add_argument("--save-every", type=int, default=40, help="batches from one checkpoint to the next")
    parser.add_argument("--quick", action="store_true", help="a tiny run with weak results")
    parser.set_defaults(dim=128, depth=4, most=20, every=12, rounds=12)
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(tenants=6, slots=3, steps=8, base_steps=60, save_every=3, dim=32, depth=2, most=6, every=2)
        args.rounds = 3
    if not 1 <= args.tenants <= len(MODULES):
        parser.error(f"--tenants is {args.tenants}, expected 1 to {len(MODULES)}")
    if min(args.slots, args.base_steps, args.save_every) < 1 or args.steps < 2:
        parser.error("--slots, --base-steps and --save-every are at least 1, --steps at least 2")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    return until_interrupted(run, parse(argv))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the base, the tenants, and each of them alone, or what is left of it; compare and draw."""
    began = time.perf_counter()
    tenants, docs = tenants_of(args.tenants, args.steps, args.every), reference()[0]
    keys = ("tenants", "slots", "steps", "base_steps", "dim", "depth", "most", "every")
    facts = {key: getattr(args, key) for key in keys}
    texts = digest([docs, *(text for tenant in tenants for text in tenant.texts)])
    claim(args.out, "tenants", {**facts, "texts": texts, "torch": torch.__version__})
    model = trained_base(args.out / "base.safetensors", docs, args.dim, args.depth, args.base_steps)

    house = House(model, tenants, args.slots, args.most, args.out)
    house.run(args.save_every)
    alone = train_alone(model, tenants, args.out)
    difference = max(
        abs(a - b) for name, losses in house.losses.items() for a, b in zip(losses, alone[name], strict=True)
    )
    speed = race(model, tenants[: args.slots], args.rounds)
    before = {t.name: bits_per_character(model, spread_rows(t.texts[1], 16)) for t in tenants}

    print(f"\n{'':<14}{'rank':>5}{'rate':>8}{'rows':>6}{'steps':>7}{'before':>9}{'after':>8}   held-out bits")
    for one in tenants:
        row = f"{one.name:<14}{one.rank:>5}{one.rate:>8g}{one.rows:>6}{one.steps:>7}"
        print(f"{row}{before[one.name]:>9.3f}{house.bits[one.name]:>8.3f}")
    times = speed["together"] / speed["one at a time"]
    picture = args.out / "tenants.png"
    draw(picture, tenants, house.spans, house.log, house.losses, alone, speed, args.slots, difference)
    size = sum(map(len, house.log)) / len(house.log)
    print(f"\nbatches       {len(house.log)}, of {size:.1f} tenants on average, in {args.slots} slots")
    print(f"alone         a loss differs by at most {difference:.1e} from the same tenant's in the bank")
    print(f"speed         {speed['together']:,.0f} characters/s together, {times:.1f} times as many as one at a time")
    print(f"adapters      {args.out}, one folder each, which PEFT reads too")
    print(f"picture       {picture}, after {time.perf_counter() - began:.0f} s in all")
    return {
        "tenants": tenants,
        "house": house,
        "alone": alone,
        "before": before,
        "difference": difference,
        "speed": speed,
        "picture": picture,
        "model": model,
    }


if __name__ == "__main__":
    if main()["difference"] > 1e-2:
        raise SystemExit("A check failed; see above.")
