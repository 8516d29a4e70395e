"""Check whether an engine serves an adapter's folder, whichever program made it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from ..disk.config_file import about, parse_fields
from ..disk.folder import WEIGHTS, find_folder, open_pair
from ..disk.headers import Spec, open_weights
from .engines import Server, server_of
from .rules import is_fused, problems, ranks_of, split


@dataclasses.dataclass(frozen=True)
class Servable:
    """The result of `check_servable`: true if the engine serves the folder right; `print` shows the reasons.

    Attributes:
        path: The folder.
        server: The engine, as messages call it.
        problems: What it cannot have, each with what to do; empty if it serves the folder.
        needs: What to start or ask it with.
    """

    path: Path
    server: str
    problems: tuple[str, ...]
    needs: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        verdict = "does not serve" if self.problems else "serves"
        lines = [f"{self.server} {verdict} {self.path}", *(f"- {one}" for one in self.problems)]
        return "\n".join([*lines, *(f"with {one}" for one in self.needs if not self.problems)])


def check_servable(path: str | os.PathLike[str], server: str, adapter_name: str = "default") -> Servable:
    """Check whether an engine loads and scales the adapter in a directory right, without the engine and a model.

    The config and the header of the weights are read, no tensor. The rules are those of the engines' sources; whether
    the adapter fits the base that is served is not seen.

    Args:
        path: The directory, as for `load_adapter`.
        server: `"vllm"`, `"sglang"`, `"lorax"` or `"llama.cpp"`.
        adapter_name: Name of a subdirectory with the adapter.

    Returns:
        What the engine cannot have, each with what to do, and the settings that the adapter needs.

    Raises:
        FileNotFoundError: No such directory or file.
        ValueError: An engine that is not known; files that are damaged, or that lead out of the directory.

    >>> import tempfile, torch
    >>> from torchgraft.adapters import LoraConfig, save_adapter
    >>> from torchgraft.functional import bind
    >>> config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    >>> graft = bind(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 3)}), config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = check_servable(save_adapter(graft, folder, params=graft.init()), "vllm")
    >>> bool(found), found.problems
    (False, ('it has use_dora, whose magnitudes vLLM 0.32 does not have; make it a plain LoRA first: ...
    """
    rules = server_of(server)
    folder = find_folder(path, adapter_name)
    with open_pair(folder) as (config_file, data, handle):
        fields = parse_fields(config_file, data)
        with about(config_file.parent / WEIGHTS):
            specs = open_weights(handle, config_file.parent / WEIGHTS).specs
    with about(config_file):
        found = problems(rules, fields, specs)
    needs = () if found else tuple(_needs(rules, fields, specs))
    return Servable(folder.path, rules.title, tuple(found), needs)


def _needs(server: Server, fields: dict[str, Any], specs: dict[str, Spec]) -> list[str]:
    """Return the settings of an engine that an adapter needs."""
    said = [fields.get("r", 8), *(fields.get("rank_pattern") or {}).values()]
    rank = max([*ranks_of(specs, fields).values(), *said])
    modules = [part[0] for part in map(split, specs) if part]
    needs = []
    if server.name == "vllm":
        needs.append(f"--enable-lora --max-lora-rank {next(step for step in server.steps if step >= rank)}")
        if any(map(is_fused, modules)):
            needs.append(
                f"a model whose experts it stacks ({', '.join(server.stacked)}), or --enable-mixed-moe-lora-format and "
                "is_3d_lora_weight in the request"
            )
    elif server.name == "sglang":
        names = sorted({module.rpartition(".")[2] for module in modules})
        needs.append(f"--enable-lora --max-lora-rank {rank} --lora-target-modules {' '.join(names)}")
    return needs
