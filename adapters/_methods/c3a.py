"""C3A: circular convolution adaptation, a weight of circulant blocks.

    y = base(x) + C x / d,    C_mn[t, j] = w_mn[(j - t) mod b],    d = number of inputs

Each block of `b` outputs and `b` inputs has `b` parameters, its first row, of which the other rows are rotations. Such
a block is diagonal in Fourier's basis: `C_mn x_n` is the circular correlation of `w_mn` and `x_n`, so the blocks of a
linear layer are never made. A convolution's weight has such blocks at each place of its kernel.

Chen et al., *Parameter-Efficient Fine-Tuning via Circular Convolution*, 2024, arXiv:2407.19342. The factor `1 / d` is
PEFT's, as are names, defaults and initial distributions, `tuners/c3a`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchgraft.functional import AddsLeafwise, Constants, Layer, Method, Rows, Site, Weights
from torchgraft.functional.extending import add_scaled

from .._config.base import AdapterConfig
from .._config.matching import by_pattern
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared import fused, remade
from .shared.scalings import patterns_of, warn_of_unused_patterns

_FEW_BLOCKS = 4
"""Blocks up to which products of single numbers are faster than those of small matrices."""

_TRANSFORM = 8
"""Elements of a weight that can be made while one number of an input or an output is transformed."""

INITIAL = (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")
"""What `init_weights` may be."""


@dataclasses.dataclass(kw_only=True)
class C3AConfig(AdapterConfig):
    """C3A adds a matrix of circulant blocks to each targeted weight, with as many parameters as one row of the blocks.

    Supports linear layers and, what PEFT refuses, `transformers`' `Conv1D` and convolutions in any number of groups,
    whose `d` is the number of inputs of one output, over the kernel.

    Where PEFT does otherwise: the gradient of the input is wrong there, the product with the matrix whose index is
    `t + j` in the place of `j - t`, so all that lies before an adapted layer is trained on it; the second of several
    active adapters gets the first one's output for its input there, here each gets the layer's.

    Attributes:
        block_size: Size of the blocks, a divisor of the numbers of inputs and of outputs; the larger, the fewer
            parameters.
        block_size_pattern: Sizes by pattern of the end of a module's name; the first that matches counts.
        init_weights: `True` for zeros, the identity; `"xavier_uniform"`, for which `False` is another name,
            `"kaiming_uniform"` and `"gaussian"` are random, so the adapter starts as something else than the identity.

    >>> C3AConfig(block_size=64, target_modules=["q_proj"]).init_weights
    'xavier_uniform'
    """

    block_size: int = 256
    block_size_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    init_weights: bool | str = "xavier_uniform"

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.init_weights in INITIAL,
            self,
            f"init_weights is {self.init_weights!r}, expected one of {', '.join(map(repr, INITIAL))}",
        )


@dataclasses.dataclass(frozen=True, eq=False)
class C3AConstants(Constants):
    """Size of a site's blocks."""

    block_size: int


def plan(config: C3AConfig, sites: list[Site], weights: Weights) -> dict[str, C3AConstants]:
    """Return the size of the blocks of each site, which divides its inputs and outputs."""
    warn_of_unused_patterns(config, sites, ("block_size_pattern",))
    planned = {}
    for site in sites:
        size = by_pattern(config.block_size_pattern, site.path, config.block_size)
        require(size > 0, config, f"block_size is {size} at {site.path}, expected a positive integer")
        rows, columns, *_ = site.weight_shape
        require(
            rows % size == 0 and columns % size == 0,
            config,
            f"block_size is {size} at {site.path}, whose weight is {rows} x {columns}; expected a divisor of "
            f"{math.gcd(rows, columns)}, or give the module its own size in block_size_pattern",
        )
        planned[site.path] = C3AConstants(size)
    return planned


def shapes(config: C3AConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`"out/b in/groups/b b *kernel"`."""
    b, (rows, columns, *kernel) = site.constants.block_size, site.weight_shape
    return {"c3a_kernel": (rows // b, columns // b, b, *kernel)}


def init(
    config: C3AConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws: one state of the generator gives PEFT's numbers, bit for bit."""
    made = {}
    for site in sites:
        kernel = torch.zeros(shapes(config, site)["c3a_kernel"], dtype=torch.float32)
        if config.init_weights == "gaussian":
            kernel.normal_(generator=generator)
        elif config.init_weights is not True:
            inputs = _inputs(site)
            kaiming = config.init_weights == "kaiming_uniform"
            bound = math.sqrt(1 / inputs) if kaiming else math.sqrt(3) * math.sqrt(2 / (inputs + site.out_features))
            kernel.uniform_(-bound, bound, generator=generator)
        made[site.path] = {"c3a_kernel": kernel}
    return made


def apply(config: C3AConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + C x / d`, in float32 or wider, which Fourier transforms need; rounded once to the base's dtype.

    A linear layer of full precision with many tokens is one product with `W + C / d`, which is not kept.
    """
    kernel = leaves["c3a_kernel"]
    linear = None if torch.compiler.is_compiling() or site.kind != "linear" or _is_few(x, site) else base.as_linear
    if linear is not None and x.itemsize >= 4 and fused.fits(x, linear[0], kernel, kernel):
        return remade.linear(_moved, x, *linear, kernel, pull=_pull)
    y = base(x)
    wide = torch.promote_types(torch.promote_types(x.dtype, kernel.dtype), torch.float32)
    x, kernel = x.to(wide), kernel.to(wide)
    by_spectra = site.kind == "linear" and x.numel() > 0  # torch's transforms refuse what is empty
    delta = _correlate(x, kernel) if by_spectra else site.call(x, _dense(kernel, site.weight_shape))
    return add_scaled(y, delta, 1 / _inputs(site))


def routed(config: C3AConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with a kernel for each group of rows; convolutions take the general way."""
    if site.kind != "linear":
        return NotImplemented
    y, groups = base(x), rows.groups()
    kernel = groups.pick(leaves["c3a_kernel"])
    wide = torch.promote_types(torch.promote_types(x.dtype, kernel.dtype), torch.float32)
    x = groups.mask(x.reshape(groups.size, -1, x.shape[-1]))  # no NaN of a row without adapter reaches a gradient
    return add_scaled(y, _correlate(x.to(wide), kernel.to(wide)).view(y.shape), 1 / _inputs(site))


def merge(
    config: C3AConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + C / d`."""
    return add_scaled(weight, _dense(leaves["c3a_kernel"], site.weight_shape), 1 / _inputs(site)), bias


def _inputs(site: Site) -> int:
    """Return the number of inputs of one output."""
    return math.prod(site.weight_shape[1:])


def _correlate(x: Tensor, kernel: Tensor) -> Tensor:
    """`C x` of `"... in"`, also with a kernel for each group of `"groups tokens in"`, as products of spectra."""
    m, n, b = kernel.shape[-3:]
    at_x, at_kernel = torch.fft.rfft(x.unflatten(-1, (n, b))), torch.fft.rfft(kernel).conj()
    if kernel.ndim > 3:
        at_y = torch.einsum("gtnf,gmnf->gtmf", at_x, at_kernel)
    elif m * n <= _FEW_BLOCKS:
        at_y = (at_x.unsqueeze(-3) * at_kernel).sum(-2)
    else:
        at_y = torch.einsum("...nf,mnf->...mf", at_x, at_kernel)
    y: Tensor = torch.fft.irfft(at_y, n=b).flatten(-2)
    return y


def _dense(kernel: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`C`, in the shape of a weight."""
    m, n, b, *size = kernel.shape
    rows = kernel.roll(-1, 2).unsqueeze(2).expand(m, n, b + 1, b, *size).reshape(m, n, b, b + 1, *size)
    return rows[:, :, :, :b].flip(2).transpose(1, 2).reshape(shape)  # row `t` of a block begins at `-t`


def _is_few(x: Tensor, site: Site) -> bool:
    """Return whether transforms of an input and an output are faster than making a weight."""
    tokens = x.numel() // site.in_features
    return tokens * (site.in_features + site.out_features) * _TRANSFORM < site.in_features * site.out_features


def _moved(weight: Tensor, kernel: Tensor) -> Tensor:
    """`W + C / d` of a linear layer."""
    return torch.add(weight, _dense(kernel, tuple(weight.shape)), alpha=1 / weight.shape[1])


def _pull(g: Tensor, x: Tensor, weight: Tensor, kernel: Tensor) -> tuple[Tensor, ...]:
    """Return the kernel's gradient: the circular correlation of those of the outputs with the inputs."""
    m, n, b = kernel.shape
    at_x, at_g = torch.fft.rfft(x.unflatten(-1, (n, b))), torch.fft.rfft(g.unflatten(-1, (m, b)))
    return (torch.fft.irfft(torch.einsum("tnf,tmf->mnf", at_x, at_g.conj()), n=b) / weight.shape[1],)


C3AConfig.method = Method(
    name="C3A",
    config=C3AConfig,
    kinds=frozenset({"linear", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=C3AConstants,
    routed=routed,
    varying=frozenset({"init_weights"}),
    abilities=(AddsLeafwise(),),
)


def _infer(config: C3AConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return sizes of blocks that differ from the config's."""
    sizes = {path: leaves["c3a_kernel"].shape[2] for path, leaves in found.items() if "c3a_kernel" in leaves}
    own = config.block_size_pattern
    other = {path: size for path, size in sizes.items() if size != by_pattern(own, path, config.block_size)}
    names = {**other, **own}  # without the mark of a whole name, with which PEFT finds none, where that will do
    if all(by_pattern(names, path, config.block_size) == size for path, size in sizes.items()):
        return {"block_size_pattern": names} if other else {}
    return patterns_of(config, sizes, "block_size", "block_size_pattern")


C3AConfig.form = PeftFormat(
    prefix="c3a_",
    layers="C3A{}",
    parameters=("c3a_kernel",),
    infer=_infer,
    values={"block_size": Value(lambda config, site: site.constants.block_size)},
    only_here=("exclude_modules", "fan_in_fan_out"),
)
