"""The table of the README, from the results as they are."""

from __future__ import annotations

import json
from typing import Any

from _results import folder

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def lines() -> list[str]:
    """Markdown: one row for each claim, a ratio of times in each cell."""
    single, many, mixed, jax = (_read(name) for name in ("single", "many", "mixed", "against_jax"))
    rows = [("of the frozen base's time", "torchgraft", "in place", "PEFT")]
    for setting, cases in single["ratios_to_frozen_base"].items():
        rows.append((setting, *(_cell(cases, f"{name}") for name in _SINGLE)))
    table = _markdown(rows)
    rows = [("of PEFT's time, adapters trained one after the other", "torchgraft", "frozen base", "")]
    rows += [
        (s, _cell(c, "torchgraft, route"), _cell(c, "frozen base, combined batch"), "")
        for s, c in many["ratios_to_peft"].items()
    ]
    rows.append(
        ("**of PEFT's time with one adapter**", "**torchgraft, mixed rows**", "**frozen base**", "**PEFT, mixed rows**")
    )
    for setting, cases in mixed["ratios_to_peft_with_one_adapter"].items():
        rows.append(
            (
                setting,
                *(_cell(cases, name) for name in ("torchgraft, mixed", "bare base", "PEFT, mixed (adapter_names)")),
            )
        )
    rows.append(
        (
            "**of JAX's `jit(vmap(grad))`, training steps**",
            "**torchgraft, eager**",
            "**compiled**",
            "**written by hand**",
        )
    )
    for setting, cases in jax["ratios_to_jax"].items():
        rows.append(
            (
                setting,
                *(
                    _cell(cases, name)
                    for name in ("torchgraft, eager", "torchgraft, compiled", "written by hand, eager")
                ),
            )
        )
    return [*table, "", *_markdown(rows)]


_SINGLE = ("torchgraft, functional", "torchgraft, in place", "PEFT")


def _cell(cases: dict[str, Any], name: str) -> str:
    return f"{cases[name]['ratio']:.2f}" if name in cases else ""


def _markdown(rows: list[tuple[str, ...]]) -> list[str]:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return [head, "|---" * len(rows[0]) + "|", *body]


def _read(name: str) -> dict[str, Any]:
    return json.loads((folder() / f"{name}.json").read_text())


if __name__ == "__main__":
    print("\n".join(lines()))
