"""Examples of docstrings as blocks of code, which Markdown would take for quotations."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Fence each paragraph of a docstring that begins with `>>>`."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that was read."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """Return a docstring whose examples are fenced as Python's console.

    >>> fenced("Add.\\n\\n>>> 1 + 1\\n2").splitlines()
    ['Add.', '', '```pycon', '>>> 1 + 1', '2', '```']
    """
    paragraphs = re.split(r"\n[ ]*\n", text)
    return "\n\n".join(_fence(one) if one.lstrip().startswith(">>> ") else one for one in paragraphs)


def _fence(paragraph: str) -> str:
    indent = " " * (len(paragraph) - len(paragraph.lstrip(" ")))
    block = f"```pycon\n{textwrap.dedent(paragraph).strip()}\n```"
    return textwrap.indent(block, indent)
