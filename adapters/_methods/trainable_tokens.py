"""Trainable tokens: the embeddings of some tokens are trained, and nothing else.

    W' = W with trained rows in the places of the tokens

The rows start as the base's own. Names and keys are those of PEFT's `tuners/trainable_tokens`; other methods take the
same as a field, `LoraConfig(trainable_token_indices=...)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from torchgraft.functional import Method

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat
from .._config.targets import find_modules
from .._config.ties import input_embeddings
from .._config.tokens import LEAF
from .shared.siteless import siteless


@dataclasses.dataclass(kw_only=True)
class TrainableTokensConfig(AdapterConfig):
    """Trainable tokens learn the rows of some tokens in the targeted embeddings, by default the model's input ones.

    The rows are a leaf, `params["embed"]["trainable_tokens_delta"]`, `"tokens dim"`, in the order of the indices. A
    module that is tied to an embedding, such as an output layer, has the same rows.

    Where PEFT does otherwise: a bias of a tied output layer is added. `init_weights=False`, random rows, is refused;
    put rows of your own into the tree.

    Attributes:
        token_indices: The tokens.
        init_weights: `True`.

    >>> TrainableTokensConfig(token_indices=[5, 7], target_modules=["embed"]).token_indices
    [5, 7]
    """

    token_indices: list[int] = dataclasses.field(default_factory=list)
    init_weights: bool = True

    method: ClassVar[Method]
    ensure_weight_tying: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        what = "init_weights is False, expected True: rows start as the base's; put others into the tree"
        require(self.init_weights, self, what)

    def token_rows(self, modules: Mapping[str, nn.Module], model: nn.Module) -> Mapping[str, list[int]]:
        """Return the tokens by the name of each targeted module.

        Raises:
            ValueError: No tokens; no target, and a model that does not say which are its input embeddings.
        """
        require(bool(self.token_indices), self, "token_indices is [], expected the tokens to train")
        if self.target_modules is not None:
            return dict.fromkeys(find_modules(self, modules, model), self.token_indices)
        path = input_embeddings(modules, model)
        what = "target_modules is None, and the model does not say which are its input embeddings; name them"
        require(path is not None, self, what)
        return {str(path): self.token_indices}


TrainableTokensConfig.method = siteless("TRAINABLE_TOKENS", TrainableTokensConfig)

_WITHIN = f".token_adapter.{LEAF}"
"""How keys end where the rows are a part of another method's adapter."""


def _pack(config: TrainableTokensConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with PEFT's keys of rows that are the whole adapter."""
    return {f"{key.removesuffix(_WITHIN)}.{LEAF}" if key.endswith(_WITHIN) else key: t for key, t in state.items()}


def _unpack(config: TrainableTokensConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the keys that rows have as a part of another adapter."""
    found = {}
    for key, tensor in state.items():
        own = key.endswith(f".{LEAF}") and not key.endswith(_WITHIN)
        found[f"{key.removesuffix(f'.{LEAF}')}{_WITHIN}" if own else key] = tensor
    return found


TrainableTokensConfig.form = PeftFormat(
    prefix="trainable_tokens_",
    pack=_pack,
    unpack=_unpack,
    only_here=(
        *("bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "modules_to_save"),
    ),
)
