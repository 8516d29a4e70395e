"""Adapters that come and go in the slots of a bank, in memory and in files."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from torchgraft.functional.extending import Tree

from .._config.base import AdapterConfig
from .files import load_resident, save_resident
from .optimizers import RowOptimizer
from .resident import Resident, own_generator
from .roster import Roster
from .slots import Slots
from .state import State


class Residents:
    """What a bank does with adapters apart from training them; `Bank` makes its attributes."""

    lock: threading.RLock
    _optimizer: RowOptimizer
    _slots: Slots
    _roster: Roster

    @property
    def names(self) -> list[str]:
        """The names of all adapters, in the order in which they were added."""
        with self.lock:
            return [*self._roster.residents]

    @property
    def state(self) -> State:
        """The numbers of all slots; what writes to them holds `lock`."""
        return self._slots.state

    def __contains__(self, name: object) -> bool:
        return name in self._roster.residents

    def __len__(self) -> int:
        return len(self._roster.residents)

    def __repr__(self) -> str:
        names = [*map(repr, self.names)]
        shown = ", ".join([*names[:5], *(["..."] if len(names) > 5 else [])]) or "none"
        return f"{type(self).__name__}({len(names)} adapters, {len(self._slots)} slots: {shown})"

    def add(
        self,
        name: str,
        config: AdapterConfig,
        *,
        params: Tree | None = None,
        generator: torch.Generator | None = None,
        optimizer: RowOptimizer | None = None,
    ) -> None:
        """Add an adapter, into a free slot.

        Args:
            name: Its name.
            config: Its config; the bank's graft has to have room for it.
            params: Its parameters, as `bind(model, config).init()` makes them, which are copied; by default fresh ones.
            generator: Source of fresh parameters; the adapter's own noise (dropout) goes on from its state.
            optimizer: Its optimizer, with defaults of its hyper-parameters; by default the bank's.

        Raises:
            KeyError, TypeError: Parameters that are not the config's; a config of another method.
            RuntimeError: No slot is free, and none can be made free.
            ValueError: A name that is taken; a config that the bank has no room for, or that differs in what its
                adapters share.

        >>> from torch import nn
        >>> from torchgraft.adapters import Bank, LoraConfig
        >>> from torchgraft.functional import bind
        >>> bank = Bank(bind(nn.Linear(4, 3), LoraConfig(r=4, target_modules="all-linear")), slots=2)
        >>> bank.add("poems", LoraConfig(r=1, target_modules="all-linear"), generator=torch.Generator().manual_seed(0))
        >>> bank.tensors("poems")[""]["lora_A"].shape
        torch.Size([1, 4])
        """
        with self.lock:
            self._roster.check_new(name, "add")
            try:
                kind = self._slots.kinds.of(config)
            except (TypeError, ValueError) as error:
                raise type(error)(f"add: the config of {name!r} does not fit the bank: {error}") from error
            resident = Resident(name, kind, self._optimizer if optimizer is None else optimizer, torch.Generator())
            resident.optimizer.check(self._slots.layout)
            if params is None:
                params = kind.graft.init(generator, dtype=self.state.parameters.dtype, device=self._slots.device)
            kind.check(params)
            resident.generator = own_generator(generator, self._slots.device)
            self._roster.enter(resident, params, {}, "add")

    def remove(self, name: str) -> None:
        """Remove an adapter; its slot is free again, and nothing else changes.

        Raises:
            KeyError: No such adapter.
            RuntimeError: Its rows are in a batch that is not over.
        """
        with self.lock:
            self._roster.drop(self._idle(name))

    def save(self, name: str, path: str | os.PathLike[str]) -> Path:
        """Write an adapter into a directory: PEFT's two files, and beside them the optimizer's state and all else.

        A crash at any moment leaves what was there before, or all that is new.

        Args:
            name: The adapter.
            path: The directory; made if it is not there.

        Raises:
            KeyError: No such adapter.
            OSError: Files that cannot be written.

        >>> import tempfile
        >>> from torch import nn
        >>> from torchgraft.adapters import Bank, LoraConfig
        >>> from torchgraft.functional import bind
        >>> bank = Bank(bind(nn.Linear(4, 3), LoraConfig(r=4, target_modules="all-linear")), slots=2)
        >>> bank.add("poems", LoraConfig(r=2, target_modules="all-linear"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = bank.save("poems", folder)
        ...     bank.load(folder, "verses")
        >>> bank.names, torch.equal(bank.tensors("poems")[""]["lora_A"], bank.tensors("verses")[""]["lora_A"])
        (['poems', 'verses'], True)
        """
        with self.lock:
            resident = self._roster.get(name, "save")
            self._roster.bring([resident], "save")
            tree, numbers = self._slots.own_tree(resident), self._slots.lift(resident)
            return save_resident(path, resident, tree, numbers)

    def load(self, path: str | os.PathLike[str], name: str, *, optimizer: RowOptimizer | None = None) -> None:
        """Add an adapter that `save`, `save_adapter` or PEFT wrote, with the optimizer's state if that is there.

        Args:
            path: The directory.
            name: The adapter's name in the bank.
            optimizer: Its optimizer; by default the one that it was saved with, or the bank's.

        Raises:
            FileNotFoundError, KeyError: As `load_adapter` does.
            RuntimeError: No slot is free, and none can be made free.
            TypeError, ValueError: As `load_adapter` and `add` do; the state of another optimizer.
        """
        with self.lock:
            self._roster.check_new(name, "load")
            resident, params, numbers = load_resident(path, name, self._slots, self._optimizer, optimizer)
            self._roster.enter(resident, params, numbers, "load")

    def prefetch(self, names: Sequence[str]) -> None:
        """Bring adapters that rest into slots, ahead of the batch that needs them; another thread may do it.

        Raises:
            KeyError: A name that no adapter has.
            RuntimeError: More adapters than slots.
        """
        with self.lock:
            self._roster.bring(self._roster.named(names, "prefetch"), "prefetch")

    def steps(self, name: str) -> int:
        """Return how many steps an adapter has taken.

        Raises:
            KeyError: No such adapter.
        """
        return self._roster.get(name, "steps").steps

    def config(self, name: str) -> AdapterConfig:
        """Return an adapter's config.

        Raises:
            KeyError: No such adapter.
        """
        return self._roster.get(name, "config").kind.config

    def tensors(self, name: str) -> Tree:
        """Return a copy of an adapter's parameters, in its own shapes: `{path: {leaf: tensor}}`.

        Raises:
            KeyError: No such adapter.
        """
        with self.lock:
            resident = self._roster.get(name, "tensors")
            self._roster.bring([resident], "tensors")
            tree = self._slots.own_tree(resident)
            return {path: {leaf: value.clone() for leaf, value in leaves.items()} for path, leaves in tree.items()}

    def _idle(self, name: str) -> Resident:
        """Return an adapter to remove."""
        resident = self._roster.get(name, "remove")
        if resident.in_batches:
            raise RuntimeError(
                f"remove: rows of {name!r} are in a batch that is not over; leave the block of bank.rows first"
            )
        return resident
