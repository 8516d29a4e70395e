"""Sites: the modules that carry an adapter, seen as plain facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLVE: dict[str, Callable[..., Tensor]] = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}

_PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a convolution slides: its module's own settings."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    pad: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted module: where it is, what it computes, and a method's constants for it.

    Weights are spoken of in canonical orientation, whatever the module stores: `"out in"` for a
    linear map, `"dim vocab"` for an embedding (a linear map of one-hot rows) and `"out in/groups *kernel"`
    for a convolution.

    Attributes:
        path: Dotted name of the module in the user's model.
        kind: `"linear"`, `"embedding"`, `"conv1d"`, `"conv2d"` or `"conv3d"`.
        in_features: Size of the input axis (vocabulary for an embedding, channels for a convolution).
        out_features: Size of the output axis.
        has_bias: Whether the module adds a bias.
        transposed: Whether the module stores its weight as `"in out"` (`transformers`' `Conv1D`, embeddings).
        kernel_size: Spatial extent of a convolution's kernel, else `()`.
        geometry: Stride, padding, dilation, groups and padding mode of a convolution.
        constants: What the method planned for this site: scaling factors, ranks, frozen tensors.

    >>> site = describe("head", torch.nn.Linear(4, 3))
    >>> site.kind, site.weight_shape
    ('linear', (3, 4))
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    has_bias: bool = False
    transposed: bool = False
    kernel_size: tuple[int, ...] = ()
    geometry: Geometry | None = None
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def groups(self) -> int:
        """Number of groups of a convolution; 1 for everything else."""
        return self.geometry.groups if self.geometry else 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight in canonical orientation."""
        return (self.out_features, self.in_features // self.groups, *self.kernel_size)

    def canonical(self, weight: Tensor) -> Tensor:
        """Turn a stored weight into canonical orientation; its own inverse."""
        return weight.mT if self.transposed else weight

    def call(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run the module's function with another canonical weight and bias.

        >>> site = describe("", torch.nn.Linear(2, 2))
        >>> site.call(torch.ones(1, 2), torch.eye(2))
        tensor([[1., 1.]])
        """
        if self.kind == "embedding":
            return F.embedding(x, weight.mT)
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        return self.convolve(x, weight, bias, groups=self.groups)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int = 1) -> Tensor:
        """Convolve as the module does: same stride, padding, dilation and padding mode."""
        how = self.geometry
        assert how is not None
        padding: Any = how.padding
        if how.padding_mode != "zeros":
            x, padding = F.pad(x, how.pad, mode=how.padding_mode), 0
        return _CONVOLVE[self.kind](x, weight, bias, how.stride, padding, how.dilation, groups)

    def pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve with a kernel of ones: a linear map of the channels, in the module's groups."""
        return _CONVOLVE[self.kind](x, weight, groups=self.groups)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is `transformers`' `Conv1D`, a linear map that stores `"in out"`, without importing it."""
    return any(map(_is_transposed_linear_class, type(module).__mro__))


def _is_transposed_linear_class(cls: type) -> bool:
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def plain_class(module: nn.Module) -> type:
    """The class among a module's bases whose forward its kind speaks of.

    A weight that is not of floating point is stored in a form that only the module's own class can read.

    >>> class Scaled(nn.Embedding):
    ...     def forward(self, ids):
    ...         return 3 * super().forward(ids)
    >>> plain_class(Scaled(4, 2)).__name__
    'Embedding'
    """
    stored = module._parameters.get("weight")
    if stored is not None and not stored.is_floating_point():
        return type(module)
    return next(cls for cls in type(module).__mro__ if cls in _PLAIN or _is_transposed_linear_class(cls))


def describe(path: str, module: nn.Module) -> Site | None:
    """Describe a module as a site, or return `None` where its kind carries no adapter.

    Args:
        path: Dotted name of the module in the user's model.
        module: The module.

    Raises:
        ValueError: An embedding with `max_norm`, whose forward rewrites its own weight.

    >>> describe("norm", torch.nn.LayerNorm(4)) is None
    True
    """
    if isinstance(module, nn.Linear):
        return Site(path, "linear", module.in_features, module.out_features, module.bias is not None)
    if is_transposed_linear(module):
        rows, columns = module.get_parameter("weight").shape
        return Site(path, "linear", rows, columns, has_bias=True, transposed=True)
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise ValueError(
                f"{path}: an Embedding with max_norm={module.max_norm} rewrites its weight in each forward, so an "
                "adapter on it has no fixed meaning; set max_norm=None or leave this module out of target_modules"
            )
        return Site(path, "embedding", module.num_embeddings, module.embedding_dim, transposed=True)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        geometry = Geometry(
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.padding_mode,
            tuple(module._reversed_padding_repeated_twice),
        )
        return Site(
            path,
            f"conv{len(module.kernel_size)}d",
            module.in_channels,
            module.out_channels,
            module.bias is not None,
            kernel_size=tuple(module.kernel_size),
            geometry=geometry,
        )
    return None


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to the widest dtype among them, leaving those that have it untouched.

    >>> [t.dtype for t in widen(torch.ones(1), torch.ones(1, dtype=torch.float64))]
    [torch.float64, torch.float64]
    """
    dtype, mixed = tensors[0].dtype, False
    for tensor in tensors[1:]:
        if tensor.dtype != dtype:
            dtype, mixed = torch.promote_types(dtype, tensor.dtype), True
    if not mixed:
        return tensors
    return tuple(tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors)
