"""A bank's record of one adapter, beside its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .kind import Kind
from .optimizers import Row, RowOptimizer


@dataclasses.dataclass(eq=False)
class Resident:
    """One adapter of a bank.

    Attributes:
        name: Its name.
        kind: What its config means on the bank's model.
        optimizer: Its optimizer.
        generator: Source of its noise.
        slot: Where its numbers are; `None` while it rests elsewhere.
        row: These numbers as its optimizer steps them.
        steps: Steps that it has taken.
        pending: Whether it has gradients since its last step.
        by_tokens: Whether these are sums over tokens that are counted.
        in_batches: How many blocks it is in that are not over.
        used: When it was named last.
    """

    name: str
    kind: Kind
    optimizer: RowOptimizer
    generator: torch.Generator
    slot: int | None = None
    row: Row | None = None
    steps: int = 0
    pending: bool = False
    by_tokens: bool = False
    in_batches: int = 0
    used: int = 0

    @property
    def place(self) -> int:
        """Its slot, which it has."""
        assert self.slot is not None
        return self.slot


class Stepped(NamedTuple):
    """What a step did to one adapter.

    Attributes:
        steps: Steps that it has taken in all.
        norm: The norm of its gradient, before clipping.
        skipped: Why it was left as it was, empty where it was not.
    """

    steps: int
    norm: float
    skipped: str = ""


def own_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """Make the source of an adapter's noise, on the device of its parameters.

    It goes on from the state of a generator that is on the same device, and else from a number that this draws.

    >>> given = torch.Generator().manual_seed(3)
    >>> own = own_generator(given, torch.device("cpu"))
    >>> own is not given, torch.equal(own.get_state(), given.get_state())
    (True, True)
    """
    own = torch.Generator(device)
    if generator is not None and generator.device == own.device:
        own.set_state(generator.get_state())
        return own
    seed = torch.empty((), dtype=torch.int64, device=None if generator is None else generator.device)
    return own.manual_seed(int(seed.random_(generator=generator)))


def generator_of_rank(states: Mapping[int, Tensor], rank: int, device: torch.device) -> torch.Generator:
    """Make the source of an adapter's noise on one of several ranks.

    It goes on from the rank's own state; where there is none, it begins with a seed that is this rank's alone.

    >>> states = {0: torch.Generator().manual_seed(3).get_state()}
    >>> made = [generator_of_rank(states, rank, torch.device("cpu")) for rank in (0, 1, 2)]
    >>> torch.equal(made[0].get_state(), states[0]), len({generator.initial_seed() for generator in made})
    (True, 3)
    """
    own = torch.Generator(device)
    own.set_state(states.get(rank, states[0]))
    if rank not in states:
        seed = torch.empty((), dtype=torch.int64, device=device).random_(generator=own)
        own.manual_seed(int(seed) + rank)
    return own
