"""The ranks of a group: what they agree on before anything changes, and what they add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The ranks of a process group, which make the same calls in the same order.

    Args:
        group: The group; by default all processes.

    Attributes:
        group: The group, as it was given.
        rank: The number of this process within the group.
        size: How many there are.

    Raises:
        RuntimeError: No process group has been begun.
        ValueError: A group that this process is not in.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "ReplicatedBank: there is no process group; start the program with torchrun and call "
                "torch.distributed.init_process_group first, or make a Bank, which is for one process"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("ReplicatedBank: this process is not in group; make the bank in those that are")

    def agree(self, what: str, attempt: Callable[[], tuple[Mapping[str, Any], T]]) -> list[T]:
        """Run on all ranks what may fail on some; then all go on, or all raise.

        Args:
            what: The call that needs it, for errors.
            attempt: Returns facts by their names, in which ranks must not differ, and what is this rank's own.

        Returns:
            What each rank has of its own.

        Raises:
            Exception: What was raised here.
            RuntimeError: Something was raised on another rank, or ranks made different calls.
            ValueError: Ranks differ in a fact.
        """
        failure: Exception | None = None
        facts: Mapping[str, Any] = {}
        own: Any = None
        try:
            facts, own = attempt()
        except Exception as error:
            failure = error
        problem = "" if failure is None else f"{type(failure).__name__}: {failure}"
        told = self.gather((what, problem, dict(facts), own))
        if failure is not None:
            raise failure
        for rank, (call, words, _, _) in enumerate(told):
            if words:
                raise RuntimeError(f"{what}: rank {rank} failed, so no rank goes on: {words}")
            if call != what:
                raise RuntimeError(
                    f"{what}: rank {rank} calls {call} meanwhile; all ranks make the same calls in the same order"
                )
        first = told[0][2]
        for rank, (_, _, others, _) in enumerate(told):
            for name in [*first, *others]:
                if name not in first or name not in others or first[name] != others[name]:
                    raise ValueError(
                        f"{what}: ranks differ in {name}: {first.get(name)!r:.200} on rank 0, "
                        f"{others.get(name)!r:.200} on rank {rank}; give all ranks the same"
                    )
        return [private for *_, private in told]

    def gather(self, own: T) -> list[T]:
        """Return what each rank has."""
        all_: list[Any] = [None] * self.size
        dist.all_gather_object(all_, own, group=self.group)
        return all_

    def add_up(self, numbers: Sequence[Tensor]) -> list[Tensor]:
        """Return sums over the ranks, in one message; the same bits on each.

        Args:
            numbers: Tensors of one axis and one dtype, on all ranks as many and as long.
        """
        flat = torch.cat([*numbers])
        dist.all_reduce(flat, group=self.group)
        return [*flat.split([len(one) for one in numbers])]

    def spread(self, numbers: Tensor) -> None:
        """Write the numbers that the first rank has into those of all others."""
        dist.broadcast(numbers, group=self.group, group_src=0)
