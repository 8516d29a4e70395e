"""Checksums of what tensors hold: the only proof that nothing wrote to one.

A version counter sees neither writes through `.data`, NumPy and shared memory nor another storage, and tensors made
under `inference_mode` have none.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchgraft.functional.extending import local_part

_ROW = 2**16
"""Numbers that are summed up at a time; few enough for the cache of a processor."""

_BITS = {1: torch.uint8, 2: torch.int16}


class Content(NamedTuple):
    """What a tensor holds, without where.

    Attributes:
        shape: Its shape; of a sharded tensor, that of this process's part.
        dtype: Its dtype.
        checksum: A checksum of the bits, in order; `None` without memory.
    """

    shape: torch.Size
    dtype: torch.dtype
    checksum: int | None


@torch.no_grad()
def content(tensor: Tensor) -> Content:
    """Read what a tensor holds now, this process's part of it where it is sharded.

    Each number of `n` bits is multiplied with an odd random one of 64; a sum over these changes with any one of them,
    and, but for odds of about 2^-32, with their order. NaNs are bits as others are.

    >>> x = torch.tensor([1.0, -1.0, float("nan")])
    >>> content(x) == content(x.clone()), content(x) == content(x.flip(0))
    (True, False)
    """
    tensor = local_part(tensor)
    if tensor.is_meta:
        return Content(tensor.shape, tensor.dtype, None)
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    bits = flat.view(_BITS.get(flat.itemsize, torch.int32))
    factors = _factors(bits.device)
    whole = len(bits) // _ROW * _ROW
    step = _ROW if bits.is_cpu else 64 * _ROW
    sums = [(part.view(-1, _ROW) * factors).sum(1) for part in bits[:whole].split(step) if len(part)]
    sums.append((bits[whole:] * factors[: len(bits) - whole]).sum(0, keepdim=True))
    return Content(tensor.shape, tensor.dtype, hash(tuple(torch.cat(sums).tolist())))


def holds(tensor: Tensor, known: Content) -> bool:
    """Return whether a tensor holds what one held before, which may have been sharded since.

    >>> x = torch.ones(3)
    >>> holds(torch.ones(3), content(x)), holds(x.double(), content(x))
    (True, False)
    """
    if content(tensor) == known:
        return True
    sharded: Any = tensor
    return tensor.shape == known.shape != local_part(tensor).shape and content(sharded.full_tensor()) == known


@functools.lru_cache(maxsize=64)
def _factors(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        generator = torch.Generator("cpu").manual_seed(0)
        factors: Any = torch.empty(_ROW, dtype=torch.int64, device="cpu").random_(-(2**63), None, generator=generator)
        result: Tensor = (factors | 1).to(device)
        return result
