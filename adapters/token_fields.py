"""Fields for single tokens and tied embeddings, which PEFT's LoRA configs share."""

from __future__ import annotations

import dataclasses

from .config import AdapterConfig
from .fields import require


@dataclasses.dataclass(kw_only=True)
class TokenFields(AdapterConfig):
    """Trains the rows of some tokens, and keeps embeddings tied.

    Attributes:
        trainable_token_indices: Tokens whose embeddings are trained: indices for the model's input embeddings, or
            `{name of a module: indices}`. The rows are a leaf, `params["embed"]["trainable_tokens_delta"]`,
            `"rows dim"` in the order of the indices. Where another module is tied to an embedding (an output layer),
            it has the same rows, unless it is named with other indices.
        ensure_weight_tying: What is trained of a tensor that several modules share, by `modules_to_save` or
            `trainable_token_indices`, is the same in all of them; without it, `modules_to_save` trains a copy of the
            named module alone.
    """

    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.trainable_token_indices
        require(
            given is None or bool(given),
            self,
            f"trainable_token_indices is {given!r}, expected indices, {{'module': indices}} or None",
        )
