"""The bank: adapters that come and go in the slots of one bound model, each trained for itself."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchgraft.functional import Graft, Rows, StackedGraft
from torchgraft.functional.extending import StackedBinding, Tree, did_you_mean, given_type, rows_of

from .._config.base import AdapterConfig
from .batch import Batch, stack_of
from .kind import Kinds
from .layout import Layout, largest
from .optimizers import Row, RowOptimizer, adamw
from .resident import Resident, own_generator
from .state import State, accumulate, clear, gather


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


class Bank:
    """Adapters with lives of their own in a fixed number of slots over one bound model.

    Each has its own rank, data, hyper-parameters, step count and noise; what it computes is what it would alone. Losses
    have to be each row's own, normalised by what belongs to the same adapter: a mean over a batch, an auxiliary loss
    over its rows or negatives from it would join adapters, which no library can see.

    Every method may be called by several threads; they take turns at one lock, `bank.lock`, which nothing holds while
    the model runs.

    Args:
        graft: `bind(model, config)` with the largest config that a slot can hold, or of several, `bind(model, [...])`.
        slots: How many adapters there are at most at one time.
        optimizer: The optimizer of adapters that are not added with another one.
        dtype: Dtype of the parameters, as for `Graft.init`.
        device: Device of the parameters.

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
    """

    def __init__(
        self,
        graft: Graft,
        slots: int = 64,
        *,
        optimizer: RowOptimizer | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        if not isinstance(slots, int) or isinstance(slots, bool) or slots < 1:
            raise ValueError(f"Bank: slots is {slots!r}, expected how many adapters there are at most, 1 or more")
        self.graft = _stacked(graft)
        self.optimizer = optimizer or adamw()
        self.lock = threading.RLock()
        self._shapes = self.graft.binding.shapes[""]
        like = _like(graft, dtype, device)
        self._layout = Layout.of(self._shapes, like.dtype)
        self.optimizer.check(self._layout)
        self._kinds = Kinds(self.graft)
        self.state = State.empty(slots, self._layout.size, like.dtype, like.device)
        for name, layout in self._kinds.layouts.items():
            self.state.constants[name] = torch.zeros(slots, layout.size, dtype=getattr(torch, name), device=like.device)
        self._add_buffers(self.optimizer)
        self._residents: dict[str, Resident] = {}
        self._free = [*range(slots)]

    @property
    def slots(self) -> int:
        """How many adapters there are at most."""
        return len(self.state.steps)

    @property
    def names(self) -> list[str]:
        """The names of all adapters, in the order in which they were added."""
        with self.lock:
            return [*self._residents]

    def __contains__(self, name: object) -> bool:
        return name in self._residents

    def __len__(self) -> int:
        return len(self._residents)

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
            RuntimeError: No slot is free.
            ValueError: A name that is taken; a config that the bank has no room for, or that differs in what its
                adapters share.

        >>> from torchgraft.adapters import Bank, LoraConfig
        >>> from torchgraft.functional import bind
        >>> bank = Bank(bind(nn.Linear(4, 3), LoraConfig(r=4, target_modules="all-linear")), slots=2)
        >>> bank.add("poems", LoraConfig(r=1, target_modules="all-linear"), generator=torch.Generator().manual_seed(0))
        >>> bank.tensors("poems")[""]["lora_A"].shape
        torch.Size([1, 4])
        """
        with self.lock:
            self._check_new(name, "add")
            try:
                kind = self._kinds.of(config)
            except (TypeError, ValueError) as error:
                raise type(error)(f"add: the config of {name!r} does not fit the bank: {error}") from error
            optimizer = optimizer or self.optimizer
            optimizer.check(self._layout)
            if params is None:
                params = kind.graft.init(generator, dtype=self.state.parameters.dtype, device=self._device)
            kind.check(params)
            own = own_generator(generator, self._device)
            slot = self._free_slot()
            self._add_buffers(optimizer)
            resident = Resident(name, kind, optimizer, own, slot)
            self._place(resident, slot)
            self._layout.write(self.state.parameters[slot], params)
            for buffer, fresh in optimizer.buffers(self.state.parameters[slot], self._layout).items():
                self.state.moments[f"{optimizer.name}.{buffer}"][slot].copy_(fresh)
            self._residents[name] = resident

    def remove(self, name: str) -> None:
        """Remove an adapter; its slot is free again, and nothing else changes.

        Raises:
            KeyError: No such adapter.
            RuntimeError: Its rows are in a batch that is not over.
        """
        with self.lock:
            resident = self._resident(name, "remove")
            self._check_idle(resident, "remove")
            clear(self.state, resident.slot)
            self._free.append(resident.slot)
            del self._residents[name]

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
        given, packed = _flat(names)
        with self.lock:
            residents = [self._resident(name, "rows") for name in dict.fromkeys(given) if name is not None]
            counts = _counts(given, packed, tokens, residents)
            stack, gathered = self._gather(residents, given, packed, torch.is_grad_enabled())
            for resident in residents:
                resident.in_batches += 1
        batch = Batch(self.graft, stack, gathered)
        try:
            yield batch
        except BaseException:
            batch.close()
            self._leave(residents, None, None)
            raise
        self._leave(residents, batch.close(), counts)

    def view(self, names: Sequence[Any]) -> nn.Module:
        """Return a module like the model whose rows have these adapters, as they are now: `bank.view(["poems"])`.

        Args:
            names: The name of each row's adapter, `None` for the base alone.

        Raises:
            KeyError: A name that no adapter has.
        """
        given, packed = _flat(names)
        with self.lock:
            residents = [self._resident(name, "view") for name in dict.fromkeys(given) if name is not None]
            return self.graft.view(self._gather(residents, given, packed, False)[0])

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
        given = _hyper(hyper)
        with self.lock, torch.no_grad():
            todo = []
            for name, values in given.items():
                resident = self._resident(name, "step")
                todo.append((resident, *self._checked_hyper(resident, values)))
            norms = [torch.linalg.vector_norm(self.state.sums[r.slot], dtype=torch.float64) for r, _, _ in todo]
            known = torch.stack([*norms, *(self.state.tokens[r.slot] for r, _, _ in todo)]).tolist() if todo else []
            return {
                resident.name: self._step(resident, values, most, norm, tokens)
                for (resident, values, most), norm, tokens in zip(
                    todo, known[: len(todo)], known[len(todo) :], strict=True
                )
            }

    def steps(self, name: str) -> int:
        """Return how many steps an adapter has taken.

        Raises:
            KeyError: No such adapter.
        """
        return self._resident(name, "steps").steps

    def config(self, name: str) -> AdapterConfig:
        """Return an adapter's config.

        Raises:
            KeyError: No such adapter.
        """
        return self._resident(name, "config").kind.config

    def tensors(self, name: str) -> Tree:
        """Return a copy of an adapter's parameters, in its own shapes: `{path: {leaf: tensor}}`.

        Raises:
            KeyError: No such adapter.
        """
        with self.lock:
            resident = self._resident(name, "tensors")
            row = self.state.parameters[resident.slot]
            tree = self._layout.views(row, resident.kind.shapes)
            return {path: {leaf: value.clone() for leaf, value in leaves.items()} for path, leaves in tree.items()}

    @property
    def _device(self) -> torch.device:
        return self.state.parameters.device

    def _resident(self, name: Any, what: str) -> Resident:
        if isinstance(name, str) and name in self._residents:
            return self._residents[name]
        raise KeyError(
            f"{what}: no adapter has the name {name!r:.60}{did_you_mean(str(name), self._residents)}; bank.add adds one"
        )

    def _check_new(self, name: Any, what: str) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{what}: name is {name!r:.60}, expected a string that is not empty")
        if name in self._residents:
            raise ValueError(f"{what}: the name {name!r} is taken; remove that adapter first, or choose another name")

    def _check_idle(self, resident: Resident, what: str) -> None:
        if resident.in_batches:
            raise RuntimeError(
                f"{what}: rows of {resident.name!r} are in a batch that is not over; leave the block of bank.rows first"
            )

    def _free_slot(self) -> int:
        if not self._free:
            raise RuntimeError(
                f"add: all {self.slots} slots are taken; remove an adapter first, or make the bank with more slots"
            )
        return self._free.pop()

    def _place(self, resident: Resident, slot: int) -> None:
        clear(self.state, slot)
        for name, row in resident.kind.constants.items():
            self.state.constants[name][slot].copy_(row)

    def _add_buffers(self, optimizer: RowOptimizer) -> None:
        """Make the buffers of an optimizer's moments, once."""
        for name, fresh in optimizer.buffers(self.state.parameters[0], self._layout).items():
            key = f"{optimizer.name}.{name}"
            if key not in self.state.moments:
                self.state.moments[key] = fresh.new_zeros(self.slots, *fresh.shape)

    def _gather(self, residents: list[Resident], given: list[Any], packed: int | None, grad: bool) -> Any:
        """Return the stack of the adapters that rows have, and its leaves."""
        present = residents or [*self._residents.values()][:1]
        if not present:
            raise ValueError("rows: the bank has no adapters yet; the base alone is the model itself")
        cut = largest([r.kind.shapes for r in present]) if self._kinds.cuts else self._shapes
        cut = {path: {**leaves, **cut.get(path, {})} for path, leaves in self._shapes.items()}
        gathered = gather(
            self.state, [r.slot for r in present], self._layout, self._kinds.layouts, cut, grad=grad and bool(residents)
        )
        index = {resident.name: i for i, resident in enumerate(present)}
        values = [-1 if name is None else index[name] for name in given]
        rows: Rows = rows_of(values, len(present), self._device, packed)
        sites = [*self.graft.sites[""]]
        return stack_of(gathered, rows, sites, [r.kind.present for r in present]), gathered

    def _leave(self, residents: list[Resident], gradients: Tensor | None, counts: list[float] | None) -> None:
        """End a batch: count its gradients, and let go of its adapters."""
        with self.lock:
            for resident in residents:
                resident.in_batches -= 1
            if gradients is not None:
                accumulate(self.state, [r.slot for r in residents], gradients, counts)
                for resident in residents:
                    resident.pending, resident.by_tokens = True, counts is not None

    def _checked_hyper(self, resident: Resident, given: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
        what = f"step: {resident.name!r}"
        if not resident.pending:
            raise RuntimeError(
                f"{what} has no gradients since its last step; call backward in a block of bank.rows, and leave it"
            )
        values = dict(given)
        most = values.pop("max_norm", None)
        if most is not None and not (isinstance(most, (int, float)) and most > 0):
            raise ValueError(f"{what}: max_norm is {most!r:.60}, expected a number above 0, or None")
        resident.optimizer.check_hyper(values, what)
        return {**resident.optimizer.hyper, **values}, most

    def _step(
        self, resident: Resident, hyper: Mapping[str, Any], most: float | None, norm: float, tokens: float
    ) -> Stepped:
        slot, state = resident.slot, self.state
        skipped = ""
        if resident.by_tokens and tokens <= 0:
            skipped = "its batches have no tokens"
        elif not math.isfinite(norm):
            skipped = "its gradients are not finite"
        factor = 1 / tokens if resident.by_tokens and tokens > 0 else 1.0
        norm *= factor
        if not skipped:
            if most is not None:
                factor *= min(1.0, most / (norm + 1e-6))
            if factor != 1:
                state.sums[slot].mul_(factor)
            first, state.steps[slot] = resident.steps == 0, resident.steps + 1
            prefix = f"{resident.optimizer.name}."
            moments = {k.removeprefix(prefix): v[slot] for k, v in state.moments.items() if k.startswith(prefix)}
            own = resident.kind.shapes
            resident.optimizer.update(
                Row(state.parameters[slot], state.sums[slot], moments, state.steps[slot], first, self._layout, own),
                hyper,
            )
            resident.steps += 1
        state.sums[slot].zero_()
        state.tokens[slot] = 0
        resident.pending = False
        return Stepped(resident.steps, norm, skipped)


def _stacked(graft: Any) -> StackedGraft:
    """Return the stack whose places are slots."""
    if isinstance(graft, StackedGraft):
        return graft
    if not isinstance(graft, Graft):
        raise TypeError(f"Bank: graft is {given_type(graft)}, expected what bind(model, config) returned")
    if graft.binding.named:
        raise TypeError(
            f"Bank: the graft has adapters by name, {sorted(graft.configs)}, which add up; bind the model to one "
            "config, the largest that a slot can hold: bind(model, config)"
        )
    binding = StackedBinding.of_singles(graft.model, [graft.binding])
    made = StackedGraft(graft.model, binding, allow_unreached=graft.bound.allow_unreached)
    return made if graft.bound.training is None else made.in_mode(graft.bound.training)


def _like(graft: Graft, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """Return a leaf like all that an adapter of the bank has."""
    made = graft.init(torch.Generator().manual_seed(0), dtype=dtype, device=device)
    leaves = {(leaf.dtype, leaf.device): leaf for leaves in made.values() for leaf in leaves.values()}
    if len(leaves) > 1:
        raise ValueError(
            f"Bank: parameters would be of {sorted(map(str, leaves))}; a bank has one dtype and one device: give "
            "dtype= and device="
        )
    return next(iter(leaves.values()))


def _flat(names: Any) -> tuple[list[Any], int | None]:
    """Return the names of rows, or those of the tokens of packed rows and how many tokens a row has."""
    if isinstance(names, (str, Tensor)) or not isinstance(names, Sequence) or not names:
        raise TypeError(
            f"rows: names is {names!r:.60}, expected a list with a name for each row of the batch, None for the base"
        )
    if not any(isinstance(one, (list, tuple)) for one in names):
        return [*names], None
    if len({len(one) if isinstance(one, (list, tuple)) else -1 for one in names}) > 1 or not names[0]:
        raise ValueError("rows: packed rows differ in their number of tokens; give a name for each token of each row")
    return [name for one in names for name in one], len(names[0])


def _counts(given: list[Any], packed: int | None, tokens: Any, residents: list[Resident]) -> list[float] | None:
    """Return how many tokens each adapter's losses are sums over."""
    for resident in residents:
        if resident.pending and resident.by_tokens != (tokens is not None):
            raise ValueError(
                f"rows: tokens are {'given' if tokens is not None else 'not given'}, and those of {resident.name!r}'s "
                f"gradients since its last step were{'' if resident.by_tokens else ' not'}; give them always, or never"
            )
    if tokens is None:
        return None
    if packed is not None:
        raise ValueError("rows: tokens are counted by row, and packed rows have several adapters; normalise the loss")
    counts = tokens.tolist() if isinstance(tokens, Tensor) else [*tokens]
    if len(counts) != len(given) or not all(isinstance(n, (int, float)) and 0 <= n < math.inf for n in counts):
        raise ValueError(f"rows: tokens is {counts!r:.60}, expected how many each of the {len(given)} rows has")
    sums = dict.fromkeys((resident.name for resident in residents), 0.0)
    for name, count in zip(given, counts, strict=True):
        if name is not None:
            sums[name] += count
    return [*sums.values()]


def _hyper(hyper: Any) -> dict[str, Mapping[str, Any]]:
    """Return the hyper-parameters of each adapter that is to be stepped."""
    if isinstance(hyper, Mapping):
        for name, values in hyper.items():
            if values is not None and not isinstance(values, Mapping):
                raise TypeError(
                    f"step: the hyper-parameters of {name!r} are {given_type(values)}, expected a dict: "
                    "bank.step({'poems': {'lr': 1e-3}})"
                )
        return {name: values or {} for name, values in hyper.items()}
    if isinstance(hyper, str) or not isinstance(hyper, Sequence):
        raise TypeError(f"step: hyper is {hyper!r:.60}, expected a dict by name, or a list of names")
    return {name: {} for name in hyper}
