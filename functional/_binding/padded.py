"""One adapter of a stack as the stack has it: with leaves as large as the largest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from .._layers.routed import SelectedAdapter
from .._locating.finder import Finder
from .._method import SiteAdapter, Tree
from .._trees import check_tree
from .stacked import StackedAdapter


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
        leaves = adapter.leaves(self.tree)
        member.check(leaves)
        return SelectedAdapter(below, member, leaves, on)

    def tensors(self) -> Any:
        return self.tree, self.index
