"""PSOFT: an orthogonal map within the principal subspace of each weight.

    y = base(x) + s B (diag(v_b) R diag(v_a) - I) A x,    B = U S / s,    A = V^T,    U S V^T = W cut to rank r

`A` and `B` are frozen. `R = (I + Q)(I - Q)^-1` with a skew-symmetric `Q`, or the start of its series, keeps the angles
between the principal parts of the weight's columns; the two vectors, ones at first, loosen that a little.

Wu et al., *Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation*, 2025, arXiv:2505.11235. Names,
defaults and initial values are those of PEFT's `tuners/psoft`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchgraft.functional import Constants, Layer, Method, PerAdapter, Rows, Site, Varying, Weights, widen

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.called import DROPOUT
from .shared.low_rank import add_to_site, route_to_linear
from .shared.principal import check_known, principal

R, V_A, V_B = "psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"


@dataclasses.dataclass(kw_only=True)
class PsoftConfig(AdapterConfig):
    """PSOFT turns the principal subspace of each targeted weight, and leaves the rest of the weight alone.

    Supports linear layers and, what PEFT refuses, `transformers`' `Conv1D`, embeddings, convolutions in any number of
    groups, and weights in double precision. The factors are constants of the graft, made from the weights when it is
    bound; files do not hold them, so they belong to one base. Beside other adapters the factors are still those of the
    base's own weight.

    Attributes:
        r: Size of the subspace, at most the smaller size of each weight.
        psoft_alpha: Numerator of the scaling factor, `s = psoft_alpha / r`, which `B` is divided by.
        psoft_dropout: Probability of dropout on the adapter's input, in training mode; embeddings ignore it.
        ab_svd_init: `"psoft_init"` for an orthonormal `A`, `"pissa_init"` for roots of the singular values in both
            factors.
        psoft_svd: `"full"`, or `"lowrank"` for torch's randomised decomposition.
        psoft_svd_lowrank_niter: Steps of that.
        random_seed: Seed of that.
        psoft_orth: Whether `R` is orthogonal; else it is a free matrix.
        psoft_mag_b: Whether there is a `v_b`.
        psoft_mag_a: Whether there is a `v_a`.
        use_cayley_neumann: Sum a series instead of solving a linear system; orthogonal up to the series' error.
        num_cayley_neumann_terms: Number of terms; 3 is the same as 4, as in PEFT.
        cayley_neumann_eps: Bound of the norm of `Q` for the series; `None` for no bound.
        init_weights: `True` for the identity, `False` for an `R` away from it.

    >>> PsoftConfig(r=4, target_modules=["q_proj"]).psoft_orth
    True
    """

    r: int = 32
    psoft_alpha: int = 32
    psoft_dropout: float = 0.0
    ab_svd_init: str = "psoft_init"
    psoft_svd: str = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        p, terms, eps = self.psoft_dropout, self.num_cayley_neumann_terms, self.cayley_neumann_eps
        require(self.r > 0, self, f"r is {self.r}, expected a positive integer")
        require(self.psoft_alpha != 0, self, "psoft_alpha is 0, expected another number, for B is divided by it")
        require(0 <= p < 1, self, f"psoft_dropout is {p}, expected 0 <= p < 1")
        for name, known in (("ab_svd_init", ("psoft_init", "pissa_init")), ("psoft_svd", ("full", "lowrank"))):
            value = getattr(self, name)
            require(value in known, self, f"{name} is {value!r}, expected {known[0]!r} or {known[1]!r}")
        require(self.psoft_svd_lowrank_niter >= 0, self, f"psoft_svd_lowrank_niter is {self.psoft_svd_lowrank_niter}")
        positive = self.ab_svd_init == "psoft_init" or self.psoft_alpha > 0
        require(positive, self, f"psoft_alpha is {self.psoft_alpha}, expected a positive number, for 'pissa_init'")
        what = f"num_cayley_neumann_terms is {terms}, expected 2 or more; the first term is the identity"
        require(terms > 1 or not self.use_cayley_neumann, self, what)
        require(eps is None or 0 < eps < 1, self, f"cayley_neumann_eps is {eps}, expected None or 0 < eps < 1")
        self._warn_of_what_has_no_effect()

    def _warn_of_what_has_no_effect(self) -> None:
        """Warn of fields of the series, and of the randomised decomposition, without these."""
        needs = {
            "use_cayley_neumann=True": ("num_cayley_neumann_terms", "cayley_neumann_eps"),
            "psoft_svd='lowrank'": ("psoft_svd_lowrank_niter",),
        }
        on = {"use_cayley_neumann=True": self.use_cayley_neumann, "psoft_svd='lowrank'": self.psoft_svd == "lowrank"}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for condition, names in needs.items():
            for name in names if not on[condition] else ():
                if (value := getattr(self, name)) != defaults[name]:
                    what = f"PsoftConfig: {name} is {value}, which has no effect without {condition}"
                    warnings.warn(what, UserWarning, stacklevel=4)


@dataclasses.dataclass(frozen=True, eq=False)
class PsoftConstants(Constants):
    """The frozen factors, `"r in/groups*kernel"` and, with the scaling factor in, `"out r"`, and that factor."""

    a: Varying[Tensor]
    b: Varying[Tensor]
    scaling: Varying[float]


def plan(config: PsoftConfig, sites: list[Site], weights: Weights) -> dict[str, PsoftConstants]:
    """Return the factors of each weight.

    Raises:
        ValueError: A rank above the smaller size of a weight; names the site.
    """
    planned, scaling = {}, config.psoft_alpha / config.r
    niter = config.psoft_svd_lowrank_niter if config.psoft_svd == "lowrank" else None
    for site in sites:
        weight = weights(site.path)
        most = min(weight.flatten(1).shape)
        what = f"r is {config.r} at {site.path}, whose weight as a matrix has the rank {most}; expected r <= {most}"
        require(config.r <= most, config, what)
        u, s, v = principal(weight, config.r, niter, config.random_seed)
        if config.ab_svd_init == "psoft_init":
            a, b = v, u * (s / scaling)
        else:
            root = (s / scaling).sqrt()
            a, b = root.unsqueeze(1) * v, u * root
        planned[site.path] = PsoftConstants(a, b * scaling, scaling)
    return planned


def shapes(config: PsoftConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`psoft_R.weight` is `"r*(r-1)/2"`, or `"r r"` for a free matrix, and the vectors are `"r"`."""
    r = config.r
    vectors = {V_A: config.psoft_mag_a, V_B: config.psoft_mag_b}
    matrix = (r * (r - 1) // 2,) if config.psoft_orth else (r, r)
    return {R: matrix, **{leaf: (r,) for leaf, there in vectors.items() if there}}


def init(
    config: PsoftConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """The identity, or numbers around it, in PEFT's order of draws."""
    made = {}
    for site in sites:
        leaves = {leaf: torch.ones(shape, dtype=torch.float32) for leaf, shape in shapes(config, site).items()}
        leaves[R] = torch.zeros_like(leaves[R]) if config.psoft_orth else torch.eye(config.r, dtype=torch.float32)
        if not config.init_weights:
            drawn = torch.empty_like(leaves[R]).normal_(generator=generator)
            leaves[R] = leaves[R] + drawn * 0.1
        made[site.path] = leaves
    return made


def apply(config: PsoftConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + s B (diag(v_b) R diag(v_a) - I) A dropout(x)`, rounded once to the base's dtype."""
    a, b = _factors(config, site, leaves)
    return add_to_site(site, base, x, a, b, leaves.get(DROPOUT, config.psoft_dropout))


def routed(config: PsoftConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with a map for each row; embeddings and convolutions take the general way."""
    if site.kind != "linear":
        return NotImplemented
    a, b = _factors(config, site, leaves)
    return route_to_linear(base, x, a.expand(len(b), *a.shape[-2:]), b, 1.0, config.psoft_dropout, rows)


def merge(
    config: PsoftConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + s B (diag(v_b) R diag(v_a) - I) A`."""
    a, b = _factors(config, site, leaves)
    return weight + (b @ a).reshape(weight.shape), bias


def _factors(config: PsoftConfig, site: Site, leaves: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return `A` and `s B (R - I)`; of a stack `"N r in"` or `"r in"`, and `"N out r"`."""
    fixed = (site.constants.a, site.constants.b)
    a, b = (one.values if isinstance(one, PerAdapter) else one for one in fixed)
    check_known(site, b, leaves[R], "PSOFT")
    between, a, b = widen(_change(config, leaves), a, b)
    return a, b @ between


def _change(config: PsoftConfig, leaves: dict[str, Any]) -> Tensor:
    """`diag(v_b) R diag(v_a) - I`, `"r r"`, exactly zero at first; computed in float32 or wider, also of a stack."""
    given = leaves[R]
    wide = torch.promote_types(given.dtype, torch.float32)
    one = torch.eye(config.r, dtype=wide, device=given.device)
    turn = _turn(config, given.to(wide), one) if config.psoft_orth else given.to(wide) - one
    v_a, v_b = (leaves[leaf].to(wide) if leaf in leaves else one.new_ones(config.r) for leaf in (V_A, V_B))
    gains = v_b.unsqueeze(-1) * v_a.unsqueeze(-2)
    return gains * turn + (gains - 1) * one


def _turn(config: PsoftConfig, vector: Tensor, one: Tensor) -> Tensor:
    """`R - I` from the upper triangle of `Q`."""
    size = config.r
    rows, columns = torch.triu_indices(size, size, 1, device=vector.device)
    place = (rows * size + columns).expand(vector.shape)
    upper = vector.new_zeros(*vector.shape[:-1], size * size).scatter(-1, place, vector).unflatten(-1, (size, size))
    q: Tensor = upper - upper.mT
    if not config.use_cayley_neumann:
        result: Tensor = torch.linalg.solve(one - q, 2 * q, left=False)
        return result
    if config.cayley_neumann_eps is not None:
        q = q * _shrinking(vector, config.cayley_neumann_eps)[..., None, None]
    if config.num_cayley_neumann_terms == 2:
        q = 2 * q
        return q
    series: Tensor = q
    for _ in range(max(3, config.num_cayley_neumann_terms - 1) - 1):
        series = 2 * q + q @ series
    return series


def _shrinking(vector: Tensor, bound: float) -> Tensor:
    """Return the factor, at most 1, that gives `Q` at most this Frobenius norm."""
    square = 2 * vector.square().sum(-1)
    outside = square > bound**2
    return torch.where(outside, bound * torch.where(outside, square, 1).rsqrt(), 1)


PsoftConfig.method = Method(
    name="PSOFT",
    config=PsoftConfig,
    kinds=frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=PsoftConstants,
    routed=routed,
    varying=frozenset(
        {"psoft_alpha", "ab_svd_init", "psoft_svd", "psoft_svd_lowrank_niter", "random_seed", "init_weights"}
    ),
)


def _infer(config: PsoftConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the size of the subspace and which parameters there are."""
    leaves = next((leaves for leaves in found.values() if R in leaves), None)
    if leaves is None:
        return {}
    orth = leaves[R].ndim == 1
    r = (1 + round((1 + 8 * len(leaves[R])) ** 0.5)) // 2 if orth else len(leaves[R])
    return {"r": r, "psoft_orth": orth, "psoft_mag_a": V_A in leaves, "psoft_mag_b": V_B in leaves}


PsoftConfig.form = PeftFormat(
    prefix="psoft_",
    dropout="psoft_dropout",
    grouped=(R, V_A, V_B),
    values={
        "r": Value(lambda config, site: config.r),
        "psoft_alpha": Value(lambda config, site: config.psoft_alpha),
        "scaling": Value(lambda config, site: site.constants.scaling),
    },
    infer=_infer,
    reads=("psoft_orth", "use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps"),
    only_here=("bias",),
)
