"""Bottleneck adapters: a small network after each targeted module, around which its output passes.

    y = base(x) + U f(D base(x) + d) + u

with `D` to `r` numbers, a nonlinearity `f`, and `U` back. Houlsby et al. put one after each sub-layer of a transformer,
where it has come back to the model's width and the residual is not yet added: target the output projections of
attention and of the feed-forward network. Pfeiffer et al. have one a layer: target that of the feed-forward network.

Houlsby et al., *Parameter-Efficient Transfer Learning for NLP*, 2019, arXiv:1902.00751; Pfeiffer et al.,
*AdapterFusion: Non-Destructive Task Composition for Transfer Learning*, 2020, arXiv:2005.00247. PEFT has none of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional import Constants, Layer, Method, Rows, Site, UnsupportedConfig, Weights, widen

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat
from .shared.rotated import laid_out
from .shared.scalings import same_rank

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}
"""Nonlinearities; each is 0 at 0, so that what pads a narrower adapter adds nothing."""


@dataclasses.dataclass(kw_only=True)
class BottleneckConfig(AdapterConfig):
    """A bottleneck adapter puts a small network after each targeted module, and adds its result to the output.

    Supports linear layers, `transformers`' `Conv1D`, embeddings and convolutions, whose channels are the features. No
    weight computes it, so it cannot be merged, and a parent that reads `child.weight` itself has an error.

    Pfeiffer et al. feed it the output after the residual and its norm; here it is fed the module's own output.

    Attributes:
        r: Width of the bottleneck.
        non_linearity: `"gelu"`, `"relu"`, `"silu"` or `"tanh"`.
        init_weights: `True` for a `U` of zeros, the identity; `False` for both matrices normal of standard deviation
            0.01, cut off at two of these, as Houlsby et al. have it: nearly the identity. `D` is so in both.

    >>> BottleneckConfig(r=16, target_modules=["attention.output.dense", "output.dense"]).non_linearity
    'relu'
    """

    r: int = 64
    non_linearity: str = "relu"
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r > 0, self, f"r is {self.r}, expected a positive integer")
        known = self.non_linearity in _FUNCTIONS
        require(known, self, f"non_linearity is {self.non_linearity!r}, expected one of {', '.join(_FUNCTIONS)}")


def plan(config: BottleneckConfig, sites: list[Site], weights: Weights) -> dict[str, Constants]:
    """Fix nothing: any module with features will do."""
    return {site.path: Constants() for site in sites}


def shapes(config: BottleneckConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`D` is `"r out"`, `U` is `"out r"`, and their biases are `"r"` and `"out"`."""
    return {
        "bottleneck_down": (config.r, site.out_features),
        "bottleneck_down_bias": (config.r,),
        "bottleneck_up": (site.out_features, config.r),
        "bottleneck_up_bias": (site.out_features,),
    }


def init(
    config: BottleneckConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw matrices; biases are zeros."""
    made = {}
    for site in sites:
        leaves = {leaf: torch.zeros(size, dtype=torch.float32) for leaf, size in shapes(config, site).items()}
        for leaf in ("bottleneck_down",) if config.init_weights else ("bottleneck_down", "bottleneck_up"):
            nn.init.trunc_normal_(leaves[leaf], std=0.01, a=-0.02, b=0.02, generator=generator)
        made[site.path] = leaves
    return made


def apply(config: BottleneckConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`h + U f(D h + d) + u` of the base's output `h`, in the wider dtype and rounded once."""
    y = base(x)
    features = -1 - len(site.kernel_size)
    wide, *parts = widen(y.movedim(features, -1), *_parts(leaves))
    down, down_bias, up, up_bias = parts
    inner = _FUNCTIONS[config.non_linearity](F.linear(wide, down, down_bias))
    changed = wide + F.linear(inner, up, up_bias)
    return laid_out(changed.to(y.dtype).movedim(-1, features), y)


def routed(config: BottleneckConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` where features come last, with a network for each group of rows in two batched products."""
    if site.kernel_size:
        return NotImplemented
    groups, y = rows.groups(), base(x)
    wide, *parts = widen(y.reshape(groups.size, -1, y.shape[-1]), *map(groups.pick, _parts(leaves)))
    down, down_bias, up, up_bias = parts
    inner = _FUNCTIONS[config.non_linearity](torch.baddbmm(down_bias.unsqueeze(1), wide, down.mT))
    added = groups.mask(torch.baddbmm(up_bias.unsqueeze(1), inner, up.mT))
    return laid_out((wide + added).to(y.dtype).view(y.shape), y)


def _parts(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """`D`, `d`, `U` and `u`."""
    return tuple(leaves[f"bottleneck_{part}"] for part in ("down", "down_bias", "up", "up_bias"))


def merge(
    config: BottleneckConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> NoReturn:
    """Refuse.

    Raises:
        UnsupportedConfig: Always; no weight computes a network.
    """
    raise UnsupportedConfig(
        f"{site.path}: a bottleneck adapter is a network after the module, which no weight computes, so there is "
        "nothing to merge or to read as its weight; call the graft, or use graft.view(params)"
    )


BottleneckConfig.method = Method(
    name="BOTTLENECK",
    config=BottleneckConfig,
    kinds=frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    routed=routed,
    varying=frozenset({"r", "init_weights"}),
)


BottleneckConfig.form = PeftFormat(
    prefix="bottleneck_",
    parameters=("bottleneck_down", "bottleneck_down_bias", "bottleneck_up", "bottleneck_up_bias"),
    infer=same_rank("bottleneck_down"),
    ranked=("bottleneck_down",),
    reads=("non_linearity",),
)
