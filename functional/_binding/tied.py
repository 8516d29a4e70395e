"""Tied sites: sites that have the parameters of another site, for a weight that two modules share.

An embedding's matrix may be an output layer's too. Adapting it in both places is one adapter: what is added to the
tensor as the one has it is added as the other has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from .._abilities import Leaves
from .._method import Config, SiteAdapter, Tree, with_shared
from .._sites.kinds import describe
from .._sites.site import Site


@dataclasses.dataclass(frozen=True)
class TiedSite:
    """The site whose parameters a module has, and how.

    Attributes:
        source: Path of the other site.
        leaves: Its leaves, by the names that they have here.
        transposed: Whether each is transposed here.
    """

    source: str
    leaves: Mapping[str, str]
    transposed: bool = True

    def turned(self, leaves: Leaves) -> Leaves:
        """Return the other site's leaves as this site has them.

        >>> import torch
        >>> TiedSite("embed", {"a": "b"}).turned({"b": torch.zeros(2, 3)})["a"].shape
        torch.Size([3, 2])
        """
        return {name: leaves[source].mT if self.transposed else leaves[source] for name, source in self.leaves.items()}

    def turned_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the other site's leaves as this site has them.

        >>> TiedSite("embed", {"a": "b"}).turned_shapes({"b": (2, 3)})
        {'a': (3, 2)}
        """
        held = {name: shapes[source] for name, source in self.leaves.items()}
        return {name: (*s[:-2], s[-1], s[-2]) for name, s in held.items()} if self.transposed else held


TiedSites = Mapping[str, TiedSite]
"""Followers by path."""


@dataclasses.dataclass(frozen=True)
class TiedAdapter(SiteAdapter):
    """One adapter's part at a site that has the parameters of another."""

    tied: TiedSite

    def leaves(self, tree: Tree) -> Leaves:
        return self.tied.turned(with_shared(self.site, tree.get(self.tied.source, {}), tree))


def plan_tied(config: Config, modules: Mapping[str, nn.Module], sites: Mapping[str, Site]) -> TiedSites:
    """Return the modules that follow a config's sites; none, for configs without `follows`."""
    return config.follows(modules, list(sites))


def tied_adapter(config: Any, path: str, module: nn.Module, tied: TiedSite, source: SiteAdapter) -> TiedAdapter:
    """Return the adapter of a module that has a site's parameters, with that site's constants and shapes.

    Raises:
        ValueError: A module that carries no adapter.
    """
    site = describe(path, module)
    if site is None:
        raise ValueError(f"{path}: is tied to {tied.source}, and a {type(module).__name__} carries no adapter")
    site = dataclasses.replace(site, constants=source.site.constants, shared=source.site.shared)
    return TiedAdapter(config, site, tied, expected=tied.turned_shapes(source.expected))
