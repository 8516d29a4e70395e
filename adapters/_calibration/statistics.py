"""What data says about each module, for LoRA that starts from data: `fit_eva`, `fit_corda`, `fit_lora_ga`.

Each takes a model, a config and batches and returns a new config with the statistics in memory. The model stays what it
is: no hook is set, no flag is changed, no gradient is left.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import UnsupportedConfig
from torchgraft.functional.extending import Site, modules_of, weights_of, with_weights

from .._config.messages import names_of, require
from .._methods.lora.lora import LoraConfig
from .initial import Statistics
from .initial.configs import EvaConfig
from .initial.corda import covariance, oriented
from .initial.eva import Directions, shares
from .observing import Forward, check_reached, first, looked_at, loss_of, run, same_inputs, wide
from .progress import shown
from .redistributed import redistributed

Rows = Callable[[Tensor, Any, EvaConfig], Tensor]
"""`(input, batch, config) -> "rows in"`: what counts of the input of a module."""


def trained_tokens(x: Tensor, batch: Any, how: EvaConfig) -> Tensor:
    """Return the rows of an input at tokens that are neither padding nor, with `use_label_mask`, without label.

    Args:
        x: `"... in"`; masks apply where its leading axes are theirs.
        batch: The batch; masks are its `attention_mask` and `labels`.
        how: The config.

    >>> x = torch.arange(6.0).view(1, 3, 2)
    >>> trained_tokens(x, {"attention_mask": torch.tensor([[1, 1, 0]])}, EvaConfig())
    tensor([[0., 1.],
            [2., 3.]])
    """
    masks = []
    if isinstance(batch, Mapping):
        if isinstance(batch.get("attention_mask"), Tensor):
            masks.append(batch["attention_mask"].bool())
        if how.use_label_mask and isinstance(batch.get("labels"), Tensor):
            masks.append(batch["labels"] != how.label_mask_value)
    for mask in masks:
        if mask.shape != x.shape[:-1]:
            return x.flatten(0, -2)
    return x[torch.stack(masks).all(0)] if masks else x.flatten(0, -2)


def fit_eva(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[Any],
    forward: Forward = run,
    *,
    rows: Rows = trained_tokens,
    passes: int = 1,
    progress: bool = True,
) -> LoraConfig:
    """Compute EVA's statistics from data: main directions of each module's inputs, and ranks by explained variance.

    Batches are gone through until every direction that is used has stayed, up to `tau`, what it was a batch ago. The
    sum of the ranks stays; a module may get up to `rho` times its own, or none, and then is no target any more.

    Args:
        model: The model; it stays as it is, and is run in evaluation mode.
        config: A config with `init_lora_weights="eva"`.
        batches: What `forward` takes, one after the other.
        forward: `(model, batch) -> output`.
        rows: `(input, batch, config.eva_config) -> "rows in"`, the part of a module's input that counts.
        passes: How often to go through the batches at most.
        progress: Whether to show a progress bar, where tqdm is installed.

    Returns:
        A config with statistics, and with its modules, `rank_pattern` and `alpha_pattern` as data has it.

    Raises:
        ValueError: A config for another initialisation, a module that it does not speak of, no batches.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator object at ...>
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> config = LoraConfig(r=1, init_lora_weights="eva", target_modules=["0", "1"])
    >>> fitted = fit_eva(model, config, [torch.randn(64, 4) for _ in range(8)], passes=8, progress=False)
    >>> fitted.statistics
    Statistics('eva', 1 modules)
    """

    def at(path: str, x: Tensor, batch: Any, how: EvaConfig) -> Tensor:
        return rows(x, batch, how)

    sites, parts = eva_directions(model, config, batches, forward, at, passes, progress)
    how: Any = config.eva_config
    return redistributed(config, sites, modules_of(model), how, parts)


def eva_directions(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[Any],
    forward: Forward,
    rows: Callable[[str, Tensor, Any, EvaConfig], Tensor],
    passes: int,
    progress: bool,
) -> tuple[Mapping[str, Site], dict[str, Tensor]]:
    """Return the sites of a config, and the directions that EVA finds for each, `"rank in"`, by path.

    The arguments are those of `fit_eva`, but that `rows` gets the path of the module first.
    """
    graft, sites = looked_at(model, config, "eva")
    how = config.eva_config
    assert isinstance(how, EvaConfig)
    one, rest = first(batches, passes)
    leaders = same_inputs(graft, forward, one)
    counts = {path: min(round(site.constants.r * how.rho), site.in_features) for path, site in sites.items()}
    for leader in set(leaders.values()):
        group = [leader, *(path for path, other in leaders.items() if other == leader)]
        counts |= dict.fromkeys(group, max(counts[path] for path in group))
    found = {path: Directions(counts[path], how.tau) for path in sites if path not in leaders}
    ranks = dict(counts)
    for batch in shown(rest, "EVA", progress):
        missing = {path for path, one in found.items() if not one.found[: ranks[path]].all()}
        if not missing:
            break

        def see(path: str, x: Tensor, batch: Any = batch, missing: set[str] = missing) -> None:
            if path in missing:
                found[path].update(wide(rows(path, x, batch, how)))

        with graft.looking(see) as base:
            forward(base, batch)
        if all(one.components is not None for one in found.values()):
            ranks = _ranks(sites, found, leaders, counts)
    ranks = _ranks(sites, found, leaders, counts)
    _warn_of_unfound(found, ranks, how)
    return graft.sites[""], {
        path: _components(found[leaders.get(path, path)], rank, how) for path, rank in ranks.items()
    }


def _components(directions: Directions, rank: int, how: EvaConfig) -> Tensor:
    """Return the first directions, `"rank in"`, of an input."""
    assert directions.components is not None
    scale = directions.values[:rank, None].sqrt() if how.whiten else 1
    return (directions.components[:rank] / scale).to(directions.dtype, copy=True)


def _ranks(
    sites: Mapping[str, Site], found: Mapping[str, Directions], leaders: Mapping[str, str], counts: Mapping[str, int]
) -> dict[str, int]:
    """Return ranks of all modules that data has reached."""
    known = {
        path: found[leaders.get(path, path)]
        for path in sorted(sites, key=lambda path: path in leaders)
        if found[leaders.get(path, path)].components is not None
    }
    if not known:
        return {}
    ratios = {path: one.ratio[: counts[path]] for path, one in known.items()}
    budget = sum(sites[path].constants.r for path in known)
    return shares(ratios, budget, {path: leader for path, leader in leaders.items() if path in known})


def _warn_of_unfound(found: Mapping[str, Directions], ranks: Mapping[str, int], how: EvaConfig) -> None:
    bare = [path for path, one in found.items() if one.components is None]
    if bare:
        warnings.warn(
            f"fit_eva: no batch had enough rows for {names_of(bare)}, which start as plain LoRA does; give more",
            RuntimeWarning,
            stacklevel=3,
        )
    unsure = [path for path, one in found.items() if not one.found[: ranks.get(path, 0)].all()]
    if unsure:
        warnings.warn(
            f"fit_eva: the directions of {names_of(unsure)} still changed by more than tau={how.tau} allows; give more "
            "batches, or go through them more often with passes=...",
            RuntimeWarning,
            stacklevel=3,
        )


def fit_corda(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[Any],
    forward: Forward = run,
    *,
    progress: bool = True,
) -> LoraConfig:
    """Compute CorDA's statistics from data: each module's input covariance, and its product with the weight.

    Only the parts of the weights that the adapter takes are kept, of its rank at each module.

    Args:
        model: The model; it stays as it is, and is run in evaluation mode.
        config: A config with `init_lora_weights="corda"`; its `corda_config` says which parts.
        batches: What `forward` takes, one after the other.
        forward: `(model, batch) -> output`.
        progress: Whether to show a progress bar, where tqdm is installed.

    Returns:
        The config with statistics.

    Raises:
        ValueError: A config for another initialisation, a module that it does not speak of or that no batch reached, no
            batches, inputs that are not finite.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> config = LoraConfig(r=2, init_lora_weights="corda", target_modules=["0"])
    >>> fit_corda(model, config, [torch.randn(64, 4)], progress=False).statistics
    Statistics('corda', 1 modules)
    """
    graft, sites = looked_at(model, config, "corda")
    how: Any = config.corda_config
    for name in ("cache_file", "covariance_file"):
        require(
            getattr(how, name) is None,
            config,
            f"corda_config.{name} is {getattr(how, name)!r}, and fit_corda neither reads nor writes files; leave it "
            "out, the returned config has it all, or call preprocess_corda",
        )
    one, rest = first(batches, 1)
    leaders = same_inputs(graft, forward, one)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(path: str, x: Tensor) -> None:
        if path not in sites or path in leaders:
            return
        rows = x.flatten(0, -2)
        added = covariance(rows.half() if how.use_float16_for_covariance else wide(rows))
        if not added.isfinite().all():
            raise ValueError(
                f"fit_corda: the covariance of the inputs of {path} is not finite; their largest entry is {rows.max()}"
            )
        sums[path] = sums[path].add_(added) if path in sums else added
        counts[path] = counts.get(path, 0) + 1

    for batch in shown(rest, "CorDA", progress):
        with graft.looking(see) as base:
            forward(base, batch)
    check_reached(sites, sums.keys() | leaders.keys(), "fit_corda")
    weights = weights_of(sites, modules_of(model))
    found = {}
    for path, site in shown(sites.items(), "CorDA, decomposing", progress):
        leader = leaders.get(path, path)
        found[path] = oriented(wide(weights(path)), sums[leader] / counts[leader], site.constants.r, how.corda_method)
    return dataclasses.replace(config, statistics=Statistics("corda", found))


def fit_lora_ga(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] = loss_of,
    *,
    progress: bool = True,
) -> LoraConfig:
    """Compute LoRA-GA's statistics from data: the mean gradient of each targeted weight over the batches.

    The model runs in the modes that it has; PEFT sets it to training mode.

    Args:
        model: The model; it stays as it is.
        config: A config with `init_lora_weights="lora_ga"`.
        batches: What `loss` takes, one after the other.
        loss: `(model, batch) -> loss`, a scalar.
        progress: Whether to show a progress bar, where tqdm is installed.

    Returns:
        The config with statistics: one gradient, of the weight's size, for each module.

    Raises:
        ValueError: A config for another initialisation, a module that it does not speak of, whose weight is no
            parameter or on which no loss depends, no batches.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> config = LoraConfig(r=2, init_lora_weights="lora_ga", target_modules=["0"])
    >>> batches = [(torch.randn(8, 4), torch.randn(8, 4)) for _ in range(2)]
    >>> mse = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> fit_lora_ga(model, config, batches, mse, progress=False).statistics
    Statistics('lora_ga', 1 modules)
    """
    graft, sites = looked_at(model, config, "lora_ga")
    modules = modules_of(model)
    weights = {}
    for path in sites:
        own = modules[path]._parameters.get("weight")
        require(
            own is not None and own.is_floating_point(),
            config,
            f"the weight of {path} is no parameter of floating point, so it has no gradient; leave it out of "
            "target_modules",
        )
        assert own is not None
        weights[f"{path}.weight" if path else "weight"] = own.detach().requires_grad_()
    require(
        bool(weights),
        config,
        "init_lora_weights is 'lora_ga', which is for linear modules, and none of the targeted modules is one; set it "
        "to True, or target linear modules too",
        UnsupportedConfig,
    )
    sums: dict[str, Tensor] = {}
    _, rest = first(batches, 1)
    count = 0
    for batch in shown(rest, "LoRA-GA", progress):
        count += 1
        with torch.enable_grad(), with_weights(graft, weights) as base:
            grads = torch.autograd.grad(loss(base, batch), list(weights.values()), allow_unused=True)
        for path, grad in zip(sites, grads, strict=True):
            if grad is not None:
                sums[path] = sums[path].add_(grad) if path in sums else wide(grad).clone()
    check_reached(sites, sums.keys(), "fit_lora_ga")
    found = {path: {"gradient": site.canonical(sums[path] / count)} for path, site in sites.items()}
    return dataclasses.replace(config, statistics=Statistics("lora_ga", found))
