"""Stacks of adapters that differ in rank, scaling or sites: one graft over several configs of one method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._binding.stacked import StackedAdapter, StackedBinding
from ._graft import Graft
from ._layers.routed import SelectedAdapter
from ._locating.finder import Finder
from ._method import Config, SiteAdapter, Tree
from ._places import Places
from ._trees import check_tree


class StackedGraft(Graft):
    """A model and a stack of adapters of one method, each with a config of its own; made by `bind(model, [...])`.

    Leaves of the stack have the largest size that any adapter has at their site, padded with zeros; padded numbers
    get no gradient, so that momentum and weight decay leave them zero, and a step on the stack is a step of each
    adapter. An adapter that has no module at a site leaves the base alone there.

    Attributes:
        members: The configs, in the order of the stack.
    """

    binding: StackedBinding

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
        """Split a stack into trees of each config's own shapes and sites; their leaves are views.

        Raises:
            KeyError, TypeError, ValueError: A stack that does not fit.
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

    def member(self, index: int) -> Graft:
        """Return the graft of one config alone, for trees that `unstack` returns.

        Raises:
            IndexError, TypeError: There is no such config.
        """
        return Graft(self.model, self.binding.member(index), allow_unreached=self.bound.allow_unreached)

    def at(self, index: int | Tensor) -> Member:
        """Return the graft of one adapter as the stack has it, padded: for `torch.vmap` over stack and index.

        Args:
            index: Which adapter: an integer or an integer tensor without axes, which `vmap` may map over.

        Raises:
            IndexError, TypeError: There is no such adapter.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(torch.nn.Linear(4, 3), [LoraConfig(r=r, target_modules="all-linear") for r in (1, 2)])
        >>> many, x = graft.init(), torch.ones(5, 4)
        >>> torch.vmap(lambda i, params: graft.at(i)(params, x))(torch.arange(2), many).shape
        torch.Size([2, 5, 3])
        """
        self.binding.check_index(index)
        return Member(self, index)


@dataclasses.dataclass(frozen=True, eq=False)
class PaddedAdapter:
    """The padded tree of one adapter and its place in the stack, given to a call in place of a tree."""

    tree: Tree
    index: int | Tensor
    per_row: ClassVar[bool] = False

    def check(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], what: str) -> None:
        check_tree(self.tree, shapes, what)

    def with_tree(self, tree: Tree) -> PaddedAdapter:
        """Return another tree of the same adapter."""
        return PaddedAdapter(tree, self.index)

    def layer(self, below: Any, adapter: SiteAdapter, finder: Finder | None) -> SelectedAdapter:
        assert isinstance(adapter, StackedAdapter)
        member, on = adapter.at(self.index)
        return SelectedAdapter(below, member, adapter.leaves(self.tree), on)

    def tensors(self) -> Any:
        return self.tree, self.index


class Member:
    """An adapter of a stack as a function of its padded tree; made by `StackedGraft.at`."""

    def __init__(self, graft: StackedGraft, index: int | Tensor):
        self.graft, self.index = graft, index

    def __call__(self, params: Tree, *args: Any, **kwargs: Any) -> Any:
        return self.graft(PaddedAdapter(params, self.index), *args, **kwargs)  # type: ignore[arg-type]
