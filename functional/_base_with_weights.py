"""The bound model without its adapters, with some of its parameters given as data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ._execution.fill import named_base
from ._graft import Graft


@contextlib.contextmanager
def with_weights(graft: Graft, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Yield the bound model without its adapters, in its own modes, with some of its parameters exchanged.

    A module, for callers that need more of a model than a call; `functional_call` is the function.

    Args:
        graft: What `bind` returned.
        weights: Tensors by the names of the user's model's parameters.

    Yields:
        A module like the user's, to be called within the `with` block; its outputs depend on the given tensors.

    Raises:
        KeyError, TypeError, ValueError: Tensors that the model does not have or that do not fit.

    >>> import torch
    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind
    >>> graft = bind(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
    >>> with with_weights(graft, {"0.weight": torch.zeros(3, 4), "0.bias": torch.ones(3)}) as model:
    ...     model(torch.ones(1, 4))
    tensor([[1., 1., 1.]])
    """
    lease = graft.bound.pool().lease()
    skeleton = lease.skeleton
    try:
        skeleton.own_buffers()
        given = named_base(skeleton, weights)
        skeleton.context.trees, skeleton.filled = {}, given
        for key, tensor in given.items():
            for container, name in skeleton.places[key]:
                container[name] = tensor
        yield skeleton.root
    finally:
        lease.release()
