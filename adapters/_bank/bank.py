"""The bank: adapters that come and go in the slots of one bound model, each trained for itself."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import Graft
from torchgraft.functional.extending import Tree

from .arguments import check_pending, check_slots, checked_hyper, flat, hyper_by_name, leaf_like, stacked, token_counts
from .batch import Batch
from .fused import adamw
from .isolation import check_isolated
from .optimizers import RowOptimizer
from .resident import Resident, Stepped
from .residents import Residents
from .resting import Resting
from .roster import Roster
from .slots import Slots
from .state import accumulate
from .stepping import Hyper, take_steps


class Bank(Residents):
    """Adapters that are added, trained and removed independently, in a fixed number of slots over one bound model.

    Each has its own rank, data, hyper-parameters, step count and noise; what it computes is what it would alone. Losses
    have to be each row's own, normalised by what belongs to the same adapter: a mean over a batch, an auxiliary loss
    over its rows or negatives from it would join adapters, which no library can see.

    Every method may be called by several threads; they take turns at one lock, `bank.lock`, which only `check` holds
    while the model runs.

    Args:
        graft: `bind(model, config)` with the largest config that a slot can hold, or of several, `bind(model, [...])`.
        slots: How many adapters have one at one time.
        optimizer: The optimizer of adapters that are not added with another one.
        resting: Where adapters rest that have no slot, so that there can be more of them than slots: `"memory"`, or a
            directory, a `pathlib.Path`. The one that was named least lately gives way to one that is named. By default
            there are no more adapters than slots.
        random_base: Accept a model that draws random numbers in training, which depend on who shares a batch; otherwise
            that is an error.
        dtype: Dtype of the parameters, as for `Graft.init`.
        device: Device of the parameters.

    Attributes:
        graft: The graft of a stack whose places are the slots.
        lock: The lock that all methods take, and hold while they read or write.

    Raises:
        TypeError: No graft, or one with named adapters.
        ValueError: Parameters of several dtypes, or on several devices.

    >>> from torchgraft.adapters import Bank, LoraConfig
    >>> from torchgraft.functional import bind
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> bank = Bank(bind(model, LoraConfig(r=8, target_modules=["0"])), slots=4)
    >>> bank.add("poems", LoraConfig(r=2, target_modules=["0"]))
    >>> bank.add("code", LoraConfig(r=8, target_modules=["0"]))
    >>> with bank.rows(["poems", "code", "poems"]) as adapted:
    ...     adapted(torch.randn(3, 4)).square().sum().backward()
    >>> report = bank.step({"poems": {"lr": 1e-2}})
    >>> report["poems"].steps, bank.steps("code")
    (1, 0)
    >>> bank
    Bank(2 adapters, 4 slots: 'poems', 'code')
    """

    def __init__(
        self,
        graft: Graft,
        slots: int = 64,
        *,
        optimizer: RowOptimizer | None = None,
        resting: str | os.PathLike[str] | None = None,
        random_base: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        check_slots(slots)
        self.graft = stacked(graft)
        self._optimizer: RowOptimizer = adamw() if optimizer is None else optimizer
        self._slots = Slots(self.graft, slots, leaf_like(graft, dtype, device))
        self._optimizer.check(self._slots.layout)
        self._slots.make_room(self._optimizer)
        self._random_base = random_base
        self._roster = Roster(self._slots, None if resting is None else Resting(resting))
        self.lock = threading.RLock()

    @contextlib.contextmanager
    def rows(self, names: Sequence[Any], *, tokens: Sequence[float] | Tensor | None = None) -> Iterator[Batch]:
        """Give each row of a batch the adapter of a name: `with bank.rows(["poems", "code"]) as adapted`.

        Within the block `adapted` is called like the model, and gradients of `backward` are collected; at its end they
        are added to what the adapters have since their last step. If an exception leaves the block, nothing is added.

        Args:
            names: The name of each row's adapter, `None` for the base alone; or for packed rows, a list for each, with
                the name of each token's.
            tokens: `"rows"`, how many tokens the loss of each row is a sum over. They add up beside the gradients, and
                a step divides by their number. Without them losses are taken as they are. One adapter's batches between
                two steps all have them, or none.

        Raises:
            KeyError: A name that no adapter has.
            RuntimeError: More adapters than slots.
            TypeError, ValueError: Names that are none; no count for each row; batches with counts and without.

        >>> from torchgraft.adapters import Bank, LoraConfig
        >>> from torchgraft.functional import bind
        >>> bank = Bank(bind(nn.Linear(4, 3), LoraConfig(r=4, target_modules="all-linear")), slots=2)
        >>> bank.add("poems", LoraConfig(r=4, target_modules="all-linear"))
        >>> with bank.rows(["poems", None, "poems"], tokens=[3, 3, 3]) as adapted:
        ...     adapted(torch.ones(3, 4)).sum().backward()
        >>> bank.step(["poems"])["poems"].steps
        1
        """
        given, packed = flat(names)
        with self.lock:
            named = self._roster.named(given, "rows")
            counts = token_counts(given, packed, tokens, named)
            present = self._roster.present(named, "rows")
            stack, gathered = self._slots.gather(present, given, packed, bool(named) and torch.is_grad_enabled())
            for resident in present:
                resident.in_batches += 1
        batch = Batch(self.graft, stack, gathered, self._random_base)
        gradients = None
        try:
            yield batch
            gradients = batch.gradients()
        finally:
            batch.close()
            self._leave(present, gradients, counts)

    def view(self, names: Sequence[Any]) -> nn.Module:
        """Return a module like the model whose rows have these adapters as they are now: `bank.view(["poems"])`.

        It has copies of their parameters, so that steps and removals after it do not change it.

        Args:
            names: As for `rows`.

        Raises:
            KeyError: A name that no adapter has.
        """
        given, packed = flat(names)
        with self.lock:
            present = self._roster.present(self._roster.named(given, "view"), "view")
            return self.graft.view(self._slots.gather(present, given, packed, False)[0])

    def step(self, hyper: Mapping[str, Mapping[str, Any] | None] | Sequence[str]) -> dict[str, Stepped]:
        """Step the named adapters with the gradients that they have collected; all others stay as they are.

        Gradients are divided by the tokens that they are of, clipped, and taken by each adapter's optimizer. One whose
        gradients are not finite is skipped, its gradients are dropped, and the report says so.

        Args:
            hyper: Hyper-parameters by name of the adapter, where they are other than its optimizer's defaults, and
                `max_norm`, to which the gradient's norm is clipped as `torch.nn.utils.clip_grad_norm_` does. Or names.

        Returns:
            What happened to each, by name.

        Raises:
            KeyError: A name that no adapter has.
            RuntimeError: An adapter without gradients.
            TypeError, ValueError: Hyper-parameters that are none, or out of their range.

        >>> from torchgraft.adapters import Bank, LoraConfig, sgd
        >>> from torchgraft.functional import bind
        >>> graft = bind(nn.Linear(4, 3), LoraConfig(r=4, target_modules="all-linear"))
        >>> bank = Bank(graft, slots=2, optimizer=sgd(momentum=0.9))
        >>> bank.add("poems", LoraConfig(r=4, target_modules="all-linear"))
        >>> with bank.rows(["poems"]) as adapted:
        ...     (adapted(torch.ones(1, 4)).sum() * float("nan")).backward()
        >>> bank.step({"poems": {"lr": 0.1, "max_norm": 1.0}})["poems"].skipped
        'its gradients are not finite'
        """
        with self.lock, torch.no_grad():
            chosen = self._chosen(hyper)
            for resident in chosen:
                check_pending(resident)
            here = [one for one in chosen if one.slot is not None]
            parts = [here, *([one] for one in chosen if one.slot is None)]  # who rests may need another one's slot
            report: dict[str, Stepped] = {}
            for part in parts:
                self._roster.bring(part, "step")
                report |= take_steps(self.state, part, [chosen[one] for one in part])
            return {one.name: report[one.name] for one in chosen}

    def check(self, names: Sequence[Any], compute: Callable[[Batch], Tensor]) -> None:
        """Prove for one batch that no adapter depends on another: each is changed in turn, and the others stay.

        What depends on how many rows there are, as a mean over the batch does, is not seen. The bank stays as it is.

        Args:
            names: As for `rows`.
            compute: `adapted -> loss`, a scalar, as it is computed within a block of `rows`.

        Raises:
            ValueError: Adapters whose gradients change with the parameters of another; names them.

        >>> from torchgraft.adapters import Bank, LoraConfig
        >>> from torchgraft.functional import bind
        >>> config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        >>> bank = Bank(bind(nn.Linear(4, 3), config), slots=2)
        >>> bank.add("poems", config)
        >>> bank.add("code", config)
        >>> bank.check(["poems", "code"], lambda adapted: adapted(torch.ones(2, 4)).square().sum())
        >>> bank.check(["poems", "code"], lambda adapted: adapted(torch.ones(2, 4)).sum().square())
        Traceback (most recent call last):
        ValueError: check: the gradients of 'code' change with the parameters of 'poems'; ...
        """
        given, packed = flat(names)
        with self.lock:
            present = self._roster.present(self._roster.named(given, "check"), "check")
            check_isolated(self.graft, self._slots, present, given, packed, compute)

    def forward_backward(
        self,
        loss: Callable[[Batch, Any], Tensor],
        batch: Any,
        names: Sequence[Any],
        *,
        tokens: Sequence[float] | Tensor | None = None,
        check: bool = False,
    ) -> Tensor:
        """Add the gradients of one batch, in the manner of training services.

        Args:
            loss: `(adapted, batch) -> losses`, one for each row, or their sum.
            batch: What it gets.
            names: As for `rows`.
            tokens: As for `rows`.
            check: Prove first that the adapters do not depend on each other, as `check` does.

        Returns:
            The losses, without gradients.

        >>> from torchgraft.adapters import Bank, LoraConfig
        >>> from torchgraft.functional import bind
        >>> bank = Bank(bind(nn.Linear(4, 3), LoraConfig(r=4, target_modules="all-linear")), slots=2)
        >>> bank.add("poems", LoraConfig(r=4, target_modules="all-linear"))
        >>> loss = lambda adapted, x: adapted(x).square().sum(-1)
        >>> bank.forward_backward(loss, torch.ones(2, 4), ["poems", "poems"], check=True).shape
        torch.Size([2])
        """
        if check:
            self.check(names, lambda adapted: loss(adapted, batch).sum())
        with self.rows(names, tokens=tokens) as adapted:
            losses = loss(adapted, batch)
            losses.sum().backward()
        return losses.detach()

    def _chosen(self, hyper: Mapping[str, Mapping[str, Any] | None] | Sequence[str]) -> dict[Resident, Hyper]:
        """Return the adapters to step, and the hyper-parameters of each."""
        given = hyper_by_name(hyper)
        residents = [self._roster.get(name, "step") for name in given]
        return {resident: checked_hyper(resident, given[resident.name]) for resident in residents}

    def _leave(self, residents: list[Resident], gradients: Tree | None, counts: list[float] | None) -> None:
        """End a batch: count its gradients, and let go of its adapters."""
        with self.lock:
            for resident in residents:
                resident.in_batches -= 1
            if gradients is not None:
                fresh = {one.place for one in residents if not one.pending}
                accumulate(self.state, [one.place for one in residents], gradients, self._slots.layout, counts, fresh)
                for resident in residents:
                    resident.pending, resident.by_tokens = True, counts is not None
