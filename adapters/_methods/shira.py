"""SHiRA: sparse high-rank adapters, numbers that are added to a few entries of the weight.

    y = base(x) + s S x,    S_ij = v_k at the k-th entry of a mask, else 0

The mask has `r (rows + columns)` entries, as many as LoRA of rank `r` has parameters, and is a constant: drawn from a
seed, or made from the weight by a function. What is trained is the vector `v`.

Bhardwaj et al., *Sparse High Rank Adapters*, 2024, arXiv:2406.13175. Names, defaults and the random mask are those of
PEFT's `tuners/shira`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from torchgraft.functional import Constants, KeepsDtype, Layer, Method, Site, Varying, Weights
from torchgraft.functional.extending import add_scaled

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.padded import unpadded
from .shared.sparse import add_sparse, dense

INDICES = "shira_indices"
"""The constant that has row and column of each entry of the mask."""


@dataclasses.dataclass(kw_only=True)
class ShiraConfig(AdapterConfig):
    """SHiRA adds trained numbers to entries of each targeted weight that a mask has chosen.

    Supports linear layers and, what PEFT refuses, `transformers`' `Conv1D` and convolutions in any number of groups,
    whose weight is a matrix, `"out in/groups*kernel"`. The mask is a constant of the graft; files hold its indices, and
    in place they are a buffer of integers.

    Where PEFT does otherwise: it adds to the weight in its own precision, in which small changes are lost where that is
    half, and calls no hooks of the base; here the outputs are added then, and hooks are called.

    Attributes:
        r: The mask has `r (rows + columns)` entries; the rank of what is added has no bound but the weight's.
        mask_type: `"random"`, or a name of your own for what `mask_fn` does.
        random_seed: Seed of the random mask, for all modules; `None` for torch's default seed, the same each time.
        init_weights: `True` for zeros, `False` for normal numbers.
        mask_fn: `(layer, r) -> mask` for other values of `mask_type`, as in PEFT: the layer is a linear one with the
            base's weight, as a matrix, and the mask has its shape and as many ones as said. It is never written to a
            file. Where a file has another mask, `load_adapter(model, path)` takes the file's.

    >>> ShiraConfig(r=4, random_seed=0, target_modules=["q_proj"]).mask_type
    'random'
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    init_weights: bool = True
    mask_fn: Callable[..., Tensor] | None = dataclasses.field(default=None, repr=False)

    method: ClassVar[Method]
    in_memory: ClassVar[frozenset[str]] = frozenset({"mask_fn"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r > 0, self, f"r is {self.r}, expected a positive integer")
        require(
            self.mask_type != "random" or self.mask_fn is None,
            self,
            "mask_type is 'random', so mask_fn has no effect; give mask_type a name of your own for what it does",
        )
        require(
            self.mask_type == "random" or self.random_seed is None,
            self,
            f"random_seed is {self.random_seed} and mask_type is {self.mask_type!r}, which draws nothing from it; "
            "leave it out",
        )

    def recall(self, other: AdapterConfig) -> Self:
        """Return this config with the mask function of another whose masks have the same name."""
        if not isinstance(other, ShiraConfig) or other.mask_type != self.mask_type:
            return self
        return dataclasses.replace(self, mask_fn=other.mask_fn)


@dataclasses.dataclass(frozen=True, eq=False)
class ShiraConstants(Constants):
    """What the entries are multiplied with, how many there are, and row and column of each, `"2 entries"`, by rows."""

    scaling: Varying[float]
    count: Varying[int]
    shira_indices: Varying[Tensor]


def plan(config: ShiraConfig, sites: list[Site], weights: Weights) -> dict[str, ShiraConstants]:
    """Return the mask of each site; without values where nothing says what it is, for a file to bring it."""
    draw, planned = functools.cache(functools.partial(_drawn, config)), {}
    for site in sites:
        rows, columns = _size(site)
        count = config.r * (rows + columns)
        what = (
            f"r is {config.r} at {site.path}, a mask of r * ({rows} + {columns}) = {count} entries, and the weight has"
        )
        most = rows * columns // (rows + columns)
        require(count <= rows * columns, config, f"{what} {rows * columns}; expected r <= {most}")
        if config.mask_type == "random":
            indices = draw(rows, columns)
        elif config.mask_fn is None or (weight := weights(site.path)).is_meta:
            indices = torch.empty((2, count), dtype=torch.int32, device="meta")
        else:
            indices = _made(config, config.mask_fn, site, weight.flatten(1), count)
        planned[site.path] = ShiraConstants(1.0, count, indices)
    return planned


def _size(site: Site) -> tuple[int, int]:
    """Return rows and columns of the weight as a matrix."""
    rows, *columns = site.weight_shape
    return rows, math.prod(columns)


def _drawn(config: ShiraConfig, rows: int, columns: int) -> Tensor:
    """Return the random mask, as PEFT draws it."""
    generator = torch.Generator("cpu")  # whose seed is the same each time
    if config.random_seed is not None:
        generator.manual_seed(config.random_seed)
    order = torch.randperm(rows * columns, generator=generator, device="cpu")
    places = order[: config.r * (rows + columns)].sort().values
    return torch.stack([places // columns, places % columns]).to(torch.int32)


def _made(config: ShiraConfig, mask_fn: Callable[..., Tensor], site: Site, weight: Tensor, count: int) -> Tensor:
    """Return the mask that a function makes of a weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    mask: Any = mask_fn(layer, config.r)
    is_mask, shape = isinstance(mask, Tensor) and mask.shape == weight.shape, tuple(weight.shape)
    what = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
    require(is_mask, config, f"mask_fn gave {what} at {site.path}, expected a tensor of shape {shape}")
    indices: Tensor = (mask == 1).nonzero().mT.to(torch.int32).contiguous()
    ones, entries = indices.shape[1], int((mask != 0).sum())
    require(
        ones == entries == count,
        config,
        f"mask_fn gave a mask of {ones} ones at {site.path} (and {entries} entries that are not 0), expected "
        f"r * (rows + columns) = {count} ones and zeros elsewhere",
    )
    return indices


def shapes(config: ShiraConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`"r*(out+in/groups*kernel)"`."""
    return {"shira_weight": (config.r * sum(_size(site)),)}


def init(
    config: ShiraConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Zeros, or normal numbers in PEFT's order of draws."""
    made = {}
    for site in sites:
        _check_known(config, site, site.constants.shira_indices)
        values = torch.zeros(shapes(config, site)["shira_weight"], dtype=torch.float32)
        made[site.path] = {"shira_weight": values if config.init_weights else values.normal_(generator=generator)}
    return made


def apply(config: ShiraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + s S x`, the sum in the wider dtype and rounded once to the base's."""
    return add_sparse(site, base, x, *_entries(config, site, leaves))


def merge(
    config: ShiraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + s S`."""
    return add_scaled(weight, dense(site, *_entries(config, site, leaves)), 1.0), bias


def _entries(config: ShiraConfig, site: Site, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the values that are added, and where in the flat weight; of equal places, which padding has, each."""
    values, scaling = unpadded(leaves["shira_weight"], site.constants.count), site.constants.scaling
    rows, columns = leaves.get(INDICES, site.constants.shira_indices).to(torch.long)
    _check_known(config, site, rows)
    if isinstance(scaling, Tensor):
        values = values * scaling.to(values.dtype)
    elif scaling != 1:
        values = values * scaling
    return values, torch.add(columns, rows, alpha=_size(site)[1])


def _check_known(config: ShiraConfig, site: Site, indices: Tensor) -> None:
    require(
        not indices.is_meta or config.mask_type == "random",
        config,
        f"mask_type is {config.mask_type!r} at {site.path}, and neither mask_fn nor a file says what the mask is; set "
        "mask_fn, or load the adapter with load_adapter(model, path), which takes the file's",
    )


ShiraConfig.method = Method(
    name="SHIRA",
    config=ShiraConfig,
    kinds=frozenset({"linear", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=ShiraConstants,
    varying=frozenset({"r", "mask_type", "random_seed", "init_weights", "mask_fn"}),
    abilities=(KeepsDtype(frozenset({INDICES})),),
)


def _express(config: ShiraConfig, sites: Mapping[str, Site]) -> dict[str, Any]:
    """Refuse factors that were written, for which no field of a config has a place."""
    for path, site in sites.items():
        require(
            float(site.constants.scaling) == 1,
            config,
            f"scaling of {path} was written to {float(site.constants.scaling)}, which no config of SHiRA has; multiply "
            "shira_weight with it and write 1",
        )
    return {}


ShiraConfig.form = PeftFormat(
    prefix="shira_",
    parameters=("shira_weight", INDICES),
    fixed=lambda config, site: (INDICES,),
    buffers=(INDICES,),
    express=_express,
    values={
        "r": Value(lambda config, site: config.r),
        "scaling": Value(
            lambda config, site: site.constants.scaling,
            lambda config, site, s: {"scaling": float(s)},
            lambda config, site: 1.0,
        ),
    },
    only_here=("bias", "exclude_modules", "layers_pattern", "layers_to_transform"),
)
