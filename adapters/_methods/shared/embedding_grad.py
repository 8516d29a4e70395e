"""The rows of `A` that an embedding's adapter looks up, with gradients as the embedding itself gives them."""

from __future__ import annotations

import torch
from torch import Tensor

from torchgraft.functional import Site


def as_embedding(site: Site, ids: Tensor, rows: Tensor, adapter: Tensor | None = None, count: int = 1) -> Tensor:
    """Rows of `A`, whose values stay and whose gradients follow the embedding's settings.

    The padding row gets none (`padding_idx`); with `scale_grad_by_freq` each is divided by how often its id occurs in
    the call, or among the ids of the same adapter. So it is in PEFT (`tuners/lora/layer.py`, `_embed`); with `max_norm`
    PEFT also cuts the rows of `A` to that norm, in place, which is not done here.

    Args:
        site: The site of an embedding.
        ids: `"..."`.
        rows: `"... r"`.
        adapter: The adapter of each id, broadcast to `ids`; `None` for one.
        count: Number of adapters.

    >>> from torchgraft.functional.extending import describe
    >>> a, ids = torch.ones(3, 1, requires_grad=True), torch.tensor([0, 2, 2])
    >>> site = describe("", torch.nn.Embedding(3, 1, padding_idx=0, scale_grad_by_freq=True))
    >>> torch.autograd.grad(as_embedding(site, ids, a[ids]).sum(), a)[0].flatten()
    tensor([0., 0., 1.])
    """
    how = site.lookup
    if how is None:
        return rows
    if how.scale_grad_by_freq:
        rows = rows.detach() + (rows - rows.detach()) / _counts(site, ids, adapter, count).unsqueeze(-1)
    if how.padding_idx is not None:
        rows = torch.where((ids == how.padding_idx).unsqueeze(-1), rows.detach(), rows)
    return rows


def _counts(site: Site, ids: Tensor, adapter: Tensor | None, count: int) -> Tensor:
    """Return how often each id occurs."""
    flat = ids.flatten().long()
    if adapter is not None:
        flat = flat + site.in_features * adapter.expand_as(ids).flatten()
    found = flat.new_zeros(site.in_features * count).scatter_add(0, flat, torch.ones_like(flat))
    return found.gather(0, flat).view(ids.shape)
