"""AdaMSS: a small low-rank change of each cluster of rows of a weight's principal part.

    y = base(x) + U' (V [x, 1]),    rows of U' in cluster i: B_i A_i

`V` are the first `r` right singular vectors of the weight with its bias as one more column, and frozen. The rows of
the left ones are clustered; each cluster has an `A_i` of a few rows, which start as a basis of its own part, and a
`B_i` that starts as zeros. The bias is adapted too, as the last column.

Zheng et al., *AdaMSS: Adaptive Multi-Subspaces Approach for Parameter-Efficient Fine-Tuning*, 2025,
OpenReview 8ZdWmpYxT0. Names, defaults and initial values are those of PEFT's `tuners/adamss`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.functional import Constants, Layer, Method, Rows, Site, Weights, widen

from ..._config.base import AdapterConfig
from ..._config.messages import require
from ..._config.peft_format import PeftFormat, Value
from ..shared.low_rank import add_product, add_to_groups
from ..shared.principal import principal, random_triplets

A, B, V = "adamss_A", "adamss_B", "adamss_newB"
_STEPS = 2
"""Steps of the randomised decompositions."""


@dataclasses.dataclass(kw_only=True)
class AdamssConfig(AdapterConfig):
    """AdaMSS trains a small low-rank change of each cluster of a weight's rows; a budget may freeze some of them.

    Supports linear layers and, what PEFT refuses, `transformers`' `Conv1D`. Singular vectors and clusters are constants
    of the graft, made of the weights that it is bound to, so the weights have to be loaded. The clusters are those of
    scikit-learn's K-means, which has to be installed; files have the vectors, but not which rows are in a cluster.

    In training, `allocate_subspaces` says which clusters the budget keeps, and `freeze_subspaces` holds the others; in
    place, `update_and_allocate` of the tuner of a `PeftModel` does both.

    Attributes:
        r: Number of singular vectors, at most the smaller size of the weight.
        num_subspaces: Number of clusters, at most the number of rows.
        subspace_rank: Rank of the change of a cluster, at most its number of rows.
        init_weights: `"orthogonal"` for the identity, `None` for a `B` of small numbers; `False` is `None`.
        use_asa: Whether a budget freezes clusters in training; the next seven fields are for it.
        asa_target_subspaces: Number of clusters over all modules that are trained to the end.
        init_warmup: First step at which importance is measured.
        final_warmup: Step from which `asa_target_subspaces` are trained.
        mask_interval: Steps from one allocation to the next.
        asa_importance_beta: Share of the past in the running average of importance.
        asa_uncertainty_beta: The same of uncertainty.
        asa_schedule_exponent: How fast the budget goes down: `target + (all - target) * left ** exponent`.
        use_dynamic_rank: Whether the rank of a cluster is the number of its larger singular values, up to
            `subspace_rank`.
        svd_threshold: What these are larger than, as a share of the largest.
        random_seed: Seed of the randomised decomposition of the weight.

    >>> AdamssConfig(r=16, target_modules=["q_proj"]).num_subspaces
    5
    """

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: str | bool | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init_weights = None if self.init_weights is False else self.init_weights
        for name in ("r", "num_subspaces", "subspace_rank"):
            require(getattr(self, name) > 0, self, f"{name} is {getattr(self, name)}, expected a positive integer")
        known = self.init_weights in ("orthogonal", None)
        require(known, self, f"init_weights is {self.init_weights!r}, expected 'orthogonal' or None")
        threshold = self.svd_threshold
        require(0 <= threshold < 1, self, f"svd_threshold is {threshold}, expected 0 <= threshold < 1")
        if self.use_asa:
            self._check_budget()

    def _check_budget(self) -> None:
        for name in ("asa_target_subspaces", "mask_interval", "asa_schedule_exponent"):
            require(getattr(self, name) > 0, self, f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("asa_importance_beta", "asa_uncertainty_beta"):
            require(0 <= getattr(self, name) < 1, self, f"{name} is {getattr(self, name)}, expected 0 <= beta < 1")
        first, last = self.init_warmup, self.final_warmup
        require(first < last, self, f"init_warmup is {first} and final_warmup {last}, expected the first to be smaller")


@dataclasses.dataclass(frozen=True, eq=False)
class AdamssConstants(Constants):
    """The singular vectors, `"r in+1"` (`"r in"` without a bias) and `"out r"`, and the clusters.

    `order` is `"out"`, the rows of one cluster after the other, and `place` where each row is there; `sizes` has the
    number of rows and the rank of each.
    """

    adamss_newB: Tensor
    left: Tensor
    order: Tensor
    place: Tensor
    sizes: tuple[tuple[int, int], ...]

    def rows(self) -> list[Tensor]:
        """Return the rows of each cluster."""
        return [*self.order.split([rows for rows, _ in self.sizes])]


def plan(config: AdamssConfig, sites: list[Site], weights: Weights) -> dict[str, AdamssConstants]:
    """Return the singular vectors, the right ones in the dtype of the weight, and the clusters of each site.

    Raises:
        ValueError: A weight without values; a rank above the number of singular vectors. Both name the site.
        ImportError: scikit-learn is not installed.
    """
    planned = {}
    for site in sites:
        weight, bias = weights(site.path), weights.bias(site.path)
        what = f"the weight of {site.path} is on the meta device, and its values say which rows are clustered"
        require(not weight.is_meta, config, f"{what}; load the model before it is bound or injected")
        whole = weight.float() if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1).float()
        u, _, v = principal(whole, min(config.r, *whole.shape), _STEPS, config.random_seed)
        clusters = clusters_of(u, config.num_subspaces)
        sizes = tuple((len(rows), _rank(config, site, u[rows])) for rows in clusters)
        order = torch.cat(clusters)
        planned[site.path] = AdamssConstants(v.to(weight.dtype), u, order, order.argsort(), sizes)
    return planned


def clusters_of(points: Tensor, count: int) -> list[Tensor]:
    """Return the rows of each cluster, of PEFT's K-means with its fixed seed; one that stayed empty is left out.

    Args:
        points: `"rows features"`.
        count: Number of clusters; at most one for each row.

    >>> [rows.tolist() for rows in clusters_of(torch.tensor([[0.0], [9.0], [1.0], [8.0]]), 2)]
    [[0, 2], [1, 3]]
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError(
            "AdaMSS clusters rows by scikit-learn's K-means, as PEFT does, which is not installed; install scikit-learn"
        ) from error
    means = KMeans(min(count, len(points)), init="random", n_init=1, max_iter=10, random_state=123456789)
    labels = torch.from_numpy(means.fit_predict(points.cpu().numpy())).to(points.device)
    return [rows for i in range(count) if len(rows := torch.where(labels == i)[0])]


def _rank(config: AdamssConfig, site: Site, left: Tensor) -> int:
    """Return the rank of the change of a cluster, by its rows of the left singular vectors."""
    rank = min(config.subspace_rank, len(left))
    if config.use_dynamic_rank:
        values = torch.linalg.svdvals(left @ left.T)
        rank = max(1, min(rank, int((values > config.svd_threshold * values[0]).sum())))
    r = left.shape[1]
    what = f"a cluster of {len(left)} rows at {site.path} has the rank {rank}, and there are {r} singular vectors"
    require(rank <= r, config, f"{what}; set subspace_rank={r} or lower")
    return rank


def shapes(config: AdamssConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`A_i` is `"rank r"`, `B_i` is `"rows rank"`."""
    r = len(site.constants.adamss_newB)
    found: dict[str, tuple[int, ...]] = {}
    for i, (rows, rank) in enumerate(site.constants.sizes):
        found |= {f"{A}.{i}": (rank, r), f"{B}.{i}": (rows, rank)}
    return found


def init(
    config: AdamssConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """A basis of the clusters' parts and zeros, or small numbers, in PEFT's order of draws."""
    made = {}
    for site in sites:
        leaves = {}
        for i, (rows, (count, rank)) in enumerate(zip(site.constants.rows(), site.constants.sizes, strict=True)):
            part = site.constants.left[rows]
            between = part @ part.T
            if config.use_dynamic_rank:  # what PEFT finds the rank with
                torch.randn(count, count, dtype=torch.float32, generator=generator)
            left = random_triplets(between, rank, _STEPS, generator)[0]
            leaves[f"{A}.{i}"] = torch.linalg.qr(part.T @ left).Q.T.contiguous()
            leaves[f"{B}.{i}"] = torch.zeros(count, rank, dtype=torch.float32)
            if config.init_weights is None:
                leaves[f"{B}.{i}"] = leaves[f"{B}.{i}"].normal_(generator=generator) * 0.01
        made[site.path] = leaves
    return made


def apply(config: AdamssConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + U' (V [x, 1])`, the sum in the wider dtype and rounded once to the base's."""
    y = base(x)
    x, v, left = widen(x, _right(site, leaves), _left(site, leaves))
    return add_product(y, _down(site, x, v), left, 1.0)


def routed(config: AdamssConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor, rows: Rows) -> Tensor:
    """`apply` with changes for each row."""
    y = base(x)
    x, v, left = widen(x, site.constants.adamss_newB, _left(site, leaves))
    return add_to_groups(y, _down(site, x, v).reshape(rows.groups().size, -1, len(v)), left, 1.0, rows)


def merge(
    config: AdamssConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`[W', b'] = [W, b] + U' V`."""
    delta = _left(site, leaves) @ _right(site, leaves).to(weight.dtype)
    return weight + delta[:, : site.in_features], None if bias is None else bias + delta[:, -1]


def _right(site: Site, leaves: dict[str, Any]) -> Tensor:
    """`V`: an injected layer has it among its leaves."""
    v: Tensor = leaves.get(V, site.constants.adamss_newB)
    return v


def _down(site: Site, x: Tensor, v: Tensor) -> Tensor:
    """`V [x, 1]`."""
    return F.linear(x, v[:, : site.in_features], v[:, -1] if site.has_bias else None)


def _left(site: Site, leaves: dict[str, Any]) -> Tensor:
    """`U'`, `"out r"`; of a stack it is stacked."""
    each = [leaves[f"{B}.{i}"] @ leaves[f"{A}.{i}"] for i in range(len(site.constants.sizes))]
    ordered = torch.cat(each, -2)
    return ordered.index_select(-2, site.constants.place.to(ordered.device))


AdamssConfig.method = Method(
    name="ADAMSS",
    config=AdamssConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=AdamssConstants,
    routed=routed,
    varying=frozenset(
        {"init_weights", "use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval"}
        | {"asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"}
    ),
)


def _infer(config: AdamssConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the number of singular vectors, of clusters, and the largest rank."""
    ranks = [tensor.shape for leaves in found.values() for leaf, tensor in leaves.items() if leaf.startswith(f"{A}.")]
    counts = [sum(leaf.startswith(f"{A}.") for leaf in leaves) for leaves in found.values()]
    if not ranks:
        return {}
    sizes = {"r": max(r for _, r in ranks), "subspace_rank": max(rank for rank, _ in ranks)}
    return {**sizes, "num_subspaces": max(counts)}


AdamssConfig.form = PeftFormat(
    prefix="adamss_",
    parameters=(V,),
    numbered={A: lambda site: len(site.constants.sizes), B: lambda site: len(site.constants.sizes)},
    fixed=lambda config, site: (V,),
    buffers=(V,),
    values={
        "num_subspaces": Value(lambda config, site: len(site.constants.sizes)),
        "train_subspace_index": Value(lambda config, site: [*range(len(site.constants.sizes))]),
        "seg_result": Value(lambda config, site: dict(enumerate(site.constants.rows()))),
        "scatter_index": Value(lambda config, site: site.constants.order),
    },
    infer=_infer,
    only_here=("bias", "exclude_modules", "fan_in_fan_out"),
)
