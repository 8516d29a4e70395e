"""The adapters of a bank: which of them have a slot, and which give way."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torchgraft.functional.extending import Tree, did_you_mean

from .resident import Resident
from .resting import Resting
from .slots import Numbers, Slots


class Roster:
    """The adapters of a bank by name, in slots or at rest.

    Args:
        slots: The slots.
        resting: Where those rest that have none; `None` where all have one.

    Attributes:
        residents: The adapters, in the order in which they were added.
    """

    def __init__(self, slots: Slots, resting: Resting | None):
        self._slots, self._resting = slots, resting
        self.residents: dict[str, Resident] = {}
        self._clock = itertools.count(1)

    def get(self, name: Any, what: str) -> Resident:
        """Return an adapter by name, or an error of the function that `what` names."""
        if isinstance(name, str) and name in self.residents:
            return self.residents[name]
        raise KeyError(
            f"{what}: no adapter has the name {name!r:.60}{did_you_mean(str(name), self.residents)}; bank.add adds one"
        )

    def named(self, given: Sequence[Any], what: str) -> list[Resident]:
        """Return the adapters that are named, each once."""
        return [self.get(name, what) for name in dict.fromkeys(given) if name is not None]

    def present(self, named: list[Resident], what: str) -> list[Resident]:
        """Bring the adapters of some rows into slots; any one where all rows have the base alone."""
        if not self.residents:
            raise ValueError(f"{what}: the bank has no adapters; the base alone is the model itself")
        present = named or [next(iter(self.residents.values()))]
        self.bring(present, what)
        return present

    def check_new(self, name: Any, what: str) -> None:
        """Refuse what is no name, or one that is taken."""
        if not isinstance(name, str) or not name:
            raise TypeError(f"{what}: name is {name!r:.60}, expected a string that is not empty")
        if name in self.residents:
            raise ValueError(f"{what}: the name {name!r} is taken; remove that adapter first, or choose another name")

    def enter(self, resident: Resident, params: Tree | None, numbers: Numbers, what: str) -> None:
        """Take in a new adapter, into a free slot.

        Args:
            resident: The adapter, without a slot.
            params: Its parameters; `None` where they are among the numbers.
            numbers: What else is known of its numbers; all others begin as fresh ones.
            what: The call that it comes by, for errors.

        Raises:
            RuntimeError: No slot is free, and none can be made free.
        """
        self.free_slots(1, [], what)
        self._slots.make_room(resident.optimizer)
        if params is None:
            self._slots.put(resident, numbers)
        else:
            self._slots.begin(resident, params)
            self._slots.write(resident, numbers)
        resident.used = next(self._clock)
        self.residents[resident.name] = resident

    def bring(self, residents: Sequence[Resident], what: str) -> None:
        """Have adapters in slots; those named least lately rest for them."""
        away = [resident for resident in residents if resident.slot is None]
        self.free_slots(len(away), residents, what)
        for resident in residents:
            resident.used = next(self._clock)
        for resident in away:
            assert self._resting is not None
            self._slots.put(resident, self._resting.read(resident))

    def free_slots(self, count: int, needed: Sequence[Resident], what: str) -> None:
        """Have slots free, if some can be made so; nothing changes otherwise."""
        missing = count - len(self._slots.free)
        if missing <= 0:
            return
        idle = [one for one in self.residents.values() if one.slot is not None and not one.in_batches]
        idle = sorted((one for one in idle if one not in needed), key=lambda one: one.used)
        if self._resting is None or len(idle) < missing:
            why = "" if self._resting is None else f", {len(self._slots) - len(idle)} of them in use"
            hint = ", or give resting= for more adapters than slots" if self._resting is None else ""
            raise RuntimeError(
                f"{what}: all {len(self._slots)} slots are taken{why}; remove an adapter first, make the bank with "
                f"more slots{hint}"
            )
        for resident in idle[:missing]:
            self._resting.write(resident, self._slots.lift(resident))
            self._slots.leave(resident)

    def drop(self, resident: Resident) -> None:
        """Forget an adapter; its slot is free."""
        if resident.slot is not None:
            self._slots.leave(resident)
        if self._resting is not None:
            self._resting.drop(resident)
        del self.residents[resident.name]
