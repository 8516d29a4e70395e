"""Sites: the modules that carry an adapter, seen as plain facts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._constants import Constants
from .._tensors.placement import resting, whole

_CONVOLVE: dict[str, Callable[..., Tensor]] = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}


PARAMETERS = ("parameter", "experts")
"""Kinds of sites that are bare parameters of a module."""


_QUANTISERS = frozenset({"torchao", "bitsandbytes", "optimum", "quanto", "hqq"})
"""Packages whose tensors say that they are of floating point and hold something else."""


Dense = tuple[Tensor, Tensor | None]
"""A canonical weight and a bias."""


_NOWHERE = torch.empty(0)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The settings of a convolution's module: how it slides."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    pad: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Lookup:
    """The settings of an embedding's module: how it looks up rows."""

    padding_idx: int | None
    scale_grad_by_freq: bool
    max_norm: float | None


@dataclasses.dataclass(frozen=True)
class Site:
    """An adapted module: where it is, what it computes, and a method's constants for it.

    Weights are spoken of in canonical orientation, whatever the module stores: `"out in"` for a
    linear map, `"dim vocab"` for an embedding (a linear map of one-hot rows) and `"out in/groups *kernel"`
    for a convolution. The input projections of an attention are one linear map, `"3*dim in"`; where queries, keys and
    values have sizes of their own, `in` is the sum of these, and only the blocks on the diagonal count.
    A site may also be a bare parameter: a matrix, `"out in"`, or one for each expert, `"experts out in"`.

    Attributes:
        path: Dotted name of the module, or of the parameter, in the user's model.
        kind: `"linear"`, `"embedding"`, `"conv1d"`, `"conv2d"`, `"conv3d"` or `"attention"`; of a parameter
            `"parameter"` or `"experts"`.
        in_features: Size of the input axis (vocabulary for an embedding, channels for a convolution).
        out_features: Size of the output axis.
        has_bias: Whether the module adds a bias.
        transposed: Whether the module stores its weight as `"in out"` (`transformers`' `Conv1D`, embeddings).
        kernel_size: Spatial extent of a convolution's kernel, else `()`.
        geometry: Stride, padding, dilation, groups and padding mode of a convolution.
        lookup: Settings of an embedding, where it has any.
        weight_names: Attributes of the module that hold its weight: several are the blocks of a diagonal; none means
            that it is packed and cannot be read.
        bias_name: Attribute that holds its bias.
        blocks: Sizes of the input axes of an attention's query, key and value, where they differ.
        within: Path of the site whose module this one is a part of, for the output projection of an attention.
        experts: Number of matrices in a parameter of kind `"experts"`, else 0.
        constants: What the method planned for this site: scaling factors, ranks, frozen tensors.
        shared: Leaves that it has together with other sites, and the names that these have under `"*"` in a tree.

    >>> site = Site("head", "linear", in_features=4, out_features=3)
    >>> site.weight_shape
    (3, 4)
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    has_bias: bool = False
    transposed: bool = False
    kernel_size: tuple[int, ...] = ()
    geometry: Geometry | None = None
    lookup: Lookup | None = None
    weight_names: tuple[str, ...] = ("weight",)
    bias_name: str = "bias"
    blocks: tuple[int, ...] = ()
    within: str | None = None
    experts: int = 0
    constants: Any = dataclasses.field(default_factory=Constants)
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def groups(self) -> int:
        """Number of groups of a convolution; 1 for everything else."""
        return self.geometry.groups if self.geometry else 1

    @property
    def by_token(self) -> bool:
        """Whether what it computes at one position of its input depends on that position alone."""
        return self.kind in ("linear", "embedding")

    @property
    def names(self) -> tuple[str, ...]:
        """Attributes of the module that hold its weight and its bias."""
        return (*self.weight_names, self.bias_name)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight in canonical orientation."""
        shape = (self.out_features, self.in_features // self.groups, *self.kernel_size)
        return (self.experts, *shape) if self.experts else shape

    @property
    def leaf(self) -> str:
        """Name of a bare parameter on its module; `""` for a module."""
        return self.weight_names[0] if self.kind in PARAMETERS else ""

    @property
    def owner(self) -> str:
        """Dotted name of the module that has the weight."""
        return self.path.rpartition(".")[0] if self.kind in PARAMETERS else self.path

    def canonical(self, weight: Tensor) -> Tensor:
        """Turn a stored weight into canonical orientation; its own inverse."""
        return weight.mT if self.transposed else weight

    def read(self, module: Any, instead: Mapping[str, Tensor] | None = None) -> Dense:
        """Return canonical weight and bias of the module that this site describes.

        What is sharded is gathered, and what is offloaded is loaded.

        Args:
            module: The module.
            instead: Tensors to take instead of the module's, by attribute.

        Raises:
            TypeError: A weight that no adapter can be added to: packed, or quantised.
            ValueError: One that each forward of its module rewrites.

        >>> module = torch.nn.Module()
        >>> module.kernel = torch.zeros(2, 3)
        >>> Site("", "linear", 2, 3, transposed=True, weight_names=("kernel",)).read(module)[0].shape
        torch.Size([3, 2])
        """
        names = (*self.weight_names, self.bias_name) if self.has_bias else self.weight_names
        held = {name: whole(resting(module, name)) for name in names if name not in (instead or {})}
        held |= {name: whole(tensor) for name, tensor in (instead or {}).items()}
        stored = [held[name] for name in self.weight_names]
        form = "packed" if not stored else next(filter(None, map(quantised_form, stored)), None)
        if form is not None:
            raise TypeError(
                f"{self.path}: its weight is {form}, so an adapter cannot be added to it. Call the module instead of "
                "reading its weight; merge into the model as it was before quantisation, or dequantise this one first"
            )
        if self.lookup is not None and self.lookup.max_norm is not None:
            raise ValueError(
                f"{self.path}: an Embedding with max_norm={self.lookup.max_norm} rewrites its weight in each forward, "
                "so there is no fixed weight to merge into or to start from; call the module instead, or set "
                "max_norm=None"
            )
        weight = self.canonical(stored[0]) if len(stored) == 1 else torch.block_diag(*stored)
        return weight, held[self.bias_name] if self.has_bias else None

    def stored(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Return canonical weight and bias as the module stores them, by attribute; the inverse of `read`.

        >>> site = Site("", "linear", 2, 3, transposed=True)
        >>> {name: tuple(value.shape) for name, value in site.stored(torch.zeros(3, 2), None).items()}
        {'weight': (2, 3)}
        """
        if len(self.weight_names) == 1:
            tensors = {self.weight_names[0]: self.canonical(weight)}
        else:
            parts = weight.chunk(len(self.blocks), 0)
            tensors = {
                name: part.split(self.blocks, 1)[i]
                for i, (name, part) in enumerate(zip(self.weight_names, parts, strict=True))
            }
        return tensors if bias is None else {**tensors, self.bias_name: bias}

    def like(self, module: Any) -> Tensor:
        """Return a tensor of the device and dtype for the module's adapter: its weight, or its first parameter."""
        for name in self.weight_names:
            result: Tensor = resting(module, name)
            return result
        return next(itertools.chain(module.parameters(), module.buffers()), _NOWHERE)

    def call(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run the module's function with another canonical weight and bias.

        >>> site = Site("", "linear", in_features=2, out_features=2)
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
        geometry = self.geometry
        assert geometry is not None
        padding: Any = geometry.padding
        if geometry.padding_mode != "zeros":
            x, padding = F.pad(x, geometry.pad, mode=geometry.padding_mode), 0
        return _CONVOLVE[self.kind](x, weight, bias, geometry.stride, padding, geometry.dilation, groups)

    def pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve with a kernel of ones: a linear map of the channels, in the module's groups."""
        return _CONVOLVE[self.kind](x, weight, groups=self.groups)


def check_leaves(path: str, leaves: Mapping[str, Tensor], like: Tensor) -> None:
    """Refuse leaves without values where there are values: torch multiplies with such memory as it finds it.

    Args:
        path: Path of the site.
        leaves: Its leaves.
        like: What they are to be used with.

    Raises:
        ValueError: A leaf on the meta device, though `like` is not; names both.

    >>> check_leaves("head", {"lora_A": torch.ones(1, device="meta")}, torch.ones(1, device="meta"))
    """
    for leaf, tensor in leaves.items():
        if tensor.is_meta and not like.is_meta:
            raise ValueError(
                f"{path or 'the model'}: the adapter's {leaf} is on the meta device, without values, and is used with "
                f"a tensor on {like.device}; load it first (load_adapter, set_peft_model_state_dict), or start with "
                "graft.init()"
            )


def check_base(path: str, weight: Tensor | None, x: Tensor) -> None:
    """Refuse a base without values where the input has some.

    Raises:
        ValueError: A weight on the meta device, though the input is not; names the site.
    """
    if weight is not None and weight.is_meta and not x.is_meta:
        raise ValueError(
            f"{path or 'the model'}: the base's weight is on the meta device, without values, and its input is on "
            f"{x.device}; load the model first (load_state_dict(..., assign=True)), or give base tensors with the call"
        )


def own_tensor(module: Any, name: str) -> Tensor | None:
    """Return the parameter or buffer that a module itself has under a name; `None` for what it computes.

    >>> own_tensor(torch.nn.Linear(2, 1), "weight").shape
    torch.Size([1, 2])
    """
    held = module._parameters.get(name)
    result: Tensor | None = module._buffers.get(name) if held is None else held
    return result


def trainable_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype that parameters beside a weight have in place: its own, float32 where it is no number's.

    >>> trainable_dtype(torch.ones(2, dtype=torch.int8)), trainable_dtype(torch.ones(2, dtype=torch.complex64))
    (torch.float32, torch.complex64)
    """
    return weight.dtype if weight.is_floating_point() or weight.is_complex() else torch.float32


def wide_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of fresh parameters beside a weight: float32, or its own where that is wider or complex.

    >>> wide_dtype(torch.ones(2, dtype=torch.bfloat16)), wide_dtype(torch.ones(2, dtype=torch.complex64))
    (torch.float32, torch.complex64)
    """
    dtype = trainable_dtype(weight)
    return dtype if dtype.itemsize > 4 else torch.promote_types(dtype, torch.float32)


def quantised_form(weight: Any) -> str | None:
    """Describe a weight that no adapter can be added to; `None` for numbers of floating point, real or complex.

    >>> quantised_form(torch.ones(2, dtype=torch.int8))
    'torch.int8'
    """
    if not (weight.is_floating_point() or weight.is_complex()):
        return str(weight.dtype)
    if type(weight) in (Tensor, torch.nn.Parameter):
        return None
    library = type(weight).__module__.partition(".")[0]
    return f"quantised (a {type(weight).__name__} of {library})" if library in _QUANTISERS else None


def add_scaled(y: Tensor, delta: Tensor, scaling: float | Tensor) -> Tensor:
    """Return `y + scaling * delta`, summed in the wider dtype and rounded once to that of `y`.

    >>> add_scaled(torch.ones(2), torch.ones(2), 2.0)
    tensor([3., 3.])
    """
    if isinstance(scaling, Tensor):
        delta, scaling = delta * scaling.to(delta.dtype), 1.0
    wide, delta = widen(y, delta)
    return torch.add(wide, delta, alpha=scaling).to(y.dtype)


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to the widest dtype among them, leaving those that have it untouched.

    Raises:
        TypeError: The first, of the base, is real, and another is complex.

    >>> [t.dtype for t in widen(torch.ones(1), torch.ones(1, dtype=torch.float64))]
    [torch.float64, torch.float64]
    """
    dtype, mixed = tensors[0].dtype, False
    for tensor in tensors[1:]:
        if tensor.dtype != dtype:
            dtype, mixed = torch.promote_types(dtype, tensor.dtype), True
    if not mixed:
        return tensors
    if dtype.is_complex and not tensors[0].is_complex():
        raise TypeError(
            f"an adapter with complex parameters ({dtype}) meets a layer of {tensors[0].dtype}, whose output has no "
            "imaginary part; make its parameters real"
        )
    return tuple(tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors)
