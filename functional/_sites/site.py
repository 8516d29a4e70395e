"""Sites: the modules that carry an adapter, seen as plain facts, and what all sites of one kind have in common."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._constants import Constants
from .._tensors.placement import resting, whole
from .geometry import Geometry
from .tensors import Dense, quantised_form

PARAMETERS = ("parameter", "experts")
"""Kinds of sites that are bare parameters of a module."""


_NOWHERE = torch.empty(0)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """The settings of an embedding's module: how it looks up rows."""

    padding_idx: int | None
    scale_grad_by_freq: bool
    max_norm: float | None


@dataclasses.dataclass(frozen=True)
class Registration:
    """The classes that users register as a kind.

    Attributes:
        describe: `(path, module, (in, out), kernel) -> Site`, without what registering says of names and bias.
        weight_axes: Number of axes of the weight.
        has_bias: Whether there may be a bias.
        transposable: Whether the weight may be stored the other way round.
        flipped: Whether the weight is stored as the transpose of the canonical one.
    """

    describe: Callable[[str, Any, tuple[int, int], tuple[int, ...]], Site]
    weight_axes: int = 2
    has_bias: bool = True
    transposable: bool = True
    flipped: bool = False


@dataclasses.dataclass(frozen=True)
class Routing:
    """How rows with adapters of their own are computed at sites of a kind.

    Attributes:
        by_token: Whether each entry of an input but for its features is computed by itself, so that tokens can be
            routed.
        by_adapter: Whether tokens of many groups are computed one adapter at a time, also by methods that route.
        by_module: Whether rows are cut from what the site's module gets and gives, as the site itself is not called.
        by_entry: Whether that module runs once for all rows where each entry of its products can be followed.
    """

    by_token: bool = False
    by_adapter: bool = False
    by_module: bool = False
    by_entry: bool = False


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of site: what its modules compute, how they hold a weight, and where an input has rows.

    Attributes:
        name: What `Site.kind` says.
        call: `(site, x, weight, bias) -> y`, the function of a module with a canonical weight and bias.
        features: How many axes of an input, from the last, are the features of one entry.
        routing: How rows with adapters of their own are computed.
        is_parameter: Whether a site is a bare parameter of a module, which the module's forward reads.
        joined: `(site, stored) -> weight`: the canonical weight from the tensors that hold it.
        split: `(site, weight) -> tensors` by name; the inverse of `joined`.
        check_readable: `site -> None`, an error for a weight that is not fixed.
        pieces: `site -> words` of what leaves are made of, piece by piece, so that zeros at their ends would shift
            them; `None` where they would not.
        registration: How classes of this kind are that users register; `None` where they cannot.
    """

    name: str
    call: Callable[[Site, Tensor, Tensor, Tensor | None], Tensor]
    features: int
    routing: Routing = Routing()
    is_parameter: bool = False
    joined: Callable[[Site, Sequence[Tensor]], Tensor] = lambda site, stored: site.canonical(stored[0])
    split: Callable[[Site, Tensor], Mapping[str, Tensor]] = lambda site, weight: {
        site.weight_names[0]: site.canonical(weight)
    }
    check_readable: Callable[[Site], None] = lambda site: None
    pieces: Callable[[Site], str | None] = lambda site: None
    registration: Registration | None = None


KINDS: dict[str, Kind] = {}
"""All kinds by name; each file of one adds its own."""


def add_kind(kind: Kind) -> Kind:
    """Make a kind known to sites of its name."""
    KINDS[kind.name] = kind
    return kind


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
    def names(self) -> tuple[str, ...]:
        """Attributes of the module that hold its weight and its bias."""
        return (*self.weight_names, self.bias_name)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight in canonical orientation."""
        shape = (self.out_features, self.in_features // self.groups, *self.kernel_size)
        return (self.experts, *shape) if self.experts else shape

    @property
    def is_parameter(self) -> bool:
        """Whether the site is a bare parameter of a module."""
        return KINDS[self.kind].is_parameter

    @property
    def routing(self) -> Routing:
        """How its rows are computed where they have adapters of their own."""
        return KINDS[self.kind].routing

    @property
    def features(self) -> int:
        """How many axes of an input, from the last, are the features of one entry."""
        return KINDS[self.kind].features

    @property
    def pieces(self) -> str | None:
        """What its leaves are made of, piece by piece, in words; `None` where zeros at their ends change nothing."""
        return KINDS[self.kind].pieces(self)

    @property
    def leaf(self) -> str:
        """Name of a bare parameter on its module; `""` for a module."""
        return self.weight_names[0] if self.is_parameter else ""

    @property
    def owner(self) -> str:
        """Dotted name of the module that has the weight."""
        return self.path.rpartition(".")[0] if self.is_parameter else self.path

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
                "reading its weight; merge into the model as it was before quantisation, or into the numbers that this "
                "weight is a code of: merge(graft, params, dequantize=True), dequantized(model)"
            )
        kind = KINDS[self.kind]
        kind.check_readable(self)
        return kind.joined(self, stored), held[self.bias_name] if self.has_bias else None

    def stored(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Return canonical weight and bias as the module stores them, by attribute; the inverse of `read`.

        >>> site = Site("", "linear", 2, 3, transposed=True)
        >>> {name: tuple(value.shape) for name, value in site.stored(torch.zeros(3, 2), None).items()}
        {'weight': (2, 3)}
        """
        tensors = dict(KINDS[self.kind].split(self, weight))
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
        return KINDS[self.kind].call(self, x, weight, bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int = 1) -> Tensor:
        """Convolve as the module does: same stride, padding, dilation and padding mode."""
        assert self.geometry is not None
        return self.geometry.convolve(x, weight, bias, groups)

    def pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve with a kernel of ones: a linear map of the channels, in the module's groups."""
        assert self.geometry is not None
        return self.geometry.pointwise(x, weight)
