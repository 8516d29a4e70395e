"""Stacks of adapters that differ in rank, scaling or sites: one graft over several configs of one method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ._binding.members import check_names, ranges_of
from ._binding.padded import PaddedAdapter
from ._binding.stacked import StackedBinding
from ._graft import Graft
from ._messages import did_you_mean
from ._method import Config, Tree
from ._places import Places


class StackedGraft(Graft):
    """A model and a stack of adapters of one method, each with a config of its own; made by `bind(model, [...])`.

    Leaves of the stack have the largest size that any adapter has at their site, padded with zeros; padded numbers
    get no gradient, so that momentum and weight decay leave them zero, and a step on the stack is a step of each
    adapter. An adapter that has no module at a site leaves the base alone there.

    What has to be alike in all configs are the fields that change which leaves there are or how they are used, such as
    LoRA's `use_dora`, `bias` and `modules_to_save`; ranks, scalings, initialisations and targets may differ.

    Args:
        model: The user's model.
        binding: Configs bound to it.
        allow_unreached: Accept forwards that run past a site.
        names: A name for each adapter, for `rows`, `member` and files.

    Attributes:
        members: The configs, in the order of the stack.
        names: The names, or `None`.
    """

    binding: StackedBinding

    def __init__(
        self,
        model: nn.Module,
        binding: StackedBinding,
        *,
        allow_unreached: bool = False,
        names: Sequence[str] | None = None,
    ):
        super().__init__(model, binding, allow_unreached=allow_unreached)
        self.names = None if names is None else check_names(names, len(binding.members))
        self._grafts: dict[int, Graft] = {}

    @property
    def members(self) -> Sequence[Config]:
        """The configs, in the order of the stack."""
        return self.binding.members

    def init(
        self,
        generator: Any = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """Make a fresh stack.

        Args:
            generator: One source of randomness for all adapters in turn, or a sequence with one for each.
            dtype: Dtype of the leaves, as for a graft of one config.
            device: Device of the leaves.

        Returns:
            A stacked tree, leaves `"N ..."`.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(torch.nn.Linear(4, 3), [LoraConfig(r=r, target_modules="all-linear") for r in (1, 2)])
        >>> {leaf: tuple(t.shape) for leaf, t in graft.init()[""].items()}
        {'lora_A': (2, 2, 4), 'lora_B': (2, 3, 2)}
        """
        return self.binding.init(generator, dtype, device)

    def stack(self, adapters: Sequence[Tree]) -> Tree:
        """Stack one tree of each config, in order, padded with zeros; differentiable.

        Args:
            adapters: Trees as the grafts of the single configs have them.

        Raises:
            KeyError, TypeError, ValueError: A tree that its config does not fit, or not one for each config.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(torch.nn.Linear(4, 3), [LoraConfig(r=r, target_modules="all-linear") for r in (1, 2)])
        >>> many = graft.stack([graft.member(i).init() for i in range(2)])
        >>> [t[""]["lora_A"].shape[0] for t in graft.unstack(many)]
        [1, 2]
        """
        return self.binding.stack(adapters)

    def unstack(self, stacked: Tree) -> list[Tree]:
        """Split a stack into trees of each config's own shapes and sites; their leaves are views, but for what
        has padding between experts or groups.

        Raises:
            KeyError, TypeError, ValueError: A stack that does not fit, or with numbers in its padding.
        """
        return self.binding.unstack(stacked)

    def pad(self, tree: Tree) -> Tree:
        """Pad one adapter's tree with zeros to what a place of the stack has room for; differentiable.

        Raises:
            ValueError: A leaf that the stack has no room for.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(torch.nn.Linear(4, 3), [LoraConfig(r=r, target_modules="all-linear") for r in (1, 4)])
        >>> graft.pad(graft.member(0).init())[""]["lora_A"].shape
        torch.Size([4, 4])
        """
        return self.binding.pad(tree)

    def places(self, configs: Sequence[Config | None] | None = None) -> Places:
        """Plan constants and sites of each place of a stack as tensors, so that a place can get another adapter.

        The graft was bound for the largest adapters that a place can hold; what is there can change without binding
        again: `graft(route(many, rows, places=places.put(2, graft.places([config]))), x)`.

        Args:
            configs: The config of each place, `None` for an empty one; by default those that were bound.

        Raises:
            TypeError: Configs of several methods.
            ValueError: A config that the graft has no room for: a site, a rank; one that differs in what the adapters
                of a stack share.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> large = LoraConfig(r=4, target_modules="all-linear")
        >>> graft = bind(torch.nn.Linear(4, 3), [large, large])
        >>> places = graft.places().put(1, graft.places([LoraConfig(r=1, lora_alpha=3, target_modules="all-linear")]))
        >>> places.constants[""]["scaling"]
        tensor([2., 3.], dtype=torch.float64)
        """
        return self.binding.places(configs)

    def member(self, index: int | str) -> Graft:
        """Return the graft of one config alone, for trees that `unstack` returns; made once.

        Args:
            index: Which adapter, by place or by name.

        Raises:
            IndexError, TypeError: There is no such adapter.
        """
        index = self._index(index)
        if index not in self._grafts:
            graft = Graft(self.model, self.binding.singles[index], allow_unreached=self.bound.allow_unreached)
            self._grafts[index] = graft if self.bound.training is None else graft.in_mode(self.bound.training)
        return self._grafts[index]

    def in_mode(self, training: bool) -> Self:
        graft = super().in_mode(training)
        graft._grafts = {}
        return graft

    def append(self, stacked: Tree, config: Config, params: Tree, name: str | None = None) -> tuple[StackedGraft, Tree]:
        """Return the graft and the stack with one more adapter at the end; differentiable, and nothing is changed.

        Leaves grow where the new one is larger. A stack that is trained is appended to under `torch.no_grad()`, and
        its optimizer made again: the tensors are new ones. Where adapters come and go all the time, `places` is for it.

        Args:
            stacked: The stack.
            config: The new adapter's config.
            params: Its tree, as `bind(model, config).init()` makes it.
            name: Its name, where adapters have names.

        Raises:
            KeyError, TypeError, ValueError: A config or a tree that does not fit; a name that is taken or missing.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(torch.nn.Linear(4, 3), [LoraConfig(r=2, target_modules="all-linear")], names=["poems"])
        >>> config = LoraConfig(r=4, target_modules="all-linear")
        >>> graft, many = graft.append(graft.init(), config, bind(graft.model, config).init(), "code")
        >>> graft.names, many[""]["lora_A"].shape
        (('poems', 'code'), torch.Size([2, 4, 4]))
        """
        if (name is None) != (self.names is None):
            given = "no name is given, and the adapters of this stack have names"
            raise ValueError(f"append: {given if name is None else 'a name is given, and this stack has none'}")
        names = None if self.names is None or name is None else check_names([*self.names, name], len(self.members) + 1)
        graft = self._like(self.binding.append(config), names)
        return graft, graft.stack([*self.unstack(stacked), params])

    def remove(self, stacked: Tree, index: int | str) -> tuple[StackedGraft, Tree]:
        """Return the graft and the stack without one adapter; differentiable, and nothing is changed.

        Leaves shrink to what the others need. Rows from before mean other adapters then: make them anew.

        Args:
            stacked: The stack.
            index: Which adapter, by place or by name.

        Raises:
            IndexError: There is no such adapter.
            ValueError: It is the only one; a stack that does not fit.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(torch.nn.Linear(4, 3), [LoraConfig(r=r, target_modules="all-linear") for r in (1, 8)])
        >>> graft.remove(graft.init(), 1)[1][""]["lora_A"].shape
        torch.Size([1, 1, 4])
        """
        index = self._index(index)
        rest = [i for i in range(len(self.members)) if i != index]
        if not rest:
            raise ValueError("remove: it is the only adapter of the stack, and no stack is empty")
        binding = self.binding.of_singles(self.model, [self.binding.singles[i] for i in rest])
        graft = self._like(binding, None if self.names is None else [self.names[i] for i in rest])
        trees = self.unstack(stacked)
        return graft, graft.stack([trees[i] for i in rest])

    def rows(
        self, names: Sequence[str | None] | Sequence[Sequence[str | None]], device: torch.device | str | None = None
    ) -> Tensor:
        """Return the index of each row's adapter, by name: `graft(route(many, graft.rows(["poems", None])), x)`.

        Args:
            names: One for each row of a batch, or a list for each, with one for each token; `None` for the base alone.
            device: Device of the result.

        Raises:
            IndexError: A name that no adapter has, or a stack without names.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> configs = [LoraConfig(r=r, target_modules="all-linear") for r in (1, 2)]
        >>> bind(torch.nn.Linear(4, 3), configs, names=["poems", "code"]).rows(["code", None, "poems"])
        tensor([ 1, -1,  0])
        """
        if isinstance(names, str):
            raise TypeError(f"rows: names is {names!r}, expected a list with a name for each row of the batch")

        def index_of(name: Any) -> Any:
            if isinstance(name, (list, tuple)):
                return [index_of(one) for one in name]
            return -1 if name is None else self._index(name)

        return torch.tensor(index_of(list(names)), dtype=torch.long, device=device)

    def _index(self, index: int | str) -> int:
        count = len(self.members)
        if isinstance(index, str):
            if self.names is None:
                raise IndexError(f"the adapters of this stack have no names, got {index!r}: bind(..., names=[...])")
            if index not in self.names:
                known = f"{list(self.names)}{did_you_mean(index, self.names)}"
                raise IndexError(f"no adapter of the stack has the name {index!r}; they are {known}")
            return self.names.index(index)
        self.binding.check_index(index)
        return index % count

    def _like(self, binding: StackedBinding, names: Sequence[str] | None) -> StackedGraft:
        graft = StackedGraft(self.model, binding, allow_unreached=self.bound.allow_unreached, names=names)
        return graft if self.bound.training is None else graft.in_mode(self.bound.training)

    def at(self, index: int | str | Tensor) -> Member:
        """Return the graft of one adapter as the stack has it, padded: for `torch.vmap` over stack and index.

        Args:
            index: Which adapter: a name, an integer, or an integer tensor without axes, which `vmap` may map over.

        Raises:
            IndexError, TypeError: There is no such adapter.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(torch.nn.Linear(4, 3), [LoraConfig(r=r, target_modules="all-linear") for r in (1, 2)])
        >>> many, x = graft.init(), torch.ones(5, 4)
        >>> torch.vmap(lambda i, params: graft.at(i)(params, x))(torch.arange(2), many).shape
        torch.Size([2, 5, 3])
        """
        return Member(self, index if isinstance(index, Tensor) else self._index(index))

    def __repr__(self) -> str:
        padded, own = self.binding.sizes
        parts = [f"{len(self.members)} adapters", *ranges_of(self.members)]
        if padded != own:
            parts.append(f"padded to {padded / own:.2g} times their size")
        return f"Stacked{super().__repr__()[:-1]}: {', '.join(parts)})"


class Member:
    """An adapter of a stack as a function of its padded tree; made by `StackedGraft.at`."""

    def __init__(self, graft: StackedGraft, index: int | Tensor):
        self.graft, self.index = graft, index

    def __call__(self, params: Tree, *args: Any, **kwargs: Any) -> Any:
        return self.graft(PaddedAdapter(params, self.index), *args, **kwargs)  # type: ignore[arg-type]
