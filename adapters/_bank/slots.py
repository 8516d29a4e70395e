"""The slots of a bank: the numbers of its adapters in rows of one state, put there, lifted and gathered."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from torchgraft.functional import DrawsNoise, Routed, StackedGraft
from torchgraft.functional.extending import Tree, rows_of

from .gathered_stack import stack_of
from .kind import Kind, Kinds
from .layout import Layout, largest, rounded
from .optimizers import Row, RowOptimizer
from .resident import Resident
from .state import Gathered, State, clear, gather

Numbers = dict[str, Tensor]
"""All numbers of an adapter out of its slot, without padding, by the name of the buffer that they are of."""


class Slots:
    """Rows of one state, and what is in them.

    Args:
        graft: The stack that they are the places of.
        count: How many there are.
        like: A leaf, for dtype and device.

    Attributes:
        kinds: The configs that have been met.
        layout: Where leaves are in a row of parameters.
        state: The numbers.
        free: The slots that nothing is in.
    """

    def __init__(self, graft: StackedGraft, count: int, like: Tensor):
        self._graft = graft
        self.layout = Layout.of(graft.binding.shapes[""], like.dtype, graft.binding.blocks)
        self.kinds = Kinds(graft)
        self.state = State.empty(count, self.layout.size, like.dtype, like.device)
        for name, layout in self.kinds.layouts.items():
            self.state.constants[name] = torch.zeros(count, layout.size, dtype=getattr(torch, name), device=like.device)
        self.free = [*reversed(range(count))]

    def __len__(self) -> int:
        return len(self.state.steps)

    @property
    def device(self) -> torch.device:
        """The device of all numbers."""
        return self.state.parameters.device

    def make_room(self, optimizer: RowOptimizer) -> None:
        """Make the buffers of an optimizer's moments, once."""
        for name, fresh in optimizer.buffers(self.state.parameters[0], self.layout, self.layout.shapes).items():
            key = _key(optimizer, name)
            if key not in self.state.moments:
                self.state.moments[key] = fresh.new_zeros(len(self), *fresh.shape)

    def begin(self, resident: Resident, params: Tree) -> None:
        """Put a new adapter into a free slot."""
        slot = self._take(resident)
        self.layout.write(self.state.parameters[slot], params)
        fresh = resident.optimizer.buffers(self.state.parameters[slot], self.layout, resident.kind.shapes)
        for name, value in fresh.items():
            self.state.moments[_key(resident.optimizer, name)][slot].copy_(value)

    def put(self, resident: Resident, numbers: Numbers) -> None:
        """Put an adapter that was lifted into a free slot."""
        self._take(resident)
        self.write(resident, numbers)

    def write(self, resident: Resident, numbers: Numbers) -> None:
        """Write some of an adapter's numbers into its slot."""
        for name, buffer in self.state.buffers().items():
            if name in numbers:
                self._unpack(buffer, resident.place, resident.kind, numbers[name].to(buffer.device))
        self._take_norm(resident)

    def lift(self, resident: Resident) -> Numbers:
        """Return copies of an adapter's numbers in host memory; the slot stays as it is."""
        kept = self.kept(resident)
        return {
            name: self._pack(buffer, resident.place, resident.kind).to("cpu", copy=True)
            for name, buffer in self.state.buffers().items()
            if name in kept
        }

    def kept(self, resident: Resident) -> set[str]:
        """Return the names of the buffers that an adapter has numbers in."""
        moments = {f"moments.{name}" for name in self._moments(resident)}
        return {"parameters", "steps", "tokens", *(["sums"] if resident.pending else []), *moments}

    def digest(self, resident: Resident) -> str:
        """Return a digest of all of an adapter's numbers."""
        found = hashlib.sha256()
        for value in self.lift(resident).values():
            found.update(value.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def check(self, resident: Resident, numbers: Numbers) -> None:
        """Refuse numbers that are not all of an adapter's, parameters apart.

        Raises:
            ValueError: Names or shapes of other adapters, or of another optimizer.
        """
        fresh = resident.optimizer.buffers(self.state.parameters[0], self.layout, self.layout.shapes)
        shapes = {f"moments.{_key(resident.optimizer, name)}": value.shape for name, value in fresh.items()}
        shapes |= {"steps": torch.Size(), "tokens": torch.Size()}
        shapes |= {"sums": self.state.sums[0].shape} if resident.pending else {}
        index = resident.kind.index(self.layout, self.device)
        if index is not None:
            shapes = {n: index.shape if shape == (self.layout.size,) else shape for n, shape in shapes.items()}
        given = {name: value.shape for name, value in numbers.items()}
        if given != shapes:
            other = sorted(name for name in {*given, *shapes} if given.get(name) != shapes.get(name))
            raise ValueError(
                f"{other[0]} has shape {tuple(given.get(other[0], ())) or 'none'}, expected "
                f"{tuple(shapes.get(other[0], ())) or 'none'}: it is the state of another adapter or optimizer"
            )

    def leave(self, resident: Resident) -> None:
        """Clear an adapter's slot, which is free then."""
        clear(self.state, resident.place)
        self.free.append(resident.place)
        resident.slot = resident.row = None

    def own_tree(self, resident: Resident) -> Tree:
        """Return an adapter's parameters in its own shapes; views where it needs no copies."""
        return self.layout.tree(self.state.parameters[resident.place], resident.kind.shapes)

    def gather(
        self,
        present: Sequence[Resident],
        given: Sequence[str | None],
        packed: int | None,
        grad: bool,
        state: State | None = None,
    ) -> tuple[Routed, Gathered]:
        """Return the stack of the adapters that rows have, over the rows, and its leaves.

        Args:
            present: The adapters, each once; one at least.
            given: The name of each row's, or of each token's.
            packed: How many tokens a row has, if they have adapters of their own.
            grad: Whether to differentiate.
            state: The numbers, where they are not the slots' own.
        """
        own = largest([resident.kind.shapes for resident in present])
        cut = rounded(own, self.layout, self.kinds.least) if self.kinds.cuts else self.layout.shapes
        places = [resident.place for resident in present]
        gathered = gather(
            self.state if state is None else state, places, self.layout, self.kinds.layouts, cut, grad=grad
        )
        index = {resident.name: i for i, resident in enumerate(present)}
        values = [-1 if name is None else index[name] for name in given]
        noise = [resident.generator for resident in present] if _draws(present[0].kind) else None
        rows = rows_of(values, len(present), self.device, packed, noise)
        sites = [*self._graft.sites[""]]
        return stack_of(gathered, rows, sites, [resident.kind.present for resident in present]), gathered

    def own_sums(self, resident: Resident) -> Tensor:
        """Return the sum of an adapter's gradients without padding, `"own"`; zeros where it has none."""
        own = self._pack(self.state.sums, resident.place, resident.kind)
        return own if resident.pending else torch.zeros_like(own)

    def set_sums(self, resident: Resident, sums: Tensor | None, tokens: float = 0.0) -> None:
        """Give an adapter a sum of gradients, `"own"`, and the tokens that it is of; or none."""
        self.state.sums[resident.place].zero_()  # padding may be what a batch left that was not finite
        self.state.tokens[resident.place] = tokens
        if sums is not None:
            self._unpack(self.state.sums, resident.place, resident.kind, sums)
        self._take_norm(resident)
        resident.pending = sums is not None

    def _take_norm(self, resident: Resident) -> None:
        sums, norms = self.state.sums[resident.place], self.state.norms
        norms[resident.place] = torch.linalg.vector_norm(sums, dtype=norms.dtype)

    def _take(self, resident: Resident) -> int:
        slot = resident.slot = self.free.pop()
        clear(self.state, slot)
        for name, row in resident.kind.constants.items():
            self.state.constants[name][slot].copy_(row)
        moments = {name.removeprefix(_key(resident.optimizer, "")): name for name in self._moments(resident)}
        resident.row = Row(
            self.state.parameters[slot],
            self.state.sums[slot],
            {name: self.state.moments[key][slot] for name, key in moments.items()},
            self.state.steps[slot],
            self.layout,
            resident.kind.shapes,
        )
        return slot

    def _moments(self, resident: Resident) -> list[str]:
        prefix = _key(resident.optimizer, "")
        return [name for name in self.state.moments if name.startswith(prefix)]

    def _pack(self, buffer: Tensor, slot: int, kind: Kind) -> Tensor:
        index = kind.index(self.layout, self.device)
        return buffer[slot] if index is None or buffer[slot].shape != (self.layout.size,) else buffer[slot][index]

    def _unpack(self, buffer: Tensor, slot: int, kind: Kind, numbers: Tensor) -> None:
        index = kind.index(self.layout, self.device)
        if index is None or buffer[slot].shape != (self.layout.size,):
            buffer[slot].copy_(numbers)
        else:
            buffer[slot].index_copy_(0, index, numbers)


def _draws(kind: Kind) -> bool:
    """Return whether the adapters of a bank, whose configs agree in this, draw noise in training."""
    fields = (field.name for field in dataclasses.fields(kind.config))
    dropping = any(getattr(kind.config, name) for name in fields if name.endswith("dropout"))
    return dropping or kind.config.method.ability(DrawsNoise) is not None


def _key(optimizer: RowOptimizer, name: str) -> str:
    """Return what an optimizer's buffer is called among the moments of all."""
    return f"{optimizer.name}.{name}"
