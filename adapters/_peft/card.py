"""The model card that stands beside an adapter's files."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from torchgraft.functional import __version__

from .._config.base import PEFT_VERSION, AdapterConfig
from .._config.peft_type import TaskType
from .tuners import BaseTuner

_PRETRAINED = ("transformers.modeling_utils", "PreTrainedModel")


def write_card(folder: Path, config: AdapterConfig, model: nn.Module) -> None:
    """Write `README.md` with the Hub's fields and a few words, unless there is one."""
    card = folder / "README.md"
    if card.exists():
        return
    base = BaseTuner.get_model_config(model).get("_name_or_path") or vars(model).get("name_or_path") or ""
    tags = {config.method.name.lower(), *(getattr(model, "model_tags", None) or ())}
    if any((cls.__module__, cls.__name__) == _PRETRAINED for cls in type(model).__mro__):
        tags.add("transformers")
    lines = ["---", "library_name: peft"]
    if isinstance(base, str) and base:
        tags.add(f"base_model:adapter:{base}")
        lines.append(f"base_model: {json.dumps(base)}")
    if config.task_type == TaskType.CAUSAL_LM:
        lines.append("pipeline_tag: text-generation")
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in sorted(tags))]
    what = f"A {config.method.name} adapter" + (f" of `{base}`" if base else f" of a `{type(model).__name__}`")
    lines += ["---", "", "# Adapter", "", f"{what}, written by torchgraft {__version__}.", ""]
    lines += ["### Framework versions", "", f"- PEFT {PEFT_VERSION}"]
    folder.mkdir(parents=True, exist_ok=True)
    card.write_text("\n".join(lines) + "\n", encoding="utf-8")
