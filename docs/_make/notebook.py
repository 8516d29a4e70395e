"""A page as a Jupyter notebook (nbformat 4.4) with the outputs of its blocks."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from blocks import Cell

LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]+\)")


def notebook(found: list[Cell]) -> str:
    """Return the JSON of a notebook; links to other pages are their words alone, for a notebook stands by itself.

    >>> import json
    >>> made = json.loads(notebook([Cell("See [this](x.md).", False), Cell("1 + 1\\n", True, value="2")]))
    >>> [cell["cell_type"] for cell in made["cells"]], made["cells"][0]["source"]
    (['markdown', 'code'], ['See this.'])
    """
    code = [cell for cell in found if cell.is_code]
    content = {
        "cells": [_code(cell, code.index(cell) + 1) if cell.is_code else _text(cell) for cell in found],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 4,
    }
    return json.dumps(content, indent=1) + "\n"


def _text(cell: Cell) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": _lines(LINK.sub(r"\1", cell.text).strip())}


def _code(cell: Cell, count: int) -> dict[str, Any]:
    outputs: list[dict[str, Any]] = []
    if cell.printed:
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(cell.printed)})
    data: dict[str, Any] = {"text/plain": _lines(cell.value)} if cell.value else {}
    if cell.picture:
        data = {"image/png": base64.b64encode(cell.picture).decode(), "text/plain": ["<Figure>"]}
    if data:
        outputs.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return {
        "cell_type": "code",
        "execution_count": count,
        "metadata": {},
        "outputs": outputs,
        "source": _lines(cell.text.rstrip()),
    }


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)
