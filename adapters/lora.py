"""LoRA: low-rank adaptation.

    y = base(x) + s B A x,    s = lora_alpha / r,  or  lora_alpha / sqrt(r)  with rank-stabilised scaling

Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021, arXiv:2106.09685; Kalajdzievski, *A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA*, 2023, arXiv:2312.03732. Names, defaults and initial
distributions are those of PEFT's `tuners/lora`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import Layer, Method, Rows, Site, Weights, widen

from .config import by_pattern, require
from .form import Form, Value
from .lora_fields import LoraFields
from .low_rank import add_product, add_routed, add_scaled, add_to_groups


@dataclasses.dataclass(kw_only=True)
class LoraConfig(LoraFields):
    """LoRA adds a product of two thin matrices to each targeted weight.

    Supports linear layers (also `transformers`' `Conv1D`), embeddings and 1-, 2- and 3-d convolutions. A grouped
    convolution gets an `A` that sees all channels, as in PEFT, so it runs but has no merged weight.

    Attributes:
        r: Rank.
        lora_alpha: Numerator of the scaling factor.
        lora_dropout: Probability of dropout on the adapter's input, in training mode; embeddings ignore it.
        use_rslora: Scale by `lora_alpha / sqrt(r)`.
        init_lora_weights: `True` for a uniform `A` and a zero `B` (embeddings: a zero `A` and a normal `B`),
            `"gaussian"` for a normal `A` of standard deviation `1 / r` (embeddings: as `True`), `False` for both
            random.
        rank_pattern: Ranks by pattern of the end of a module's name; the first that matches counts.
        alpha_pattern: The same for `lora_alpha`.

    >>> LoraConfig(r=4, target_modules=["q_proj"]).lora_alpha
    8
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.lora_dropout < 1, self, f"lora_dropout is {self.lora_dropout}, expected 0 <= p < 1")
        require(
            self.init_lora_weights in (True, False, "gaussian"),
            self,
            f"init_lora_weights is {self.init_lora_weights!r}, expected True, False or 'gaussian'",
        )


def plan(config: LoraConfig, sites: list[Site], weights: Weights) -> dict[str, dict[str, Any]]:
    """Rank and scaling factor of each site."""
    patterns = {**config.rank_pattern, **config.alpha_pattern}
    missed = [one for one in patterns if not any(by_pattern({one: True}, site.path, False) for site in sites)]
    if missed:
        warnings.warn(
            f"LoraConfig: {missed} in rank_pattern or alpha_pattern match none of the targeted modules and have no "
            "effect; a pattern matches a whole name, or its end after a dot",
            RuntimeWarning,
            stacklevel=2,
        )
    planned = {}
    for site in sites:
        r = by_pattern(config.rank_pattern, site.path, config.r)
        alpha = by_pattern(config.alpha_pattern, site.path, config.lora_alpha)
        require(isinstance(r, int) and r > 0, config, f"r is {r!r} at {site.path}, expected a positive integer")
        require(
            r % site.groups == 0,
            config,
            f"r is {r} at {site.path}, a convolution with {site.groups} groups; expected a multiple of the groups",
        )
        scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        planned[site.path] = {"lora_alpha": alpha, "r": r, "scaling": scaling}
    return planned


def shapes(config: LoraConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`A` is `"r in *kernel"`, `B` is `"out r/groups *ones"`; an embedding's are `"r vocab"` and `"dim r"`."""
    r = site.constants["r"]
    a, b = _names(site)
    return {
        a: (r, site.in_features, *site.kernel_size),
        b: (site.out_features, r // site.groups, *(1 for _ in site.kernel_size)),
    }


def init(
    config: LoraConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws: one state of the generator gives PEFT's numbers, bit for bit."""
    return {site.path: _init_site(config, site, generator) for site in sites}


def _init_site(config: LoraConfig, site: Site, generator: torch.Generator | None) -> dict[str, Tensor]:
    a_name, b_name = _names(site)
    shape = shapes(config, site)
    device = generator.device if generator is not None else None
    a = torch.empty(shape[a_name], dtype=torch.float32, device=device)
    b = torch.empty(shape[b_name], dtype=torch.float32, device=device)
    if site.kind == "embedding":
        for tensor in (a, b):
            tensor.normal_(generator=generator)
        if config.init_lora_weights:
            a.zero_()
            b.normal_(generator=generator)
        return {a_name: a, b_name: b}
    for tensor in (a, b):
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    if config.init_lora_weights is True:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    elif config.init_lora_weights == "gaussian":
        a.normal_(std=1 / site.constants["r"], generator=generator)
    if config.init_lora_weights:
        b.zero_()
    return {a_name: a, b_name: b}


def apply(config: LoraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + s B A dropout(x)`, the sum in the wider dtype and rounded once to the base's."""
    a_name, b_name = _names(site)
    a, b, scaling = leaves[a_name], leaves[b_name], site.constants["scaling"]
    y = base(x)
    if site.kind == "embedding":
        return add_product(y, F.embedding(x, a.mT), b, scaling)
    if config.lora_dropout:
        x = F.dropout(x, config.lora_dropout, training=base.training)
    x, a, b = widen(x, a, b)
    if site.kernel_size:
        return add_scaled(y, site.pointwise(site.convolve(x, a), b), scaling)
    return add_product(y, F.linear(x, a), b, scaling)


def routed(config: LoraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with an `A` and a `B` for each row; convolutions take the general way."""
    if site.kernel_size:
        return NotImplemented
    a_name, b_name = _names(site)
    a, b, scaling = leaves[a_name], leaves[b_name], site.constants["scaling"]
    y = base(x)
    if site.kind == "embedding":
        groups = rows.groups()
        index = torch.arange(groups.size, device=x.device) if groups.index is None else groups.index.clamp(min=0)
        a, b = widen(a, b)
        return add_to_groups(y, a.mT[index.view(-1, 1), x.reshape(groups.size, -1)], b, scaling, rows)
    if config.lora_dropout:
        x = F.dropout(x, config.lora_dropout, training=base.training)
    x, a, b = widen(x, a, b)
    return add_routed(y, x, a, b, scaling, rows)


def merge(
    config: LoraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + s B A`."""
    if site.groups > 1:
        raise ValueError(
            f"{site.path}: LoRA on a convolution with {site.groups} groups sees all channels through A, so no grouped "
            "weight is its merged form; call the graft instead, or leave this module out of target_modules"
        )
    a, b = (leaves[name] for name in _names(site))
    delta = (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    return add_scaled(weight, delta, site.constants["scaling"]), bias


def _names(site: Site) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if site.kind == "embedding" else ("lora_A", "lora_B")


LoraConfig.method = Method(
    name="LORA",
    kinds=frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    routed=routed,
    varying=frozenset(
        {"r", "lora_alpha", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern", "alpha", "scaling"}
    ),
)


def _holder(config: LoraConfig, site: Site, leaf: str) -> nn.Module:
    """The layer that PEFT keeps a leaf in: a linear one, or a convolution like the base's around one of ones."""
    r = site.constants["r"]
    how: dict[str, Any] = {"bias": False, "device": "meta"}
    if site.geometry is None:
        return nn.Linear(site.in_features, r, **how) if leaf == "lora_A" else nn.Linear(r, site.out_features, **how)
    conv, g = getattr(nn, f"Conv{len(site.kernel_size)}d"), site.geometry
    if leaf == "lora_B":
        return conv(r, site.out_features, 1, groups=g.groups, **how)
    return conv(
        site.in_features, r, site.kernel_size, g.stride, g.padding, g.dilation, padding_mode=g.padding_mode, **how
    )


def _infer(config: LoraConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Ranks that differ from the config's, from the shapes of `A`."""
    ranks = {path: len(leaves[name]) for path, leaves in found.items() for name in leaves if name.endswith("_A")}
    wanted = {path: by_pattern(config.rank_pattern, path, config.r) for path in ranks}
    other = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != wanted[path]}
    return {"rank_pattern": {**other, **config.rank_pattern}} if other else {}


LoraConfig.form = Form(
    prefix="lora_",
    modules=("lora_A", "lora_B"),
    parameters=("lora_embedding_A", "lora_embedding_B"),
    holder=_holder,
    infer=_infer,
    values={
        "lora_alpha": Value(lambda config, site: site.constants["lora_alpha"]),
        "r": Value(lambda config, site: site.constants["r"]),
        "scaling": Value(
            lambda config, site: site.constants["scaling"], lambda config, site, value: {"scaling": value}
        ),
        "use_rslora": Value(lambda config, site: config.use_rslora),
    },
)
