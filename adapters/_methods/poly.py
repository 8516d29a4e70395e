"""Poly: polytropon, low-rank skills that a module has together for all tasks, and shares of them for each task.

    y = base(x) + B A x / r,    A = sum_s p_s A_s,    B = sum_s p_s B_s,    p = g / sum(g)

`g` is the sigmoid of a task's logits, in training a sample of relaxed Bernoulli variables with these logits, one for
each row of a batch. With `n_splits` parts, inputs and outputs are cut into as many, each with shares of its own: then
it is multi-head routing.

Ponti et al., *Combining Parameter-efficient Modules for Task-level Generalisation*, 2022, arXiv:2202.13914; Caccia et
al., *Multi-Head Adapter Routing for Cross-Task Generalization*, 2022, arXiv:2211.03831. Names, defaults and initial
distributions are those of PEFT's `tuners/poly`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchgraft.functional import (
    Constants,
    DrawsNoise,
    Layer,
    Method,
    PerAdapter,
    Rows,
    Site,
    UnsupportedConfig,
    Varying,
    Weights,
    widen,
)
from torchgraft.functional.extending import Tree, add_scaled

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .._config.tasks import Tasks
from .shared.low_rank import add_to_linear, route_to_linear

A, B, LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
_LEAST = 1e-12
"""What PEFT adds to a sum before it divides by it."""


@dataclasses.dataclass(kw_only=True)
class PolyConfig(AdapterConfig):
    """Poly has `n_skills` low-rank skills in each module, and learns for each task which of them count how much.

    Supports linear layers (also `transformers`' `Conv1D`). An adapter of one task is called and merged like any other.
    Of several, which task a row is of is data of a call, and each task is an adapter of a stack that `split_tasks`
    makes: its skills are those of all tasks, and gradients flow to them.

    In training mode shares are random, drawn from torch's generator: one sample for each row of the batch, the first
    axis of a layer's input. A merged weight has the shares of evaluation.

    Attributes:
        r: Rank of each skill.
        init_weights: `True` for zeros in all `B_s`, `False` for random ones.
        poly_type: `"poly"`.
        n_tasks: Number of tasks.
        n_skills: Number of skills.
        n_splits: Number of parts of inputs and outputs that have shares of their own; it divides both.

    >>> PolyConfig(n_tasks=3, n_skills=2, target_modules=["q", "v"]).n_splits
    1
    """

    r: int = 8
    init_weights: bool = True
    poly_type: str = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "n_tasks", "n_skills", "n_splits"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} is {value}, expected a positive integer")
        require(self.poly_type == "poly", self, f"poly_type is {self.poly_type!r}, expected 'poly'")


@dataclasses.dataclass(frozen=True, eq=False)
class PolyConstants(Constants):
    """The scaling factor `1 / r`."""

    scaling: Varying[float]


def plan(config: PolyConfig, sites: list[Site], weights: Weights) -> dict[str, PolyConstants]:
    """Return the constants of each site, whose inputs and outputs can be cut into parts."""
    for site in sites:
        for name, size in (("in_features", site.in_features), ("out_features", site.out_features)):
            what = f"n_splits is {config.n_splits} at {site.path}, whose {name} is {size}, expected a divisor"
            require(size % config.n_splits == 0, config, what)
    return {site.path: PolyConstants(1 / config.r) for site in sites}


def shapes(config: PolyConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """`A` is `"splits skills in/splits r"`, `B` is `"splits skills r out/splits"`, logits `"tasks splits*skills"`."""
    splits, skills = config.n_splits, config.n_skills
    return {
        A: (splits, skills, site.in_features // splits, config.r),
        B: (splits, skills, config.r, site.out_features // splits),
        LOGITS: (config.n_tasks, splits * skills),
    }


def init(
    config: PolyConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws: skill by skill, in each of them split by split."""
    made = {}
    for site in sites:
        leaves = {leaf: torch.zeros(size, dtype=torch.float32) for leaf, size in shapes(config, site).items()}
        for leaf in (A,) if config.init_weights else (A, B):
            for skill in range(config.n_skills):
                for split in range(config.n_splits):
                    drawn = torch.empty(leaves[leaf].shape[:1:-1], dtype=torch.float32)
                    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
                    leaves[leaf][split, skill] = drawn.T
        leaves[LOGITS].uniform_(-1e-3, 1e-3, generator=generator)
        made[site.path] = leaves
    return made


def split_tasks(config: PolyConfig, params: Tree) -> tuple[PolyConfig, Tree]:
    """Return the config of an adapter of one task, and a stack with an adapter for each task.

    The stack has views of the parameters, through which gradients flow to them: what tasks have in common is no copy.

    Args:
        config: The config of all tasks.
        params: Its tree.

    Raises:
        TypeError: Another method's config.
        ValueError: A tree whose logits are not those of the config's tasks; names the path.

    >>> from torchgraft.functional import bind, merge, route, unstack
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> config = PolyConfig(r=2, n_tasks=3, init_weights=False, target_modules=["0"])
    >>> params = bind(model, config).init()
    >>> single, tasks = split_tasks(config, params)
    >>> graft = bind(model, single)
    >>> y = graft(route(tasks, torch.tensor([2, 0])), torch.randn(2, 4))  # the task of each row
    >>> state = merge(graft, unstack(tasks)[2])  # or one task's model
    """
    if not isinstance(config, PolyConfig):
        raise TypeError(f"split_tasks: config is a {type(config).__name__}, expected a PolyConfig")
    for path, leaves in params.items():
        given = tuple(leaves[LOGITS].shape) if LOGITS in leaves else (config.n_tasks,)
        if given[:1] != (config.n_tasks,) or len(given) > 2:
            raise ValueError(
                f"{path}: {LOGITS} has shape {given}, expected ({config.n_tasks}, n_splits*n_skills), a row for each "
                f"of the config's {config.n_tasks} tasks"
            )
    count = config.n_tasks
    expanded = {
        path: {leaf: tensor.expand(count, *tensor.shape) for leaf, tensor in leaves.items()}
        for path, leaves in params.items()
    }
    return _single(config), _chosen(expanded, torch.arange(count))


def _single(config: PolyConfig) -> PolyConfig:
    return dataclasses.replace(config, n_tasks=1)


def _chosen(stacked: Tree, tasks: Tensor) -> Tree:
    """Return a stack of Poly adapters, of each of which one task is left: leaves `"N ..."`, tasks `"N"`."""
    return {
        path: {leaf: _row(one, tasks) if leaf == LOGITS else one for leaf, one in leaves.items()}
        for path, leaves in stacked.items()
    }


def _row(logits: Tensor, tasks: Tensor) -> Tensor:
    tasks = tasks.to(logits.device)
    return logits[torch.arange(len(tasks), device=logits.device), tasks].unsqueeze(1)


def apply(config: PolyConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + B A x / r`, the sum in the wider dtype and rounded once to the base's.

    Raises:
        UnsupportedConfig: An adapter of several tasks.
    """
    _check_single(config, site)
    if not base.training:
        return add_to_linear(base, x, *_mixed(config, leaves), site.constants.scaling, 0.0)
    y, rows = base(x), len(x) if x.ndim > 1 else 1
    shares = _shares(config, leaves[LOGITS].expand(rows, -1), sampled=True)
    added = _sampled(shares, x, leaves[A].unsqueeze(0), leaves[B].unsqueeze(0))
    return add_scaled(y, added.view(y.shape), site.constants.scaling)


def routed(config: PolyConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with matrices for each adapter; in training with a sample for each row, drawn in their order."""
    _check_single(config, site)
    scaling = site.constants.scaling
    if not base.training:
        return route_to_linear(base, x, *_mixed(config, leaves), scaling, 0.0, rows)
    if rows.tokens is not None or len(x) != rows.size:
        return NotImplemented
    groups, y = rows.each(), base(x)
    shares = _shares(config, groups.pick(leaves[LOGITS]).squeeze(1), sampled=True)
    added = groups.mask(_sampled(shares, x, groups.pick(leaves[A]), groups.pick(leaves[B])))
    if isinstance(scaling, PerAdapter):
        added, scaling = added * groups.pick(scaling.values).to(added.dtype).view(-1, 1, 1), 1.0
    return add_scaled(y, added.view(y.shape), scaling)


def merge(
    config: PolyConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + B A / r`, with the shares of evaluation.

    Raises:
        UnsupportedConfig: An adapter of several tasks.
    """
    _check_single(config, site)
    a, b = _mixed(config, leaves)
    return add_scaled(weight, b @ a, site.constants.scaling), bias


def _check_single(config: PolyConfig, site: Site) -> None:
    if config.n_tasks > 1:
        raise UnsupportedConfig(
            f"{site.path}: this adapter is of {config.n_tasks} tasks, and nothing says which one is meant; make it "
            "adapters of one task, single, tasks = split_tasks(config, params), for bind(model, single), and call "
            "graft(route(tasks, task_ids), x) with the task of each row, or take unstack(tasks)[task]; in place, "
            "call adapter_rows(model, names, task_ids=task_ids)(x), or a PeftModel, model(x, task_ids=task_ids)"
        )


def _shares(config: PolyConfig, logits: Tensor, sampled: bool = False) -> Tensor:
    """Return each skill's share of a mix, `"... splits skills"`, of logits `"... splits*skills"`.

    A sample of relaxed Bernoulli variables of temperature 1 is a sigmoid of the logits and logistic noise.
    """
    logits = logits.unflatten(-1, (config.n_splits, config.n_skills))
    gates = torch.sigmoid(logits)
    if sampled:
        finfo = torch.finfo(logits.dtype)
        uniform = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device).clamp(finfo.eps, 1 - finfo.eps)
        gates = torch.sigmoid(uniform.log() - (-uniform).log1p() + logits).clamp(finfo.tiny, 1 - finfo.eps)
    return gates / (gates.sum(-1, keepdim=True) + _LEAST)


def _mixed(config: PolyConfig, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`A`, `"r in"`, and `B`, `"out r"`, mixed by the shares of one task; of a stack they are stacked."""
    shares, a, b = widen(_shares(config, leaves[LOGITS].squeeze(-2)), leaves[A], leaves[B])
    a = torch.einsum("...qs,...qsdr->...rqd", shares, a).flatten(-2)
    b = torch.einsum("...qs,...qsrd->...qdr", shares, b).flatten(-3, -2)
    return a, b


def _sampled(shares: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return `B A x` with shares for each row, which multiply coordinates, so that no row has matrices of its own.

    Args:
        shares: `"rows splits skills"`.
        x: `"rows ... in"`, or `"in"` for one row.
        a: `"rows splits skills in/splits r"`, or one for all rows.
        b: `"rows splits skills r out/splits"`, likewise.

    Returns:
        `"rows tokens out"`.
    """
    x, shares, a, b = widen(x, shares, a, b)
    rows, splits, _ = shares.shape
    parts = x.reshape(rows, math.prod(x.shape[1:-1]), splits, x.shape[-1] // splits)
    each = shares.unsqueeze(1).unsqueeze(-1)
    down = (torch.einsum("ntqd,nqsdr->ntqsr", parts, a) * each).sum((2, 3))
    mixed = down[:, :, None, None] * each
    return torch.einsum("ntqsr,nqsrd->ntqd", mixed, b).flatten(-2)


PolyConfig.method = Method(
    name="POLY",
    config=PolyConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    constants=PolyConstants,
    routed=routed,
    varying=frozenset({"r", "init_weights"}),
    abilities=(DrawsNoise(),),
)


def _infer(config: PolyConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return rank and numbers of parts, skills and tasks, from the first module that has them all."""
    for leaves in found.values():
        if A in leaves and LOGITS in leaves and (leaves[A].ndim, leaves[LOGITS].ndim) == (4, 2):
            splits, skills, _, r = leaves[A].shape
            return {"r": r, "n_splits": splits, "n_skills": skills, "n_tasks": len(leaves[LOGITS])}
    return {}


def _field(name: str) -> Value:
    return Value(lambda config, site: getattr(config, name))


PolyConfig.form = PeftFormat(
    prefix="poly_",
    parameters=(A, B),
    grouped=(LOGITS,),
    values={name: _field(name) for name in ("r", "n_tasks", "n_skills", "n_splits", "poly_type")},
    infer=_infer,
    tasks=Tasks(lambda config: config.n_tasks, _single, _chosen),
    only_here=("bias", "fan_in_fan_out", "layers_pattern", "layers_to_transform"),
)
