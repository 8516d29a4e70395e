"""Where a LoRA site starts: its initial factors, and what an initialisation changes beside them.

PiSSA, OLoRA, CorDA and LoRA-GA start away from zero and take `s B0 A0` out of the base. Here the base stays: `A0` and
`B0` are constants of the site, and the adapter adds `s (B A - B0 A0)`. LoftQ's base is the quantised weight: the
difference to the base's own is a constant. MiCA's `B` is a constant.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchgraft.functional import Site, UnsupportedConfig, Weights

from ..._config.messages import names_of, require
from .configs import LoftQConfig, LoraGAConfig, made
from .corda import corda
from .loftq import loftq
from .lora_ga import lora_ga
from .spectral import Factors, mica, olora, orthogonal, pissa
from .statistics import Statistics

if TYPE_CHECKING:
    from ..._methods.lora.lora import LoraConfig

NAMES = ("pissa", "pissa_niter_<steps>", "olora", "orthogonal", "mica", "eva", "corda", "loftq", "lora_ga")
"""The initialisations beside PEFT's plain ones, `True`, `False` and `"gaussian"`."""
REMOVING = ("pissa", "olora", "corda", "lora_ga")
"""Those that take their initial product out of the base."""
FROM_DATA = {"eva": "fit_eva", "corda": "fit_corda", "lora_ga": "fit_lora_ga"}
"""Those that need statistics, and what makes them."""
_PISSA = re.compile(r"pissa(_niter_\d+)?")
_ORDINARY_ON_EMBEDDINGS = ("eva", "lora_ga")


def kind_of(init_lora_weights: bool | str) -> str | None:
    """Return the initialisation that a value asks for; `None` for a plain one or an unknown one.

    >>> kind_of("pissa_niter_4"), kind_of("gaussian"), kind_of("pissa_niter_x")
    ('pissa', None, None)
    """
    name = str(init_lora_weights)
    if _PISSA.fullmatch(name):
        return "pissa"
    return name if name in NAMES else None


def constants(config: LoraConfig, site: Site, r: int, scaling: float, weights: Weights) -> dict[str, Tensor]:
    """Return what an initialisation fixes at a site: `initial_A` and `initial_B`, `rounding`, or the name of a leaf.

    Raises:
        ValueError: A kind of module or a rank that the initialisation does not support, a weight without values,
            missing statistics.
    """
    kind = kind_of(config.init_lora_weights)
    if kind is None or not _supports(config, kind, site, r):
        return {}
    if kind in REMOVING:
        a, b = _removed(config, kind, site, r, scaling, weights)
        return {"initial_A": a.contiguous(), "initial_B": b.contiguous()}
    if kind == "mica":
        name = "lora_embedding_B" if site.kind == "embedding" else "lora_B"
        return {name: mica(weight_of(config, site, weights), r)[1]}
    if kind == "loftq":
        weight = weights(site.path)
        quantised = _loftq(config, site, r, weights)[0].to(weight.dtype)
        if scaling != 1:
            warnings.warn(
                f"LoraConfig: the scaling factor at {site.path} is {scaling:.3g}, and loftq's factors restore what "
                "quantising loses at 1; set lora_alpha to r",
                RuntimeWarning,
                stacklevel=4,
            )
        return {"rounding": quantised.to(_wide(weight)) - weight.to(_wide(weight))}
    return {}


def factors(config: LoraConfig, site: Site, generator: torch.Generator | None, weights: Weights) -> Factors | None:
    """Return initial `A` and `B` of a site that was planned; `None` where they are plain LoRA's.

    EVA's have a zero `B`; without statistics they are plain.
    """
    kind, r = kind_of(config.init_lora_weights), site.constants.r
    if kind is None or (site.kind == "embedding" and kind != "mica"):
        return None
    if kind in REMOVING:
        return site.constants.initial_A.clone(), site.constants.initial_B.clone()
    if kind == "mica":
        b = getattr(site.constants, "lora_embedding_B" if site.kind == "embedding" else "lora_B")
        return b.new_zeros(r, site.in_features), b
    if kind == "loftq":
        return _loftq(config, site, r, weights)[1:]
    if kind == "orthogonal":
        return orthogonal(site.in_features, site.out_features, r, generator)
    found = found_statistics(config, site)
    if found is None:
        return None
    a = found["components"]
    return a.clone(), a.new_zeros(site.out_features, r)


def warn_of_plain(config: LoraConfig, sites: list[Site]) -> None:
    """Say which sites start as plain LoRA does, though the config asks for EVA, since it has no statistics of them."""
    if config.init_lora_weights != "eva":
        return
    lacking = [site.path for site in sites if site.kind == "linear" and found_statistics(config, site) is None]
    if lacking:
        warnings.warn(
            f"LoraConfig: init_lora_weights is 'eva', and the config has no statistics of {names_of(lacking)}, which "
            "start as plain LoRA does; call fit_eva(model, config, batches) and use the config that it returns",
            RuntimeWarning,
            stacklevel=4,
        )


def weight_of(config: LoraConfig, site: Site, weights: Weights) -> Tensor:
    """Return a site's weight in float32 or wider.

    Raises:
        ValueError: A weight on the meta device.
    """
    weight = weights(site.path)
    require(
        not weight.is_meta,
        config,
        f"init_lora_weights is {config.init_lora_weights!r}, which is made from the base's weights, and that of "
        f"{site.path} is on the meta device; load the base first",
    )
    return weight.to(_wide(weight))


def found_statistics(config: LoraConfig, site: Site) -> dict[str, Tensor] | None:
    """Return the tensors that data gave for a site."""
    statistics: Statistics | None = config.statistics
    found = None if statistics is None else statistics.sites.get(site.path)
    return None if found is None else dict(found)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _supports(config: LoraConfig, kind: str, site: Site, r: int) -> bool:
    """Return whether the initialisation speaks of such a site; `False` for embeddings that start as plain ones do."""
    name, path = config.init_lora_weights, site.path
    if site.kind == "embedding" and kind in _ORDINARY_ON_EMBEDDINGS:
        warnings.warn(
            f"LoraConfig: init_lora_weights is {name!r}, and {path} is an embedding, which starts as with True",
            RuntimeWarning,
            stacklevel=5,
        )
        return False
    kinds = ("linear", "embedding") if kind == "mica" else ("linear",)
    require(
        site.kind in kinds,
        config,
        f"init_lora_weights is {name!r}, which is for {' and '.join(kinds)} modules, and {path} is of kind {site.kind}"
        "; leave it out of target_modules, or bind it with a config of its own",
        UnsupportedConfig,
    )
    smaller = min(site.in_features, site.out_features)
    most = {"orthogonal": r, "lora_ga": smaller // 2, "eva": site.in_features}.get(kind, smaller)
    require(
        r <= most,
        config,
        f"r is {r} at {path}, whose weight is {site.out_features} x {site.in_features}; {name!r} needs r <= {most}",
    )
    require(kind != "orthogonal" or r % 2 == 0, config, f"r is {r} at {path}; 'orthogonal' needs an even r")
    return True


def _removed(config: LoraConfig, kind: str, site: Site, r: int, scaling: float, weights: Weights) -> Factors:
    found = _needed(config, kind, site, r) if kind in FROM_DATA else {}
    weight = weight_of(config, site, weights)
    if kind == "pissa":
        steps = re.fullmatch(r"pissa_niter_(\d+)", str(config.init_lora_weights))
        return pissa(weight, r, scaling, int(steps[1]) if steps else None)
    if kind == "olora":
        return olora(weight, r)
    found = {name: tensor.to(weight) for name, tensor in found.items()}
    if kind == "corda":
        return corda(found, scaling)
    return lora_ga(weight, found["gradient"], r, scaling, made(LoraGAConfig, config.lora_ga_config, "lora_ga_config"))


def _needed(config: LoraConfig, kind: str, site: Site, r: int) -> dict[str, Tensor]:
    found = found_statistics(config, site)
    require(
        found is not None,
        config,
        f"init_lora_weights is {kind!r}, which takes a part of the base out that data chooses, and the config has no "
        f"statistics of {site.path}; use the config that {FROM_DATA[kind]}(model, config, batches) returns. No file "
        "holds them: save with save_adapter(..., plain=True). For a base from which that part was taken out already, "
        "set init_lora_weights to True",
    )
    assert found is not None
    for name, shape in _shapes(kind, site, r).items():
        require(
            tuple(found[name].shape) == shape,
            config,
            f"the statistics of {site.path} have {name} of shape {tuple(found[name].shape)}, expected {shape}; call "
            f"{FROM_DATA[kind]} again with this model and this r",
        )
    return found


def _shapes(kind: str, site: Site, r: int) -> dict[str, tuple[int, ...]]:
    if kind == "corda":
        return {"U": (site.out_features, r), "S": (r,), "V": (site.in_features, r)}
    return {"gradient": (site.out_features, site.in_features)}


def _loftq(config: LoraConfig, site: Site, r: int, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    how = made(LoftQConfig, config.loftq_config, "loftq_config")
    return loftq(weight_of(config, site, weights), r, how.loftq_bits, how.loftq_iter)
