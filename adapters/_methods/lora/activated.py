"""aLoRA: activated LoRA, which adapts a prompt from its invocation on and leaves what is before it to the base.

So the base's cache of keys and values holds for what came before. Which tokens are adapted is data of a call: the rows
of a routed call, one a token.

Greenewald et al., *Activated LoRA: Fine-tuned LLMs for Intrinsics*, 2025, arXiv:2504.12397. In PEFT it is the field
`alora_invocation_tokens`, by which a model looks for them in each call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
    >>> from torchgraft.functional import bind, route, stack
    >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4))
    >>> graft = bind(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["1"]))
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
