"""Values that are computed once, for as long as the tensors that they come from stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

_KNOWN: Any = WeakIdKeyDictionary()


def remembered(
    compute: Callable[[], tuple[Tensor, ...]], owner: Tensor, sources: Sequence[Tensor], facts: Hashable = None
) -> tuple[Tensor, ...]:
    """`compute()`, or what it returned the last time where nothing that it depends on has changed since.

    Only what is constant is remembered: no source requires a gradient, and nothing is compiled, traced, transformed or
    captured in a CUDA graph. Another stream computes its own.
    A source has changed if it is another tensor, has other memory or was written to. That is what PyTorch's version
    counters say, which do not see writes through `.data`; trained parameters, to which such writes are common, are
    never remembered.

    Args:
        compute: Returns tensors that depend on `sources` and `facts` alone.
        owner: One of the sources; what is remembered lives as long as it.
        sources: All tensors that `compute` reads.
        facts: Everything else that it reads.

    >>> weight = torch.ones(3)
    >>> first = remembered(lambda: (weight * 2,), weight, [weight])
    >>> remembered(lambda: (weight * 2,), weight, [weight])[0] is first[0]
    True
    >>> _ = weight.fill_(2)
    >>> remembered(lambda: (weight * 2,), weight, [weight])[0]
    tensor([4., 4., 4.])
    """
    if torch.compiler.is_compiling() or not _are_plain(sources):
        return compute()
    stream = _stream(owner)
    if stream is None:
        return compute()
    state = (stream, facts, *map(_state, sources))
    known = _KNOWN.get(owner)
    if known is None or known[0] != state:
        with torch.inference_mode(False), torch.no_grad():
            # References that keep a freed storage from being taken for a new one at the same address.
            known = state, [StorageWeakRef(source.untyped_storage()) for source in sources], compute()
        _KNOWN[owner] = known
    return known[2]


def _are_plain(sources: Sequence[Tensor]) -> bool:
    """Whether these are constants with memory, outside of every transform and mode."""
    if forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None:
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    return not any(
        source.requires_grad or source.is_meta or source.is_inference() or type(source) not in (Tensor, nn.Parameter)
        for source in sources
    )


def _stream(tensor: Tensor) -> int | None:
    """The stream that work on a tensor goes to now; `None` where what it computes must not be kept."""
    if tensor.device.type in ("cpu", "mps"):
        return 0
    if not tensor.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def _state(tensor: Tensor) -> tuple[Hashable, ...]:
    storage = tensor.untyped_storage()
    return storage._cdata, tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
