"""What adapters that train together are held against: the frozen base alone, and PEFT, one adapter after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import peft
import torch
from peft.functional import set_adapter
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""`(logits, ids) -> loss`."""


def floor(model: Any, ids: Tensor, loss_of: Loss) -> Callable[[], None]:
    """The frozen base on the combined batch: forward, and backward to the embeddings."""

    def run() -> None:
        embeddings = model.get_input_embeddings()(ids).requires_grad_()
        loss_of(model(inputs_embeds=embeddings).logits, ids).backward()

    return run


def one_by_one(
    model: Any, fields: Mapping[str, Any], parts: Sequence[Tensor], loss_of: Loss, together: bool = True
) -> Callable[[], None]:
    """PEFT: each adapter in its turn on its own part, with one optimizer each; all in one model, or one alone in it."""
    theirs: Any = copy.deepcopy(model)
    names = [f"adapter{index}" for index in range(len(parts) if together else 1)]
    for name in names:
        peft.inject_adapter_in_model(peft.LoraConfig(**fields), theirs, name)
    own: dict[str, list[Tensor]] = {name: [] for name in names}
    for key, parameter in theirs.named_parameters():
        for name in {*key.split(".")} & {*names}:
            own[name].append(parameter)
    optimizers = {name: torch.optim.AdamW(own[name], lr=1e-5, fused=True) for name in names}

    def run() -> None:
        for index, part in enumerate(parts):
            name = names[index if together else 0]
            if together:
                set_adapter(theirs, name)
            optimizers[name].zero_grad(set_to_none=True)
            loss_of(theirs(part).logits, part).backward()
            optimizers[name].step()

    return run
