"""LoRA: low-rank adaptation.

    y = base(x) + s B A x,    s = lora_alpha / r,  or  lora_alpha / sqrt(r)  with rank-stabilised scaling

With `lora_bias`, `B` has a bias: `y = base(x) + s (B A x + b)`. With `use_dora`, see `dora.py`.

Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021, arXiv:2106.09685; Kalajdzievski, *A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA*, 2023, arXiv:2312.03732. Names, defaults and initial
distributions are those of PEFT's `tuners/lora`. `forward.py` computes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from torchgraft.functional import (
    AddsProduct,
    KeepsDtype,
    MergesOver,
    Method,
    PadsInBlocks,
    Precomputes,
    RunsInOneStep,
    Site,
    SplitsProjection,
    TakesComplex,
    UnsupportedConfig,
    Weights,
)
from torchgraft.functional.extending import PARAMETERS

from ..._calibration.initial import FROM_DATA, NAMES, Statistics, constants, kind_of
from ..._calibration.initial.configs import CONFIGS, made
from ..._config.base import AdapterConfig
from ..._config.errors import PeftWarning
from ..._config.messages import require
from ..._config.peft_format import PeftFormat, Value
from ..shared.scalings import (
    alpha_at,
    of_patterns,
    planned_scaling,
    rank_at,
    ranks_of,
    scaling_of,
    warn_of_unused_patterns,
    written,
)
from . import dora, forward
from .activated import check_activated
from .blocks import BdLoraConfig, BlockDiagonalLinear, blocks_of
from .constants import LoraConstants
from .fields import LoraFields
from .forward import BIAS
from .leaves import blocks, fixed_leaves, init, part, shapes
from .parameters import check_parameter, factors_of_parameter


@dataclasses.dataclass(kw_only=True)
class LoraConfig(LoraFields):
    """LoRA adds a product of two thin matrices to each targeted weight.

    Supports linear layers (also `transformers`' `Conv1D`), embeddings, 1-, 2- and 3-d convolutions and
    `nn.MultiheadAttention`. A grouped convolution gets an `A` that sees all channels, as in PEFT, so it runs but has no
    merged weight. An attention gets one adapter on its input projections and one on its output projection, which is
    added once (PEFT 0.21.2 adds it twice); where keys or values have sizes of their own, which PEFT refuses, `A` is
    `"r query+key+value"` and each projection has its part. Bare parameters have two axes, or three of
    which the first counts experts; all experts of one have their `A` and `B` in two matrices.

    Attributes:
        r: Rank.
        lora_alpha: Numerator of the scaling factor.
        lora_dropout: Probability of dropout on the adapter's input, in training mode; embeddings ignore it.
        use_rslora: Scale by `lora_alpha / sqrt(r)`.
        init_lora_weights: `True` for a uniform `A` and a zero `B` (embeddings: a zero `A` and a normal `B`),
            `"gaussian"` for a normal `A` of standard deviation `1 / r` (embeddings: as `True`), `False` for both
            random. From the weight: `"pissa"`, `"pissa_niter_<steps>"`, `"olora"`, `"mica"`, whose `B` is not trained,
            and `"loftq"`, whose base is quantised; `"orthogonal"` from random numbers; from data: `"eva"`, `"corda"`
            and `"lora_ga"`, see `fit_eva`, `fit_corda` and `fit_lora_ga`. `calibration/initial/` has them.
        rank_pattern: Ranks by pattern of the end of a module's name; the first that matches counts.
        alpha_pattern: The same for `lora_alpha`.
        target_parameters: Parameters to adapt, such as the stacked weights of experts, `"mlp.experts.down_proj"`: whole
            names, or ends of names after a dot. Together with `target_modules`, or alone.
        use_bdlora: Give an `A` or a `B` of blocks to linear layers, by parts of their names; a dict will do.
        use_dora: Learn the magnitude of each output apart from the direction of its weights.
        alora_invocation_tokens: For an activated LoRA, the tokens from which on it adapts a prompt: calls are routed by
            the rows that `activated_positions` finds, and others are errors. Linear layers alone; never merged.
        lora_bias: Give `B` a bias; embeddings cannot have it, and modules without a bias have no merged form then.
        loftq_config, eva_config, corda_config, lora_ga_config: More about the initialisation of that name; a dict will
            do.
        statistics: What data says about each module, for initialisations from data; never written to a file.

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
    statistics: Statistics | None = dataclasses.field(default=None, repr=False)

    method: ClassVar[Method]
    acted_on: ClassVar[frozenset[str]] = frozenset(
        {"alora_invocation_tokens", "use_bdlora", "use_dora", "lora_bias", "target_parameters", *CONFIGS}
    )
    in_memory: ClassVar[frozenset[str]] = frozenset({"statistics"})
    site_fields: ClassVar[frozenset[str]] = LoraFields.site_fields | {"target_parameters"}

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.lora_dropout < 1, self, f"lora_dropout is {self.lora_dropout}, expected 0 <= p < 1")
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()  # PEFT takes "OLoRA" and "Gaussian" too
        kind = kind_of(self.init_lora_weights)
        require(
            self.init_lora_weights in (True, False, "gaussian") or kind is not None,
            self,
            f"init_lora_weights is {self.init_lora_weights!r}, expected True, False, 'gaussian' or one of {NAMES}",
        )
        if self.lora_bias:
            require(not self.use_dora, self, "use_dora and lora_bias are both True, and DoRA has no bias; set one")
            require(
                self.init_lora_weights in (True, False),
                self,
                f"lora_bias is True and init_lora_weights {self.init_lora_weights!r}, expected True or False with it",
            )
        if self.use_bdlora is not None:
            self.use_bdlora = made(BdLoraConfig, self.use_bdlora, "use_bdlora")
            plain = kind is None and not (self.use_dora or self.lora_bias)
            what = f"init_lora_weights {self.init_lora_weights!r}, use_dora {self.use_dora}, lora_bias {self.lora_bias}"
            words = f"use_bdlora is given with {what}; expected True, False or 'gaussian', and neither of the others"
            require(plain, self, words, UnsupportedConfig)
        check_activated(self)
        _fill_in(self, kind)

    def recall(self, other: AdapterConfig) -> Self:
        """Return this config with the statistics of another that starts alike."""
        if not isinstance(other, LoraConfig) or other.init_lora_weights != self.init_lora_weights:
            return self
        return dataclasses.replace(self, statistics=other.statistics)


def _fill_in(config: LoraConfig, kind: str | None) -> None:
    """Make the config of the chosen initialisation, and say which ones have no effect."""
    for name, cls in CONFIGS.items():
        value = getattr(config, name)
        if name == f"{kind}_config":
            setattr(config, name, made(cls, value or None, name))
        elif value:
            setattr(config, name, made(cls, value, name))
            warnings.warn(
                f"LoraConfig: {name} has no effect, since init_lora_weights is {config.init_lora_weights!r}; set it to "
                f"{name.removesuffix('_config')!r}, or leave {name} out",
                UserWarning,
                stacklevel=4,
            )
    made_for = None if config.statistics is None else config.statistics.kind
    require(
        made_for in (None, kind),
        config,
        f"init_lora_weights is {config.init_lora_weights!r}, and statistics are for {made_for!r}; set statistics to "
        f"None, or call {FROM_DATA.get(str(kind), 'none of the functions that make them')}",
    )


def plan(config: LoraConfig, sites: list[Site], weights: Weights) -> dict[str, LoraConstants]:
    """Return rank and scaling factor of each site, and what its initialisation fixes."""
    warn_of_unused_patterns(config, sites)
    for site in sites:
        if site.is_parameter:
            check_parameter(config, site)
    bare = [site.path for site in sites if not site.has_bias and site.kind != "embedding"]
    if config.lora_bias and bare:
        warnings.warn(
            f"LoraConfig: lora_bias is True, and {bare} have no bias, so the adapter works there but cannot be merged",
            PeftWarning,
            stacklevel=2,
        )
    planned: dict[str, LoraConstants] = {}
    for site in sites:
        r, alpha = rank_at(config, site), alpha_at(config, site)
        _check_site(config, site, r)
        scaling = scaling_of(config, r, alpha)
        special, blocks = constants(config, site, r, scaling, weights), blocks_of(config, site, r)
        activated = True if config.alora_invocation_tokens is not None else None
        planned[site.path] = LoraConstants(r, alpha, scaling, activated=activated, **special, blocks=blocks)
    return planned


def _check_site(config: LoraConfig, site: Site, r: int) -> None:
    """Refuse what a site cannot have."""
    require(isinstance(r, int) and r > 0, config, f"r is {r!r} at {site.path}, expected a positive integer")
    require(
        config.alora_invocation_tokens is None or site.kind == "linear",
        config,
        f"alora_invocation_tokens is {config.alora_invocation_tokens!r} and {site.path} is of the kind {site.kind!r}; "
        "an activated LoRA is for linear layers, leave it out of target_modules",
        UnsupportedConfig,
    )
    require(
        r % site.groups == 0,
        config,
        f"r is {r} at {site.path}, a convolution with {site.groups} groups; expected a multiple of the groups",
    )
    require(
        not config.lora_bias or site.kind != "embedding",
        config,
        f"lora_bias is True, which {site.path}, an embedding, cannot have; leave it out of target_modules",
        UnsupportedConfig,
    )
    require(
        site.kind != "attention" or (kind_of(config.init_lora_weights) is None and not config.use_dora),
        config,
        f"init_lora_weights is {config.init_lora_weights!r} and use_dora is {config.use_dora}; at {site.path}, a "
        "MultiheadAttention, only True, False or 'gaussian' work, without DoRA; leave it out of target_modules",
        UnsupportedConfig,
    )


def needs_real(config: LoraConfig) -> str | None:
    """Name the field that asks for norms or singular vectors, which are made here for real weights."""
    if config.use_dora:
        return "LORA with use_dora"
    plain = config.init_lora_weights in (True, False, "gaussian")
    return None if plain else f"LORA with init_lora_weights={config.init_lora_weights!r}"


LoraConfig.method = Method(
    name="LORA",
    config=LoraConfig,
    kinds=frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d", "attention", *PARAMETERS}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=forward.apply,
    merge=forward.merge,
    constants=LoraConstants,
    routed=forward.routed,
    varying=frozenset(
        {"r", "lora_alpha", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern", "statistics", *CONFIGS}
        | {"alora_invocation_tokens"}
    ),
    abilities=(
        RunsInOneStep(forward.decide),
        SplitsProjection(part),
        AddsProduct(factors_of_parameter),
        PadsInBlocks(blocks),
        MergesOver(forward.merge_over),
        Precomputes(forward.precompute),
        KeepsDtype(frozenset({dora.MAGNITUDE})),
        TakesComplex(needs_real),
    ),
)


def _holder(config: LoraConfig, site: Site, leaf: str) -> nn.Module:
    """Return the layer that PEFT keeps a leaf in: a linear one, or a convolution like the base's around one of ones."""
    r = site.constants.r * max(site.experts, 1)
    if leaf == dora.MAGNITUDE:
        return dora.Magnitude(site)
    of_a, of_b, _ = site.constants.blocks or (1, 1, r)
    if (blocks := of_a if leaf == "lora_A" else of_b) > 1:
        sizes = (site.in_features, r) if leaf == "lora_A" else (r, site.out_features)
        return BlockDiagonalLinear(sizes[0], sizes[1], blocks)
    how: dict[str, Any] = {"bias": config.lora_bias and leaf == "lora_B", "device": "meta"}
    if site.geometry is None:
        return _linear(site.in_features, r, False) if leaf == "lora_A" else _linear(r, site.out_features, how["bias"])
    conv, g = getattr(nn, f"Conv{len(site.kernel_size)}d"), site.geometry
    if leaf == "lora_B":
        result: nn.Module = conv(r, site.out_features, 1, groups=g.groups, **how)
        return result
    result = conv(
        site.in_features, r, site.kernel_size, g.stride, g.padding, g.dilation, padding_mode=g.padding_mode, **how
    )
    return result


def _linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """Make a linear layer whose parameters are put in later: nothing is drawn for them, which would take longest."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = in_features, out_features
    for name in ("weight", "bias"):
        layer.register_parameter(name, None)
    if bias:
        layer.bias = nn.Parameter(torch.empty(out_features, device="meta"))
    return layer


def _infer(config: LoraConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return ranks that differ from the config's, from the shapes of `A`."""
    ranks = {path: len(leaves[name]) for path, leaves in found.items() for name in leaves if name.endswith("_A")}
    return ranks_of(config, ranks)


LoraConfig.form = PeftFormat(
    prefix="lora_",
    dropout="lora_dropout",
    modules=("lora_A", "lora_B"),
    bare_modules=(dora.MAGNITUDE,),
    biases={BIAS: "lora_B"},
    biased="lora_bias",
    parameters=("lora_embedding_A", "lora_embedding_B"),
    holder=_holder,
    ranked=("lora_A", "lora_embedding_A"),
    infer=_infer,
    express=of_patterns,
    fixed=fixed_leaves,
    reads=("use_dora", "lora_bias", "use_bdlora"),
    starts={"lora_A": "initial_A", "lora_B": "initial_B"},
    values={
        "lora_alpha": Value(alpha_at),
        "r": Value(lambda config, site: site.constants.r),
        "scaling": Value(lambda config, site: site.constants.scaling, written, planned_scaling),
        "use_rslora": Value(lambda config, site: config.use_rslora),
        "use_dora": Value(lambda config, site: config.use_dora),
        "lora_bias": Value(lambda config, site: config.lora_bias),
    },
)
