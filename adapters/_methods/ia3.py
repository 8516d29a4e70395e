"""(IA)^3: learned vectors that rescale activations.

    y = l * base(x),    or, for a feed-forward module,    y = base(l * x)

Liu et al., *Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning*, 2022,
arXiv:2205.05638. Names, defaults and initial distributions are those of PEFT's `tuners/ia3`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchgraft.functional import AddsLeafwise, Constants, Layer, Method, Rows, Site, TakesComplex, Weights, widen

from .._config import patterns
from .._config.base import AdapterConfig
from .._config.messages import require, spelled
from .._config.peft_format import PeftFormat


@dataclasses.dataclass(kw_only=True)
class IA3Config(AdapterConfig):
    """(IA)^3 multiplies each channel that leaves (or enters) a targeted module by a learned number.

    Supports linear layers (also `transformers`' `Conv1D`) and 2- and 3-d convolutions, in any number of groups. A bias
    is rescaled with the output; a feed-forward module's is not.

    PEFT reads a name in `feedforward_modules` as any end of a module's name, so that `"w"` means `raw` too; here it is
    a whole name, or an end after a dot, as in `target_modules`. And `None` means that no module is feed-forward, where
    PEFT looks a model's architecture up in a table.

    Attributes:
        feedforward_modules: Modules whose input is rescaled instead of their output, in the notation of
            `target_modules`; a list has to be part of the list `target_modules`.
        init_ia3_weights: `True` for vectors of ones, `False` for normal ones.

    >>> config = IA3Config(target_modules=["k", "v", "w0"], feedforward_modules=["w0"])
    >>> config.init_ia3_weights
    True
    """

    feedforward_modules: list[str] | set[str] | str | None = None
    init_ia3_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        named, targets = self.feedforward_modules, self.target_modules
        if named is None or targets is None or isinstance(named, str) or isinstance(targets, str):
            return
        outside = sorted(set(named) - set(targets))
        require(
            not outside,
            self,
            f"feedforward_modules has {outside}, expected a subset of target_modules, {sorted(targets)}",
        )


@dataclasses.dataclass(frozen=True, eq=False)
class IA3Constants(Constants):
    """Whether the input of a site is rescaled instead of its output."""

    feedforward: bool


def plan(config: IA3Config, sites: list[Site], weights: Weights) -> dict[str, IA3Constants]:
    """Return whether each site is feed-forward."""
    names = config.feedforward_modules or []
    each: list[list[str] | str] = [names] if isinstance(names, str) else [[name] for name in sorted(names)]
    missed = [one for one in each if not any(_matches(one, site.path) for site in sites)]
    if missed:
        warnings.warn(
            f"IA3Config: feedforward_modules {spelled(names)}: {missed} match none of the targeted modules, whose "
            "outputs are rescaled instead of their inputs",
            RuntimeWarning,
            stacklevel=2,
        )
    return {site.path: IA3Constants(_matches(names, site.path)) for site in sites}


def _matches(names: Collection[str], path: str) -> bool:
    if isinstance(names, str):
        return patterns.fullmatch(names, path, "IA3Config: feedforward_modules")
    return path in names or any(path.endswith(f".{name}") for name in names)


def shapes(config: IA3Config, site: Site) -> dict[str, tuple[int, ...]]:
    """`"out 1"`, feed-forward `"1 in"`; a convolution's is `"1 channels *ones"`."""
    feedforward = site.constants.feedforward
    size = site.in_features if feedforward else site.out_features
    if site.kernel_size:
        return {"ia3_l": (1, size, *(1 for _ in site.kernel_size))}
    return {"ia3_l": (1, size) if feedforward else (size, 1)}


def init(
    config: IA3Config, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws; vectors of ones use up the same random numbers."""
    made = {}
    for site in sites:
        drawn = torch.randn(shapes(config, site)["ia3_l"], dtype=torch.float32, generator=generator)
        made[site.path] = {"ia3_l": torch.ones_like(drawn) if config.init_ia3_weights else drawn}
    return made


def apply(config: IA3Config, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`l * base(x)` or `base(l * x)`, the product in the wider dtype and rounded once."""
    scale = leaves["ia3_l"][0] if site.kernel_size else leaves["ia3_l"].flatten()
    if site.constants.feedforward:
        return base(_rescale(x, scale))
    return _rescale(base(x), scale)


def _rescale(x: Tensor, scale: Tensor) -> Tensor:
    wide, scale = widen(x, scale)
    return (wide * scale).to(x.dtype)


def routed(config: IA3Config, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Tensor:
    """`apply` with a vector for each row."""
    groups, leaf = rows.groups(), leaves["ia3_l"]
    scale = groups.mask(groups.pick(leaf[:, 0] if site.kernel_size else leaf.flatten(1)), identity=1.0)
    if site.constants.feedforward:
        return base(_rescale_groups(x, scale, site))
    return _rescale_groups(base(x), scale, site)


def _rescale_groups(x: Tensor, scale: Tensor, site: Site) -> Tensor:
    """`x` is `"groups*k ... dim"` or `"groups*k channels *spatial"`, and `scale` has one vector for each group."""
    scale = scale.unsqueeze(1)
    if not site.kernel_size:
        scale = scale.view(len(scale), *(1,) * (x.ndim - 1), -1)
    return _rescale(x.unflatten(0, (len(scale), -1)), scale).flatten(0, 1)


def merge(
    config: IA3Config, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = diag(l) W` and `b' = l * b`; feed-forward `W' = W diag(l)`, group by group in a grouped convolution."""
    scale = leaves["ia3_l"].flatten()
    ones = (1,) * (weight.ndim - 2)
    if site.constants.feedforward:
        per_group = weight.unflatten(0, (site.groups, -1))
        return (per_group * scale.view(site.groups, 1, -1, *ones)).flatten(0, 1), bias
    return weight * scale.view(-1, 1, *ones), None if bias is None else bias * scale


IA3Config.method = Method(
    name="IA3",
    config=IA3Config,
    kinds=frozenset({"linear", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=IA3Constants,
    routed=routed,
    varying=frozenset({"feedforward_modules", "init_ia3_weights"}),
    abilities=(TakesComplex(), AddsLeafwise(1.0)),
)


def _infer(config: IA3Config, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the feed-forward modules, from which side their vectors rescale; convolutions do not tell."""
    shapes = {path: leaves["ia3_l"].shape for path, leaves in found.items()}
    rows = [path for path, shape in shapes.items() if len(shape) == 2 and shape[0] == 1]
    rows += [
        path for path, shape in shapes.items() if len(shape) > 2 and _matches(config.feedforward_modules or [], path)
    ]
    return {"feedforward_modules": rows}


IA3Config.form = PeftFormat(
    prefix="ia3_",
    parameters=("ia3_l",),
    facts=lambda config, site: {"is_feedforward": site.constants.feedforward},
    infer=_infer,
    only_here=("bias", "layers_pattern", "layers_to_transform"),
)
