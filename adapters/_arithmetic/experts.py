"""LoRA adapters as the experts of one Arrow adapter, with what they know in common taken out of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchgraft.functional.extending import Tree, sort

from .._methods.arrow import A, ArrowLoraConfig, B
from .given import check_adapters
from .products import Adapter, Product, products


def arrow_experts(
    adapters: Sequence[Adapter],
    generals: Sequence[Adapter] = (),
    *,
    top_k: int = 3,
    router_temperature: float = 1.0,
    rng_seed: int | None = None,
) -> tuple[ArrowLoraConfig, Tree]:
    """Return an adapter that routes each token among LoRA adapters: a pure function, differentiable in their trees.

    With adapters of general knowledge, the means of their `A` and `B` are subtracted from those of each expert, as in
    GenKnowSub: Bagherifard et al., *GenKnowSub*, ACL 2025 (acl-short.54).

    Args:
        adapters: `(config, params)` of each expert: LoRA on the same linear layers, of one rank.
        generals: Those of general knowledge, alike.
        top_k: Number of experts that a token has; all of them where there are fewer.
        router_temperature: What similarities are divided by.
        rng_seed: As in `ArrowLoraConfig`.

    Returns:
        `(config, params)`; each leaf `arrow_B` has its expert's scaling factor in it.

    Raises:
        TypeError, ValueError: Something else than such adapters; names which one, and the path.

    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> config = LoraConfig(r=2, init_lora_weights=False, target_modules=["0"])
    >>> experts = [(config, bind(model, config).init()) for _ in range(4)]
    >>> config, params = arrow_experts(experts, top_k=2)
    >>> y = bind(model, config)(params, torch.ones(5, 4))
    """
    given = check_adapters(adapters, "arrow_experts")
    common = check_adapters(generals, "arrow_experts: generals") if generals else []
    whats = [f"adapters[{i}]" for i in range(len(given))] + [f"generals[{i}]" for i in range(len(common))]
    each = [products(config, tree, what) for (config, tree), what in zip([*given, *common], whats, strict=True)]
    for (_, tree), found, what in zip([*given, *common], each, whats, strict=True):
        _check_alike(each[0], found, tree, what)
    params: Tree = {}
    for path, first in each[0].items():
        a = torch.stack([one[path].a[0] for one in each])
        b = torch.stack([one[path].b[0] for one in each])
        if common:
            a, b = (part[: len(given)] - part[len(given) :].mean(0) for part in (a, b))
        scalings = torch.tensor([one[path].scaling for one in each[: len(given)]], dtype=b.dtype, device=b.device)
        params[path] = {A: a.to(first.dtype), B: (b * scalings.view(-1, 1, 1)).to(first.dtype)}
    base: Any = given[0][0]
    config = ArrowLoraConfig(
        r=next(iter(each[0].values())).a.shape[-2],
        num_experts=len(given),
        top_k=min(top_k, len(given)),
        router_temperature=router_temperature,
        rng_seed=rng_seed,
        target_modules=sorted(params),
        base_model_name_or_path=base.base_model_name_or_path,
        task_type=base.task_type,
    )
    return config, sort(params)


def _check_alike(first: dict[str, Product], own: dict[str, Product], tree: Tree, what: str) -> None:
    """Refuse an adapter on other modules, of another rank, or with more than two matrices."""
    if own.keys() != first.keys():
        raise ValueError(
            f"arrow_experts: {what} adapts other modules than adapters[0]: only one has "
            f"{min(own.keys() ^ first.keys())!r}"
        )
    rank = next(iter(first.values())).a.shape[-2]
    for path, product in own.items():
        if product.layout.kind != "matrix" or len(product.layout.inputs) != 1 or product.layout.names[0] != "lora_A":
            raise ValueError(f"arrow_experts: {path} of {what} is no linear layer, and Arrow routes tokens of these")
        if product.a.shape[-2] != rank:
            raise ValueError(
                f"arrow_experts: {path} of {what} has rank {product.a.shape[-2]}, expected {rank} as in adapters[0]"
            )
        if extra := sorted(set(tree[path]) - {"lora_A", "lora_B"}):
            raise ValueError(f"arrow_experts: {path} of {what} has {extra}, and an expert is a lora_A and a lora_B")
    if others := sorted(set(tree) - set(own)):
        raise ValueError(f"arrow_experts: {what} trains {others[0]!r} too, which no expert has")
