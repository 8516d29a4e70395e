"""Grafts: a model bound to adapter configs, as a pure function of (params, inputs)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from . import trees
from .adapted import AdaptedModule, Cell
from .constant import check_constant, precompute
from .follow import Follows, follower, plan_follows
from .leaves import initialise, shapes_of
from .method import Config, Entry, Tree
from .parameters import AdaptedParameters, Key, check_apart, key_of
from .plan import check_unchanged, for_model, plan_sites, structure_for
from .pool import Pool
from .references import check_references
from .replaced import Plan, conflicts, exchange, exchanges, plan_replaced
from .route import Routed
from .rows import PerAdapter
from .site import Site
from .skeleton import Skeleton
from .traced import Traced
from .units import make_units
from .wrappers import check_flat, modules_of, without_parallel

if TYPE_CHECKING:
    from .stacks import StackedGraft

_RECENT = 4
"""Pools kept for states of the model that come back, such as train() and eval()."""


class Graft:
    """A model and the adapters bound to it; made by `bind`.

    Holds no parameters: `graft(params, *inputs)` is a pure function. The user's model is only read.

    Attributes:
        model: The user's model, or one that shares its tensors and has more layers (`layer_replication`).
        configs: The configs, by adapter name (`""` for an unnamed one).
        sites: The adapted modules, by adapter name and path.
        replaced: The tensors of the base that each adapter replaces, by adapter name, path and leaf.
        follows: The modules that have the parameters of a site, by adapter name and path.
    """

    def __init__(
        self,
        model: nn.Module,
        configs: Mapping[str, Config],
        named: bool,
        allow_unreached: bool,
        sites: dict[str, dict[str, Site]] | None = None,
    ):
        self.model = model = structure_for(configs.values(), model)
        self.configs = {name: for_model(copy.deepcopy(config), model) for name, config in configs.items()}
        self.named = named
        self.allow_unreached = allow_unreached
        modules = modules_of(model)
        self.sites: dict[str, dict[str, Site]] = sites or {
            name: plan_sites(config, modules, config.targets(model)) for name, config in self.configs.items()
        }
        self.replaced: dict[str, Plan] = {
            name: plan_replaced(config, modules, model, self.sites[name]) for name, config in self.configs.items()
        }
        self.follows: dict[str, Follows] = {
            name: plan_follows(config, modules, self.sites[name]) for name, config in self.configs.items()
        }
        self._conflicts = conflicts(self.replaced)
        self._shapes = self.expected()
        self.pools: list[Pool] = []
        self.compiled = Traced()
        check_references(model, {path for plan in (*self.sites.values(), *self.replaced.values()) for path in plan})
        self.pool()

    def init(
        self,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """Make fresh parameters.

        Args:
            generator: Source of randomness; one generator state gives one tree. `None` takes torch's global one.
            dtype: Dtype of the leaves; by default float32, or the base's where that is wider.
            device: Device of the leaves; by default each site's own.

        Returns:
            `{path: {leaf: tensor}}`, or `{name: {path: {leaf: tensor}}}` for named adapters; keys are sorted.

        Raises:
            TypeError: A `generator` or a `dtype` of another type, or no floating-point one.

        >>> from torchgraft.adapters import LoraConfig
        >>> graft = bind(torch.nn.Linear(4, 3), LoraConfig(r=2, target_modules="all-linear"))
        >>> {leaf: tuple(t.shape) for leaf, t in graft.init()[""].items()}
        {'lora_A': (2, 4), 'lora_B': (3, 2)}
        """
        made = {
            name: initialise(self.model, config, self.sites[name], generator, dtype, device, self.replaced[name])
            for name, config in self.configs.items()
        }
        return trees.sort(made) if self.named else made[""]

    def __call__(self, params: Tree | Routed, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the adapters in `params`; the same as `functional_call(graft, params, args, kwargs)`."""
        from .call import functional_call

        return functional_call(self, params, args, kwargs)

    def view(self, params: Tree | Routed, *, constant: bool = False) -> nn.Module:
        """A module like the user's, with the adapter in and the base shared.

        It has the class, the attributes and the methods of the user's model (`generate`, properties, submodules
        by name), shares the base parameters, has its own buffers and keeps `params` as they are, so gradients flow to
        them. Any number of views live side by side; each is its own module, so flags set on one (`eval()`) stay there,
        and later changes of the model's structure or placement are not followed: take a new view.

        Args:
            params: A parameter tree, as for a call.
            constant: Promise that nobody writes to the base or to the leaves as long as the view is used, in whatever
                way. What a method computes from them alone (DoRA's norms) is then computed here, once; writing to them
                makes the view wrong, and nothing notices. Without it every call sees what is written.

        Raises:
            KeyError, TypeError, ValueError: As a call does, for a tree that does not fit; with `constant` also for
                leaves that require gradients.

        >>> from torchgraft.adapters import LoraConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> graft = bind(model, LoraConfig(target_modules=["0"]))
        >>> type(graft.view(graft.init())).__name__
        'Sequential'
        """
        active = self.active(params)
        if constant:
            check_constant(active)
        skeleton = self.build()
        skeleton.cell.trees = active
        skeleton.own_buffers()
        exchange(skeleton, active)
        if constant:
            precompute(skeleton)
        if any(isinstance(tree, Routed) for tree in active.values()):
            from .entered import watch

            watch(self, skeleton, active)
        return skeleton.root

    def active(self, params: Any) -> dict[str, Any]:
        """The trees of `params` by adapter name, or what stands for one, held against what this graft expects.

        Raises:
            KeyError, TypeError, ValueError: A tree that does not fit; names the site and the leaf.
        """
        if not self.named:
            _check(params, self._shapes[""], "params")
            return {"": params}
        if isinstance(params, Routed) and isinstance(params.tree, dict):
            params = {name: params.named(name) for name in params.tree}
        if not isinstance(params, dict):
            raise TypeError(
                f"params is of type {type(params).__name__}, expected a dict of adapters: {sorted(self.configs)}"
            )
        for name, tree in params.items():
            if name not in self.configs:
                raise KeyError(f"params has unknown adapter {name!r}; this graft was bound with {sorted(self.configs)}")
            _check(tree, self._shapes[name], f"params[{name!r}]")
        for first, second, name in self._conflicts:
            if first in params and second in params:
                raise ValueError(
                    f"params has adapters {first!r} and {second!r}, which both replace {name}, and only one can; leave "
                    "one of them out of the call"
                )
        return {name: params[name] for name in self.configs if name in params}

    def expected(self) -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
        """Shapes of all leaves, by adapter name, path and leaf."""
        return {name: shapes_of(config, self.sites[name], self.replaced[name]) for name, config in self.configs.items()}

    def pool(self) -> Pool:
        """The skeletons that fit the model as it is now."""
        for pool in self.pools:
            if pool.watch.same():
                return pool
        pool = Pool(self.build)
        self.pools = [pool, *(old for old in self.pools if old.watch.same_tensors())][:_RECENT]
        return pool

    def look(
        self,
        *args: Any,
        rows: int | None = None,
        batch_dim: int | Mapping[str, int] | None = None,
        mixed: Sequence[str] = (),
        rearranged: tuple[Any, ...] | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Find out where the rows of a kind of call are before it is made; calls of that kind then know it.

        A routed call does so by itself. It cannot under `torch.compile`, `torch.vmap` and export, nor where its inputs
        cannot be cut by rows or copied; a small sample of the same kind (arguments given, numbers of axes, modes) can.

        Args:
            *args: Positional arguments of the model's forward, with at least two rows.
            rows: Number of rows in them; by default the length of the first tensor.
            batch_dim: As for `route`.
            mixed: As for `route`.
            rearranged: For inputs that cannot be cut by rows (packed images, lists): the arguments of the same call
                with its rows in the order 1, 0, 2, ..., n-1, n-1, positional ones or a dict of keyword arguments. Then
                `rows` has to be given.
            **kwargs: Keyword arguments of the forward.

        Raises:
            ValueError: The rows cannot be followed; names the first site or output that does not.

        >>> from torchgraft.adapters import LoraConfig
        >>> graft = bind(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
        >>> graft.look(torch.randn(3, 4))
        """
        from .look import Declared
        from .trial import remember

        other = (rearranged, {}) if isinstance(rearranged, tuple) else ((), dict(rearranged or {}))
        declared = Declared(batch_dim, tuple(mixed))
        remember(self, (args, kwargs), rows, declared, None if rearranged is None else other)

    @contextlib.contextmanager
    def looking(self, see: Callable[[str, Tensor], None]) -> Iterator[nn.Module]:
        """The base alone, in evaluation mode and without autograd, with somebody told what reaches each site.

        Args:
            see: `(path, input)`, called at each call of a site's module.

        Yields:
            A module like the user's, to be called within the `with` block.

        >>> from torchgraft.adapters import LoraConfig
        >>> graft = bind(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
        >>> with graft.looking(lambda path, x: print(path, tuple(x.shape))) as base:
        ...     _ = base(torch.ones(2, 4))
        0 (2, 4)
        """
        lease = self.pool().lease()
        skeleton = lease.skeleton
        skeleton.own_buffers()
        cell, modes = skeleton.cell, [module.training for _, module in skeleton.modules]
        cell.trees, cell.see = {}, see
        devices = {t.device for t in skeleton.aliases.values() if t.device.type not in ("cpu", "meta")}
        try:
            for _, module in skeleton.modules:
                module.training = False
            kind = next(iter(devices)).type if devices else "cuda"
            with torch.no_grad(), torch.random.fork_rng(list(devices), device_type=kind):
                yield skeleton.root
        finally:
            cell.see = None
            for (_, module), mode in zip(skeleton.modules, modes, strict=True):
                module.training = mode
            lease.release()

    def unreached(self, paths: Iterable[str], reached: Collection[str]) -> list[str]:
        """Of these sites, those whose module no forward reached under any of its names."""
        modules = modules_of(self.model)
        seen = {key_of(modules, path) for path in reached}
        return sorted({path for path in paths if key_of(modules, path) not in seen})

    def build(self, cell: Cell | None = None) -> Skeleton:
        """A new skeleton of the model as it is now.

        Args:
            cell: What its sites ask about the call in progress.

        Raises:
            ValueError: A module at a site was replaced by one that the site's parameters do not fit.
        """
        modules = modules_of(self.model)
        entries: dict[Key, dict[str, Entry]] = {}
        paths: dict[Key, str] = {}
        for name in self.configs:
            for path, entry in self.entries(name).items():
                key = key_of(modules, path)
                entries.setdefault(key, {})[name] = entry
                paths.setdefault(key, path)
        check_apart(entries, paths)
        skeleton = Skeleton(self.model, entries, paths, cell)
        skeleton.exchanges = exchanges(skeleton, modules, self.replaced)
        make_units(skeleton.cell, skeleton.modules, skeleton.exchanges, {id(m): name for name, m in modules.items()})
        skeleton.remember()
        return skeleton

    def entries(self, name: str) -> dict[str, Entry]:
        """One adapter's entries by path, with constants on the devices where the model is now.

        Raises:
            ValueError: A module at a site was replaced by one that the site's parameters do not fit.
        """
        modules = modules_of(self.model)
        moved: dict[tuple[int, torch.device], Tensor] = {}
        found: dict[str, Entry] = {}
        for path, site in self.sites[name].items():
            check_unchanged(path, site, modules)
            device = site.like(modules[site.owner]).device
            site = dataclasses.replace(site, constants=_to(site.constants, device, moved))
            found[path] = Entry(self.configs[name], site)
        for path, follow in self.follows[name].items():
            found[path] = follower(self.configs[name], path, modules[path], follow, found[follow.source].site)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "pools": [], "compiled": Traced()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.pool()

    def __repr__(self) -> str:
        adapters = ", ".join(
            f"{name + ': ' if name else ''}{config.method.name} on {len(self.sites[name])} sites"
            for name, config in self.configs.items()
        )
        return f"Graft({type(self.model).__name__}, {adapters})"


@overload
def bind(model: nn.Module, config: Sequence[Config], *, allow_unreached: bool = ...) -> StackedGraft: ...


@overload
def bind(model: nn.Module, config: Config | Mapping[str, Config], *, allow_unreached: bool = ...) -> Graft: ...


def bind(
    model: nn.Module, config: Config | Mapping[str, Config] | Sequence[Config], *, allow_unreached: bool = False
) -> Graft:
    """Bind adapter configs to a model; the model stays as it is.

    Args:
        model: Any module. It may still move, be evaluated or get new weights later; every call sees it. Of one in
            `DistributedDataParallel`, the module within. One that `fully_shard` has sharded is gathered in calls, unit
            by unit, in which each process takes part.
        config: One config, or several by name. With names, parameters are `{name: tree}` and a name that is missing
            from them is switched off. With a list, one config for each adapter of a stack: see `StackedGraft`.
        allow_unreached: Accept forwards that run past a site, as mixtures of experts and encoder-decoder models
            with cached encoder outputs do. Otherwise such a forward is an error.

    Returns:
        A `Graft`: `graft.init(generator)` makes parameters, `graft(params, *inputs)` runs the model with them.

    Raises:
        TypeError: `model` is no module, or `config` no config.
        ValueError: A config that matches nothing, or a module that its method does not support.

    >>> from torchgraft.adapters import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    >>> bind(model, LoraConfig(target_modules=["0"]))
    Graft(Sequential, LORA on 1 sites)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"bind: model is of type {type(model).__name__}, expected a torch.nn.Module")
    model = without_parallel(model)
    named = isinstance(config, Mapping)
    configs: Mapping[str, Any] = {"": config}
    if isinstance(config, Mapping):
        configs = config
    elif isinstance(config, (list, tuple)):
        configs = {f"[{i}]": one for i, one in enumerate(config)}
    if not configs:
        given = "dict of configs; give at least one, as {'name': LoraConfig(...)}"
        raise ValueError(f"bind: got an empty {given if named else 'list of configs; give at least one'}")
    for name, one in configs.items():
        if not isinstance(name, str) or (named and not name):
            raise TypeError(f"bind: an adapter's name is a non-empty string, got {name!r}")
        if isinstance(one, type) or not hasattr(one, "method") or not hasattr(one, "targets"):
            given = f"the class {one.__name__}" if isinstance(one, type) else f"of type {type(one).__name__}"
            raise TypeError(f"bind: config is {given}, expected a config object such as LoraConfig(target_modules=...)")
    for path, module in model.named_modules():
        check_flat(path or "the model", module)
        if isinstance(module, (AdaptedModule, AdaptedParameters)):
            raise TypeError(
                f"bind: {path or 'the model'} is already adapted: this is a view of another graft. Bind the original "
                "model with all configs at once: bind(model, {'first': ..., 'second': ...})"
            )
    if isinstance(config, (list, tuple)):
        from .stacks import StackedGraft

        return StackedGraft(model, list(configs.values()), allow_unreached)
    return Graft(model, configs, named, allow_unreached)


def _to(
    constants: Mapping[str, Any], device: torch.device, moved: dict[tuple[int, torch.device], Tensor]
) -> dict[str, Any]:
    """Move tensors among a site's constants, each shared one once."""
    out: dict[str, Any] = {}
    for key, value in constants.items():
        tensor = value.values if isinstance(value, PerAdapter) else value
        if isinstance(tensor, Tensor) and tensor.device != device:
            tensor = moved.setdefault((id(tensor), device), tensor.to(device))
            value = PerAdapter(tensor) if isinstance(value, PerAdapter) else tensor
        out[key] = value
    return out


def _check(tree: Any, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], what: str) -> None:
    if hasattr(tree, "check"):
        tree.check(shapes, what)
    else:
        trees.check(tree, shapes, what)
