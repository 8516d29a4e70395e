"""One batch on several processes: tenants of one frozen base, each with rows on whichever rank has room.

    pip install torchgraft[demo]
    torchrun --nproc-per-node 2 examples/distributed.py --check
    torchrun --nproc-per-node 4 examples/distributed.py --shard       # goes on from the checkpoint of the two

A small transformer is the base, whole on each rank or sharded by `fully_shard`. Five tenants write in registers of
their own, with ranks and learning rates of their own. Every batch is dealt out to the ranks row by row; `step` adds up
what they collected. `--check` runs the same batches in this process alone, and says how far apart the adapters are.

What to change for GPUs: `dist.init_process_group("nccl")` after `torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))`,
and the base and the ids on that device. For many machines:
- Start it on each: `torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 ...`.
- `--out` has to be a directory that all of them see.
- Load the base from disk on each rank in place of `make_base`; for one that does not fit, make it on the meta device,
  call `fully_shard`, and load with `torch.distributed.checkpoint`.
- With several machines shard within each, and replicate across: a mesh of two axes for `fully_shard`.
- Let a scheduler send each rank its rows. Every rank has to know whom to step, and a sharded base has to run as often
  on each: a rank without rows of its own runs one of any tenant, with `tokens=[0]` and its loss times 0.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from torchgraft.adapters import Bank, LoraConfig, ReplicatedBank, adamw
from torchgraft.functional import bind

try:
    import _characters as lm
except ImportError as error:
    raise SystemExit(f"This example needs {error.name}, which is not installed: pip install torchgraft[demo]") from None

Register = Callable[[str], str]
TENANTS: dict[str, tuple[Register, int, float]] = {  # how each writes, its rank, its learning rate
    "shouted": (str.upper, 8, 1e-2),
    "snake": (lambda text: text.replace(" ", "_"), 2, 2e-2),
    "vowelless": (lambda text: "".join(c for c in text if c not in "aeiou"), 8, 5e-3),
    "swapped": (str.swapcase, 4, 1e-2),
    "dotted": (lambda text: ".".join(text), 4, 2e-2),
}
Batch = tuple[list[str], Tensor]


def config(r: int) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules=["qkv", "out", "up", "down"])


def make_base() -> lm.Transformer:
    """The same base on every rank, a little trained: the first rank's."""
    torch.manual_seed(0)
    base = lm.Transformer(32, depth=2)
    if dist.get_rank() == 0:
        lm.train_base(base, lm.read_prose(), 60, 0)
    base.requires_grad_(False).eval()
    for parameter in base.parameters():
        dist.broadcast(parameter, 0)
    return base


def shard(base: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in base.blocks:
        fully_shard(block)
    return fully_shard(base)


def batches(start: int, stop: int, rows: int) -> list[Batch]:
    """Names and texts of all rows of some batches; tenants have unequal shares, and not each is in every batch."""
    prose, made = lm.read_prose(), []
    for number in range(start, stop):
        draw = random.Random(number)
        names = draw.choices([*TENANTS], weights=[4, 1, 2, 1, 1], k=rows)
        texts = [TENANTS[name][0](" ".join(draw.choices(prose, k=3)))[: lm.WINDOW + 1] for name in names]
        made.append((names, torch.tensor([lm.encode(text) for text in texts])))
    return made


def train(bank: Bank, todo: Sequence[Batch], mine: slice) -> list[float]:
    """Train on some rows of each batch, and return the sum of the losses of each, over its tokens."""
    losses = []
    for names, ids in todo:
        own, x = names[mine], ids[mine]
        with bank.rows(own, tokens=[lm.WINDOW] * len(own)) as adapted:
            logits = adapted(x[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum")  # nothing is averaged
            loss.backward()
        bank.step(sorted({*names}))
        losses.append(float(loss.detach()) / ids[:, 1:].numel())
    return losses


def add_tenants(bank: Bank) -> None:
    for seed, (name, (_, r, lr)) in enumerate(TENANTS.items()):
        bank.add(name, config(r), generator=lm.seeded(seed), optimizer=adamw(lr=lr))


def distance(bank: Bank, other: Bank) -> float:
    """How far apart adapters are, of the largest of their numbers."""
    pairs = [
        (leaf, other.tensors(name)[path][key])
        for name in bank.names
        for path, leaves in bank.tensors(name).items()
        for key, leaf in leaves.items()
    ]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="One batch on several processes: tenants of one frozen base.")
    parser.add_argument("--steps", type=int, default=40, help="batches in this run")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch, on all ranks together")
    parser.add_argument("--shard", action="store_true", help="shard the base over the ranks")
    parser.add_argument("--check", action="store_true", help="compare with one process (of the first run)")
    parser.add_argument("--out", type=Path, default=Path("distributed-out"), help="where checkpoints are")
    options = parser.parse_args(given)

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()

    base = make_base()
    whole = copy.deepcopy(base)
    bank = ReplicatedBank(bind(shard(base) if options.shard else base, config(8)), slots=8)
    # Where a model has its rows is found out by running it, which a sharded one does on all ranks or on none.
    bank.graft.look(torch.arange(30).view(3, 10))

    found = sorted(options.out.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    start = int(found[-1].name.removeprefix("step-")) if found else 0
    if found:
        bank.load_checkpoint(found[-1])
    else:
        add_tenants(bank)
    todo = batches(start, start + options.steps, options.rows)
    losses = torch.tensor(train(bank, todo, slice(rank, None, size)))
    dist.all_reduce(losses)
    bank.save_checkpoint(options.out / f"step-{start + options.steps}")

    apart = None
    if options.check and not start and rank == 0:
        alone = Bank(bind(whole, config(8)), slots=8)
        add_tenants(alone)
        train(alone, todo, slice(None))
        apart = distance(bank, alone)
    if rank == 0:
        few = max(1, options.steps // 8)
        first, last = float(losses[:few].mean()), float(losses[-few:].mean())
        print(f"{size} ranks, steps {start + 1} to {start + options.steps}: {first:.2f} to {last:.2f} nats a character")
        print(f"steps of each: {', '.join(f'{name} {bank.steps(name)}' for name in bank.names)}")
        if apart is not None:
            print(f"apart from one process by {apart:.0e} of the largest number")
    dist.destroy_process_group()
    return {"losses": losses.tolist(), "apart": apart, "start": start}


if __name__ == "__main__":
    main()
