"""The model card that stands beside an adapter's files."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchgraft.functional import __version__

from .._config.base import AdapterConfig


def write_card(folder: Path, config: AdapterConfig, model: nn.Module) -> None:
    """Write `README.md` with the Hub's fields and a few words, unless there is one."""
    card = folder / "README.md"
    if card.exists():
        return
    base = config.base_model_name_or_path or vars(model).get("name_or_path") or ""
    lines = ["---", "library_name: peft", "tags:", f"- {config.method.name.lower()}"]
    if isinstance(base, str) and base:
        lines[1:1] = [f"base_model: {base}"]
        lines.append(f"- base_model:adapter:{base}")
    what = f"A {config.method.name} adapter" + (f" of `{base}`" if base else f" of a `{type(model).__name__}`")
    lines += ["---", "", "# Adapter", "", f"{what}, written by torchgraft {__version__}."]
    card.write_text("\n".join(lines) + "\n", encoding="utf-8")
