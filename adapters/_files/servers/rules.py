"""What an engine cannot have of an adapter, each with what to do: told from a config's fields and a header alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from ..._calibration.initial import REMOVING, kind_of
from ..._config.keys import PREFIX
from ..._config.messages import names_of
from ..disk.headers import Spec
from .engines import Server

Fields = Mapping[str, Any]
Specs = Mapping[str, Spec]

TO_LORA = "make it a plain LoRA first: to_lora(graft, params, rank=...)"
_RESAVE = "save it with save_adapter(..., server={!r}), which writes factors that need none"

_OTHER_FORWARDS = {
    "alora_invocation_tokens": "adapts only what follows these tokens",
    "arrow_config": "chooses among adapters by token",
    "kasa_config": "has singular values of its own",
    "layer_replication": "repeats layers of the base",
    "lora_bias": "has biases beside its factors",
    "monteclora_config": "draws its factors",
    "use_bdlora": "has factors of blocks",
    "use_qalora": "pools its inputs",
}
"""Fields of PEFT's LoRA that change what is computed, and how."""

_FACTOR = re.compile(r"(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))")


def problems(server: Server, fields: Fields, specs: Specs) -> list[str]:
    """Return what an engine cannot have of an adapter's files; an empty list where it serves them right.

    Args:
        server: The engine.
        fields: The fields of `adapter_config.json`.
        specs: What the header of the weights says, by key.
    """
    method = list(of_method(server, fields))
    return method or [*of_fields(server, fields), *_of_keys(server, fields, specs)]


def of_method(server: Server, fields: Fields) -> Iterator[str]:
    """Yield what is no LoRA."""
    name = fields.get("peft_type")
    if name != "LORA":
        yield f"it is {name}, and {server.title} serves LoRA alone; {TO_LORA}"


def of_fields(server: Server, fields: Fields) -> Iterator[str]:
    """Yield what a LoRA's config has beside factors."""
    if fields.get("use_dora"):
        yield f"it has use_dora, whose magnitudes {server.title} does not have; {TO_LORA}"
    for name, what in _OTHER_FORWARDS.items():
        if fields.get(name):
            yield f"it has {name}, which {what}, and {server.title} has nothing of the kind; merge it into the base"
    if fields.get("bias", "none") != "none":
        yield (
            f"bias is {fields['bias']!r}, and {server.title} keeps the base's biases; train with bias='none', or merge "
            "the adapter into the base"
        )
    if saved := sorted(set(fields.get("modules_to_save") or ()) - set(server.saved)):
        yield (
            f"modules_to_save is {saved}, whole modules, which {server.title} does not take; target them with LoRA, or "
            "merge the adapter into the base"
        )
    if fields.get("trainable_token_indices"):
        yield f"it has trainable_token_indices, rows of an embedding, which {server.title} does not take; merge it"
    kind = kind_of(fields.get("init_lora_weights", True))
    if kind == "loftq":
        yield "it started as LoftQ, for a quantised base of its own; merge it into that base"
    elif kind in REMOVING:
        yield (
            f"it started as {kind}, so it is for a base that lost its initial product; save it with plain=True, or "
            "to_plain(graft, params)"
        )
    if server.needs_list and isinstance(fields.get("target_modules"), str):
        yield (
            f"target_modules is the expression {fields['target_modules']!r:.80}, and {server.title} reads a list of "
            f"names; save it with save_adapter(..., server={server.name!r})"
        )


def split(key: str) -> tuple[str, str] | None:
    """Return the module and `"A"` or `"B"` of a factor's key; `None` for other keys.

    >>> split("base_model.model.layers.0.q_proj.lora_A.weight")
    ('layers.0.q_proj', 'A')
    """
    found = _FACTOR.fullmatch(key.removeprefix(PREFIX))
    return None if found is None or not key.startswith(PREFIX) else (found[1], found[2] or found[3])


def is_fused(module: str) -> bool:
    """Return whether a module's factors are those of all experts in one tensor, as with PEFT's `target_parameters`.

    >>> is_fused("layers.0.mlp.experts.base_layer"), is_fused("layers.0.mlp.experts.3.up_proj")
    (True, False)
    """
    return module.removesuffix(".base_layer").endswith("experts")


def ranks_of(specs: Specs, fields: Fields) -> dict[str, int]:
    """Return the rank of each module that has factors; of stacked experts that of the config."""
    found = ((split(key), spec) for key, spec in specs.items())
    return {part[0]: spec.shape[0] for part, spec in found if part and part[1] == "A" and not is_fused(part[0])}


def _of_keys(server: Server, fields: Fields, specs: Specs) -> Iterator[str]:
    parts: dict[str, dict[str, Spec]] = defaultdict(dict)
    other = []
    for key, spec in specs.items():
        part = split(key)
        if part is None:
            other.append(key)
        else:
            parts[part[0]][part[1]] = spec
    known = (*server.passes_over, *(f".{name}.{leaf}" for name in server.saved for leaf in ("weight", "bias")))
    if other := [key for key in other if not key.endswith(known)]:
        yield (
            f"{names_of(other)}: no factor of LoRA under a key {PREFIX}<module>.lora_A.weight, and {server.title} "
            "takes no other tensors; save the adapter again with save_adapter"
        )
    if not parts:
        yield "it has no factors of LoRA"
    if odd := [path for path, both in parts.items() if not _is_pair(both) and not is_fused(path)]:
        yield (
            f"{names_of(odd)}: expected two matrices, A of shape (r, in) and B of shape (out, r), since {server.title} "
            "adapts linear layers; leave other layers out of target_modules, or merge the adapter into the base"
        )
    yield from _of_embeddings(server, specs)
    yield from _of_experts(server, parts)
    yield from _of_ranks(server, fields, {path: both["A"].shape[0] for path, both in parts.items() if "A" in both})
    yield from _of_projections(server, parts)
    yield from _of_layers(server, parts)


def _is_pair(both: Mapping[str, Spec]) -> bool:
    if both.keys() != {"A", "B"}:
        return False
    a, b = both["A"], both["B"]
    matrices = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
    return matrices and a.dtype.is_floating_point and b.dtype.is_floating_point


def _of_embeddings(server: Server, specs: Specs) -> Iterator[str]:
    found = [key.removeprefix(PREFIX).removesuffix(".lora_embedding_A") for key in specs if "lora_embedding_A" in key]
    if server.embeddings is not None and (
        odd := [path for path in found if path.rpartition(".")[2] not in server.embeddings]
    ):
        known = f"only those named {' and '.join(server.embeddings)}" if server.embeddings else "none"
        yield f"{names_of(odd)}: an embedding, of which {server.title} adapts {known}; leave it out of target_modules"


def _of_experts(server: Server, parts: Mapping[str, Any]) -> Iterator[str]:
    fused = [path for path in parts if is_fused(path)]
    single = [path for path in parts if re.search(r"\.experts\.\d+\.", path)]
    if server.experts == "none" and (fused or single):
        yield f"{names_of(fused or single)}: experts, which {server.title} does not adapt; leave them out, or merge"
    elif server.experts == "each" and fused:
        yield (
            f"{names_of(fused)}: the factors of all experts in one tensor, and {server.title} reads them expert by "
            f"expert; save it with save_adapter(..., server={server.name!r})"
        )
    if server.experts == "any" and fused:
        alone = [path for path in fused if path.endswith(".base_layer")]
        lacking = [path for path in fused if not path.endswith(".base_layer") and f"{path}.base_layer" not in parts]
        lacking += [path for path in alone if path.removesuffix(".base_layer") not in parts]
        if lacking:
            yield (
                f"{names_of(lacking)}: {server.title} takes stacked experts with both of their parameters adapted; "
                "target gate_up_proj and down_proj"
            )


def _of_ranks(server: Server, fields: Fields, ranks: Mapping[str, int]) -> Iterator[str]:
    plain = {path: rank for path, rank in ranks.items() if not is_fused(path)}
    said = [fields.get("r", 8), *(fields.get("rank_pattern") or {}).values()]
    largest = max([*plain.values(), *said])
    if server.most_rank is not None and largest > server.most_rank:
        yield (
            f"its rank is {largest}, and {server.title} takes at most {server.most_rank}; cut it: "
            f"shrink(config, params, rank={server.most_rank})"
        )
    resave = _RESAVE.format(server.name)
    if server.patterns:
        return
    if named := [name for name in ("rank_pattern", "alpha_pattern") if fields.get(name)]:
        yield f"it has {' and '.join(named)}, and {server.title} reads r and lora_alpha alone; {resave}"
    elif other := [path for path, rank in plain.items() if rank != fields.get("r", 8)]:
        r = fields.get("r", 8)
        yield f"{names_of(other)}: of another rank than the config's r, {r}, which {server.title} reads; {resave}"
    if fields.get("use_rslora") and not server.rslora:
        yield f"it has use_rslora, and {server.title} divides lora_alpha by r itself; {resave}"
    if plain and server.rank(largest) != largest:
        yield f"its rank is {largest}, which {server.title} pads, and then scales by the padded rank; {resave}"


def _of_projections(server: Server, parts: Mapping[str, Any]) -> Iterator[str]:
    for names in server.together:
        for parent in dict.fromkeys(path.rpartition(".")[0] for path in parts if path.rpartition(".")[2] in names):
            if lacking := [name for name in names if f"{parent}.{name}".lstrip(".") not in parts]:
                yield (
                    f"{parent or 'the model'}: has no factors for {', '.join(lacking)}, and {server.title} fuses "
                    f"{', '.join(names)}; save it with save_adapter(..., server={server.name!r}), which adds zeros, or "
                    "target all of them"
                )
                break  # as in all other layers


def _of_layers(server: Server, parts: Mapping[str, Any]) -> Iterator[str]:
    if not server.all_layers:
        return
    layers: dict[str, set[int]] = defaultdict(set)
    for path in parts:
        if found := re.search(r"^(.*?)\.(\d+)\.(.*)$", path):
            layers[f"{found[1]}.*.{found[3]}"].add(int(found[2]))
    every = set().union(*layers.values()) | set(range(max(set().union(*layers.values()), default=-1) + 1))
    if lacking := [name for name, found in layers.items() if found != every]:
        yield (
            f"{names_of(lacking)}: adapted in some layers only, and {server.title} then adapts none of them; save it "
            f"with save_adapter(..., server={server.name!r}), which adds zeros, or target all layers"
        )
