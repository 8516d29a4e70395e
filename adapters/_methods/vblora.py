"""VB-LoRA: low-rank adaptation out of a bank of vectors that all modules share.

    y = base(x) + B A x,    each part of `A`'s rows and `B`'s columns a mix of the bank's vectors

A row of `A`, `"in"`, and a column of `B`, `"out"`, are cut into parts as long as the bank's vectors. A part is
`sum_k softmax(top k of its logits)_k v_k`: the `topk` vectors of the bank that its logits choose.

Li et al., *VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks*, 2024, arXiv:2405.15179. Names,
defaults and initial distributions are those of PEFT's `tuners/vblora`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchgraft.functional import (
    Constants,
    Layer,
    Method,
    Rows,
    SharesLeaves,
    Site,
    UnsupportedCall,
    Weights,
    widen,
)
from torchgraft.functional.extending import SHARED

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared.called import DROPOUT
from .shared.low_rank import add_to_linear, route_to_linear


@dataclasses.dataclass(kw_only=True)
class VBLoRAConfig(AdapterConfig):
    """VB-LoRA learns one bank of vectors for all modules, and which of them make up each module's matrices.

    Supports linear layers (also `transformers`' `Conv1D`), whose sizes `vector_length` divides. The bank is one leaf,
    `params["*"]["vblora_vector_bank"]`, beside the logits of each module. PEFT's example trains the two with learning
    rates of their own: give an optimizer these leaves as groups. An adapter is not the identity at first, as in the
    paper and in PEFT: both factors are mixes of small random vectors.

    Where PEFT does otherwise: it reads NaN from files of `save_only_topk_weights` whose weights add up to more than 1
    by rounding; here the last weight is 0 then.

    Attributes:
        r: Rank.
        num_vectors: Number of vectors in the bank.
        vector_length: Their length.
        topk: Number of vectors in a mix.
        save_only_topk_weights: Whether files and state dicts hold the chosen vectors and their weights instead of the
            logits. What is loaded from them computes the same; the choice of vectors cannot be trained on.
        vblora_dropout: Probability of dropout on the adapter's input, in training mode.
        init_vector_bank_bound: The bank starts uniform between this and its negative.
        init_logits_std: Standard deviation of the logits at first.

    >>> VBLoRAConfig(num_vectors=90, target_modules=["q_proj"]).topk
    2
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "num_vectors", "vector_length", "topk"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} is {value}, expected a positive integer")
        most = self.num_vectors
        require(self.topk <= most, self, f"topk is {self.topk} and num_vectors is {most}, expected topk <= num_vectors")
        require(0 <= self.vblora_dropout < 1, self, f"vblora_dropout is {self.vblora_dropout}, expected 0 <= p < 1")
        for name in ("init_vector_bank_bound", "init_logits_std"):
            value = getattr(self, name)
            require(value >= 0, self, f"{name} is {value}, expected a number >= 0")


BANK = "vblora_vector_bank"
LOGITS = ("vblora_logits_A", "vblora_logits_B")


def plan(config: VBLoRAConfig, sites: list[Site], weights: Weights) -> dict[str, Constants]:
    """Check that each site can be cut into parts; there are no constants."""
    for site in sites:
        for name, size in (("in_features", site.in_features), ("out_features", site.out_features)):
            what = f"vector_length is {config.vector_length} at {site.path}, whose {name} is {size}, expected a divisor"
            require(size % config.vector_length == 0, config, what)
    return {site.path: Constants() for site in sites}


def shapes(config: VBLoRAConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """The logits of `A` are `"r in/length vectors"`, those of `B` are `"out/length r vectors"`."""
    length, vectors = config.vector_length, config.num_vectors
    a, b = (config.r, site.in_features // length, vectors), (site.out_features // length, config.r, vectors)
    return dict(zip(LOGITS, (a, b), strict=True))


def shared_shapes(config: VBLoRAConfig, sites: list[Site]) -> dict[str, tuple[int, ...]]:
    """The bank is `"vectors length"`."""
    return {BANK: (config.num_vectors, config.vector_length)}


def init(
    config: VBLoRAConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws: the bank anew for each module, of which the last one stays."""
    made, bound = {}, config.init_vector_bank_bound
    for site in sites:
        bank = torch.empty(shared_shapes(config, sites)[BANK], dtype=torch.float32)
        bank.uniform_(-bound, bound, generator=generator)
        made[site.path] = {
            leaf: torch.empty(shape, dtype=torch.float32).normal_(0, config.init_logits_std, generator=generator)
            for leaf, shape in shapes(config, site).items()
        }
        made[SHARED] = {BANK: bank}
    return made


def apply(config: VBLoRAConfig, site: Site, leaves: dict[str, Any], base: Layer, x: Tensor) -> Tensor:
    """`base(x) + B A dropout(x)`, the sum in the wider dtype and rounded once to the base's."""
    if base.training:
        _check_trainable(config, site, leaves)
    dropout = leaves.get(DROPOUT, config.vblora_dropout)
    return add_to_linear(base, x, *_factors(config, leaves), 1.0, dropout)


def routed(config: VBLoRAConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor, rows: Rows) -> Any:
    """`apply` with a bank and logits for each row."""
    if base.training:
        _check_trainable(config, site, leaves)
    return route_to_linear(base, x, *_factors(config, leaves), 1.0, config.vblora_dropout, rows)


def merge(
    config: VBLoRAConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W + B A`."""
    a, b = _factors(config, leaves)
    return torch.addmm(weight, b, a), bias


def _factors(config: VBLoRAConfig, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`A`, `"r in"`, and `B`, `"out r"`; of a stack they are stacked."""
    a, b = (_mixed(leaves[leaf], leaves[BANK], config.topk) for leaf in LOGITS)
    return a.flatten(-2), b.mT.flatten(-3, -2)


def _mixed(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """Return the mix of vectors that each place has logits for.

    Args:
        logits: `"... vectors"`; of a stack `"N ... vectors"`.
        bank: `"vectors length"`; of a stack `"N vectors length"`.
        topk: Number of vectors in a mix.

    Returns:
        `"... length"`.
    """
    chosen, index = logits.topk(topk, -1)
    weights, bank = widen(chosen.softmax(-1), bank)
    if bank.ndim == 3:
        first = torch.arange(len(bank), device=bank.device) * bank.shape[1]
        index, bank = index + first.view(-1, *(1 for _ in index.shape[1:])), bank.flatten(0, 1)
    mixed: Tensor = (weights.unsqueeze(-1) * torch.embedding(bank, index)).sum(-2)  # faster than products so small
    return mixed


def _check_trainable(config: VBLoRAConfig, site: Site, leaves: dict[str, Tensor]) -> None:
    """Refuse to train logits of which a file kept the highest alone, where values can be read.

    One of any `topk + 1` logits at a place is infinite then, so that no more are read.

    Raises:
        UnsupportedCall: Such logits; names the site.
    """
    logits = leaves[LOGITS[0]]
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None or logits.is_meta:
        return
    if -math.inf in logits[..., 0, 0, : config.topk + 1].flatten().tolist():
        raise UnsupportedCall(
            f"{site.path}: {LOGITS[0]} is infinite but for the chosen vectors, as files of save_only_topk_weights have "
            "it, so that no other vector could ever be chosen; train on from a file with all logits, or call "
            "model.eval() to compute with these"
        )


VBLoRAConfig.method = Method(
    name="VBLORA",
    config=VBLoRAConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    routed=routed,
    varying=frozenset({"save_only_topk_weights", "init_vector_bank_bound", "init_logits_std"}),
    abilities=(SharesLeaves(lambda config, sites: {site.path: {BANK: BANK} for site in sites}, shared_shapes),),
)

INDICES, WEIGHTS = "_topk_indices", "_topk_weights"


def _pack(config: VBLoRAConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the chosen vectors and all but the last of their weights in the place of logits."""
    if not config.save_only_topk_weights:
        return dict(state)
    packed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.endswith(LOGITS):
            chosen, index = tensor.topk(config.topk)
            packed[f"{key}{INDICES}"] = index.to(_index_dtype(config.num_vectors))
            packed[f"{key}{WEIGHTS}"] = chosen.softmax(-1)[..., :-1].contiguous()
        else:
            packed[key] = tensor
    return packed


def _index_dtype(count: int) -> torch.dtype:
    """Return the smallest dtype that PEFT writes indices of so many vectors in."""
    sizes = ((8, torch.uint8), (15, torch.int16), (31, torch.int32))
    return next((dtype for bits, dtype in sizes if count < 2**bits), torch.int64)


def _unpack(config: VBLoRAConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with logits in the place of chosen vectors and their weights: minus infinity but for these.

    Raises:
        ValueError: One without the other, other shapes than the config's, or values that are none of theirs.
    """
    found = {}
    for key, tensor in state.items():
        name = key.removesuffix(INDICES).removesuffix(WEIGHTS)
        if name == key or not name.endswith(LOGITS):
            found[key] = tensor
        elif key.endswith(INDICES):
            other = f"{name}{WEIGHTS}"
            require(other in state, config, f"there is {key!r} without {other!r}, expected both")
            found[name] = _logits(config, key, tensor, state[other])
        else:
            require(f"{name}{INDICES}" in state, config, f"there is {key!r} without {name + INDICES!r}, expected both")
    return found


def _logits(config: VBLoRAConfig, key: str, index: Tensor, weights: Tensor) -> Tensor:
    shape = (*index.shape[:-1], config.topk)
    require(
        index.ndim == 3 and index.shape == shape and weights.shape == (*shape[:-1], config.topk - 1),
        config,
        f"{key!r} has shape {tuple(index.shape)} and its weights {tuple(weights.shape)}, expected '... topk' and "
        f"'... topk-1' with topk={config.topk}",
    )
    index, vectors = index.long(), config.num_vectors
    weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
    if not index.is_meta:
        within = bool(((index >= 0) & (index < vectors)).all())
        require(within, config, f"{key!r} has indices outside 0 to {vectors - 1}, for num_vectors={vectors}")
        slack = 4 * torch.finfo(weights.dtype).eps * config.topk
        sound = bool(((weights >= -slack) & (weights <= 1 + slack)).all())
        require(sound, config, f"{key!r} has weights that are no shares of 1")
    logits = torch.full((*shape[:-1], vectors), float("-inf"), dtype=weights.dtype, device=weights.device)
    return logits.scatter(-1, index, weights.clamp(min=0).log())


def _infer(config: VBLoRAConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return rank, and the size of the bank, where there are such tensors."""
    ranks = [len(leaves[LOGITS[0]]) for leaves in found.values() if LOGITS[0] in leaves]
    fields = {"r": ranks[0]} if ranks else {}
    bank = found.get(SHARED, {}).get(BANK)
    return fields if bank is None else fields | {"num_vectors": bank.shape[0], "vector_length": bank.shape[1]}


VBLoRAConfig.form = PeftFormat(
    prefix="vblora_",
    dropout="vblora_dropout",
    parameters=LOGITS,
    shared_leaves=(BANK,),
    values={"r": Value(lambda config, site: config.r), "topk": Value(lambda config, site: config.topk)},
    infer=_infer,
    reads=("topk",),
    pack=_pack,
    unpack=_unpack,
)
