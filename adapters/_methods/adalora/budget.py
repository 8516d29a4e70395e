"""AdaLoRA's budget: which singular triplets stay, as pure functions of trees.

    score_k = s(E_k) + mean_j s(A_kj) + mean_i s(B_ik),    s = I * U,    i = |p dL/dp|
    I <- beta1 I + (1 - beta1) i,    U <- beta2 U + (1 - beta2) |i - I|

Triplets compete across all modules; those with the lowest scores get `E_k = 0`. Zhang et al., 2023, arXiv:2303.10512;
PEFT's `RankAllocator` and `update_and_allocate` in `tuners/adalora`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from torchgraft.functional.extending import Leaves, Tree

from ..._config.messages import require
from .adalora import AdaLoraConfig

_LEAVES = ("lora_A", "lora_B", "lora_E")


def adalora_state(config: AdaLoraConfig, params: Tree) -> Tree:
    """Return the state that `allocate` starts from: no importance yet, every triplet kept.

    Args:
        config: The adapter's config.
        params: One adapter's tree, or a stack of them, which gives a stack of states.

    Returns:
        A tree of tensors: `"importance"` and `"uncertainty"` like `params`, and `"kept"`, `{path: "r 1"}`.

    Raises:
        KeyError, TypeError: A tree that is no AdaLoRA adapter's.

    >>> import torch
    >>> from torchgraft.adapters import AdaLoraConfig
    >>> from torchgraft.functional import bind
    >>> config = AdaLoraConfig(init_r=2, target_r=1, total_step=4, target_modules="all-linear")
    >>> params = bind(torch.nn.Sequential(torch.nn.Linear(4, 3)), config).init()
    >>> adalora_state(config, params)["kept"]["0"].tolist()
    [[True], [True]]
    """
    params = _own(params, "params")
    return {
        "importance": {path: {leaf: torch.zeros_like(p) for leaf, p in params[path].items()} for path in params},
        "kept": {path: torch.ones_like(leaves["lora_E"], dtype=torch.bool) for path, leaves in params.items()},
        "uncertainty": {path: {leaf: torch.zeros_like(p) for leaf, p in params[path].items()} for path in params},
    }


def allocate(config: AdaLoraConfig, params: Tree, grads: Tree, state: Tree, step: int) -> tuple[Tree, Tree]:
    """Set the singular values of the least important triplets to zero, as the schedule has it.

    Call it once per step, after the optimizer's: it is PEFT's `update_and_allocate`. Before step
    `total_step - tfinal` it updates importance from `grads` and, every `deltaT` steps after `tinit`, masks all
    triplets over budget; at that step it masks for the last time and forgets importance; later it keeps that mask.
    In between two allocations a masked triplet may grow again. Ties at the threshold are all masked, as in PEFT.
    A budget of all triplets masks none, where PEFT raises.

    A pure function: works under `torch.func` and `torch.compile`, and for a stack of adapters under `torch.vmap`,
    where each has its own budget. Importance carries no gradients; the returned `lora_E` is differentiable in
    `params`. With an optimizer of `torch.optim`, call it under `torch.no_grad()` and copy each `lora_E` back.

    Args:
        config: The adapter's config; needs `total_step`.
        params: The tree after the optimizer's step.
        grads: The gradients of that step, a tree like `params`.
        state: From `adalora_state`, or the last call.
        step: Number of the step, a Python integer.

    Returns:
        The parameters with masked `lora_E`, and the next state.

    Raises:
        ValueError: No `total_step`; a stack outside of `torch.vmap`; trees that do not fit each other; a step that
            is no Python integer.
        KeyError, TypeError: A tree that is no AdaLoRA adapter's, a state that is none.

    >>> import torch
    >>> from torchgraft.adapters import AdaLoraConfig
    >>> config = AdaLoraConfig(init_r=2, target_r=1, total_step=1, target_modules=["layer"])
    >>> params = {"layer": {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(3, 2), "lora_E": torch.ones(2, 1)}}
    >>> grads = {"layer": {**params["layer"], "lora_E": torch.tensor([[1.0], [2.0]])}}
    >>> state = adalora_state(config, params)
    >>> params, state = allocate(config, params, grads, state, 0)
    >>> params, state = allocate(config, params, grads, state, 1)
    >>> params["layer"]["lora_E"].tolist()
    [[0.0], [1.0]]
    """
    last = _last(config)
    given = params
    params, grads = _own(params, "params"), _own(grads, "grads")
    require(isinstance(step, int) and step >= 0, config, f"step is {step!r}, expected a Python integer, 0 or more")
    if not isinstance(state, dict) or set(state) != {"importance", "kept", "uncertainty"}:
        found = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise TypeError(f"allocate: state is {found}, expected what adalora_state or the last allocate returned")
    kept = state["kept"]
    require(
        grads.keys() == params.keys() == kept.keys(),
        config,
        f"grads has {sorted(grads)} and state has {sorted(kept)}, expected the sites of params, {sorted(params)}",
    )
    importance, uncertainty = state["importance"], state["uncertainty"]
    if step < last:
        importance, uncertainty = _observe(config, params, grads, importance, uncertainty)
    ranks = [_rank(path, params[path]) for path in params]
    triplets, masking = budget(config, ranks, step)
    if step == last or (step < last and masking):
        kept = _keep(params, importance, uncertainty, sum(ranks) - triplets)
    if step >= last or masking:
        params = {
            path: {**leaves, "lora_E": torch.where(kept[path], leaves["lora_E"], 0)} for path, leaves in params.items()
        }
    if step == last:
        importance, uncertainty = _zeros(importance), _zeros(uncertainty)
    params = {path: {**leaves, **params.get(path, {})} for path, leaves in given.items()}
    return params, {"importance": importance, "kept": kept, "uncertainty": uncertainty}


def budget(config: AdaLoraConfig, ranks: list[int], step: int) -> tuple[int, bool]:
    """Return the number of triplets that a step allows over all modules, and whether it masks the others.

    Args:
        config: The adapter's config; needs `total_step`.
        ranks: The initial rank of each module.
        step: Number of the step.

    Raises:
        ValueError: No `total_step`.

    >>> from torchgraft.adapters import AdaLoraConfig
    >>> config = AdaLoraConfig(init_r=12, target_r=8, total_step=10)
    >>> [budget(config, [12, 12], step)[0] for step in (0, 1, 5, 9, 10)]
    [24, 21, 17, 16, 16]
    """
    last = _last(config)
    start, target = sum(ranks), config.target_r * len(ranks)
    if step <= config.tinit:
        return start, False
    if step > last:
        return target, True
    left = 1 - (step - config.tinit) / (last - config.tinit)
    return int((start - target) * left**3 + target), step % config.deltaT == 0


def orthogonality(config: AdaLoraConfig, params: Tree) -> Tensor:
    """AdaLoRA's regulariser: how far `A` and `B` are from having orthonormal triplets.

        orth_reg_weight * mean over all A and B of ||A A^T - I||_F and ||B^T B - I||_F

    Add it to the loss; PEFT does so in `AdaLoraModel.forward` where the model returns a loss.

    Args:
        config: The adapter's config, for `orth_reg_weight`.
        params: One adapter's tree.

    Returns:
        A scalar, differentiable in `params`.

    Raises:
        KeyError, TypeError: A tree that is no AdaLoRA adapter's.
        ValueError: A stack outside of `torch.vmap`.

    >>> import torch
    >>> from torchgraft.adapters import AdaLoraConfig
    >>> eye = torch.eye(2)
    >>> params = {"layer": {"lora_A": eye, "lora_B": eye, "lora_E": torch.ones(2, 1)}}
    >>> orthogonality(AdaLoraConfig(), params)
    tensor(0.)
    """
    params = _own(params, "params")
    norms = []
    for path, leaves in params.items():
        identity = torch.eye(_rank(path, leaves), dtype=leaves["lora_A"].dtype, device=leaves["lora_A"].device)
        for rows in (leaves["lora_A"], leaves["lora_B"].mT):
            norms.append(torch.linalg.matrix_norm(rows @ rows.mT - identity))
    return config.orth_reg_weight * torch.stack(norms).mean()


def prune(config: AdaLoraConfig, params: Tree, state: Tree) -> tuple[AdaLoraConfig, Tree]:
    """Drop the masked triplets: smaller leaves, and a config that says which stayed, as PEFT saves them.

    For after training, outside of any transform: shapes depend on the mask. A graft bound to the new config computes
    with the new tree what the old one does with the masked tree.

    Args:
        config: The adapter's config.
        params: The masked tree.
        state: What `allocate` returned with it.

    Returns:
        The config with `rank_pattern`, and the tree.

    Raises:
        KeyError, TypeError: A tree that is no AdaLoRA adapter's.
        ValueError: A stack; a triplet that `state` masks and `params` does not.

    >>> import torch
    >>> from torchgraft.adapters import AdaLoraConfig
    >>> params = {"layer": {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(3, 2), "lora_E": torch.eye(2)[:, :1]}}
    >>> config, params = prune(AdaLoraConfig(init_r=2), params, {"kept": {"layer": torch.tensor([[True], [False]])}})
    >>> config.rank_pattern, params["layer"]["lora_B"].shape
    ({'layer.lora_E': [True, False]}, torch.Size([3, 1]))
    """
    given, params = params, _own(params, "params")
    require(config.rank_pattern is None, config, "rank_pattern is given, so these parameters are pruned already")
    pattern, pruned = {}, {}
    for path, leaves in params.items():
        _rank(path, leaves)
        kept = state["kept"][path].flatten()
        require(
            not leaves["lora_E"][~kept].any(),
            config,
            f"lora_E of {path} is not zero where state masks it; prune what allocate returned with this state",
        )
        pattern[f"{path}.lora_E"] = kept.tolist()
        a, b, e = leaves["lora_A"][kept], leaves["lora_B"][:, kept], leaves["lora_E"][kept]
        pruned[path] = {"lora_A": a, "lora_B": b, "lora_E": e}
    rest = {path: {**leaves, **pruned.get(path, {})} for path, leaves in given.items()}
    return dataclasses.replace(config, rank_pattern=pattern), rest


def _last(config: AdaLoraConfig) -> int:
    """Return the step of the last allocation."""
    if config.total_step is None:
        raise ValueError("AdaLoraConfig: total_step is None, expected the number of training steps for the schedule")
    return config.total_step - config.tfinal


def _observe(
    config: AdaLoraConfig, params: Tree, grads: Tree, importance: Tree, uncertainty: Tree
) -> tuple[Tree, Tree]:
    """Return the two running averages, one step later."""
    averages: Tree = {path: {} for path in params}
    deviations: Tree = {path: {} for path in params}
    for path, leaves in params.items():
        for leaf, p in leaves.items():
            now = (p * grads[path][leaf]).abs().detach()
            average = config.beta1 * importance[path][leaf] + (1 - config.beta1) * now
            deviation = (now - average).abs()
            averages[path][leaf] = average
            deviations[path][leaf] = config.beta2 * uncertainty[path][leaf] + (1 - config.beta2) * deviation
    return averages, deviations


def _keep(params: Tree, importance: Tree, uncertainty: Tree, excess: int) -> Tree:
    """Masks, `{path: "r 1"}`, without the `excess` triplets of the lowest score."""
    scores: Leaves = {}
    for path in params:
        s = {leaf: importance[path][leaf] * uncertainty[path][leaf] for leaf in ("lora_A", "lora_B", "lora_E")}
        scores[path] = s["lora_E"] + s["lora_A"].mean(1, keepdim=True) + s["lora_B"].mean(0).unsqueeze(1)
    if excess <= 0:
        return {path: torch.ones_like(score, dtype=torch.bool) for path, score in scores.items()}
    threshold = torch.cat([score.flatten() for score in scores.values()]).sort().values[excess - 1]
    return {path: score > threshold for path, score in scores.items()}


def _zeros(tree: Tree) -> Tree:
    return {path: {leaf: torch.zeros_like(value) for leaf, value in leaves.items()} for path, leaves in tree.items()}


def _own(tree: Tree, what: str) -> Tree:
    """Return the leaves of AdaLoRA's own, without the tensors of the base that the adapter replaces."""
    if not isinstance(tree, dict):
        raise TypeError(
            f"{what} is of type {type(tree).__name__}, expected one AdaLoRA adapter's tree, as graft.init(generator) "
            "makes it"
        )
    own = {path: {leaf: leaves[leaf] for leaf in _LEAVES if leaf in leaves} for path, leaves in tree.items()}
    for path, leaves in own.items():
        if 0 < len(leaves) < len(_LEAVES) or not any(own.values()):
            raise KeyError(
                f"{what}[{path!r}] has {sorted(tree[path])}, expected {list(_LEAVES)}; give one AdaLoRA adapter's "
                "tree, {path: leaves}"
            )
    return {path: leaves for path, leaves in own.items() if leaves}


def _rank(path: str, leaves: Leaves) -> int:
    """Return the rank of one module's leaves, which have no axis for the adapter."""
    shape = tuple(leaves["lora_E"].shape)
    if len(shape) != 2:
        raise ValueError(
            f"{path}: lora_E has shape {shape}, expected (r, 1); for a stack of adapters use torch.vmap, or unstack it"
        )
    return shape[0]
