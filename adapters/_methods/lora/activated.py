"""aLoRA: activated LoRA, which adapts a prompt from its invocation on and leaves what is before it to the base.

So the base's cache of keys and values holds for what came before. Which tokens are adapted is data of a call: the rows
of a routed call, one a token. A config with `alora_invocation_tokens` takes no other calls.

Greenewald et al., *Activated LoRA: Fine-tuned LLMs for Intrinsics*, 2025, arXiv:2504.12397. In PEFT it is the field
`alora_invocation_tokens`, by which a model looks for them in each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.functional import Rows, Site, UnsupportedCall, UnsupportedConfig
from torchgraft.functional.extending import is_look

from ..._config.messages import require

if TYPE_CHECKING:
    from .lora import LoraConfig


def activated_positions(input_ids: Tensor, invocation_tokens: Sequence[int]) -> Tensor:
    """Return the rows of a routed call that adapts each prompt from the last invocation in it on.

    Tokens that are generated after an invocation are adapted too: in a step with a cache of keys and values their rows
    are the last ones again, `rows[:, -1:]`.

    Args:
        input_ids: `"batch tokens"`, padded on either side.
        invocation_tokens: The tokens that activate the adapter, in succession; they are adapted themselves.

    Returns:
        `"batch tokens"`, long: 0 from the last invocation on, -1 before it; -1 all along where there is none.

    Raises:
        ValueError: Ids without the two axes; no tokens to look for.

    >>> activated_positions(torch.tensor([[4, 7, 8, 5, 7, 8, 6], [7, 7, 4, 5, 8, 6, 6]]), [7, 8])
    tensor([[-1, -1, -1, -1,  0,  0,  0],
            [-1, -1, -1, -1, -1, -1, -1]])

    >>> from torchgraft.adapters import LoraConfig
    >>> fields = {"alora_invocation_tokens": [7, 8], "init_lora_weights": False}
    >>> from torchgraft.functional import bind, route, stack
    >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4))
    >>> graft = bind(model, LoraConfig(r=2, **fields, target_modules=["1"]))
    >>> ids = torch.tensor([[1, 2, 7, 8, 3]])
    >>> y = graft(route(stack([graft.init()]), activated_positions(ids, [7, 8])), ids)
    >>> (y == model(ids)).all(-1)
    tensor([[ True,  True, False, False, False]])
    """
    if input_ids.ndim != 2:
        raise ValueError(
            f"activated_positions: input_ids has the shape {tuple(input_ids.shape)}, expected (batch, tokens)"
        )
    count = len(invocation_tokens)
    if not count:
        raise ValueError("activated_positions: invocation_tokens is empty, expected the ids of the invocation")
    if input_ids.shape[1] < count:
        return torch.full_like(input_ids, -1, dtype=torch.long)
    looked_for = torch.tensor(list(invocation_tokens), device=input_ids.device)
    begins = F.pad((input_ids.unfold(1, count, 1) == looked_for).all(-1).long(), (0, count - 1))
    yet_to_come = begins.sum(1, keepdim=True) - begins.cumsum(1)
    return torch.where((yet_to_come == 0) & (begins.sum(1, keepdim=True) > 0), 0, -1)


def check_activated(config: LoraConfig) -> None:
    """Refuse an invocation that is none, and what an activated LoRA cannot have.

    Raises:
        ValueError: No tokens, or negative ones.
        UnsupportedConfig: A magnitude, or an initialisation that takes something from the base.
    """
    tokens: Any = config.alora_invocation_tokens
    if tokens is None:
        return
    what = f"alora_invocation_tokens is {tokens!r}"
    require(bool(tokens) and min(tokens) >= 0, config, f"{what}, expected the ids of the invocation, or None")
    require(not config.use_dora, config, f"{what} and use_dora is True; set one of them", UnsupportedConfig)
    require(
        config.init_lora_weights in (True, False, "gaussian", "orthogonal"),
        config,
        f"{what} and init_lora_weights {config.init_lora_weights!r}, expected True, False, 'gaussian' or 'orthogonal': "
        "what comes before the invocation is the base's",
        UnsupportedConfig,
    )


def check_positions(config: LoraConfig, site: Site, rows: Rows | None) -> None:
    """Refuse a call of an activated LoRA that does not say which tokens it adapts.

    Raises:
        UnsupportedCall: No rows, or rows that are not one a token.
    """
    if site.constants.activated and (rows is None or rows.tokens is None) and not is_look():
        raise UnsupportedCall(
            f"{site.path}: the adapter has alora_invocation_tokens={config.alora_invocation_tokens}, and the call does "
            "not say which tokens it adapts; route it: graft(route(stack([params]), activated_positions(input_ids, "
            "config.alora_invocation_tokens)), input_ids); in place, call adapter_rows(model, names, positions=...), "
            "or a PeftModel with input_ids"
        )


def check_unmerged(site: Site) -> None:
    """Refuse to merge an activated LoRA.

    Raises:
        UnsupportedConfig: It is one.
    """
    if site.constants.activated:
        raise UnsupportedConfig(
            f"{site.path}: an activated LoRA (alora_invocation_tokens) adapts some tokens and not others, which no "
            "weight does, so there is nothing to merge; call the graft with rows of activated_positions"
        )
