"""Layer types: which modules carry an adapter, and how each becomes a site."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .attention import describe_attention
from .convolution import CONVOLUTIONS, describe_convolution
from .embedding import EMBEDDING, describe_embedding
from .linear import LINEAR, describe_linear, describe_packed
from .site import Site
from .tensors import quantised_form

Describe = Callable[[str, Any], Site]


def describe(path: str, module: nn.Module) -> Site | None:
    """Describe a module as a site, or return `None` where its kind carries no adapter.

    Args:
        path: Dotted name of the module in the user's model.
        module: The module.

    Raises:
        ValueError: A module of a registered class that is not what was said of it.

    >>> describe("head", nn.Linear(4, 3)).weight_shape
    (3, 4)
    >>> describe("norm", nn.LayerNorm(4)) is None
    True
    """
    for cls in type(module).__mro__:
        if (describe_known := _known(cls)) is not None:
            return describe_known(path, module)
    return None


def forward_class(module: nn.Module, site: Site | None = None) -> type:
    """Return the class among a module's bases whose forward its kind speaks of.

    A weight that is not of floating point is stored in a form that only the module's own class can read.

    Args:
        module: The module.
        site: Its site, where that is known.

    >>> class Scaled(nn.Embedding):
    ...     def forward(self, ids):
    ...         return 3 * super().forward(ids)
    >>> forward_class(Scaled(4, 2)).__name__
    'Embedding'
    """
    site = site or describe("", module)
    assert site is not None
    if not site.weight_names or quantised_form(site.like(module)):
        return type(module)
    return next(cls for cls in type(module).__mro__ if _known(cls))


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer of any type.

    >>> is_linear(nn.Linear(2, 2)), is_linear(nn.Embedding(2, 2))
    (True, False)
    """
    site = describe("", module)
    return site is not None and site.kind == LINEAR.name


def register_layer(
    cls: type[nn.Module],
    kind: str,
    *,
    weight: str = "weight",
    bias: str | None = "bias",
    transposed: bool = False,
) -> None:
    """Let modules of a class of your own carry adapters, and those of its subclasses.

    The class computes what torch's layer of that kind does, with a weight and a bias that it may name and lay out in
    its own way. Its forward is called with the input first and stays as it is; sizes are read from the weight. A
    convolution's `stride`, `padding`, `dilation`, `groups` and `padding_mode` are read from attributes of these names,
    where it has them.

    Args:
        cls: The class.
        kind: `"linear"`, `"embedding"`, `"conv1d"`, `"conv2d"` or `"conv3d"`.
        weight: Name of the attribute that holds the weight: `"out in"` for a linear layer, `"vocab dim"` for an
            embedding, `"out in/groups *kernel"` for a convolution.
        bias: Name of the attribute that holds the bias, which may be missing or `None`; `None` where there is none.
        transposed: Whether the weight is `"in out"`, or an embedding's `"dim vocab"`.

    Raises:
        TypeError: Something else than a class of modules, or a name that is no string.
        ValueError: An unknown kind, a transposed convolution, or a class that is known already as something else.

    >>> import torch
    >>> class Dense(nn.Module):
    ...     def __init__(self, inputs, outputs):
    ...         super().__init__()
    ...         self.kernel = nn.Parameter(torch.randn(inputs, outputs))
    ...
    ...     def forward(self, x):
    ...         return x @ self.kernel
    >>> register_layer(Dense, "linear", weight="kernel", bias=None, transposed=True)
    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind
    >>> graft = bind(nn.Sequential(Dense(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> {leaf: tuple(t.shape) for leaf, t in graft.init()["0"].items()}
    {'lora_A': (2, 4), 'lora_B': (3, 2)}
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_layer: cls is {cls!r}, expected a class of torch.nn.Module")
    if not isinstance(weight, str) or not (bias is None or isinstance(bias, str)):
        raise TypeError(f"register_layer: weight is {weight!r} and bias is {bias!r}, expected names of attributes")
    if kind not in _REGISTERED:
        raise ValueError(f"register_layer: kind is {kind!r}, expected one of {', '.join(_REGISTERED)}")
    if transposed and not _REGISTERED[kind].transposable:
        raise ValueError(
            f"register_layer: transposed is True for the {kind} {cls.__name__}; a convolution's weight has to be "
            "'out in/groups *kernel', and one of a transposed convolution is not supported"
        )
    new = functools.partial(_own, kind, weight, bias, transposed)
    old = _known(cls)
    if old is not None and not (isinstance(old, functools.partial) and old.args == new.args):
        raise ValueError(
            f"register_layer: {cls.__name__} is known already as something else; register a subclass of it instead"
        )
    _DESCRIBE[cls] = new


def register_by_name(module: str, name: str, describe: Describe, *, linear_forward: bool = False) -> None:
    """Let modules of a class carry adapters that another library defines, without importing it.

    Args:
        module: The name of the Python module that defines the class.
        name: The name of the class.
        describe: `(path, module) -> Site`.
        linear_forward: Whether its forward is `F.linear` of its canonical weight and its bias, and nothing else.
    """
    _BY_NAME[module, name] = describe
    if linear_forward:
        _LINEAR_FORWARDS.add((module, f"{name}.forward"))


@functools.lru_cache(maxsize=256)
def has_linear_forward(cls: Any) -> bool:
    """Return whether modules of a class have the forward of `nn.Linear` itself, or one that computes the same.

    >>> has_linear_forward(nn.Linear), has_linear_forward(nn.Bilinear)
    (True, False)
    """
    forward = cls.forward
    return forward is nn.Linear.forward or (forward.__module__, forward.__qualname__) in _LINEAR_FORWARDS


# -- those that users register --------------------------------------------------------------------------------------


_REGISTERED = {kind.name: kind.registration for kind in (LINEAR, EMBEDDING, *CONVOLUTIONS) if kind.registration}
"""Kinds that classes can be registered as."""


def _own(name: str, weight: str, bias: str | None, transposed: bool, path: str, module: Any) -> Site:
    classes = _REGISTERED[name]
    what = f"{path or 'the model'}: {type(module).__name__} is registered as {name}"
    held = getattr(module, weight, None)
    if not isinstance(held, Tensor) or held.ndim != classes.weight_axes:
        given = f"has shape {tuple(held.shape)}" if isinstance(held, Tensor) else f"is {type(held).__name__}"
        raise ValueError(f"{what}, and its {weight!r} {given}, expected a tensor of {classes.weight_axes} axes")
    shift = None if bias is None else getattr(module, bias, None)
    flip = transposed != classes.flipped
    outputs, inputs = tuple(held.mT.shape if flip else held.shape)[:2]
    if shift is not None and not (classes.has_bias and isinstance(shift, Tensor) and shift.shape == (outputs,)):
        given = str(tuple(shift.shape)) if isinstance(shift, Tensor) else type(shift).__name__
        expected = f"shape {(outputs,)}" if classes.has_bias else "none"
        raise ValueError(f"{what}, and its {bias!r} is {given}, expected {expected}")
    site = classes.describe(path, module, (inputs, outputs), tuple(held.shape[2:]))
    names: dict[str, Any] = {"weight_names": (weight,), "bias_name": bias or "bias"}
    return dataclasses.replace(site, has_bias=shift is not None, transposed=flip, **names)


# -- torch's own, and those known by name ---------------------------------------------------------------------------

_DESCRIBE: dict[type, Describe] = {
    nn.Linear: describe_linear,
    nn.Embedding: describe_embedding,
    nn.Conv1d: describe_convolution,
    nn.Conv2d: describe_convolution,
    nn.Conv3d: describe_convolution,
    nn.MultiheadAttention: describe_attention,
}


_LINEAR_FORWARDS: set[tuple[str, str]] = set()
"""Forwards that are `F.linear`, by the names of their Python module and of themselves."""

_BY_NAME: dict[tuple[str, str], Describe] = {
    ("torch.ao.nn.quantized.dynamic.modules.linear", "Linear"): describe_packed,
}


def _known(cls: type) -> Describe | None:
    return _DESCRIBE.get(cls) or _BY_NAME.get((cls.__module__, cls.__name__))
