"""Large weights in parts: rows of a weight, and what a LoRA has for them.

    (W + s B A)[i:j] = W[i:j] + s B[i:j] A

DoRA's magnitudes and norms are those of rows too. Other methods mix rows, and are merged as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from torch import Tensor

from torchgraft.functional import Site
from torchgraft.functional.extending import SiteAdapter

from .._methods.lora.dora import MAGNITUDE
from .._methods.lora.forward import BIAS
from .._methods.lora.lora import LoraConfig

Leaves = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a site.

    Attributes:
        site: The site, of the part's size.
        leaves: The leaves for it.
        rows: Which rows of the stored tensors it has, by attribute; all of those that are not named.
    """

    site: Site
    leaves: Leaves
    rows: Mapping[str, tuple[int, int]]


def parts_of(adapter: SiteAdapter, leaves: Leaves, leaf: str, count: int) -> Iterator[Part]:
    """Yield the parts of a site, in order; one where it is small, or of a method that has none.

    Args:
        adapter: The adapter at the site.
        leaves: Its leaves.
        leaf: The attribute that is wanted; only a weight is cut.
        count: Into how many parts.

    >>> import torch
    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind
    >>> graft = bind(torch.nn.Linear(2, 5), LoraConfig(r=1, target_modules="all-linear"))
    >>> adapter, params = graft.binding.adapters("")[""], graft.init()
    >>> [(part.rows["weight"], part.leaves["lora_B"].shape[0]) for part in parts_of(adapter, params[""], "weight", 2)]
    [((0, 3), 3), ((3, 5), 2)]
    """
    site, config = adapter.site, adapter.config
    cut = {"linear": _outputs, "embedding": _inputs, "experts": _experts}.get(site.kind)
    dora = getattr(config, "use_dora", False)
    fits = (
        isinstance(config, LoraConfig) and config.use_bdlora is None and not (site.kind == "linear" and site.transposed)
    )
    if count < 2 or cut is None or not fits or leaf not in site.weight_names or (dora and site.kind == "embedding"):
        yield Part(site, leaves, {})
        return
    total = {"linear": site.out_features, "embedding": site.in_features, "experts": site.experts}[site.kind]
    step = max(1, -(-total // count))
    for start in range(0, total, step):
        yield cut(site, leaves, start, min(start + step, total))


def expert_of(adapter: SiteAdapter, leaves: Leaves, expert: int) -> Part:
    """Return one of a site's stacked experts."""
    return _experts(adapter.site, leaves, expert, expert + 1)


def _outputs(site: Site, leaves: Leaves, start: int, stop: int) -> Part:
    """Return some outputs of a linear layer."""
    by_output = ("lora_B", MAGNITUDE, BIAS)
    own = {name: leaf[start:stop] if name in by_output else leaf for name, leaf in leaves.items()}
    rows = dict.fromkeys(site.names, (start, stop))
    return Part(dataclasses.replace(site, out_features=stop - start), own, rows)


def _inputs(site: Site, leaves: Leaves, start: int, stop: int) -> Part:
    """Return some rows of an embedding, each of which is an input."""
    own = {**leaves, "lora_embedding_A": leaves["lora_embedding_A"][:, start:stop]}
    return Part(dataclasses.replace(site, in_features=stop - start), own, dict.fromkeys(site.names, (start, stop)))


def _experts(site: Site, leaves: Leaves, start: int, stop: int) -> Part:
    """Return some of stacked experts."""
    a = leaves["lora_A"].unflatten(0, (site.experts, -1))[start:stop].flatten(0, 1)
    b = leaves["lora_B"].unflatten(1, (-1, site.experts))[..., start:stop].flatten(1)
    part = dataclasses.replace(site, experts=stop - start)
    return Part(part, {**leaves, "lora_A": a, "lora_B": b}, dict.fromkeys(site.names, (start, stop)))
