"""Links of pages: written as paths of the repository, and rewritten to what the site has in their place.

A page of `docs/` is at the site's top; every other file keeps its path. What is no page has one that shows it: a
source its text, a folder its names.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = ("http://", "https://", "mailto:")
ASSETS = (".png", ".svg", ".ipynb", ".js", ".css")
CODE = re.compile(r"(^```.*?^```[ ]*$|`[^`\n]*`)", flags=re.DOTALL | re.MULTILINE)
TARGET = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")


def with_targets(text: str, change: Callable[[str], str]) -> str:
    """Return a page's text with each link's target changed, but for what stands in code."""
    parts = CODE.split(text)
    parts[::2] = [TARGET.sub(lambda found: change(found[1]), part) for part in parts[::2]]
    return "".join(parts)


def targets(text: str) -> Iterator[str]:
    """Yield the targets of a page's links within the repository, with their anchors."""
    found = (match[1] for part in CODE.split(text)[::2] for match in TARGET.finditer(part))
    return (target for target in found if not target.startswith(ELSEWHERE))


def resolved(target: str, page: str) -> tuple[str, str]:
    """Return the path in the repository, and the anchor, that a link of a page leads to.

    >>> resolved("../README.md#methods", "docs/first-hour.md")
    ('README.md', 'methods')
    """
    path, _, anchor = target.partition("#")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page, anchor


def moved(text: str, page: str, to: str) -> str:
    """Return text of one page with its links as another page has to write them."""

    def change(target: str) -> str:
        if target.startswith(ELSEWHERE):
            return target
        path, anchor = resolved(target, page)
        return relative(path, to) + (f"#{anchor}" if anchor else "")

    return with_targets(text, change)


def relative(path: str, page: str) -> str:
    """Return a path as a link of a page.

    >>> relative("tests/test_doctests.py", "docs/methods/lora.md")
    '../../tests/test_doctests.py'
    """
    return posixpath.relpath(path, posixpath.dirname(page) or ".")


def place(path: str) -> str:
    """Return where the site has a file or a folder of the repository.

    >>> [place(path) for path in ("docs/methods.md", "README.md", "tests/test_doctests.py", "adapters")]
    ['methods.md', 'overview.md', 'tests/test_doctests.py.md', 'adapters/files.md']
    """
    if path == "README.md":
        return "overview.md"
    if path.endswith((".md", *ASSETS)):
        return path.removeprefix("docs/")
    return f"{path}/files.md" if (ROOT / path).is_dir() else f"{path}.md"


def for_the_site(text: str, page: str) -> str:
    """Return a page's text with its links as the site has them."""

    def change(target: str) -> str:
        if target.startswith(ELSEWHERE):
            return target
        path, anchor = resolved(target, page)
        return relative(place(path), place(page)) + (f"#{anchor}" if anchor else "")

    return with_targets(text, change)
