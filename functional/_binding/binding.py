"""Bindings: configs meet a model.

A binding is what follows from the two and never changes: the sites, what is replaced beside them, what is tied, the
shapes and the constants. Calls, merging, stacks, the in-place style and files all use it; nothing is planned again.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .._constants import Constants
from .._layers.base import Base
from .._messages import did_you_mean, given_type
from .._method import Config, SiteAdapter, Tree
from .._rows import PerAdapter
from .._sites.parameters import Key, key_of
from .._sites.site import Site
from .._tensors.wrappers import modules_of
from .._trees import TreeForm, check_tree, sort
from .leaves import initialise, shapes_at, shapes_of
from .plan import check_unchanged, for_model, plan_sites, structure_for
from .replaced import Plan, conflicts, plan_replaced
from .tied import TiedSites, plan_tied, tied_adapter

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Shapes of a tree's leaves, by path and leaf."""


@dataclasses.dataclass(frozen=True, eq=False)
class Binding:
    """Configs bound to a model; made by `plan`.

    Attributes:
        model: The user's model, or one that shares its tensors and has more layers (`layer_replication`).
        configs: The configs, by adapter name (`""` for an unnamed one).
        named: Whether trees are given by adapter name.
        sites: The adapted modules, by adapter name and path.
        replaced: The tensors of the base that each adapter replaces, by adapter name, path and leaf.
        tied: The modules that have the parameters of a site, by adapter name and path.
        shapes: Shapes of all leaves, by adapter name, path and leaf.
    """

    model: nn.Module
    configs: Mapping[str, Config]
    named: bool
    sites: Mapping[str, Mapping[str, Site]]
    replaced: Mapping[str, Plan]
    tied: Mapping[str, TiedSites]
    shapes: Mapping[str, Shapes]

    members: ClassVar[Sequence[Config] | None] = None

    @functools.cached_property
    def conflicts(self) -> list[tuple[str, str, str]]:
        """Pairs of adapters that replace the same tensor, which one call cannot have both of, and the tensor."""
        return conflicts(self.replaced)

    @functools.cached_property
    def _forms(self) -> dict[str, TreeForm]:
        return {name: TreeForm(shapes) for name, shapes in self.shapes.items()}

    @classmethod
    def plan(
        cls,
        model: nn.Module,
        configs: Mapping[str, Config],
        named: bool,
        constants: Mapping[str, Mapping[str, Constants]] | None = None,
    ) -> Binding:
        """Bind configs to a model.

        Args:
            model: The user's model.
            configs: The configs, by adapter name.
            named: Whether trees are given by adapter name.
            constants: The constants of each site by adapter name and path, where they are known.

        Raises:
            ValueError: A config that matches nothing, or a module that its method does not support.

        >>> from torchgraft.adapters import LoraConfig
        >>> binding = Binding.plan(nn.Linear(4, 3), {"": LoraConfig(r=2, target_modules="all-linear")}, False)
        >>> binding.shapes[""]
        {'': {'lora_A': (2, 4), 'lora_B': (3, 2)}}
        """
        model = structure_for(configs.values(), model)
        configs = {name: for_model(copy.deepcopy(config), model) for name, config in configs.items()}
        return cls.of_modules(model, configs, modules_of(model), named=named, constants=constants)

    @classmethod
    def of_modules(
        cls,
        model: nn.Module,
        configs: Mapping[str, Config],
        modules: Mapping[str, nn.Module],
        *,
        named: bool = False,
        paths: Mapping[str, Iterable[str]] | None = None,
        base: Callable[[nn.Module, Site], Base] = Base,
        constants: Mapping[str, Mapping[str, Constants]] | None = None,
    ) -> Binding:
        """Bind configs, which are made for this model already, to some modules of it.

        Args:
            model: The model.
            configs: The configs, by adapter name.
            modules: The model's modules by name, without what is around them.
            named: Whether trees are given by adapter name.
            paths: Names of the targets by adapter name; by default what the configs say.
            base: How a module's original weight is read.
            constants: The constants of each site by adapter name and path, where they are known.

        Raises:
            ValueError: A module that its method does not support.
        """
        known, given = constants or {}, paths or {}
        sites = {
            name: plan_sites(config, modules, given.get(name) or config.targets(model), base, known.get(name))
            for name, config in configs.items()
        }
        replaced = {name: plan_replaced(config, modules, model, sites[name]) for name, config in configs.items()}
        tied = {name: plan_tied(config, modules, sites[name]) for name, config in configs.items()}
        shapes = {name: shapes_of(config, sites[name], replaced[name]) for name, config in configs.items()}
        return cls(model, configs, named, sites, replaced, tied, shapes)

    def on(self, model: nn.Module) -> Self:
        """Return the same binding for another model of the same structure; constants stay those of the first one."""
        return (
            self
            if model is self.model
            else dataclasses.replace(self, model=structure_for(self.configs.values(), model))
        )

    def paths(self, names: Iterable[str]) -> set[str]:
        """Return the paths of everything that these adapters change: sites, ties and owners of replaced tensors."""
        return {path for name in names for path in (*self.sites[name], *self.tied[name], *self.replaced[name])}

    def init(
        self,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """Make fresh leaves of all adapters, as `Graft.init` does."""
        made = {
            name: initialise(self.model, config, self.sites[name], generator, dtype, device, self.replaced[name])
            for name, config in self.configs.items()
        }
        return sort(made) if self.named else made[""]

    def active(self, params: Any, in_steps: bool = False) -> dict[str, Any]:
        """Return validated parameter trees, or `ActiveTree`s in their place, by adapter name.

        Args:
            params: What the user passed.
            in_steps: Whether all sites look at the shapes of their leaves when they run.

        Raises:
            KeyError, TypeError, ValueError: A tree that does not fit; names the site and the leaf.
        """
        if not self.named:
            self._check(params, "", "params", in_steps)
            return {"": params}
        if hasattr(params, "named") and isinstance(params.tree, dict):
            params = {name: params.named(name) for name in params.tree}
        if not isinstance(params, dict):
            raise TypeError(
                f"params is {given_type(params)}, expected a dict of adapters: {sorted(self.configs)}; "
                "graft.init(generator) makes one"
            )
        for name, tree in params.items():
            if name not in self.configs:
                raise KeyError(
                    f"params has unknown adapter {name!r}; this graft was bound with {sorted(self.configs)}"
                    + self._named_by(params, name)
                )
            self._check(tree, name, f"params[{name!r}]", in_steps)
        for first, second, name in self.conflicts:
            if first in params and second in params:
                raise ValueError(
                    f"params has adapters {first!r} and {second!r}, which both replace {name}, and only one can; leave "
                    "one of them out of the call"
                )
        return {name: params[name] for name in self.configs if name in params}

    def _named_by(self, params: Mapping[str, Any], name: str) -> str:
        """Return what parameters look like that have an unknown adapter."""
        for own, sites in self.sites.items():
            if params.keys() <= sites.keys():
                return f"; it looks like the tree of one adapter: give its name too, {{{own!r}: params}}"
        return did_you_mean(name, self.configs)

    def _check(self, tree: Any, name: str, what: str, in_steps: bool = False) -> None:
        """Refuse a tree, or an `ActiveTree`, that does not fit an adapter."""
        if self.members is None and getattr(tree, "places", None) is not None:
            raise ValueError(
                "route: places are given, and this graft was bound with one config for all adapters of a stack; bind "
                "it with one for each: bind(model, [config, ...])"
            )
        if hasattr(tree, "check"):
            tree.check(self.shapes[name], what)
        elif torch.compiler.is_dynamo_compiling() or not (
            (in_steps and self._forms[name].knows(tree)) or self._forms[name].fits(tree)
        ):
            check_tree(tree, self.shapes[name], what)

    def adapters(self, name: str, modules: Mapping[str, nn.Module] | None = None) -> dict[str, SiteAdapter]:
        """Return one adapter's part at each of its sites, with constants on the devices where the model is now.

        Args:
            name: The adapter's name.
            modules: The model's modules, where they are known.

        Raises:
            ValueError: A module at a site was replaced by one that the site's parameters do not fit.
        """
        modules = modules or modules_of(self.model)
        moved: dict[tuple[int, torch.device], Tensor] = {}
        site_adapters: dict[str, SiteAdapter] = {}
        for path, site in self.sites[name].items():
            check_unchanged(path, site, modules)
            device = site.like(modules[site.owner]).device
            if device.type != "meta":  # where constants would lose their values
                constants = _to(site.constants, device, moved)
                site = site if constants is site.constants else dataclasses.replace(site, constants=constants)
            site_adapters[path] = SiteAdapter(self.configs[name], site, expected=shapes_at(self.shapes[name], site))
        for path, tied in self.tied[name].items():
            site_adapters[path] = tied_adapter(
                self.configs[name], path, modules[path], tied, site_adapters[tied.source]
            )
        return site_adapters

    def adapters_by_key(
        self, names: Iterable[str], modules: Mapping[str, nn.Module] | None = None
    ) -> tuple[dict[Key, dict[str, SiteAdapter]], dict[Key, str]]:
        """Return the adapters at each module or parameter, the innermost first, and the path of each of these."""
        modules = modules or modules_of(self.model)
        adapters: dict[Key, dict[str, SiteAdapter]] = {}
        paths: dict[Key, str] = {}
        for name in names:
            for path, adapter in self.adapters(name, modules).items():
                key = key_of(modules, path)
                adapters.setdefault(key, {})[name] = adapter
                paths.setdefault(key, path)
        return adapters, paths

    def unreached(self, paths: Iterable[str], reached: Collection[str]) -> list[str]:
        """Return the sites among these whose module no forward reached under any of its names."""
        modules = modules_of(self.model)
        seen = {key_of(modules, path) for path in reached}
        return sorted({path for path in paths if key_of(modules, path) not in seen})


def _to(constants: Constants, device: torch.device, moved: dict[tuple[int, torch.device], Tensor]) -> Constants:
    """Move tensors among a site's constants, each shared one once; those without values stay as they are."""
    out: dict[str, Any] = {}
    for key, value in constants.items():
        tensor = value.values if isinstance(value, PerAdapter) else value
        if isinstance(tensor, Tensor) and tensor.device != device and not tensor.is_meta:
            tensor = moved.setdefault((id(tensor), device), tensor.to(device))
            out[key] = PerAdapter(tensor) if isinstance(value, PerAdapter) else tensor
    return constants.replace(out)
