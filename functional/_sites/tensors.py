"""Tensors at a site: their dtypes, sums that are rounded once, and those that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Dense = tuple[Tensor, Tensor | None]
"""A canonical weight and a bias."""


_QUANTISERS = frozenset({"torchao", "bitsandbytes", "optimum", "quanto", "hqq"})
"""Packages whose tensors say that they are of floating point and hold something else."""


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


def check_shapes(
    path: str, leaves: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], stacked: tuple[int, ...] = ()
) -> None:
    """Refuse leaves of other shapes than a site's: torch would repeat one of a single row without a word.

    Args:
        path: Path of the site.
        leaves: Its leaves; those without an expected shape, such as trained biases, may have any.
        expected: Their shapes.
        stacked: What precedes these in a stack: the number of adapters.

    Raises:
        ValueError: A leaf of another shape; names the site and the leaf.

    >>> check_shapes("head", {"lora_B": torch.ones(3, 2)}, {"lora_B": (3, 2)})
    """
    for leaf, tensor in leaves.items():
        shape = expected.get(leaf) if isinstance(tensor, Tensor) else None  # others are called
        if shape is not None and tensor.shape != (*stacked, *shape):
            raise ValueError(
                f"{path or 'the model'}: the adapter's {leaf} has shape {tuple(tensor.shape)}, expected "
                f"{(*stacked, *shape)}; it got another one after it was accepted, as by writing to .data: give the "
                "call, or the model, a leaf of the expected shape"
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
