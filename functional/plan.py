"""Planning: from targeted modules to sites with a method's constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch import nn

from .method import Config
from .site import Site, describe


def plan_sites(config: Config, modules: Mapping[str, nn.Module], paths: Iterable[str]) -> dict[str, Site]:
    """Describe the targeted modules and let the method plan its constants for all of them.

    Args:
        config: An adapter's config.
        modules: The model's modules by name.
        paths: Names of the targeted ones; a module under two names is one site, under the first.

    Returns:
        `{path: site}`, in the order of `paths`.

    Raises:
        ValueError: A module that the method does not support.

    >>> from torchgraft.adapters import LoraConfig
    >>> list(plan_sites(LoraConfig(), {"a": nn.Linear(2, 2)}, ["a"]))
    ['a']
    """
    sites: dict[str, Site] = {}
    seen: set[int] = set()
    method = config.method
    for path in paths:
        module = modules[path]
        if id(module) in seen:
            continue
        seen.add(id(module))
        site = describe(path, module)
        if site is None or site.kind not in method.kinds:
            kind = type(module).__name__ if site is None else f"{type(module).__name__} ({site.kind})"
            raise ValueError(
                f"{path or 'the model'}: {method.name} does not support {kind}; it supports "
                f"{', '.join(sorted(method.kinds))}. Name other modules in target_modules, or exclude this one"
            )
        sites[path] = site
    constants = method.plan(config, list(sites.values()))
    return {path: dataclasses.replace(site, constants=constants[path]) for path, site in sites.items()}
