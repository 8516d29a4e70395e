"""Planning: from targeted modules to sites with a method's constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor, nn

from .._abilities import SharesLeaves, TakesComplex
from .._constants import Constants
from .._layers.base import Base
from .._messages import advice_on
from .._method import SHARED, Config, Weights
from .._sites.kinds import describe
from .._sites.parameters import describe_parameter, find
from .._sites.site import Site
from .._tensors.wrappers import around
from .._unsupported import UnsupportedConfig

C = TypeVar("C", bound=Config)


def structure_for(configs: Iterable[Config], model: nn.Module) -> nn.Module:
    """Return the model that configs are for: one that shares all tensors with this, where they ask for more layers."""
    for config in configs:
        model = config.structure(model)
    return model


def for_model(config: C, model: nn.Module) -> C:
    """Return the config with its targets named as a model has them, for configs that speak of kinds of models."""
    return config.for_model(model)


def plan_sites(
    config: Config,
    modules: Mapping[str, nn.Module],
    paths: Iterable[str],
    base: Callable[[nn.Module, Site], Base] = Base,
    constants: Mapping[str, Constants] | None = None,
) -> dict[str, Site]:
    """Describe the targeted modules and let the method plan its constants for all of them.

    Args:
        config: An adapter's config.
        modules: The model's modules by name.
        paths: Names of the targeted ones and of targeted parameters; what has two names is one site, under the first.
        base: How a module's original weight is read.
        constants: The constants of each site, where they are known; by default the method plans them.

    Returns:
        `{path: site}`, in the order of `paths`.

    Raises:
        ValueError: A module or a parameter that the method does not support; a parameter of a targeted module.

    >>> from torchgraft.adapters import LoraConfig
    >>> list(plan_sites(LoraConfig(), {"a": nn.Linear(2, 2)}, ["a"]))
    ['a']
    """
    if SHARED in modules:
        raise ValueError(
            f"{SHARED!r}: the model has a module of this name, under which trees have the leaves that sites share; "
            "rename the module"
        )
    paths = list(paths)
    _check_bare(paths, modules)
    sites: dict[str, Site] = {}
    seen: set[tuple[int, str]] = set()
    method = config.method
    for path, within in with_parts(modules, paths):
        module, leaf = find(modules, path)
        assert module is not None
        if (id(module), leaf) in seen:
            continue
        seen.add((id(module), leaf))
        site = describe_parameter(path, module, leaf) if leaf else describe(path, module)
        if site is None or site.kind not in method.kinds:
            kind = type(module).__name__ if site is None else f"{type(module).__name__} ({site.kind})"
            raise UnsupportedConfig(
                f"{path or 'the model'}: {method.name} does not support {kind}; it supports "
                f"{', '.join(sorted(method.kinds))}. Name other modules in target_modules, or exclude this one"
                + _inside(path, modules, method.kinds)
            )
        if leaf and (id(module), "") in seen:
            raise ValueError(
                f"{path}: target_parameters names a parameter of a module that is adapted as a whole; leave one of the "
                "two out"
            )
        if site.like(module).is_complex() and (what := _needs_real(config)) is not None:
            raise ValueError(
                f"{path}: the weight is complex, {site.like(module).dtype}, and {what} is made for real ones; adapt it "
                "with plain LoRA, or leave it out of target_modules"
            )
        sites[path] = site if within is None else dataclasses.replace(site, within=within)
    if constants is None:
        constants = method.plan(config, list(sites.values()), weights_of(sites, modules, base))
    sites = {path: dataclasses.replace(site, constants=constants[path]) for path, site in sites.items()}
    sharing = method.ability(SharesLeaves)
    if sharing is None:
        return sites
    uses = sharing.uses(config, list(sites.values()))
    return {path: dataclasses.replace(site, shared=dict(uses.get(path, {}))) for path, site in sites.items()}


def _check_bare(paths: Iterable[str], modules: Mapping[str, nn.Module]) -> None:
    """Refuse modules that another library's adapters, or those in place, are around."""
    for path in sorted(around(paths)):
        if advice := advice_on(modules.get(path)):
            raise TypeError(f"{path or 'the model'}: {type(modules[path]).__name__} {advice}")


def _inside(path: str, modules: Mapping[str, nn.Module], kinds: Collection[str]) -> str:
    """Return which modules within an unsupported one are supported."""
    start = f"{path}." if path else ""
    sites = (describe(name, modules[name]) for name in modules if name != path and name.startswith(start))
    names = [site.path for site in sites if site is not None and site.kind in kinds]
    more = f", ... ({len(names)} in all)" if len(names) > 3 else ""
    return f". Within it are {', '.join(map(repr, names[:3]))}{more}" if names else ""


def _needs_real(config: Config) -> str | None:
    """Return a description of what in a config has no meaning for complex weights, `None` for nothing."""
    ability = config.method.ability(TakesComplex)
    return config.method.name if ability is None else ability.refuses(config)


def weights_of(
    sites: Mapping[str, Site], modules: Mapping[str, nn.Module], base: Callable[[nn.Module, Site], Base] = Base
) -> Weights:
    """Return what reads the base's weights and biases as methods see them, each when asked for.

    Args:
        sites: The sites, by path.
        modules: The model's modules by name.
        base: How a module's original weight is read.

    Returns:
        `path -> weight`, canonical and detached, and `bias(path)`; a `TypeError` where it is not of floating point.

    >>> module = nn.Linear(3, 2)
    >>> site = describe("head", module)
    >>> weights_of({"head": site}, {"head": module})("head").shape
    torch.Size([2, 3])
    """
    return BaseWeights(sites, modules, base)


@dataclasses.dataclass(frozen=True)
class BaseWeights:
    """Weights and biases of the base at some sites; see `weights_of`."""

    sites: Mapping[str, Site]
    modules: Mapping[str, nn.Module]
    base: Callable[[nn.Module, Site], Base]

    def __call__(self, path: str, /) -> Tensor:
        """Return the canonical weight of a site."""
        return self._at(path).weight.detach()

    def bias(self, path: str, /) -> Tensor | None:
        """Return the bias of a site."""
        bias = self._at(path).bias
        return None if bias is None else bias.detach()

    def _at(self, path: str) -> Base:
        return self.base(self.modules[self.sites[path].owner], self.sites[path])


def with_parts(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each path with the path of the site it is a part of: an attention, then its output projection."""
    for path in paths:
        yield path, None
        if isinstance(modules.get(path), nn.MultiheadAttention):
            yield f"{path}.out_proj" if path else "out_proj", path


def check_unchanged(path: str, site: Site, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a module, or a parameter, that parameters made for this site do not fit any more.

    Raises:
        ValueError: It was removed, or replaced by another kind or size.
    """
    module, leaf = find(modules, path)
    if module is None:
        raise ValueError(f"{path}: the module was removed from the model after bind; bind the model again")
    now = describe_parameter(path, module, leaf) if leaf else describe(path, module)
    planned = {"constants": site.constants, "within": site.within, "shared": site.shared}
    if now is None or vars(now) | planned != vars(site):
        raise ValueError(
            f"{path}: the module was replaced after bind by {module}, and parameters made for the old one "
            f"({site.kind} {site.in_features} -> {site.out_features}) do not fit; bind the model again"
        )
