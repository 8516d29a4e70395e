"""The leaves of parameter trees as optimizers want them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._trees import flatten


def trainable(params: Any) -> list[Tensor]:
    """Make the leaves of a tree trainable, in place, and return them in one list: `AdamW(trainable(params))`.

    The tree stays what is given to calls and saved, and steps of the optimizer are seen in it. For settings of each
    adapter, one group each: `AdamW([{"params": trainable(a), "lr": 1e-3}, {"params": trainable(b), "lr": 1e-4}])`.

    Args:
        params: A tree, a stack, `{name: tree}`, or a part of one, whose tensors are leaves of autograd.

    Returns:
        Its leaves in the tree's order, each once; `requires_grad` is set.

    Raises:
        TypeError: Something else than a tree; a leaf of integers.
        ValueError: A tree without leaves; a leaf that was computed from others, to which an optimizer cannot write.

    >>> import torch
    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind
    >>> graft = bind(torch.nn.Linear(4, 3), LoraConfig(r=2, target_modules="all-linear"))
    >>> params = graft.init()
    >>> optimizer = torch.optim.AdamW(trainable(params), lr=1e-2)
    >>> graft(params, torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    """
    leaves = checked_leaves(params, "trainable")
    return list({id(leaf): leaf.requires_grad_() for leaf in leaves.values()}.values())


def checked_leaves(params: Any, what: str) -> dict[str, Tensor]:
    """Return the leaves of a tree by a readable path, each of which an optimizer can write to.

    Raises:
        TypeError, ValueError: As `trainable` does; `what` is who asks.
    """
    if not isinstance(params, dict):
        raise TypeError(
            f"{what}: params is of type {type(params).__name__}, expected one parameter tree, as graft.init() makes it"
            + _remedy(params)
        )
    leaves = flatten(params)
    if not leaves:
        raise ValueError(f"{what}: the tree has no leaves; graft.init(generator) makes one")
    for path, leaf in leaves.items():
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(
                f"{what}: leaf {path} has dtype {leaf.dtype}, which has no gradient; expected float32 or so"
            )
        if leaf.is_inference():
            raise ValueError(
                f"{what}: leaf {path} was made in torch.inference_mode(), which forbids training; clone it"
            )
        if not leaf.is_leaf:
            raise ValueError(
                f"{what}: leaf {path} was computed from tensors that require gradients ({leaf.grad_fn}), so no "
                "optimizer can write to it; train those, or make it under torch.no_grad() or from detached ones"
            )
    return leaves


def _remedy(params: Any) -> str:
    if hasattr(params, "tree"):
        return "; give the stack that was routed"
    if callable(getattr(params, "parameters", None)):
        return "; a module has parameters(), and where adapters are in place, those that require gradients are theirs"
    if callable(getattr(params, "init", None)):
        return "; a graft holds no parameters"
    if isinstance(params, (list, tuple)):
        return "; of several trees: [leaf for tree in trees for leaf in trainable(tree)]"
    return ""
