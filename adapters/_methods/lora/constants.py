"""What binding fixes for a site of LoRA."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from torchgraft.functional import Constants, Varying


@dataclasses.dataclass(frozen=True, eq=False)
class LoraConstants(Constants):
    """Rank and scaling factor of a site, and what its initialisation fixes.

    Attributes:
        r: The rank.
        lora_alpha: The numerator of the scaling factor.
        scaling: The scaling factor.
        initial_A: What the base has to lose, with `initial_B`, where the adapter starts from the base's weight.
        initial_B: See `initial_A`.
        rounding: What quantising changes of the weight, for LoftQ.
        lora_B: A `B` that is not trained.
        lora_embedding_B: That of an embedding.
        activated: Whether tokens before an invocation stay as the base has them, so that calls say which these are.
        blocks: Numbers of blocks of `A` and of `B`, and the rank, for BD-LoRA.
        gains: DoRA's gain of each output, in a view that is said to be constant.
    """

    r: Varying[int]
    lora_alpha: Varying[float]
    scaling: Varying[float]
    initial_A: Varying[Tensor | None] = None
    initial_B: Varying[Tensor | None] = None
    rounding: Varying[Tensor | None] = None
    lora_B: Varying[Tensor | None] = None
    lora_embedding_B: Varying[Tensor | None] = None
    activated: bool | None = None
    gains: Tensor | None = None
    blocks: tuple[int, int, int] | None = None
