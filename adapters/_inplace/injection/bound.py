"""An adapter that is bound to a model's modules, and not placed in it yet."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from torchgraft.functional import Binding
from torchgraft.functional.extending import (
    Plan,
    SiteAdapter,
    TiedAdapter,
    Tree,
    check_tree,
    each,
    shapes_at,
    tied_adapter,
    weights_of,
)

from ..._config.base import AdapterConfig
from ..._config.replaced import saved_modules
from ..._config.targets import find_targets
from ..._config.tokens import LEAF as TOKENS
from ..beside.biases import biases_of
from ..walk import bare_modules, original_base
from .initial_leaves import initial_leaves, started
from .overlaps import check_apart, check_names, check_overlap, check_tokens
from .targets_from_keys import from_keys


@dataclasses.dataclass(frozen=True)
class Injection:
    """An adapter that is bound to the modules of a model.

    Attributes:
        name: The adapter's name.
        config: Its config, with the targets that it has in this model.
        modules: The modules of the model by name, without adapters.
        entries: Config and site of each target, by path.
        leaves: The parameters of each.
        replaced: The tensors of the base that the adapter trains copies of.
        params: The tree that these copies are taken from; `None` for the base's numbers.
    """

    name: str
    config: AdapterConfig
    modules: Mapping[str, nn.Module]
    entries: Mapping[str, SiteAdapter]
    leaves: Mapping[str, dict[str, nn.Parameter]]
    replaced: Plan
    params: Tree | None

    @property
    def targets(self) -> dict[str, nn.Module]:
        """The modules that get layers, by the path of each target."""
        return {path: self.modules[entry.site.owner] for path, entry in self.entries.items()}

    @functools.cached_property
    def saved(self) -> dict[str, nn.Module]:
        """The modules that the adapter trains copies of, by path."""
        return saved_modules(self.config, self.modules)

    @functools.cached_property
    def followers(self) -> dict[str, Shared]:
        """The modules that have a tensor in common with one that is trained."""
        return _followers(self.replaced, self.modules, self.saved)

    @property
    def copied(self) -> dict[str, nn.Module]:
        """The modules that get copies, of their own or of tensors that others train, by path."""
        shared = {path: self.modules[path] for path, one in self.followers.items() if one.leaf != TOKENS}
        return self.saved | shared

    @property
    def embeddings(self) -> dict[str, nn.Module]:
        """The modules of which rows are trained, by path."""
        own = [path for path, leaf, _ in each(self.replaced) if leaf == TOKENS]
        own += [path for path, one in self.followers.items() if one.leaf == TOKENS]
        return {path: self.modules[path] for path in own}

    @property
    def biases(self) -> list[str]:
        """The modules whose biases are trained where they are, by path."""
        found = [path for path, leaf, _ in each(self.replaced) if leaf == "bias" and not within(path, self.saved)]
        return found if self.config.bias != "none" else []

    def given(self, path: str, leaf: str) -> Tensor | None:
        """Return a given tensor of the adapter's tree."""
        return None if self.params is None else self.params[path][leaf]

    def given_within(self, path: str) -> dict[str, Tensor]:
        """Return the given tensors of one of `modules_to_save`, by the names that they have in it."""
        if self.params is None:
            return {}
        prefix = f"{path}."
        return {
            name.removeprefix(prefix): self.params[owner][leaf]
            for owner, leaf, one in each(self.replaced)
            for name in one.names
            if name.startswith(prefix)
        }


class Shared(NamedTuple):
    """A tensor of a module that is trained in another one.

    Attributes:
        source: The other module's path.
        leaf: The leaf that trains it there.
        name: The tensor's name in this module.
    """

    source: str
    leaf: str
    name: str


def bind_injection(
    peft_config: AdapterConfig,
    model: nn.Module,
    adapter_name: str,
    meta: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    params: Tree | None = None,
) -> Injection:
    """Find what a config means in a model, and make the parameters that the adapter starts with.

    Args:
        peft_config: The config, which stays as it is.
        model: The model, which may have adapters.
        adapter_name: The adapter's name.
        meta: Make the parameters on the meta device.
        state_dict: Keys that say which modules are targeted, instead of the config.
        params: A tree whose tensors become the parameters.

    Raises:
        ValueError: A config or keys that do not fit the model.
        KeyError: `params` that do not fit.
    """
    config, modules = copy.deepcopy(peft_config), bare_modules(model)
    if state_dict is None:
        config = config.for_model(model, modules)
        paths = find_targets(config, modules, model)
    else:
        config, paths = from_keys(config, state_dict, modules, model)
    _check_not_root(config, modules, paths)
    _check_biases(model, config)
    base = original_base(model)
    binding = Binding.of_modules(model, {"": config}, modules, paths={"": paths}, base=base)
    if params is not None:
        check_tree(params, binding.shapes[""])
    planned = binding.sites[""]
    leaves = initial_leaves(config, planned, modules, weights_of(planned, modules, base), meta, params)
    sites = {path: started(config, site, leaves[path]) for path, site in planned.items()}
    entries: dict[str, SiteAdapter] = {
        path: SiteAdapter(config, site, expected=shapes_at(binding.shapes[""], site)) for path, site in sites.items()
    }
    for path, follow in binding.tied[""].items():
        entries[path] = tied_adapter(config, path, modules[path], follow, entries[follow.source])
        turned = follow.turned({leaf: parameter.detach() for leaf, parameter in leaves[follow.source].items()})
        leaves[path] = {leaf: nn.Parameter(tensor) for leaf, tensor in turned.items()}  # of one memory, as in PEFT
    return Injection(adapter_name, config, modules, entries, leaves, binding.replaced[""], params)


def check_injection(injection: Injection, model: nn.Module) -> None:
    """Refuse an adapter that cannot be on these modules beside what the model has.

    Raises:
        ValueError: Says which module, and what is on it.
    """
    modules, copied = injection.modules, injection.copied
    owners = [entry.site.owner for entry in injection.entries.values()]
    check_overlap(model, modules, owners, copied)
    check_tokens(model, modules, owners, copied, injection.embeddings)
    sites = {path: entry.site for path, entry in injection.entries.items() if not isinstance(entry, TiedAdapter)}
    check_apart(model, modules, sites)
    check_names(model, modules, injection.entries)


def _check_not_root(config: AdapterConfig, modules: Mapping[str, nn.Module], paths: Iterable[str]) -> None:
    """Refuse the model itself as a target, and its own parameters."""
    for path in paths:
        if not (path if path in modules else path.rpartition(".")[0]):
            what = f"{path}, a parameter of the model itself, is" if path else "the model itself is"
            raise ValueError(f"{type(config).__name__}: {what} targeted, which cannot be replaced in place")


def _check_biases(model: nn.Module, config: AdapterConfig) -> None:
    """Refuse a second adapter that trains the base's biases where they are, as PEFT does."""
    biases = biases_of(model)
    if biases is not None and config.bias != "none":
        raise ValueError(
            f"bias is {config.bias!r}, and adapter {biases.adapter!r} trains biases of this model already, which only "
            "one adapter can; set bias='none', or use bind(model, {...}), where each has its own"
        )


def _followers(replaced: Plan, modules: Mapping[str, nn.Module], saved: Iterable[str]) -> dict[str, Shared]:
    """Return the modules that have a tensor in common with one that is trained, by path."""
    found: dict[str, Shared] = {}
    for path, leaf, one in each(replaced):
        seen = {id(modules[path])}
        for name in one.names if leaf == TOKENS or leaf == "weight" else ():
            owner, _, own = name.rpartition(".")
            if id(modules[owner]) not in seen and not within(owner, saved):
                seen.add(id(modules[owner]))
                found[owner] = Shared(path, leaf, own)
    return found


def within(path: str, saved: Iterable[str]) -> bool:
    """Return whether a module is one of these, or in one of them."""
    return any(path == one or path.startswith(f"{one}.") for one in saved)
