"""Fields for single tokens and tied embeddings, which PEFT's LoRA configs share."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping

from torch import nn

from torchgraft.functional.extending import TiedSite

from .base import AdapterConfig
from .messages import require
from .ties import tied_to

_TURNED = {"lora_A": "lora_embedding_B", "lora_B": "lora_embedding_A"}
_SAME = {name: name for name in ("lora_embedding_A", "lora_embedding_B")}
"""An embedding's leaves by the names that a linear layer, or another embedding, of the same weight has for them."""


@dataclasses.dataclass(kw_only=True)
class TokenFields(AdapterConfig):
    """Trains the rows of some tokens, and keeps embeddings tied.

    Attributes:
        trainable_token_indices: Tokens whose embeddings are trained: indices for the model's input embeddings, or
            `{name of a module: indices}`. The rows are a leaf, `params["embed"]["trainable_tokens_delta"]`,
            `"rows dim"` in the order of the indices. Where another module is tied to an embedding (an output layer),
            it has the same rows, unless it is named with other indices.
        ensure_weight_tying: What is trained of a tensor that several modules share is the same in all of them: of
            `modules_to_save`, `trainable_token_indices`, or a targeted embedding. Naming the output layer then means
            the embedding. Without it each named module is trained alone.
    """

    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_tokens()

    def _check_tokens(self) -> None:
        given = self.trainable_token_indices
        require(
            given is None or bool(given),
            self,
            f"trainable_token_indices is {given!r}, expected indices, {{'module': indices}} or None",
        )

    def follows(self, modules: Mapping[str, nn.Module], paths: Iterable[str]) -> dict[str, TiedSite]:
        """Return the modules that are tied to a targeted embedding and have its adapter, where `ensure_weight_tying`.

        Args:
            modules: The model's modules by name.
            paths: Names of the modules that are adapted.

        Raises:
            ValueError: An adapter that cannot be tied.
        """
        paths = list(paths)
        if not self.ensure_weight_tying:
            return {}
        found = {other: path for path in paths if path in modules for other in tied_to(path, modules)}
        plain = getattr(self, "use_dora", False) is False and getattr(self, "init_lora_weights", True) in (True, False)
        require(
            plain or not found,
            self,
            f"ensure_weight_tying is True, and {sorted(found)} follow {sorted(set(found.values()))}, which is for "
            "plain LoRA; leave out use_dora and special init_lora_weights, or the embeddings",
        )
        if not found and not self.modules_to_save and self.trainable_token_indices is None:
            warnings.warn(
                f"{type(self).__name__}: ensure_weight_tying is True, and nothing that is trained is tied",
                UserWarning,
                stacklevel=2,
            )
        return {
            other: TiedSite(path, _SAME, False) if isinstance(modules[other], nn.Embedding) else TiedSite(path, _TURNED)
            for other, path in found.items()
        }
