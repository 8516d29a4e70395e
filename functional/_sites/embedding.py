"""Embeddings: `y = W e_i`, a linear map of one-hot rows, whose weight is stored as `"vocab dim"`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .site import Kind, Lookup, Registration, Routing, Site, add_kind


def _call(site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.embedding(x, weight.mT)


def _check_fixed(site: Site) -> None:
    """Refuse a weight that each forward of its module rewrites."""
    if site.lookup is not None and site.lookup.max_norm is not None:
        raise ValueError(
            f"{site.path}: an Embedding with max_norm={site.lookup.max_norm} rewrites its weight in each forward, "
            "so there is no fixed weight to merge into or to start from; call the module instead, or set "
            "max_norm=None"
        )


def _registered(path: str, module: Any, sizes: tuple[int, int], kernel: tuple[int, ...]) -> Site:
    return Site(path, "embedding", *sizes)


EMBEDDING = add_kind(
    Kind(
        "embedding",
        _call,
        features=0,
        routing=Routing(by_token=True, by_adapter=True),
        check_readable=_check_fixed,
        registration=Registration(_registered, has_bias=False, flipped=True),
    )
)


def describe_embedding(path: str, module: nn.Embedding) -> Site:
    """Describe an embedding."""
    settings = Lookup(module.padding_idx, module.scale_grad_by_freq, module.max_norm)
    lookup = None if settings == Lookup(None, False, None) else settings
    return Site(path, "embedding", module.num_embeddings, module.embedding_dim, transposed=True, lookup=lookup)
