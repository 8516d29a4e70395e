"""Ranks and scaling factors in configs: what a config plans, and the config that plans what was written since.

A layer's `scaling` can be written, and files have no place for it but the config: `lora_alpha`, or `alpha_pattern`
where modules differ. LoRA calls the numerator of the factor `lora_alpha`, LoHa calls it `alpha`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from torchgraft.functional import PerAdapter, Site

from ..._calibration.initial import REMOVING, kind_of
from ..._config.matching import by_pattern
from ..._config.messages import require

C = TypeVar("C", bound=Any)
V = TypeVar("V")
Sites = Mapping[str, Site]


def _numerator(config: Any) -> str:
    """Return the field and the constant that have the numerator of the scaling factor."""
    return "lora_alpha" if hasattr(config, "lora_alpha") else "alpha"


def alpha_at(config: Any, site: Site) -> float:
    """Return the numerator of the scaling factor that a config means at a site."""
    alpha: float = _by_patterns(config.alpha_pattern, getattr(config, _numerator(config)), site)
    return alpha


def rank_at(config: Any, site: Site) -> int:
    """Return the rank that a config means at a site."""
    r: int = _by_patterns(config.rank_pattern, config.r, site)
    return r


def _by_patterns(patterns: Mapping[str, V], value: V, site: Site) -> V:
    for path in filter(None, (site.within, site.path)):
        value = by_pattern(patterns, path, value)
    return value


def scaling_of(config: Any, r: int, alpha: float) -> float:
    """Return the scaling factor of a site of LoRA or LoHa.

    >>> from torchgraft.adapters import LoraConfig
    >>> scaling_of(LoraConfig(use_rslora=True), 4, 8)
    4.0
    """
    return alpha / _denominator(config, r)


def planned_scaling(config: Any, site: Site) -> float:
    """Return the scaling factor that a config of LoRA, LoHa or LoKr means at a site."""
    return scaling_of(config, site.constants.r, alpha_at(config, site))


def _denominator(config: Any, r: int) -> float:
    return math.sqrt(r) if getattr(config, "use_rslora", False) else r


def warn_of_unused_patterns(
    config: Any, sites: list[Site], fields: Sequence[str] = ("rank_pattern", "alpha_pattern")
) -> None:
    """Warn of what fields of patterns name in vain."""
    patterns = dict.fromkeys(pattern for field in fields for pattern in getattr(config, field))
    missed = [one for one in patterns if not any(by_pattern({one: True}, site.path, False) for site in sites)]
    if missed:
        warnings.warn(
            f"{type(config).__name__}: {missed} in {' or '.join(fields)} match none of the targeted modules "
            "and have no effect; a pattern matches a whole name, or its end after a dot",
            RuntimeWarning,
            stacklevel=3,
        )


def ranks_of(config: Any, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields of a config that gives modules these ranks, by path; none where it does already."""
    return patterns_of(config, ranks, "r", "rank_pattern")


def same_rank(leaf: str, axis: int = 0) -> Callable[[Any, Mapping[str, Mapping[str, Tensor]]], dict[str, Any]]:
    """Return what finds `r` from leaves of files: the size of an axis, where all modules have the same.

    >>> import torch
    >>> same_rank("hra_u", 1)(None, {"a": {"hra_u": torch.ones(4, 2)}, "b": {"hra_u": torch.ones(3, 2)}})
    {'r': 2}
    """

    def infer(config: Any, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
        ranks = {leaves[leaf].shape[axis] for leaves in found.values() if leaf in leaves}
        return {"r": ranks.pop()} if len(ranks) == 1 else {}

    return infer


def patterns_of(config: Any, values: Mapping[str, Any], field: str, patterns: str) -> dict[str, Any]:
    """Return the fields of a config that gives modules these values, by path; none where it does already.

    Args:
        config: An adapter's config.
        values: The value of each module.
        field: Name of the field that holds for modules that no pattern matches.
        patterns: Name of the field that has other values by pattern.
    """
    own, default = getattr(config, patterns), getattr(config, field)
    other = {f"^{re.escape(path)}": one for path, one in values.items() if one != by_pattern(own, path, default)}
    return {patterns: {**other, **own}} if other else {}


def expressed(config: C, sites: Sites) -> C:
    """Return the config whose plan has the scaling factors that sites have now: this one, where none was written.

    Args:
        config: An adapter's config.
        sites: Its sites, by path.

    Raises:
        ValueError: Factors that no config of the method has: not finite, or different ones with AdaLoRA.
    """
    find = config.form.express
    stacked = any(isinstance(value, PerAdapter) for site in sites.values() for _, value in site.constants.items())
    fields = {} if find is None or stacked else find(config, sites)
    return dataclasses.replace(config, **fields) if fields else config


def of_patterns(config: Any, sites: Sites) -> dict[str, Any]:
    """Return the fields of a config that has an `alpha_pattern` with the scaling factors of these sites."""
    wanted = {path: _alpha(config, site) for path, site in sites.items()}
    if all(alpha == alpha_at(config, sites[path]) for path, alpha in wanted.items()):
        return {}
    if len(set(wanted.values())) == 1:
        return {_numerator(config): next(iter(wanted.values())), "alpha_pattern": {}}
    own: dict[str, float] = {}
    for path, alpha in wanted.items():  # whole names alone: files sort patterns, of which the first that matches counts
        if _by_patterns(own, getattr(config, _numerator(config)), sites[path]) != alpha:
            own[f"^{re.escape(path)}"] = alpha
    return {"alpha_pattern": own}


def _alpha(config: Any, site: Site) -> float:
    """Return the numerator that gives a site its scaling factor, to the bit where there is one."""
    r, planned = site.constants.r, alpha_at(config, site)
    scaling = _number(config, site, "scaling")
    if scaling_of(config, r, planned) == scaling:
        return planned
    alpha = scaling * _denominator(config, r)
    near = (alpha, round(alpha), math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    alpha = next((one for one in near if scaling_of(config, r, one) == scaling), alpha)
    return int(alpha) if alpha == int(alpha) else alpha


def written(config: Any, site: Site, scaling: Any) -> dict[str, Any]:
    """Return the constants of a site with another scaling factor, and the numerator that gives it, if one does."""
    new = {"scaling": scaling}
    if math.isfinite(_as_float(scaling)):
        new[_numerator(config)] = _alpha(config, dataclasses.replace(site, constants=site.constants.replace(new)))
    return new


def _as_float(value: Any) -> float:
    return float(value) if not isinstance(value, Tensor) or (value.numel() == 1 and not value.is_meta) else math.nan


def planned_alpha(config: Any) -> float:
    """Return the scaling factor that an AdaLoRA config means."""
    alpha: float = config.lora_alpha if config.lora_alpha > 0 else float(config.init_r)
    return alpha


def of_adalora(config: Any, sites: Sites) -> dict[str, Any]:
    """Return the field of an AdaLoRA config with the scaling factor of these sites."""
    planned = planned_alpha(config)
    alphas = {path: _number(config, site, "lora_alpha") for path, site in sites.items()}
    if set(alphas.values()) == {planned}:
        return {}
    alpha = next(iter(alphas.values()))
    require(
        alpha > 0 and len(set(alphas.values())) == 1,
        config,
        f"scaling was written to {sorted(set(alphas.values()))}, and AdaLoRA's config has one positive lora_alpha for "
        "all modules; write the same positive number to all",
    )
    return {"lora_alpha": alpha}


def _number(config: Any, site: Site, name: str) -> float:
    value = getattr(site.constants, name)
    number = _as_float(value)
    require(
        math.isfinite(number),
        config,
        f"scaling of {site.path} was written to {value!r:.100}, which no config has; write one finite number",
    )
    return number


def check_raw(config: Any, sites: Sites) -> None:
    """Refuse written factors where the initialisation was made with the old ones, for files of the leaves as they are.

    Raises:
        ValueError: Such an adapter; says what to pass.
    """
    kind = kind_of(getattr(config, "init_lora_weights", True))
    if kind in REMOVING and expressed(config, sites) is not config:
        raise ValueError(
            f"init_lora_weights is {kind!r}, made with the config's scaling factor, and scaling was written since, "
            "so the leaves as they are would mean something else with any config; save it with plain=True, or convert "
            "it with to_plain(extract_graft(model), extract_params(model))"
        )
