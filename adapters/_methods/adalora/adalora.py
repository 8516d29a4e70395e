"""AdaLoRA: low-rank adaptation in the form of a singular value decomposition.

    y = base(x) + s B diag(E) A x,    s = lora_alpha / (init_r + 1e-5)

Zhang et al., *AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning*, 2023, arXiv:2303.10512. Names,
defaults and initial distributions are those of PEFT's `tuners/adalora`. Which singular values stay is decided during
training: `torchgraft.adapters.allocate`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchgraft.functional import Constants, Layer, Method, Rows, Site, Varying, Weights, widen
from torchgraft.functional.extending import add_scaled

from ..._config.messages import require
from ..._config.peft_format import PeftFormat, Value
from ..lora.fields import LoraFields
from ..shared.called import DROPOUT, dropped
from ..shared.low_rank import add_to_linear, route_to_linear
from ..shared.scalings import of_adalora, planned_alpha


@dataclasses.dataclass(kw_only=True)
class AdaLoraConfig(LoraFields):
    """AdaLoRA learns singular triplets and spends a shrinking budget of them where they matter.

    Supports linear layers (also `transformers`' `Conv1D`) and 2-d convolutions in any number of groups, where the
    triplets are those of the weight as a matrix, `"out in/groups*kernel"`.

    The schedule: all triplets for `tinit` steps; then the budget falls with the cube of the time that is left, from
    `init_r` to `target_r` triplets per module on average, until `total_step - tfinal`; then it stays.

    Attributes:
        target_r: Average rank at the end.
        init_r: Rank at the start.
        tinit: Steps before the budget falls.
        tfinal: Steps after the last allocation.
        deltaT: Steps between two allocations.
        beta1: Decay of the average of importance.
        beta2: Decay of the average of its deviation.
        orth_reg_weight: Weight of the regulariser, `orthogonality`.
        total_step: Steps of the whole training; `allocate` needs it. PEFT needs it for inference too.
        lora_alpha: Numerator of the scaling factor; where it is not positive, `init_r`.
        lora_dropout: Probability of dropout on the adapter's input, in training mode.
        init_lora_weights: `True` for a zero `E` and small normal `A` and `B`, `False` for standard normal ones.
        rank_pattern: The triplets that stayed, as PEFT writes it: `{"<module>.lora_E": [True, False, ...]}`. Those
            modules' leaves hold only these; the scaling factor stays that of `init_r`.
        r: Has no effect, as in PEFT; `init_r` is the rank.
        use_rslora: Has no effect, as in PEFT.
        alpha_pattern: Has no effect, as in PEFT.

    >>> AdaLoraConfig(target_modules=["q_proj"], total_step=100, tinit=10, tfinal=20).init_r
    12
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    init_lora_weights: bool = True
    rank_pattern: Mapping[str, Sequence[bool]] | None = None
    r: int = 8
    use_rslora: bool = False
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_r", "init_r", "deltaT"):
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, self, f"{name} is {value!r}, expected a positive integer")
        for name in ("tinit", "tfinal"):
            require(getattr(self, name) >= 0, self, f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("beta1", "beta2"):
            require(0 < getattr(self, name) < 1, self, f"{name} is {getattr(self, name)}, expected 0 < beta < 1")
        require(self.orth_reg_weight >= 0, self, f"orth_reg_weight is {self.orth_reg_weight}, expected 0 or more")
        require(0 <= self.lora_dropout < 1, self, f"lora_dropout is {self.lora_dropout}, expected 0 <= p < 1")
        if (self.r, self.use_rslora, self.alpha_pattern) != (8, False, {}):
            warnings.warn(
                "AdaLoraConfig: r, use_rslora and alpha_pattern have no effect; the rank is init_r, the scaling factor "
                "lora_alpha / init_r",
                UserWarning,
                stacklevel=3,
            )
        if self.rank_pattern is not None:
            wrong = [key for key in self.rank_pattern if ".lora_E" not in key]
            require(not wrong, self, f"rank_pattern names {wrong}, expected targeted modules followed by '.lora_E'")
            self.rank_pattern = {f"{_module(key)}.lora_E": mask for key, mask in self.rank_pattern.items()}
        if self.total_step is not None:
            require(
                self.tinit < self.total_step - self.tfinal,
                self,
                f"tinit={self.tinit}, tfinal={self.tfinal} and total_step={self.total_step} leave no step to allocate "
                "in, expected tinit < total_step - tfinal",
            )


@dataclasses.dataclass(frozen=True, eq=False)
class AdaLoraConstants(Constants):
    """Rank of a site, the numerator of its scaling factor, and the factor."""

    r: Varying[int]
    lora_alpha: Varying[float]
    scaling: Varying[float]


def plan(config: AdaLoraConfig, sites: list[Site], weights: Weights) -> dict[str, AdaLoraConstants]:
    """Return rank and scaling factor of each site."""
    patterns = {_module(key): [bool(kept) for kept in mask] for key, mask in (config.rank_pattern or {}).items()}
    unknown = sorted(set(patterns) - {site.path for site in sites})
    require(not unknown, config, f"rank_pattern names {unknown}, expected targeted modules followed by '.lora_E'")
    for path, mask in patterns.items():
        require(
            len(mask) == config.init_r,
            config,
            f"rank_pattern has {len(mask)} entries for {path}, expected one for each of the init_r={config.init_r} "
            "triplets",
        )
    alpha = planned_alpha(config)
    return {
        site.path: AdaLoraConstants(
            sum(patterns[site.path]) if site.path in patterns else config.init_r, **_scaled(config, alpha)
        )
        for site in sites
    }


def _scaled(config: AdaLoraConfig, alpha: float) -> dict[str, float]:
    return {"lora_alpha": alpha, "scaling": alpha / (config.init_r + 1e-5)}


def _module(key: str) -> str:
    """Return the module that a key of `rank_pattern` speaks of; an adapter's name may follow the leaf's."""
    return key.removeprefix("base_model.model.").rpartition(".lora_E")[0]


def shapes(config: AdaLoraConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`A` is `"r in/groups*kernel"`, `E` is `"r 1"`, `B` is `"out r"`."""
    r = site.constants.r
    return {"lora_A": (r, math.prod(site.weight_shape[1:])), "lora_B": (site.out_features, r), "lora_E": (r, 1)}


def init(
    config: AdaLoraConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws: one state of the generator gives PEFT's numbers, bit for bit."""
    return {site.path: _init_site(config, site, generator) for site in sites}


def _init_site(config: AdaLoraConfig, site: Site, generator: torch.Generator | None) -> dict[str, Tensor]:
    shape = shapes(config, site)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float32, generator=generator)

    a, e, b = (draw(*shape[name]) for name in ("lora_A", "lora_E", "lora_B"))
    draw(1)
    if config.init_lora_weights:
        e.zero_()
        a.normal_(std=0.02, generator=generator)
        b.normal_(std=0.02, generator=generator)
    return {"lora_A": a, "lora_B": b, "lora_E": e}


def apply(config: AdaLoraConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + s B diag(E) A dropout(x)`, the sum in the wider dtype and rounded once to the base's."""
    scaling, dropout = site.constants.scaling, leaves.get(DROPOUT, config.lora_dropout)
    if site.kind == "linear":
        a, e, b = widen(leaves["lora_A"], leaves["lora_E"], leaves["lora_B"])
        return add_to_linear(base, x, a * e, b, scaling, dropout)
    y = base(x)
    x, a, e, b = widen(dropped(x, dropout, base.training), leaves["lora_A"], leaves["lora_E"], leaves["lora_B"])
    kernels = (a * e).unflatten(1, site.weight_shape[1:]).repeat(site.groups, *(1 for _ in site.weight_shape[1:]))
    down = site.convolve(x, kernels, groups=site.groups)
    return add_scaled(y, site.pointwise(down, b[(...,) + (None,) * len(site.kernel_size)]), scaling)


def routed(config: AdaLoraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with triplets for each row; convolutions take the general way."""
    if site.kernel_size:
        return NotImplemented
    a, e, b = widen(leaves["lora_A"], leaves["lora_E"], leaves["lora_B"])
    return route_to_linear(base, x, a * e, b, site.constants.scaling, config.lora_dropout, rows)


def merge(
    config: AdaLoraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + s B diag(E) A`."""
    delta = leaves["lora_B"] @ (leaves["lora_E"] * leaves["lora_A"])
    return add_scaled(weight, delta.view(weight.shape), site.constants.scaling), bias


AdaLoraConfig.method = Method(
    name="ADALORA",
    config=AdaLoraConfig,
    kinds=frozenset({"linear", "conv2d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=AdaLoraConstants,
    routed=routed,
    varying=frozenset(
        {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
        | {"lora_alpha", "init_lora_weights", "rank_pattern", "r"}
    ),
)


def _infer(config: AdaLoraConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return a pattern for modules with another rank than `init_r`, which keeps the scaling factor."""
    ranks = {path: len(leaves["lora_E"]) for path, leaves in found.items() if "lora_E" in leaves}
    if all(rank == config.init_r for rank in ranks.values()):
        return {}
    require(
        max(ranks.values()) <= config.init_r,
        config,
        f"init_r is {config.init_r}, and the tensors have rank {max(ranks.values())}; give the init_r they were made "
        "with",
    )
    return {
        "rank_pattern": {f"{path}.lora_E": [k < rank for k in range(config.init_r)] for path, rank in ranks.items()}
    }


AdaLoraConfig.form = PeftFormat(
    prefix="lora_",
    layers="SVD{}",
    dropout="lora_dropout",
    ranked=("lora_E",),
    infer=_infer,
    express=of_adalora,
    parameters=("lora_A", "lora_B", "lora_E"),
    values={
        "lora_alpha": Value(lambda config, site: config.lora_alpha),
        "r": Value(lambda config, site: site.constants.r),
        "ranknum": Value(lambda config, site: float(config.init_r)),
        "scaling": Value(
            lambda config, site: site.constants.lora_alpha,
            lambda config, site, value: _scaled(config, value),
            lambda config, site: planned_alpha(config),
        ),
    },
)
