"""Python blocks of pages, run one after the other as the cells of a notebook."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import re
from typing import Any

FENCE = re.compile(r"^```python\n(.*?)^```\n?", flags=re.DOTALL | re.MULTILINE)


@dataclasses.dataclass(eq=False)
class Cell:
    """A part of a page: text, or a block of code and what came of it."""

    text: str
    is_code: bool
    printed: str = ""
    value: str = ""
    picture: bytes = b""


def cells(page: str) -> list[Cell]:
    """Cut a page into its text and its Python blocks.

    >>> [(cell.text, cell.is_code) for cell in cells("One.\\n\\n```python\\nx = 1\\n```\\nTwo.\\n")]
    [('One.\\n\\n', False), ('x = 1\\n', True), ('Two.\\n', False)]
    """
    parts = FENCE.split(page)
    return [Cell(part, bool(number % 2)) for number, part in enumerate(parts) if number % 2 or part.strip()]


def run(page: str, name: str, namespace: dict[str, Any] | None = None) -> list[Cell]:
    """Run a page's blocks in one namespace; a cell keeps what it printed, and its last expression as a notebook does.

    >>> [(cell.printed, cell.value) for cell in run("```python\\nprint(1)\\n2 + 3\\n```\\n", "page.md")]
    [('1\\n', '5')]
    """
    namespace = {"__name__": "__main__"} if namespace is None else namespace
    found = cells(page)
    for number, cell in enumerate(cell for cell in found if cell.is_code):
        _run_cell(cell, f"{name}, block {number + 1}", namespace)
    return found


def _run_cell(cell: Cell, name: str, namespace: dict[str, Any]) -> None:
    tree, last = ast.parse(cell.text, name), None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        value = eval(compile(last, name, "eval"), namespace) if last else None
    cell.printed = printed.getvalue()
    if value is not None and hasattr(value, "savefig"):
        picture = io.BytesIO()
        value.savefig(picture, format="png", dpi=110, metadata={"Software": None})
        cell.picture = picture.getvalue()
    elif value is not None:
        cell.value = repr(value)


def shown(found: list[Cell], pictures: str) -> str:
    """Return the page with the outputs under its blocks; `pictures.format(i)` names the picture of block `i`."""
    parts = []
    for number, cell in enumerate(found):
        if not cell.is_code:
            parts.append(cell.text)
            continue
        parts.append(f"```python\n{cell.text}```\n")
        output = cell.printed + cell.value
        if output:
            parts.append(f"\n```{{ .text .output }}\n{output.rstrip()}\n```\n")
        if cell.picture:
            parts.append(f"\n![what the block draws]({pictures.format(number)})\n")
    return "".join(parts)
