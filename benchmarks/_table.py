"""The table of `COSTS.md`, some rows of which the README has, from the results as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from _results import folder

Cases = Mapping[str, Mapping[str, float]]


def lines() -> list[str]:
    """Markdown: a row for each setting, times as multiples of the reference that the row names."""
    single = _read("single")["ratios_to_frozen_base"]
    many = _read("many")["ratios_to_peft"]
    mixed = _read("mixed")["ratios_to_peft_with_one_adapter"]
    variants = _read("variants")["ratios_to_frozen_base"]
    experts = _read("experts")["ratios_to_frozen_base"]
    rows = ["| time | torchgraft | PEFT 0.21.2 | frozen base |", "|---|---|---|---|"]
    names = ("torchgraft, functional", "PEFT", "frozen base")
    for setting, cases in single.items():
        rows.append(_row(f"{setting} (base = 1)", cases, *names))
        if "launch-bound" in setting:
            rows.append(_row("the same, in place", cases, "torchgraft, in place", *names[1:]))
    for way in ("grouped product", "one expert after the other"):
        cases = experts[f"training step, {way}, batch 4 x 64"]
        rows.append(_row(f"LoRA on 32 experts, {way}: training step (base = 1)", cases, *names))
    for setting, method in (
        ("DoRA: training step", ", DoRA"),
        ("DoRA: training step with dropout 0.1", ", DoRA"),
        ("MultiheadAttention: training step", ""),
    ):
        ours = f"torchgraft{method or ', functional'}"
        rows.append(_row(f"{setting} (base = 1)", variants[setting], ours, f"PEFT{method}", "frozen base"))
    for setting, cases in [*many.items()][::2] + [*many.items()][3:]:
        names = ("torchgraft, route", "PEFT, one by one", "frozen base, combined batch")
        rows.append(_row(f"training step, {setting} (PEFT one by one = 1)", cases, *names))
    for setting, cases in [*mixed.items()][::2]:
        names = ("torchgraft, mixed", "PEFT, mixed (adapter_names)", "bare base")
        rows.append(_row(f"inference, {setting} (PEFT with one adapter = 1)", cases, *names))
    return rows


def _row(setting: str, cases: Cases, *names: str) -> str:
    return " | ".join([f"| {setting}", *(f"{cases[name]['ratio']:.2f}" for name in names)]) + " |"


def _read(name: str) -> dict[str, Any]:
    return json.loads((folder() / f"{name}.json").read_text())


if __name__ == "__main__":
    print("\n".join(lines()))
