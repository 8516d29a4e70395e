"""A bank on each of several processes: its adapters are the same on all, and the rows of one batch are on several."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchgraft.functional import Graft
from torchgraft.functional.extending import Tree, is_sharded

from .._config.base import AdapterConfig
from .bank import Bank
from .checkpoint import generator_of, new_directory, read_checkpoint, tensors_of, write_checkpoint
from .collected import Collected, check_pending_anywhere, collected_of, totals_of
from .optimizers import RowOptimizer
from .ranks import Ranks
from .record import facts_of
from .resident import Resident, Stepped, generator_of_rank
from .stepping import Hyper, take_steps


class ReplicatedBank(Bank):
    """A bank replicated on every rank of a process group, whose batches have rows on several ranks.

    The base is the user's: whole on each rank, within `DistributedDataParallel`, or sharded by `fully_shard`. Each rank
    calls `rows` with rows of its own, of whichever adapters. Gradients and counts of tokens stay on their rank until
    `step`, which adds them up in one message: what several ranks do between two steps is what one process does in as
    many batches. So a loss is a sum over rows, or over the tokens that `tokens=` counts; nothing is averaged.

    All ranks call `add`, `load`, `save`, `remove`, `step`, `save_checkpoint` and `load_checkpoint`, from one thread, in
    the same order and with the same arguments. Ranks that differ, and one that fails, are errors on all of them, before
    anything changes. All else is each rank's own. But a sharded base has to run as often on each rank, backward through
    checkpoints too, so it does not look for rows by itself: call `bank.graft.look(*sample)` first, on all ranks with
    the same sample.

    Args:
        graft: As for `Bank`.
        slots: As for `Bank`, on each rank.
        group: The process group; by default all processes.
        resting: As for `Bank`; within a directory each rank takes one of its own.
        options: As for `Bank`.

    Raises:
        RuntimeError: There is no process group.
        TypeError, ValueError: As `Bank` does; a group that this process is not in.

    >>> from torch import nn
    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> bank = ReplicatedBank(bind(nn.Linear(4, 3), LoraConfig(r=8, target_modules="all-linear")), slots=2)
    >>> bank.add("poems", LoraConfig(r=2, target_modules="all-linear"))
    >>> with bank.rows(["poems"], tokens=[3]) as adapted:
    ...     adapted(torch.ones(1, 4)).sum().backward()
    >>> bank.step(["poems"])["poems"].steps
    1
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        graft: Graft,
        slots: int = 64,
        *,
        group: dist.ProcessGroup | None = None,
        resting: str | os.PathLike[str] | None = None,
        **options: Any,
    ):
        self._ranks = Ranks(group)
        if resting is not None and resting != "memory":
            resting = Path(resting) / f"rank{dist.get_rank()}"
        super().__init__(graft, slots, resting=resting, **options)
        if any(map(is_sharded, self.graft.model.parameters())):
            self.graft = self.graft.without_looks()

    def add(
        self,
        name: str,
        config: AdapterConfig,
        *,
        params: Tree | None = None,
        generator: torch.Generator | None = None,
        optimizer: RowOptimizer | None = None,
    ) -> None:
        """Add an adapter on all ranks, as `Bank.add` does, with the parameters that the first rank gives or draws.

        Its noise is drawn by each rank for itself, on the first as in one process.

        Raises:
            KeyError, TypeError: As `Bank.add` does.
            RuntimeError: As `Bank.add` does; it failed on another rank.
            ValueError: As `Bank.add` does; ranks give different names, configs or optimizers.
        """

        def attempt() -> tuple[dict[str, Any], Tensor]:
            Bank.add(self, name, config, params=params, generator=generator, optimizer=optimizer)
            resident = self._roster.get(name, "add")
            return facts_of(resident), resident.generator.get_state()

        with self.lock:
            states = self._all_or_none("add", attempt)
            resident = self._roster.get(name, "add")
            self._ranks.spread(self.state.parameters[resident.place])
            resident.generator = generator_of_rank({0: states[0]}, self._ranks.rank, self._slots.device)

    def remove(self, name: str) -> None:
        """Remove an adapter on all ranks, as `Bank.remove` does.

        Raises:
            KeyError: No such adapter.
            RuntimeError: Its rows are in a batch that is not over; it failed on another rank.
            ValueError: Ranks give different names.
        """
        with self.lock:
            self._ranks.agree("remove", lambda: ({"name": self._idle(name).name}, None))
            super().remove(name)

    def step(self, hyper: Mapping[str, Mapping[str, Any] | None] | Sequence[str]) -> dict[str, Stepped]:
        """Step the named adapters on all ranks, with what all ranks have collected; afterwards all have the same bits.

        A rank without rows of an adapter adds nothing. One whose gradients are not finite on any rank is skipped on
        all of them.

        Raises:
            KeyError, TypeError: As `Bank.step` does.
            RuntimeError: An adapter without gradients on any rank; it failed on another rank.
            ValueError: As `Bank.step` does; ranks name different adapters or hyper-parameters, or some count tokens.
        """
        chosen: dict[Resident, Hyper] = {}
        start, size = 0, len(self._slots)

        def attempt() -> tuple[dict[str, Any], list[Collected]]:
            chosen.update(self._chosen(hyper))
            self._roster.bring([*chosen][start : start + size], "step")
            values = {f"hyper-parameters of {one.name!r}": own for one, own in chosen.items()}
            facts = {"adapters": [one.name for one in chosen], **values, "steps": [one.steps for one in chosen]}
            return facts, collected_of([*chosen], self.state)

        with self.lock, torch.no_grad():
            report: dict[str, Stepped] = {}
            while not start or start < len(chosen):
                collected = self._ranks.agree("step", attempt)
                residents = [*chosen]
                totals = totals_of(residents, collected, "step")[start:]
                check_pending_anywhere(residents[start:], totals)
                part = residents[start : start + size]
                self._add_up(part, totals[:size], [True] * len(part))
                report |= take_steps(self.state, part, [chosen[one] for one in part])
                start += size
            return report

    def save(self, name: str, path: str | os.PathLike[str]) -> Path:
        """Write an adapter into a directory, as `Bank.save` does; the first rank writes.

        Gradients that wait for a step are added up, and are the first rank's from then on.

        Raises:
            KeyError: No such adapter.
            OSError: Files that cannot be written.
            RuntimeError: It failed on another rank.
            ValueError: Ranks give different names.
        """
        first = self._ranks.rank == 0
        with self.lock, torch.no_grad():
            self._settle("save", [name], [first])
            written = self._ranks.agree("save", lambda: ({}, Bank.save(self, name, path) if first else None))
            assert written[0] is not None
            return written[0]

    def load(self, path: str | os.PathLike[str], name: str, *, optimizer: RowOptimizer | None = None) -> None:
        """Add an adapter on all ranks, as `Bank.load` does; each rank reads the files.

        Gradients that waited for a step when it was saved are the first rank's.

        Raises:
            FileNotFoundError, KeyError, TypeError: As `Bank.load` does.
            RuntimeError: As `Bank.load` does; it failed on another rank.
            ValueError: As `Bank.load` does; ranks give different names, or read different files.
        """

        def attempt() -> tuple[dict[str, Any], Tensor]:
            Bank.load(self, path, name, optimizer=optimizer)
            resident = self._roster.get(name, "load")
            return {**facts_of(resident), "files": self._slots.digest(resident)}, resident.generator.get_state()

        with self.lock:
            states = self._all_or_none("load", attempt)
            self._arrive(self._roster.get(name, "load"), {0: states[0]})

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write all adapters into a checkpoint of `torch.distributed.checkpoint`; each rank writes a part of them.

        It has what `save` has of each adapter, and the noise of each rank. Gradients that wait for a step are added up,
        and are from then on those of the rank that wrote them.

        Args:
            path: A directory without a checkpoint, which all ranks see.

        Raises:
            FileExistsError: A directory with a checkpoint.
            OSError: Files that cannot be written.
            RuntimeError: It failed on another rank.
            ValueError: Ranks have different adapters.
        """
        tensors, names, size = dict[str, Tensor](), self.names, len(self._slots)
        with self.lock, torch.no_grad():
            folders = self._ranks.agree("save_checkpoint", lambda: ({"adapters": names}, new_directory(path)))
            for start in range(0, len(names), size):
                part = names[start : start + size]
                mine = [(start + i) % self._ranks.size == self._ranks.rank for i in range(len(part))]
                for resident, here in zip(self._settle("save_checkpoint", part, mine), mine, strict=True):
                    tensors |= generator_of(resident, self._ranks.rank)
                    tensors |= tensors_of(resident, self._slots.lift(resident)) if here else {}
            write_checkpoint(folders[self._ranks.rank], names, tensors, self._ranks.group)

    def load_checkpoint(self, path: str | os.PathLike[str], *, optimizer: RowOptimizer | None = None) -> list[str]:
        """Add all adapters of a checkpoint that `save_checkpoint` wrote, on as many ranks or on others.

        Ranks that there were not have noise of their own; on the others it goes on. torch keeps the metadata of a
        checkpoint in a pickle: read only what you trust.

        Args:
            path: The directory, which each rank reads.
            optimizer: As for `load`.

        Returns:
            Their names.

        Raises:
            FileNotFoundError: No checkpoint, or one whose writing was interrupted.
            RuntimeError: No slot is free, and none can be made free; it failed on another rank.
            TypeError, ValueError: Names that are taken; adapters that do not fit; ranks that read different files.
        """

        def attempt() -> tuple[dict[str, Any], list[str]]:
            facts = {}
            for resident, numbers, generators in read_checkpoint(Path(path), self._slots, self._optimizer, optimizer):
                self._roster.check_new(resident.name, "load_checkpoint")
                self._roster.enter(resident, None, numbers, "load_checkpoint")
                facts[f"the files of {resident.name!r}"] = self._slots.digest(resident)
                self._arrive(resident, generators)
            return {"adapters": [*facts], **facts}, [*self._roster.residents][-len(facts) :] if facts else []

        with self.lock, torch.no_grad():
            return [*self._all_or_none("load_checkpoint", attempt)[0]]

    def _all_or_none(self, what: str, attempt: Callable[[], tuple[dict[str, Any], Any]]) -> list[Any]:
        """Let adapters in on all ranks, or on none."""
        before = {*self._roster.residents}
        try:
            return self._ranks.agree(what, attempt)
        except BaseException:
            for resident in [*self._roster.residents.values()]:
                if resident.name not in before:
                    self._roster.drop(resident)
            raise

    def _arrive(self, resident: Resident, states: Mapping[int, Tensor]) -> None:
        """Make an adapter that was read from files what it is on this rank."""
        resident.generator = generator_of_rank(states, self._ranks.rank, self._slots.device)
        if self._ranks.rank:
            self._slots.set_sums(resident, None)

    def _settle(self, what: str, names: Sequence[str], here: Sequence[bool]) -> list[Resident]:
        """Bring adapters into slots, where what all ranks have collected of each is one rank's from now on."""
        residents: list[Resident] = []

        def attempt() -> tuple[dict[str, Any], list[Collected]]:
            residents[:] = [self._roster.get(name, what) for name in names]
            self._roster.bring(residents, what)
            return {"adapters": [*names]}, collected_of(residents, self.state)

        self._add_up(residents, totals_of(residents, self._ranks.agree(what, attempt), what), here)
        return residents

    def _add_up(self, residents: Sequence[Resident], totals: Sequence[Collected], here: Sequence[bool]) -> None:
        """Add up the gradients that ranks have collected.

        Args:
            residents: The adapters, in slots.
            totals: What all ranks together have of each.
            here: Whether each one's sum is this rank's from now on; ranks that do not keep it have none.
        """
        some = [i for i, collected in enumerate(totals) if collected.pending]
        if not some:
            return
        sums = self._ranks.add_up([self._slots.own_sums(residents[i]) for i in some])
        for i, sum_ in zip(some, sums, strict=True):
            self._slots.set_sums(residents[i], sum_ if here[i] else None, totals[i].tokens if here[i] else 0.0)
            residents[i].by_tokens = totals[i].by_tokens
