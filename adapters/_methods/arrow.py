"""Arrow: several low-rank experts at a module, among which each token is routed by their own directions.

    y = base(x) + sum_e c_e B_e A_e x,    c = softmax of the top k of |x v_e| / t

`v_e` is the first right singular vector of `B_e A_e`, found by steps of power iteration from one random vector.
`arrow_experts` makes such an adapter of trained LoRA adapters.

Ostapenko et al., *Towards Modular LLMs by Building and Reusing a Library of LoRAs*, 2024, arXiv:2405.11157. Numbers of
steps and the random vector are those of PEFT's `tuners/lora/arrow.py`, where it is a form of LoRA.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from torchgraft.functional import Constants, Layer, Method, Site, UnsupportedConfig, Weights, widen

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat
from .shared.low_rank import add_product

A, B = "arrow_A", "arrow_B"
_STEPS, _LEAST = 15, 1e-8
"""How often PEFT iterates, and what it adds to a norm before it divides by it."""


@dataclasses.dataclass(kw_only=True)
class ArrowLoraConfig(AdapterConfig):
    """Arrow routes each token of a module's input to some of several low-rank experts, without a trained router.

    Supports linear layers (also `transformers`' `Conv1D`). Directions are made from the leaves in each call, as
    constants of the gradient; where PEFT keeps those of the first call, they follow what is trained. No weight computes
    it, for shares depend on the input: it cannot be merged.

    Attributes:
        r: Rank of each expert.
        num_experts: Number of experts.
        top_k: Number of experts that a token has.
        router_temperature: `t`.
        rng_seed: Seed of the vector that the iteration starts from; `None` is 0, where PEFT draws another each time.
        init_weights: `True` for zeros in all `B_e`, `False` for random ones.

    >>> ArrowLoraConfig(r=4, num_experts=5, target_modules=["q_proj"]).top_k
    3
    """

    r: int = 8
    num_experts: int = 3
    top_k: int = 3
    router_temperature: float = 1.0
    rng_seed: int | None = None
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "num_experts", "top_k"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} is {value}, expected a positive integer")
        count, t = self.num_experts, self.router_temperature
        require(
            self.top_k <= count, self, f"top_k is {self.top_k} and num_experts is {count}, expected top_k <= {count}"
        )
        require(t > 0, self, f"router_temperature is {t}, expected a positive number")


@dataclasses.dataclass(frozen=True, eq=False)
class ArrowConstants(Constants):
    """The vector that the iteration starts from, `"in"`."""

    start: Tensor


def plan(config: ArrowLoraConfig, sites: list[Site], weights: Weights) -> dict[str, ArrowConstants]:
    """Draw the vector that each site's iteration starts from."""
    planned = {}
    for site in sites:
        generator = torch.Generator("cpu").manual_seed(config.rng_seed or 0)
        start = torch.randn(site.in_features, generator=generator, device="cpu", dtype=torch.float32)
        planned[site.path] = ArrowConstants((start / (start.norm() + _LEAST)).to(weights(site.path).device))
    return planned


def shapes(config: ArrowLoraConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`A` is `"experts r in"`, `B` is `"experts out r"`."""
    experts, r = config.num_experts, config.r
    return {A: (experts, r, site.in_features), B: (experts, site.out_features, r)}


def init(
    config: ArrowLoraConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw each expert as LoRA is drawn."""
    made = {}
    for site in sites:
        leaves = {leaf: torch.zeros(size, dtype=torch.float32) for leaf, size in shapes(config, site).items()}
        for leaf in (A,) if config.init_weights else (A, B):
            for expert in leaves[leaf]:
                nn.init.kaiming_uniform_(expert, a=math.sqrt(5), generator=generator)
        made[site.path] = leaves
    return made


def arrow_directions(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """Return the first right singular vectors of products `B A`, up to their signs, by power iteration.

    Args:
        a: `"... r in"`.
        b: `"... out r"`.
        start: The vector to start from, `"in"`.

    Returns:
        `"... in"`, in float32 or wider; constants, also of forward mode.

    >>> arrow_directions(torch.tensor([[3.0, 4.0]]), torch.ones(2, 1), torch.tensor([1.0, 0.0]))
    tensor([0.6000, 0.8000])
    """
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b, start = (one.detach().to(wide) for one in (a, b, start))
    gram = b.mT @ b
    v = start.expand(*a.shape[:-2], -1).unsqueeze(-1)
    for _ in range(_STEPS):
        w = a.mT @ (gram @ (a @ v))
        v = w / (w.norm(dim=-2, keepdim=True) + _LEAST)
    return v.squeeze(-1)


def arrow_shares(x: Tensor, directions: Tensor, top_k: int, temperature: float) -> Tensor:
    """Return the share of each expert in each token's output.

    Args:
        x: `"... in"`.
        directions: `"experts in"`, whose signs do not matter.
        top_k: Number of experts that have a share.
        temperature: What similarities are divided by.

    Returns:
        `"... experts"`; they add up to 1.

    >>> arrow_shares(torch.tensor([1.0, -2.0]), torch.eye(2), 1, 1.0)
    tensor([0., 1.])
    """
    similar = (x @ directions.mT).abs()
    best, index = similar.topk(top_k, -1)
    return torch.zeros_like(similar).scatter(-1, index, (best / temperature).softmax(-1))


def apply(config: ArrowLoraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + sum_e c_e B_e A_e x`, the sum in the wider dtype and rounded once to the base's.

    Shares multiply coordinates, `"experts*r"`, so that no token has outputs of each expert.
    """
    y = base(x)
    x, a, b = widen(x, leaves[A], leaves[B])
    directions = arrow_directions(leaves[A], leaves[B], site.constants.start).to(x.dtype)
    shares = arrow_shares(x, directions, config.top_k, config.router_temperature)
    down = (x @ a.flatten(0, 1).mT).unflatten(-1, a.shape[:2])
    return add_product(y, (down * shares.unsqueeze(-1)).flatten(-2), b.movedim(0, 1).flatten(1), 1.0)


def merge(
    config: ArrowLoraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> NoReturn:
    """Refuse.

    Raises:
        UnsupportedConfig: Always; no weight computes shares that depend on the input.
    """
    raise UnsupportedConfig(
        f"{site.path}: Arrow's shares of experts depend on each token, which no weight computes, so there is nothing "
        "to merge or to read as its weight; call the graft, or use graft.view(params)"
    )


ArrowLoraConfig.method = Method(
    name="ARROW",
    config=ArrowLoraConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=ArrowConstants,
    varying=frozenset({"init_weights"}),
)


def _infer(config: ArrowLoraConfig, found: Any) -> dict[str, Any]:
    """Return number and rank of the experts of the first module."""
    a = next((leaves[A] for leaves in found.values() if A in leaves), None)
    return {} if a is None or a.ndim != 3 else {"num_experts": len(a), "r": a.shape[1]}


ArrowLoraConfig.form = PeftFormat(
    prefix="arrow_", parameters=(A, B), infer=_infer, reads=("top_k", "router_temperature")
)
