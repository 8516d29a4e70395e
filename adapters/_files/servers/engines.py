"""What each engine takes of PEFT's LoRA files, read in its source.

All of them add `s B A` to linear layers, and differ in where `s` and the rank come from and in which tensors they know.
What they do not know they refuse at best; most is served as if it were not there.

- vLLM 0.32.0: `vllm/lora/peft_helper.py`, `lora_model.py`, `utils.py`, `model_manager.py`; tried by `make serve-check`.
- SGLang: `python/sglang/srt/lora/lora.py`, `lora_config.py`, `lora_manager.py`, `mem_pool.py`; by its source alone.
- LoRAX: `server/lorax_server/adapters/lora.py`, `server/lorax_server/utils/sgmv.py`; by its source alone. It scales by
  `lora_alpha / r` after it has overwritten `r` with a rank that it padded, so files get a rank that it leaves alone.
- llama.cpp: `convert_lora_to_gguf.py`, which keeps one alpha, to be divided by each tensor's rank; by its source alone.
"""

from __future__ import annotations

import dataclasses

from torchgraft.functional.extending import did_you_mean

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")


@dataclasses.dataclass(frozen=True)
class Server:
    """An engine's rules.

    Attributes:
        name: What users call it here.
        title: What messages call it.
        patterns: Whether it reads `rank_pattern` and `alpha_pattern`; else one rank and one factor are for all modules.
        rslora: Whether it reads `use_rslora`.
        most_rank: The largest rank, or `None`.
        steps: The ranks that its `--max-lora-rank` takes; empty where it takes any, or has none.
        pads: The least rank to write, of which all others are doublings, so that the engine pads none itself.
        embeddings: Last names of the embeddings that it adapts; `None` for any.
        needs_list: Whether `target_modules` has to be a list of names.
        together: Projections that it fuses and that need factors for all, where one has some.
        all_layers: Whether modules of a name have to be adapted in all layers or in none.
        experts: `"any"` where it takes the factors of all experts in one tensor, as PEFT's `target_parameters` have
            them, and expert by expert; `"each"` for the latter alone; `"none"`.
        stacked: The types of models whose experts it reads in one tensor, where it also reads them one by one.
        saved: The modules that may be trained as a whole.
        passes_over: Ends of keys of the base's own tensors, which it does not read.
    """

    name: str
    title: str
    patterns: bool = False
    rslora: bool = False
    most_rank: int | None = None
    steps: tuple[int, ...] = ()
    pads: int = 1
    embeddings: tuple[str, ...] | None = None
    needs_list: bool = False
    together: tuple[tuple[str, ...], ...] = ()
    all_layers: bool = False
    experts: str = "each"
    stacked: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    passes_over: tuple[str, ...] = ()

    def rank(self, largest: int) -> int:
        """Return the rank to write for an adapter of this largest rank.

        >>> SERVERS["lorax"].rank(4), SERVERS["lorax"].rank(24), SERVERS["sglang"].rank(24)
        (16, 32, 24)
        """
        if self.pads == 1:
            return largest
        rank = self.pads
        while rank < largest:
            rank *= 2
        return rank


_ALL = (
    Server(
        "vllm",
        "vLLM 0.32",
        patterns=True,
        rslora=True,
        most_rank=512,
        steps=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        embeddings=("embed_tokens", "lm_head"),
        experts="any",
        stacked=("gpt_oss", "interns1_pro", "qwen3_5_moe", "qwen3_omni_moe", "qwen3_vl_moe"),
        saved=("classifier", "score"),
        passes_over=(".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"),
    ),
    Server(
        "sglang",
        "SGLang",
        embeddings=("embed_tokens", "lm_head"),
        needs_list=True,
        together=(QKV, GATE_UP),
    ),
    Server("lorax", "LoRAX", rslora=True, pads=16, embeddings=(), all_layers=True, experts="none"),
    Server("llama.cpp", "llama.cpp"),
)

SERVERS = {server.name: server for server in _ALL}
"""The engines by name."""


def server_of(name: str) -> Server:
    """Return an engine's rules.

    Raises:
        ValueError: No such engine; names those that are known.

    >>> server_of("vlm")
    Traceback (most recent call last):
    ValueError: server is 'vlm', expected one of ['vllm', 'sglang', 'lorax', 'llama.cpp']; did you mean 'vllm'?
    """
    if name not in SERVERS:
        raise ValueError(f"server is {name!r}, expected one of {list(SERVERS)}{did_you_mean(name, SERVERS)}")
    return SERVERS[name]
