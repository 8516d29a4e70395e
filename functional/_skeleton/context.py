"""The context of a call: the facts that the adapted modules of its skeleton read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from .._locating.finder import Finder


class CallContext:
    """The facts of one call that its sites need. Each skeleton has one, so threads never share it.

    Attributes:
        trees: The active trees, or `ActiveTree`s in their place, by adapter name.
        finder: Finds where the rows of a routed call are in a site's input.
        see: `(path, x)`, called with the input of each site that runs; `None` for no call.
        reached: Collects the paths of the sites that ran.
        apart: Names of adapters that a look is to keep apart by rows, also in runs without them.
        kept: The tensors, by identity of the model's, that a routed stack replaces row by row.
        weights: What adapted parameters are read as where each row has its own, by their paths; `None` elsewhere.
    """

    __slots__ = ("__weakref__", "apart", "finder", "kept", "reached", "see", "trees", "weights")

    def __init__(self) -> None:
        self.trees: Mapping[str, Any] | None = None
        self.finder: Finder | None = None
        self.see: Callable[[str, Tensor], None] | None = None
        self.reached: set[str] | None = None
        self.apart: Collection[str] = ()
        self.kept: dict[int, Tensor] | None = None
        self.weights: Mapping[str, Any] | None = None

    def active(self, path: str) -> Mapping[str, Any]:
        """Return the active trees by adapter name, for the site at a path.

        Raises:
            RuntimeError: No call is in progress.
        """
        if self.trees is None:
            raise RuntimeError(
                f"{path}: this adapted module ran outside any call of its graft; to keep an adapted module, take it "
                "from graft.view(params)"
            )
        return self.trees

    def clear(self) -> None:
        """End the call."""
        self.trees = self.reached = self.finder = self.kept = self.weights = None
        self.apart = ()
