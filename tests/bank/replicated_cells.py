"""What is done to a bank on several ranks, against the same done to a bank in one process; in one group of processes.

A cell is a function that every rank runs; it raises where a number or an error is not what it has to be.
"""

import copy
import os
import traceback
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from sharded_cells import InStep, join, mesh, shared_folder
from torch import nn

from torchgraft.adapters import Bank, LoraConfig, ReplicatedBank, adamw, load_config, sgd
from torchgraft.functional import bind

WIDTH, BATCH = 6, 8
TARGETS = (["0.up", "0.down", "1.up", "1.down"], ["1.up"])
KINDS = {"poems": (2, 0, adamw(lr=1e-2)), "code": (4, 0, sgd(lr=1e-2, momentum=0.9)), "songs": (1, 1, adamw(lr=3e-3))}
HYPER = {"poems": {"max_norm": 0.5}, "code": {"lr": 3e-3}, "songs": {}}
NAMES = ["poems", "code", "poems", None, "code", "code", "songs", "code"]
"""Of two ranks the first has all rows of "poems" and "songs"."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).double()


def config(r, targets=0, dropout=0.0):
    return LoraConfig(
        r=r, lora_alpha=r + 2, target_modules=TARGETS[targets], init_lora_weights=False, lora_dropout=dropout
    )


# -- bases ----------------------------------------------------------------------------------------------------------


def sharded(base):
    from torch.distributed.fsdp import fully_shard

    for block in base:
        fully_shard(block, mesh=mesh())
    return fully_shard(base, mesh=mesh())


def checkpointed(base):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    return nn.Sequential(*(checkpoint_wrapper(fully_shard(block, mesh=mesh())) for block in base))


def tensor_parallel(base):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in base:
        parallelize_module(block, grid()["columns"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return base


def grid():
    """Pairs of ranks that share a base, and as many rows of ranks as there are pairs."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("rows", "columns"))


BASES = {
    "whole": lambda base: base,
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP2": sharded,
    "FSDP2, checkpointed": checkpointed,
    "tensor parallel": tensor_parallel,
}


# -- both banks -----------------------------------------------------------------------------------------------------


class Twice:
    """A bank on all ranks, and one in this process that has all rows."""

    def __init__(self, base="whole", dropout=0.0, add=True, **options):
        group = options.get("group")
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.ours = ReplicatedBank(bind(BASES[base](model()), config(4, 0, dropout)), **options)
        self.one = Bank(bind(model(), config(4, 0, dropout)))
        self.source = torch.Generator().manual_seed(1)
        if base not in ("whole", "DDP"):
            self.ours.graft.look(torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2)).double())
        for name, (r, targets, optimizer) in KINDS.items() if add else ():
            for bank in (self.ours, self.one):
                generator = torch.Generator().manual_seed(r)
                bank.add(name, config(r, targets, dropout), optimizer=optimizer, generator=generator)

    def batch(self, names=NAMES, weights=None, tokens=True):
        x = torch.randn(len(names), WIDTH, generator=self.source, dtype=torch.float64)
        counts = torch.randint(1, 5, (len(names),), generator=self.source).double()
        weights = torch.ones(len(names), dtype=torch.float64) if weights is None else weights
        mine = slice(self.rank, None, self.size)
        for bank, rows in ((self.ours, mine), (self.one, slice(None))):
            with bank.rows(names[rows], tokens=counts[rows] if tokens else None) as adapted:
                loss = (adapted(x[rows]).square().sum(-1) * weights[rows]).sum()
                if loss.requires_grad:
                    loss.backward()

    def step(self, names=KINDS):
        hyper = {name: HYPER[name] for name in names}
        given, expected = self.ours.step(hyper), self.one.step(hyper)
        assert {name: (one.steps, one.skipped) for name, one in given.items()} == {
            name: (one.steps, one.skipped) for name, one in expected.items()
        }
        for name, one in expected.items():
            torch.testing.assert_close(given[name].norm, one.norm, rtol=1e-10, atol=1e-12, equal_nan=True)

    def check(self):
        equal_on_all(self.ours)
        close(self.ours, self.one)


def numbers(bank):
    return {
        f"{name}.{path}.{leaf}": tensor
        for name in bank.names
        for path, leaves in bank.tensors(name).items()
        for leaf, tensor in leaves.items()
    }


def close(bank, other):
    expected = numbers(other)
    assert list(numbers(bank)) == list(expected)
    for key, tensor in numbers(bank).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-10, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def equal_on_all(bank):
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, numbers(bank))
    for key, tensor in told[0].items():
        assert all(torch.equal(tensor, other[key]) for other in told), key


def error(kind, words, call):
    """Assert that a call fails so on this rank."""
    with pytest.raises(kind) as raised:
        call()
    assert raised.type is kind and all(part in str(raised.value) for part in words), raised.value


# -- cells ----------------------------------------------------------------------------------------------------------


def training(base):
    options = {"group": grid()["rows"].get_group()} if base == "tensor parallel" else {}
    both = Twice(base, **options)
    for _ in range(3):
        both.batch()
        both.batch(NAMES[::-1])
        both.step()
        both.check()
    assert both.ours.steps("songs") == 3


def adapters_at_rest(base, resting):
    both = Twice(base, slots=1, resting=shared_folder() if resting == "disk" else resting)
    for names in ([[name] * BATCH for name in KINDS]) * 2:
        both.batch(names)
    both.step()
    for names in (["poems"] * BATCH, ["code"] * BATCH):
        both.batch(names)
    both.step(["code", "poems"])
    both.check()


def losses_without_counts():
    both = Twice()
    for _ in range(2):
        both.batch(tokens=False)
        both.step()
    both.check()


def nan_on_one_rank():
    both = Twice()
    weights = torch.ones(BATCH, dtype=torch.float64)
    weights[2] = float("nan")  # a row of "poems"
    before = copy.deepcopy(both.ours.tensors("poems"))
    both.batch(weights=weights)
    both.step()
    for path, leaves in before.items():
        for leaf, tensor in leaves.items():
            assert torch.equal(tensor, both.ours.tensors("poems")[path][leaf])
    assert (both.ours.steps("poems"), both.ours.steps("code")) == (0, 1)
    only_last = [None] * (BATCH - 1) + ["poems"]  # what the other ranks' batches left is not counted again
    both.batch(only_last)
    both.batch([*NAMES[1:], "code"])
    both.step()
    assert both.ours.steps("poems") == 1
    both.check()


def first_ranks_parameters():
    both = Twice(add=False)
    both.ours.add("poems", config(2))  # as torch's generator draws, which is another on each rank
    equal_on_all(both.ours)
    both.one.add("poems", config(2), params=both.ours.tensors("poems"))
    both.batch(["poems"] * BATCH)
    both.one.step(["poems"])
    both.ours.step(["poems"])
    both.check()


def errors():
    both = Twice()
    rank, ours = both.rank, both.ours
    both.batch()
    before = {name: tensor.clone() for name, tensor in ours.state.buffers().items()}
    names = ["poems", "code"][rank == 1 :]
    error(ValueError, ["step: ranks differ in adapters: ['poems', 'code'] on rank 0, ['code'] on rank 1"],
          lambda: ours.step(names))  # fmt: skip
    error(ValueError, ["ranks differ in hyper-parameters of 'code'", "0.1", "0.2", "give all ranks the same"],
          lambda: ours.step({"code": {"lr": 0.2 if rank == 1 else 0.1}}))  # fmt: skip
    failing = (TypeError, ["sgd has no hyper-parameter 'rl'"])
    others = (RuntimeError, ["step: rank 1 failed, so no rank goes on: TypeError: step: 'code'"])
    error(*(failing if rank == 1 else others), lambda: ours.step({"code": {"rl" if rank == 1 else "lr": 0.1}}))
    error(RuntimeError, ["step: rank 1 calls remove meanwhile" if rank != 1 else "remove: rank 0 calls step"],
          lambda: ours.remove("code") if rank == 1 else ours.step(["code"]))  # fmt: skip
    error(ValueError, ["add: ranks differ in LoraConfig.r: 2 on rank 0, 3 on rank 1; give all ranks the same"],
          lambda: ours.add("more", config(3 if rank == 1 else 2)))  # fmt: skip
    error(ValueError, ["add: ranks differ in name: 'a' on rank 0, 'b' on rank 1"],
          lambda: ours.add("b" if rank == 1 else "a", config(2)))  # fmt: skip
    taken = (ValueError, ["add: the name 'code' is taken"])
    others = (RuntimeError, ["add: rank 1 failed, so no rank goes on: ValueError: add: the name 'code'"])
    error(*(taken if rank == 1 else others), lambda: ours.add("code" if rank == 1 else "more", config(2)))
    missing = (FileNotFoundError, ["nowhere"])
    others = (RuntimeError, ["load: rank 1 failed"])
    folder = shared_folder()
    ours.save("songs", folder)
    before["sums"], before["tokens"] = ours.state.sums.clone(), ours.state.tokens.clone()  # which are rank 0's now
    error(*(missing if rank == 1 else others), lambda: ours.load(f"{folder}/nowhere" if rank == 1 else folder, "more"))
    assert ours.names == [*KINDS]
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state.buffers().items())
    both.step()
    both.check()
    error(RuntimeError, ["step: 'code' has no gradients on any rank since its last step"], lambda: ours.step(["code"]))
    with ours.rows(["code"], tokens=[1.0] if rank == 1 else None) as adapted:
        adapted(torch.ones(1, WIDTH).double()).sum().backward()
    error(ValueError, ["step: tokens of 'code' are given on ranks [1], and not on ranks [0"],
          lambda: ours.step(["code"]))  # fmt: skip


def saving_and_loading(base):
    both = Twice(base)
    both.batch()
    both.step()
    both.batch()
    folder = shared_folder()
    for name in KINDS:
        assert both.ours.save(name, f"{folder}/{name}") == Path(folder) / name
    alone = Bank(bind(model(), config(4)))
    for name in KINDS:
        alone.load(f"{folder}/{name}", name)
        both.ours.remove(name)
        both.ours.load(f"{folder}/{name}", name)
        assert load_config(f"{folder}/{name}").auto_mapping["base_model_class"] == "Sequential"
    alone.step(HYPER)
    both.step()  # with the gradients that waited, once
    both.check()
    close(alone, both.one)
    dist.barrier()
    if both.rank == 1:  # another file than the others'
        alone.save("poems", f"{folder}/other")
    dist.barrier()
    both.ours.remove("poems")
    error(ValueError, ["load: ranks differ in files"],
          lambda: both.ours.load(f"{folder}/{'other' if both.rank == 1 else 'poems'}", "poems"))  # fmt: skip


def checkpoints(base):
    both = Twice(base)
    both.batch()
    both.step()
    both.batch()
    folder = shared_folder()
    both.ours.save_checkpoint(folder)
    error(FileExistsError, ["has a checkpoint", "save into a new directory"],
          lambda: both.ours.save_checkpoint(folder))  # fmt: skip
    restored = Twice(base, add=False, slots=2, resting="memory")
    restored.one, restored.source = both.one, both.source
    assert restored.ours.load_checkpoint(folder) == [*KINDS]
    error(ValueError, ["the name 'poems' is taken"], lambda: restored.ours.load_checkpoint(folder))
    restored.step()
    restored.batch(["poems"] * BATCH)
    restored.step(["poems"])
    restored.check()


def checkpoints_of_other_ranks():
    both = Twice()
    both.batch()
    both.step()
    both.batch()
    everywhere, fewer = shared_folder(), shared_folder()
    both.ours.save_checkpoint(everywhere)
    both.one.step(HYPER)
    group = dist.new_group([*range(both.size // 2)])
    if both.rank < both.size // 2:  # by half as many ranks
        bank = ReplicatedBank(bind(model(), config(4)), group=group)
        bank.load_checkpoint(everywhere)
        bank.save_checkpoint(f"{fewer}/half")
        bank.step(HYPER)
        close(bank, both.one)
    dist.barrier()
    bank = ReplicatedBank(bind(model(), config(4)))  # and by twice as many
    bank.load_checkpoint(f"{fewer}/half")
    bank.step(HYPER)
    close(bank, both.one)
    equal_on_all(bank)
    error(FileNotFoundError, ["has no checkpoint"], lambda: bank.load_checkpoint(fewer))
    small = ReplicatedBank(bind(model(), config(1)))
    error(ValueError, ["'poems' does not fit the bank", "2"], lambda: small.load_checkpoint(everywhere))
    assert small.names == []


def noise():
    """Ranks draw masks of their own, the first those of one process; noise goes on after a checkpoint."""
    both = Twice(dropout=0.5)
    x = torch.ones(4, WIDTH).double()

    def outputs(bank):
        with bank.rows(["poems"] * 4) as adapted:
            y = adapted(x)
            y.sum().backward()
        return y.detach()

    told = [None] * both.size
    y = outputs(both.ours)
    dist.all_gather_object(told, y)
    assert torch.equal(told[0], outputs(both.one))
    assert all(not torch.equal(told[0], other) for other in told[1:])
    folder = shared_folder()
    both.ours.save_checkpoint(folder)
    restored = ReplicatedBank(bind(model(), config(4, 0, 0.5)))
    restored.load_checkpoint(folder)
    for bank in (both.ours, restored):
        outputs(bank)
        bank.step(["poems"])
    equal_on_all(restored)
    close(restored, both.ours)


def without_a_look():
    bank = ReplicatedBank(bind(sharded(model()), config(4)))
    bank.add("poems", config(2))
    with bank.rows(["poems"] * 2) as adapted:
        error(ValueError, ["may not find out by itself", "graft.look(*sample)", "the same in each process"],
              lambda: adapted(torch.randn(2, WIDTH).double()))  # fmt: skip
    bank.graft.look(torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2)).double())
    count = 1 if dist.get_rank() == 1 else 2  # one row has nothing to find out
    with bank.rows(["poems"] * count) as adapted:
        assert len(adapted(torch.randn(count, WIDTH).double())) == count


def kept_by_autograd():
    """Bytes of gathered weights that autograd keeps until a backward: none where blocks are checkpointed."""
    kept = {}
    for base in ("FSDP2", "FSDP2, checkpointed"):
        both = Twice(base)
        shapes = {tuple(p.shape) for p in model().parameters() if p.ndim == 2}
        found = []

        def pack(tensor, shapes=shapes, found=found):
            found.extend([tuple(tensor.shape)] if {tuple(tensor.shape), tuple(tensor.shape)[::-1]} & shapes else [])
            return tensor

        with both.ours.rows(["poems"] * 4) as adapted, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            adapted(torch.ones(4, WIDTH).double()).sum().backward()
        kept[base] = len(found)
    assert kept["FSDP2"] >= 3 and kept["FSDP2, checkpointed"] == 0, kept


CELLS = {
    **{f"training, {base}": (training, base) for base in BASES},
    "at rest in memory": (adapters_at_rest, "whole", "memory"),
    "at rest on disk, FSDP2": (adapters_at_rest, "FSDP2", "disk"),
    "losses without counts": (losses_without_counts,),
    "NaN on one rank": (nan_on_one_rank,),
    "the first rank's parameters": (first_ranks_parameters,),
    "errors": (errors,),
    "save and load": (saving_and_loading, "FSDP2"),
    "checkpoint": (checkpoints, "whole"),
    "checkpoint, FSDP2": (checkpoints, "FSDP2"),
    "checkpoints of other ranks": (checkpoints_of_other_ranks,),
    "noise": (noise,),
    "without a look": (without_a_look,),
    "kept by autograd": (kept_by_autograd,),
}


def run(rank: int, size: int, folder: str, in_step: InStep) -> NoReturn:
    """One process of a group: every cell, and what came of it."""
    torch.set_num_threads(1)
    join(rank, size, Path(folder) / "rendezvous")
    outcomes = {}
    for index, (name, (cell, *args)) in enumerate(CELLS.items()):
        torch.manual_seed(rank)  # nothing may count on equal random numbers
        try:
            cell(*args)
            outcomes[name] = ""
        except Exception as raised:
            outcomes[name] = f"{type(raised).__name__}: {raised}\n{traceback.format_exc()}"
        if in_step.meet(rank, bool(outcomes[name])):  # messages of the cell may be on their way
            dist.destroy_process_group()
            join(rank, size, Path(folder) / f"rendezvous{index}")
    torch.save(outcomes, Path(folder) / f"{rank}.pt")
    in_step.meet(rank, False)
    dist.destroy_process_group()
    os._exit(0)  # what was sharded keeps gloo's threads, which an interpreter that ends would pull the ground from
