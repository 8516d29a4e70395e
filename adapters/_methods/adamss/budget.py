"""AdaMSS's budget: which clusters of rows go on being trained, as pure functions of trees.

    score_i = mean s(A_i) + mean s(B_i),    s = I * U,    now = |p dL/dp|
    U <- beta2 U + (1 - beta2) |now - I|,    I <- beta1 I + (1 - beta1) now

Clusters compete across all modules; those with the lowest scores are frozen where they are, for good. Zheng et al.,
2025, OpenReview 8ZdWmpYxT0; PEFT's `update_and_allocate` in `tuners/adamss`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchgraft.functional.extending import Tree

from ..._config.messages import require
from .adamss import AdamssConfig

_A, _B = "adamss_A.", "adamss_B."
_STATE = {"importance", "kept", "uncertainty"}


def adamss_state(config: AdamssConfig, params: Tree) -> Tree:
    """Return the state that `allocate_subspaces` starts from: no importance yet, every cluster trained.

    Args:
        config: The adapter's config.
        params: One adapter's tree, or a stack of them, which gives a stack of states.

    Returns:
        A tree of tensors: `"importance"` and `"uncertainty"` like `params`, and `"kept"`, `{path: {number: ""}}`, bool.

    Raises:
        KeyError, TypeError: A tree that is no AdaMSS adapter's.

    >>> params = {"layer": {"adamss_A.0": torch.ones(1, 2), "adamss_B.0": torch.zeros(3, 1)}}
    >>> adamss_state(AdamssConfig(), params)["kept"]
    {'layer': {'0': tensor(True)}}
    """
    params = _own(params, "params")
    kept = {path: {i: _ones_like(leaves[_A + i]) for i in _numbers(leaves)} for path, leaves in params.items()}
    return {"importance": _zeros(params), "kept": kept, "uncertainty": _zeros(params)}


def allocate_subspaces(config: AdamssConfig, params: Tree, grads: Tree, state: Tree, step: int) -> Tree:
    """Return the state after a step: the importance of each cluster, and which clusters stay trained.

    Call it once per step; it is PEFT's `update_and_allocate`. From step `init_warmup` to `final_warmup` it updates
    importance from `grads`; every `mask_interval` steps of these it keeps as many of the kept clusters as the schedule
    has it, those of the highest scores, and forgets importance. Ties at the threshold are all kept. PEFT keeps one less
    than the schedule has it wherever it masks any.

    A pure function: works under `torch.func` and `torch.compile`, and for a stack of adapters under `torch.vmap`,
    where each has its own budget. The state carries no gradients.

    Args:
        config: The adapter's config, with `use_asa=True`.
        params: One adapter's tree.
        grads: Its gradients, a tree like `params`.
        state: From `adamss_state`, or the last call.
        step: Number of the step, a Python integer.

    Raises:
        ValueError: `use_asa` is not set; a stack outside of `torch.vmap`; trees that do not fit each other; a step that
            is no Python integer.
        KeyError, TypeError: A tree that is no AdaMSS adapter's, a state that is none.

    >>> config = AdamssConfig(use_asa=True, asa_target_subspaces=1, init_warmup=0, final_warmup=1, mask_interval=1)
    >>> params = {"layer": {f"adamss_{leaf}.{i}": torch.ones(1, 1) for leaf in "AB" for i in (0, 1)}}
    >>> grads = {"layer": {name: torch.full((1, 1), 1.0 + float(name[-1])) for name in params["layer"]}}
    >>> state = adamss_state(config, params)
    >>> for step in (0, 1):
    ...     state = allocate_subspaces(config, params, grads, state, step)
    >>> state["kept"]
    {'layer': {'0': tensor(False), '1': tensor(True)}}
    """
    require(config.use_asa, config, "use_asa is False, so there is no budget; set use_asa=True")
    require(isinstance(step, int) and step >= 0, config, f"step is {step!r}, expected a Python integer, 0 or more")
    params, grads = _own(params, "params"), _own(grads, "grads")
    if not isinstance(state, dict) or set(state) != _STATE:
        found = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise TypeError(f"allocate_subspaces: state is {found}, expected what adamss_state or the last call returned")
    kept = state["kept"]
    require(
        grads.keys() == params.keys() == kept.keys(),
        config,
        f"grads has {sorted(grads)} and state has {sorted(kept)}, expected the sites of params, {sorted(params)}",
    )
    _check_one(params)
    if not config.init_warmup <= step <= config.final_warmup:
        return state
    importance, uncertainty = _observe(config, params, grads, state)
    if step % config.mask_interval == 0:
        count = subspace_budget(config, sum(len(numbers) for numbers in kept.values()), step)
        kept = _keep(kept, importance, uncertainty, count)
        importance, uncertainty = _zeros(importance), _zeros(uncertainty)
    return {"importance": importance, "kept": kept, "uncertainty": uncertainty}


def subspace_budget(config: AdamssConfig, total: int, step: int) -> int:
    """Return the number of clusters that a step allows over all modules.

    Args:
        config: The adapter's config.
        total: The number of all of them.
        step: Number of the step, from `init_warmup` to `final_warmup`.

    >>> config = AdamssConfig(asa_target_subspaces=4, init_warmup=0, final_warmup=10)
    >>> [subspace_budget(config, 20, step) for step in (0, 2, 5, 10)]
    [20, 12, 6, 4]
    """
    left = 1 - (step - config.init_warmup) / (config.final_warmup - config.init_warmup)
    target = config.asa_target_subspaces
    return int(target + (total - target) * left**config.asa_schedule_exponent)


def freeze_subspaces(before: Tree, after: Tree, state: Tree) -> Tree:
    """Return the parameters after an optimizer's step, with those of frozen clusters as they were before it.

    So neither momentum nor weight decay moves them, as if the optimizer did not have them.

    Args:
        before: One adapter's tree, or a stack of them.
        after: The same after the step.
        state: From `adamss_state` or `allocate_subspaces`, of a stack a stack of states.

    Raises:
        KeyError, TypeError: A tree that is no AdaMSS adapter's; names what it lacks.

    >>> before = {"layer": {"adamss_A.0": torch.zeros(1, 2), "adamss_B.0": torch.zeros(2, 1)}}
    >>> after = {"layer": {name: leaf + 1 for name, leaf in before["layer"].items()}}
    >>> freeze_subspaces(before, after, {"kept": {"layer": {"0": torch.tensor(False)}}})["layer"]["adamss_A.0"]
    tensor([[0., 0.]])
    """
    own, found = _own(after, "after"), {}
    for path, leaves in own.items():
        numbers = state["kept"][path]
        found[path] = {
            leaf: torch.where(numbers[leaf.partition(".")[2]][..., None, None], new, before[path][leaf])
            for leaf, new in leaves.items()
        }
    return {path: {**leaves, **found.get(path, {})} for path, leaves in after.items()}


def _observe(config: AdamssConfig, params: Tree, grads: Tree, state: Tree) -> tuple[Tree, Tree]:
    """Return the two running averages, one step later."""
    averages: Tree = {path: {} for path in params}
    deviations: Tree = {path: {} for path in params}
    for path, leaves in params.items():
        for leaf, p in leaves.items():
            now, average = (p * grads[path][leaf]).abs().detach(), state["importance"][path][leaf]
            share = config.asa_uncertainty_beta
            deviations[path][leaf] = share * state["uncertainty"][path][leaf] + (1 - share) * (now - average).abs()
            share = config.asa_importance_beta
            averages[path][leaf] = share * average + (1 - share) * now
    return averages, deviations


def _keep(kept: Tree, importance: Tree, uncertainty: Tree, count: int) -> Tree:
    """Return which clusters are kept: of those that were, `count` of the highest scores."""
    scores = {}
    for path, numbers in kept.items():
        s = {leaf: importance[path][leaf] * uncertainty[path][leaf] for leaf in importance[path]}
        for i, own in numbers.items():
            scores[path, i] = torch.where(own, s[_A + i].mean() + s[_B + i].mean(), -torch.inf)
    if count >= len(scores):
        return kept
    threshold = torch.stack(list(scores.values())).sort(descending=True).values[count - 1]
    return {
        path: {i: own & (scores[path, i] >= threshold) for i, own in numbers.items()} for path, numbers in kept.items()
    }


def _numbers(leaves: Tree) -> list[str]:
    return [leaf.removeprefix(_A) for leaf in leaves if leaf.startswith(_A)]


def _ones_like(leaf: Tensor) -> Tensor:
    return torch.ones(leaf.shape[:-2], dtype=torch.bool, device=leaf.device)


def _zeros(tree: Tree) -> Tree:
    return {path: {leaf: torch.zeros_like(value) for leaf, value in leaves.items()} for path, leaves in tree.items()}


def _check_one(params: Tree) -> None:
    for path, leaves in params.items():
        for leaf, value in leaves.items():
            if value.ndim != 2:
                raise ValueError(
                    f"{path}: {leaf} has shape {tuple(value.shape)}, expected a matrix; for a stack of adapters use "
                    "torch.vmap, or unstack it"
                )


def _own(tree: Tree, what: str) -> Tree:
    """Return the leaves of AdaMSS's own, without the tensors of the base that the adapter replaces."""
    if not isinstance(tree, dict):
        raise TypeError(
            f"{what} is of type {type(tree).__name__}, expected one AdaMSS adapter's tree, as graft.init(generator) "
            "makes it"
        )
    own = {
        path: {leaf: value for leaf, value in leaves.items() if leaf.startswith((_A, _B))}
        for path, leaves in tree.items()
    }
    for path, leaves in own.items():
        pairs = {f"{prefix}{i}" for i in _numbers(leaves) for prefix in (_A, _B)}
        if leaves.keys() != pairs or not any(own.values()):
            raise KeyError(
                f"{what}[{path!r}] has {sorted(tree[path])}, expected 'adamss_A.0', 'adamss_B.0' and so on; give one "
                "AdaMSS adapter's tree, {path: leaves}"
            )
    return {path: leaves for path, leaves in own.items() if leaves}
