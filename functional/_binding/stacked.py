"""Bindings of stacks: several configs of one method meet a model."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import given_type
from .._method import Config, SiteAdapter, Tree
from .._places import Places
from .._rows import PerAdapter, Rows, is_readable
from .._sites.site import Site
from .._tensors.wrappers import modules_of
from .._trees import check_tree, sort
from .binding import Binding, Shapes
from .padding import Blocks, blocks_of, check_padding, cut_to, pad_to, whole_by
from .plan import for_model, structure_for
from .stacking import (
    NoRoomError,
    check_configs,
    check_leaves,
    constants_in_places,
    largest,
    union,
)


@dataclasses.dataclass(frozen=True, eq=False)
class StackedBinding(Binding):
    """Several configs of one method bound to a model, one for each adapter of a stack; made by `plan_stack`.

    Attributes:
        members: The configs, in the order of the stack.
        singles: The binding of each config alone; leaves of the stack are as large as the largest of theirs.
        blocks: The blocks of leaves, behind each of which there may be padding.
    """

    members: Sequence[Config] = ()  # type: ignore[misc]
    singles: Sequence[Binding] = ()
    blocks: Blocks = dataclasses.field(default_factory=dict)

    @property
    def plans(self) -> list[Mapping[str, Site]]:
        """The sites of each config alone, by path."""
        return [single.sites[""] for single in self.singles]

    @property
    def own(self) -> list[Shapes]:
        """The shapes of each config's own leaves, before padding."""
        return [single.shapes[""] for single in self.singles]

    @property
    def sizes(self) -> tuple[int, int]:
        """How many numbers the leaves of a stack have, and how many the adapters have without padding."""
        padded = sum(math.prod(shape) for leaves in self.shapes[""].values() for shape in leaves.values())
        own = sum(math.prod(shape) for shapes in self.own for leaves in shapes.values() for shape in leaves.values())
        return padded * len(self.members), own

    @classmethod
    def plan_stack(cls, model: nn.Module, members: Sequence[Config]) -> StackedBinding:
        """Bind the configs of a stack to a model.

        Raises:
            TypeError: Configs of several methods.
            ValueError: Configs that differ in what the adapters of a stack share, or that do not fit the model.
        """
        model = structure_for(members, model)
        members = [for_model(copy.deepcopy(config), model) for config in members]
        check_configs(members)  # before the work of planning
        modules = modules_of(model)
        return cls.of_singles(model, [Binding.of_modules(model, {"": config}, modules) for config in members])

    @classmethod
    def of_singles(cls, model: nn.Module, singles: Sequence[Binding]) -> StackedBinding:
        """Make the stack of adapters that are each bound to a model.

        Raises:
            TypeError, ValueError: As `plan_stack` does.
        """
        members = [single.configs[""] for single in singles]
        check_configs(members)
        check_leaves(singles)
        replaced, member_shapes = singles[0].replaced[""], [single.shapes[""] for single in singles]
        for i, other in enumerate(singles[1:], start=1):
            if differing := set(other.replaced[""]) ^ set(replaced):
                raise ValueError(
                    f"bind: only one of configs[0] and configs[{i}] replaces tensors of {min(differing)!r}, which the "
                    "adapters of a stack do together; bind them apart"
                )
        for path, tied in ((path, tied) for single in singles for path, tied in single.tied[""].items()):
            raise ValueError(
                f"bind: {path} is tied to {tied.source} (ensure_weight_tying), and a stack of several configs has no "
                "such ties; bind them apart, or stack trees of one config"
            )
        sites = union(members[0], [single.sites[""] for single in singles], model)
        paths = sorted({path for shapes in member_shapes for path in shapes})
        shapes = {path: largest(path, members[0], sites.get(path), member_shapes) for path in paths}
        first = singles[0]
        return cls(
            model,
            first.configs,
            named=False,
            sites={"": sites},
            replaced=first.replaced,
            tied=first.tied,
            shapes={"": shapes},
            members=members,
            singles=singles,
            blocks=blocks_of(members[0], sites),
        )

    def append(self, config: Config) -> StackedBinding:
        """Bind one more adapter; those that are there keep their constants."""
        config = for_model(copy.deepcopy(config), self.model)
        check_configs([*self.members, config])
        single = Binding.of_modules(self.model, {"": config}, modules_of(self.model))
        return self.of_singles(self.model, [*self.singles, single])

    def init(
        self,
        generator: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """Make a fresh stack, as `StackedGraft.init` does."""
        count = len(self.members)
        generators = list(generator) if isinstance(generator, Sequence) else [generator] * count
        if len(generators) != count:
            raise ValueError(
                f"init: got {len(generators)} generators, expected one for each of the {count} adapters, or one for all"
            )
        fresh = [single.init(source, dtype, device) for single, source in zip(self.singles, generators, strict=True)]
        return self.stack(fresh)

    def stack(self, adapters: Sequence[Tree]) -> Tree:
        """Stack one tree of each config, as `StackedGraft.stack` does."""
        adapters = list(adapters)
        if len(adapters) != len(self.members):
            raise ValueError(
                f"stack: got {len(adapters)} trees, expected one for each of the {len(self.members)} configs"
            )
        for i, (tree, shapes) in enumerate(zip(adapters, self.own, strict=True)):
            check_tree(tree, shapes, f"trees[{i}]")
        stacked: Tree = {}
        for path, leaves in self.shapes[""].items():
            stacked[path] = {}
            for name, shape in leaves.items():
                given = [tree.get(path, {}).get(name) for tree in adapters]
                having = next(leaf for leaf in given if leaf is not None)
                blocks = self._blocks(path, name)
                parts = [having.new_zeros(shape) if leaf is None else pad_to(leaf, shape, blocks) for leaf in given]
                stacked[path][name] = torch.stack(parts)
        return sort(stacked)

    def pad(self, tree: Tree) -> Tree:
        """Pad one adapter's tree, as `StackedGraft.pad` does."""
        like = next((leaf for leaves in tree.values() for leaf in leaves.values()), None)
        padded: Tree = {}
        for path, leaves in tree.items():
            for name, leaf in leaves.items():
                room = self.shapes[""].get(path, {}).get(name, ())
                if leaf.ndim != len(room) or any(a > b for a, b in zip(leaf.shape, room, strict=True)):
                    raise ValueError(
                        f"pad: {name} of {path!r} has shape {tuple(leaf.shape)}, and this graft was bound with room "
                        f"for {room or 'none'}"
                    )
                padded.setdefault(path, {})[name] = pad_to(leaf, room, self._blocks(path, name))
        for path, leaves in self.shapes[""].items():
            for name, room in leaves.items():
                if name not in padded.setdefault(path, {}):
                    padded[path][name] = torch.zeros(room) if like is None else like.new_zeros(room)
        return sort(padded)

    def unstack(self, stacked: Tree) -> list[Tree]:
        """Split a stack, as `StackedGraft.unstack` does."""
        check_tree(stacked, self.shapes[""], "the stack", stacked=len(self.members))
        check_padding(stacked, self.shapes[""], self.own, self.blocks)
        return [
            {
                path: {
                    name: cut_to(stacked[path][name][i], shape, self._blocks(path, name))
                    for name, shape in leaves.items()
                }
                for path, leaves in shapes.items()
            }
            for i, shapes in enumerate(self.own)
        ]

    def _blocks(self, path: str, name: str) -> int:
        return self.blocks.get(path, {}).get(name, 1)

    def active(self, params: Any, in_steps: bool = False) -> dict[str, Any]:
        if isinstance(params, dict):
            raise TypeError(
                f"params is a dict; this graft was bound with {len(self.members)} configs: call it with "
                "route(stacked, rows), or call graft.at(i) for adapter i of the stack, or graft.member(i) for its own "
                "tree, graft.unstack(many)[i], which merge and save_adapter take too"
            )
        active = super().active(params, in_steps)
        rows, members, places = (getattr(params, name, None) for name in ("rows", "members", "places"))
        held = self.members if members is None else members
        if rows is not None and places is None and rows.count != len(held):
            raise ValueError(
                f"the stack has {rows.count} adapters, and this graft was bound with {len(self.members)} configs; say "
                f"which of them it holds: route(stacked, rows, members=...) with {rows.count} indices"
            )
        return active

    def check_index(self, index: Any) -> None:
        """Refuse what is no index of one of the configs; one that is a tensor is not looked at."""
        count = len(self.members)
        if isinstance(index, Tensor):
            return
        if not isinstance(index, int):
            raise TypeError(
                f"index is {index!r:.60}, expected an integer: the adapters of a stack are numbered, 0 to {count - 1}, "
                "in the order of their configs"
            )
        if not -count <= index < count:
            raise IndexError(f"index is {index}, and the stack has adapters 0 to {count - 1}")

    def _check(self, tree: Any, name: str, what: str, in_steps: bool = False) -> None:
        try:
            super()._check(tree, name, what)
        except ValueError as error:
            raise ValueError(
                f"{error} In a stack of {len(self.members)} configs a tree is padded: graft.stack(trees) stacks trees "
                "of their own shapes, and graft.pad(tree) pads one"
            ) from None

    def places(self, configs: Sequence[Config | None] | None = None) -> Places:
        """Plan the constants and sites of each place of a stack, as `StackedGraft.places` does."""
        if isinstance(configs, (str, Mapping)) or not isinstance(configs, (Iterable, type(None))):
            raise TypeError(f"places: configs is {given_type(configs)}, expected a list: graft.places([config, ...])")
        given = self.members if configs is None else list(configs)
        if not given:
            raise ValueError("places: got no configs; give one for each place, None for an empty one")
        for i, config in enumerate(given):
            if config is not None and not hasattr(config, "method"):
                raise TypeError(f"places: configs[{i}] is of type {type(config).__name__}, expected a config or None")
        check_configs([self.members[0], *(config for config in given if config is not None)])
        modules = modules_of(self.model)
        plans: list[Mapping[str, Site]] = [{} for _ in given]
        for i, config in enumerate(given):
            if config is not None:
                single = Binding.plan(self.model, {"": config}, False)
                self._check_fits(i, single.shapes[""])
                plans[i] = single.sites[""]
        constants, present, known = {}, {}, {}
        for path, site in self.sites[""].items():
            device = site.like(modules[site.owner]).device
            placed = [plan.get(path) for plan in plans]
            known[path] = tuple(one is not None for one in placed)
            present[path] = torch.tensor(known[path], device=device)
            constants[path] = constants_in_places(path, site, placed, device)
        return Places(constants, present, known)

    def _check_fits(self, place: int, shapes: Shapes) -> None:
        """Refuse a config that the stack has no room for."""
        for path, leaves in shapes.items():
            most = self.shapes[""].get(path, {})
            site = self.sites[""].get(path)
            whole = whole_by(self.members[0], site)
            for leaf, shape in leaves.items():
                room = most.get(leaf, ())
                fits = len(room) == len(shape) and all(a <= b for a, b in zip(shape, room, strict=True))
                if not fits or (whole is not None and shape != room):
                    pieces = whole if fits else None
                    remedy = (
                        f"give it the same rank, for {pieces}" if pieces else "bind it with a config that is as large"
                    )
                    message = (
                        f"places: configs[{place}] has {leaf} of shape {shape} at {path!r}, and this graft was bound "
                        f"with room for {room or 'none'}; {remedy}"
                    )
                    raise NoRoomError(message, path, leaf, shape, room, pieces or "")

    def adapters(self, name: str, modules: Mapping[str, nn.Module] | None = None) -> dict[str, SiteAdapter]:
        modules = modules or modules_of(self.model)
        adapters = super().adapters(name, modules)
        return {path: self._adapter(path, adapter, modules) for path, adapter in adapters.items()}

    def _adapter(self, path: str, adapter: SiteAdapter, modules: Mapping[str, nn.Module]) -> StackedAdapter:
        known = tuple(path in plan for plan in self.plans)
        device = adapter.site.like(modules[adapter.site.owner]).device
        here = torch.tensor(known, device=device)
        return StackedAdapter(adapter.config, adapter.site, here, known, expected=adapter.expected)


@dataclasses.dataclass(frozen=True, eq=False)
class StackedAdapter(SiteAdapter):
    """The part of a stack at one site, which some of its adapters may not have."""

    present: Tensor
    known: tuple[bool, ...]

    def along(self, members: Tensor | None, rows: Rows, places: Places | None = None) -> tuple[SiteAdapter, Rows]:
        if places is not None:
            here = {name: PerAdapter(values) for name, values in places.constants[self.site.path].items()}
            known = None if torch.compiler.is_compiling() else places.known.get(self.site.path)
            return self.with_constants(here), rows.only(places.present[self.site.path], known)
        if members is None:
            return self, rows.only(self.present, self.known)
        constants = {
            name: PerAdapter(constant.values[members])
            for name, constant in self.site.constants.items()
            if isinstance(constant, PerAdapter)
        }
        readable = not torch.compiler.is_compiling() and is_readable(members)
        known = tuple(self.known[i] for i in members.tolist()) if readable else None
        return self.with_constants(constants), rows.only(self.present[members], known)

    def several(self, count: int) -> SiteAdapter:
        having = [i for i, known in enumerate(self.known) if known]
        members = torch.tensor([having[i % len(having)] for i in range(count)], device=self.present.device)
        return self.along(members, Rows(None, count))[0]

    def at(self, index: int | Tensor) -> tuple[SiteAdapter, Tensor | None]:
        """Return one adapter's part, and whether it has the site (`None` for yes)."""
        constants = {
            name: _at(constant.values, index)
            for name, constant in self.site.constants.items()
            if isinstance(constant, PerAdapter)
        }
        return self.with_constants(constants), None if all(self.known) else _at(self.present, index)


def _at(values: Tensor, index: int | Tensor) -> Tensor:
    """Return `values[index]`, without reading an index that is a tensor."""
    if isinstance(index, Tensor):
        return values.index_select(0, index.view(1)).squeeze(0)
    return values[index]
