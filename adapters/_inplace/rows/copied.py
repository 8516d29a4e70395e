"""Constants of injected adapters whose values a stack has copies of: compared by content in each call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from torchgraft.functional import Binding

from ..walk import layers


def copied_constants(model: nn.Module, names: Iterable[str], stack: Binding) -> list[Tensor]:
    """Return the constants of adapters that a stack of them does not share memory with, as their layers have them."""
    sites, found = stack.sites[""], []
    for path, layer in layers(model).items():
        for name in names:
            if name not in layer.entries or path not in sites:
                continue
            constants = dict(layer.entries[name].site.constants.items())
            fixed = layer.fixed(name)
            constants |= {leaf: tensor for leaf, tensor in layer.numbers(name).items() if leaf in fixed}
            for key, own in constants.items():
                if (
                    isinstance(own, Tensor)
                    and not own.is_meta
                    and not _shares(own, getattr(sites[path].constants, key))
                ):
                    found.append(own)
    return found


def _shares(own: Tensor, bound: object) -> bool:
    return isinstance(bound, Tensor) and own.data_ptr() == bound.data_ptr() and own.shape == bound.shape


class Contents:
    """The content of some tensors, to be compared with what they have later.

    >>> x = torch.ones(2)
    >>> contents = Contents([x])
    >>> before = contents.same()
    >>> x.data[0] = 2
    >>> before, contents.same()
    (True, False)
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self._tensors: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in {id(tensor): tensor for tensor in tensors}.values():
            self._tensors.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        self._kept = self._joined()

    def same(self) -> bool:
        """Return whether all have what they had."""
        return all(now.equal(self._kept[key]) for key, now in self._joined().items())

    @torch.no_grad()
    def _joined(self) -> Mapping[tuple[torch.dtype, torch.device], Tensor]:
        return {key: torch.cat([tensor.flatten() for tensor in each]) for key, each in self._tensors.items()}
