"""FRoD: a sparse matrix between bases that modules of one role share, in the place of each weight.

    y = base(x) + U (S + diag(l - l0)) V^T x,    W = U diag(l0) V^T

`V` is one basis for all modules of a role (all `q_proj`, say), made of their weights; the columns of `U` are those of
`W V^-T`, divided by their lengths `l0`. `l` and the entries of `S`, at places that a seed chooses, are trained: the
adapted weight is `U (S + diag(l)) V^T`. What is added is written as a difference from the start, which is exactly zero
there.

*FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees*, AAAI 2026, doi:10.1609/aaai.v40i31.39813. Names,
defaults and initial values are those of PEFT's `tuners/frod`.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.functional import Constants, Layer, Method, Site, Varying, Weights, widen
from torchgraft.functional.extending import add_scaled

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.called import DROPOUT, dropped
from .shared.principal import check_known

L, S = LEAVES = ("frod_lambda_l", "frod_lambda_s_values")


@dataclasses.dataclass(kw_only=True)
class FrodConfig(AdapterConfig):
    """FRoD turns each targeted weight by a sparse matrix between two bases, of which modules of a role share one.

    Supports linear layers (also `transformers`' `Conv1D`). The role of a module is the end of its name, as in PEFT:
    `layers.0.mlp.up` and `layers.1.mlp.up` share the basis `mlp_up`. The bases are constants of the graft, made of the
    weights that it is bound to. Beside other adapters they are still those of the base's own weights.

    Where PEFT does otherwise: it computes with `U diag(l0) V^T` in the place of the weight, which is the weight up to
    rounding; and it keeps a `U` that does not belong to the `V` of a file.

    Attributes:
        projection_prng_key: Seed of the places of the sparse entries.
        save_projection: Whether files hold the shared bases and places too.
        frod_dropout: Probability of dropout on the adapter's input, in training mode.
        init_weights: `True` for the identity, `False` for numbers around it.
        sparse_rate: Share of the entries beside the diagonal that are trained.
        regularization_alpha: What is added to the diagonal of the matrices that are inverted for a shared basis.
        progressbar: Has no effect: there is no such bar.
        runtime_offload_base_weight: Has no effect, with a warning: where the base's weights are is the user's to say.

    >>> FrodConfig(sparse_rate=0.02, target_modules=["q_proj"]).regularization_alpha
    0.001
    """

    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        p, rate, alpha = self.frod_dropout, self.sparse_rate, self.regularization_alpha
        require(0 <= p < 1, self, f"frod_dropout is {p}, expected 0 <= p < 1")
        require(0 <= rate <= 1, self, f"sparse_rate is {rate}, expected 0 to 1, the share of the trained entries")
        require(alpha >= 0, self, f"regularization_alpha is {alpha}, expected 0 or more")
        if self.runtime_offload_base_weight:
            warnings.warn(
                "FrodConfig: runtime_offload_base_weight is True, which has no effect; the base's weights stay where "
                "they are",
                UserWarning,
                stacklevel=3,
            )


@dataclasses.dataclass(frozen=True, eq=False)
class FrodConstants(Constants):
    """The bases, `"in in"` and `"out in"`, the places of the entries, `"2 entries"`, and `l0`, `"in"`."""

    frod_V: Varying[Tensor]
    frod_U: Varying[Tensor]
    frod_s_indices: Varying[Tensor]
    frod_s_size: Varying[Tensor]
    start: Varying[Tensor]


def role(site: Site) -> str:
    """Return the role of a module, by its name.

    >>> [role(Site(path, "linear", 2, 2)) for path in ("layers.0.mlp.up", "layers.0.up", "0.attention.output.dense")]
    ['mlp_up', 'up', 'attention_output']
    """
    *before, last = site.path.split(".")
    if not before or before[-1].isdigit():
        return last
    return "attention_output" if site.path.endswith("attention.output.dense") else f"{before[-1]}_{last}"


def by_role(sites: list[Site]) -> dict[str, list[Site]]:
    """Return the sites whose weights make the basis of each role: by index of their layer, the last one of equal ones.

    >>> found = by_role([Site(f"layers.{i}.up", "linear", 2, 2) for i in (1, 0)])
    >>> [site.path for site in found["up"]]
    ['layers.0.up', 'layers.1.up']
    """
    found: dict[str, dict[int, Site]] = {}
    for position, site in enumerate(sites):
        parts = site.path.split(".")
        numbers = [int(part) for part in parts if part.isdigit()]
        after = next((two for one, two in itertools.pairwise(parts) if one == "layers"), "")
        index = int(after) if after.isdigit() else numbers[0] if numbers else position
        found.setdefault(role(site), {})[index] = site
    return {name: [site for _, site in sorted(found[name].items())] for name in sorted(found)}


def plan(config: FrodConfig, sites: list[Site], weights: Weights) -> dict[str, FrodConstants]:
    """Return the bases of each role and module, in the dtype of its weight, and the places of the entries."""
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    bases = {}
    for name, owners in by_role(sites).items():
        _check_sizes(config, name, [site for site in sites if role(site) == name])
        matrices = [weights(site.path) for site in owners]
        v = shared_basis([_in_memory(matrix, torch.float32) for matrix in matrices], config.regularization_alpha)
        places = draw_places(v.shape[0], config.sparse_rate, generator)
        bases[name] = v.to(matrices[0]), places, torch.tensor(v.shape)
    planned = {}
    for site in sites:
        v, places, size = bases[role(site)]
        u, start = own_basis(weights(site.path), v)
        planned[site.path] = FrodConstants(v, u, places, size, start)
    return planned


def _check_sizes(config: FrodConfig, name: str, sites: list[Site]) -> None:
    first = sites[0]
    for site in sites:
        what = f"{first.path} has {first.in_features} inputs and {site.path} has {site.in_features}, and by their names"
        same = site.in_features == first.in_features
        require(same, config, f"{what} they share the basis {name!r}; leave one of them out of target_modules")


def _in_memory(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype, on the CPU as in PEFT, so that devices make the same bases."""
    return tensor.to(dtype=dtype) if tensor.is_meta else tensor.to("cpu", dtype)


def shared_basis(weights: list[Tensor], alpha: float) -> Tensor:
    """Return the basis of several weights, `"in in"`.

    With few outputs these are the right singular vectors of all of them. Else it is `R^T E`, where the weights are
    `Q R` and `E` are the eigenvectors of the mean of `(Q_i^T Q_i + alpha I)^-1`: the higher-order decomposition of
    Ponnapalli et al., 2011, doi:10.1371/journal.pone.0028072.

    Args:
        weights: `"out in"` each, in float32.
        alpha: Ridge of what is inverted.
    """
    together = torch.cat(weights, 0)
    if together.shape[0] < together.shape[1]:
        basis: Tensor = torch.linalg.svd(together, full_matrices=True)[2].T
        return basis
    q, r = torch.linalg.qr(together)
    ridge = alpha * torch.eye(r.shape[1], dtype=r.dtype, device=r.device)
    mean = torch.zeros_like(ridge)
    for part in q.split([len(weight) for weight in weights]):
        mean += torch.linalg.inv(part.T @ part + ridge)
    mean /= len(weights)
    mixed: Tensor = r.T @ torch.linalg.eigh(mean)[1]
    return mixed


def own_basis(weight: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return `U`, `"out in"`, in the dtype of the weight, and `l0`, `"in"`, of `W = U diag(l0) V^T`, in float32."""
    w, basis = _in_memory(weight, torch.float64), _in_memory(v, torch.float64)
    try:
        turned = torch.linalg.solve(basis, w.T).T
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined,unused-ignore] # strict alone sees it
        turned = w @ torch.linalg.pinv(basis, rtol=1e-6).T
    lengths = torch.linalg.norm(turned, dim=0)
    there = lengths > 1e-12
    u = torch.where(there, turned / torch.where(there, lengths, 1), 0)
    return u.float().to(weight), lengths.float().to(weight.device)


def draw_places(size: int, rate: float, generator: torch.Generator) -> Tensor:
    """Return rows and columns of entries beside the diagonal, `"2 entries"`; at least one where the rate is not 0.

    >>> draw_places(3, 0.3, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 2])
    """
    most = size * (size - 1)
    count = max(1, min(int(size * size * rate), most)) if rate > 0 and most else 0
    if not count:
        return torch.empty(2, 0, dtype=torch.long)
    place = torch.randperm(most, generator=generator, device="cpu")[:count]
    rows, columns = place // (size - 1), place % (size - 1)
    return torch.stack([rows, columns + (columns >= rows)])


def shapes(config: FrodConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`frod_lambda_l` is `"in"`, `frod_lambda_s_values` is `"entries"`."""
    return {L: (site.in_features,), S: (site.constants.frod_s_indices.shape[1],)}


def init(
    config: FrodConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """The weight's lengths and no entries, or numbers around these, in PEFT's order of draws."""
    made = {}
    for site in sites:
        entries = torch.zeros(shapes(config, site)[S], dtype=torch.float32)
        lengths = site.constants.start.float().to(entries.device, copy=True)
        if not config.init_weights:
            entries.normal_(std=0.1, generator=generator)
            lengths += 0.1 * torch.empty_like(lengths).normal_(generator=generator)
        made[site.path] = {L: lengths, S: entries}
    return made


def apply(config: FrodConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + U (S + diag(l - l0)) V^T dropout(x)`, the sum in the wider dtype and rounded once to the base's."""
    y = base(x)
    x = dropped(x, leaves.get(DROPOUT, config.frod_dropout), base.training)
    x, between, u, v = widen(x, _between(site, leaves), site.constants.frod_U, site.constants.frod_V)
    return add_scaled(y, F.linear(F.linear(x @ v, between), u), 1.0)


def merge(
    config: FrodConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + U (S + diag(l - l0)) V^T`."""
    u, v = (one.to(weight.dtype) for one in (site.constants.frod_U, site.constants.frod_V))
    return weight + u @ _between(site, leaves) @ v.mT, bias


def _between(site: Site, leaves: dict[str, Tensor]) -> Tensor:
    """`S + diag(l - l0)`, `"in in"`."""
    check_known(site, site.constants.frod_U, leaves[L], "FRoD")
    lengths, start, entries = widen(leaves[L], site.constants.start, leaves[S])
    size, places = site.in_features, site.constants.frod_s_indices.to(lengths.device)
    diagonal = torch.arange(size, device=lengths.device) * (size + 1)
    where, values = torch.cat([diagonal, places[0] * size + places[1]]), torch.cat([lengths - start, entries])
    return torch.zeros(size * size, dtype=values.dtype, device=values.device).scatter(0, where, values).view(size, size)


def _follow(
    config: FrodConfig, site: Site, weight: Callable[[], Tensor], shared: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Return the constants of a module that go with other shared ones: a `U` that belongs to their `V`."""
    if "frod_V" not in shared:
        return shared
    u, start = own_basis(weight(), shared["frod_V"])
    return {**shared, "frod_U": u, "start": start}


FrodConfig.method = Method(
    name="FROD",
    config=FrodConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=FrodConstants,
    varying=frozenset(
        {"init_weights", "projection_prng_key", "save_projection", "regularization_alpha", "progressbar"}
        | {"runtime_offload_base_weight"}
    ),
)


FrodConfig.form = PeftFormat(
    prefix="frod_",
    dropout="frod_dropout",
    parameters=LEAVES,
    values={
        "r": Value(lambda config, site: site.out_features),
        "frod_V": Value(lambda config, site: site.constants.frod_V),
        "frod_U": Value(lambda config, site: site.constants.frod_U),
        "frod_s_indices": Value(lambda config, site: site.constants.frod_s_indices),
        "frod_s_size": Value(lambda config, site: site.constants.frod_s_size),
        "runtime_offload_base_weight": Value(lambda config, site: config.runtime_offload_base_weight),
    },
    starts={L: "start"},
    shared=("frod_V", "frod_s_indices", "frod_s_size"),
    shared_by=role,
    follow_shared=_follow,
    saves_shared=lambda config: config.save_projection,
    only_here=("exclude_modules",),
)
