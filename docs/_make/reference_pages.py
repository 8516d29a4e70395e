"""Pages of the reference: the names of each package, grouped by the room that they come from."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from links import ROOT, relative
from method_pages import configs, title

FOR_AUTHORS = {
    "_abilities", "_binding", "_constants", "_method", "_places", "_rows", "_sites", "_unsupported",
}  # fmt: skip
"""Rooms and files of `functional` whose names the author of a method meets."""

TITLES = {
    "_arithmetic": "Sums and distances",
    "_bank": "The bank",
    "_calibration": "Starts from data",
    "_checkpoints": "Models' files",
    "_config": "Configs",
    "_conversion": "Conversion",
    "_files": "Files",
    "_inplace": "In place",
    "_methods": "Methods",
    "_optim": "Optimizers",
    "_peft": "PEFT's names",
}
"""What the rooms of `adapters` are called; one that is not here has its own name."""


def pages() -> dict[str, tuple[str, str]]:
    """Return the title and the text of each page of the reference, by its path."""
    users: list[str] = []
    authors: list[str] = []
    for room, name in exported("functional"):
        (authors if room in FOR_AUTHORS else users).append(f"torchgraft.functional.{name}")
    authors += [f"torchgraft.functional.extending.{name}" for name in extending()]
    found = {
        "docs/reference/functional.md": ("Functional", _page("torchgraft.functional", users)),
        "docs/reference/extending.md": ("Writing a method", _page("For the author of a method", authors)),
    }
    rooms: dict[str, list[str]] = {}
    for room, name in exported("adapters"):
        rooms.setdefault(room, []).append(name)
    own = {config.__name__ for config in configs().values()}
    for room in sorted(rooms, key=lambda room: TITLES.get(room, room.strip("_").title())):
        path = f"docs/reference/{room.strip('_')}.md"
        name = TITLES.get(room, room.strip("_").title())
        names = [f"torchgraft.adapters.{one}" for one in sorted(rooms[room], key=str.lower) if one not in own]
        found[path] = (name, _page(name, names) + (_links_to_methods(path) if room == "_methods" else ""))
    return found


def exported(folder: str) -> Iterator[tuple[str, str]]:
    """Yield each public name of a package with the room, or the file, that it is imported from."""
    for node in ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            yield from ((node.module.split(".")[0], alias.name) for alias in node.names if alias.asname == alias.name)


def extending() -> list[str]:
    """Return the public names of the module for packages that extend the library, but for those of `functional`."""
    from torchgraft import functional
    from torchgraft.functional import extending

    return sorted({*extending.__all__} - {*functional.__all__}, key=str.lower)


def _page(name: str, names: list[str]) -> str:
    return f"# {name}\n\n" + "".join(f"::: {one}\n\n" for one in names)


def _links_to_methods(path: str) -> str:
    lines = (f"- [{title(config)}]({relative(page, path)})\n" for page, config in configs().items())
    return "\n## Configs of the methods\n\n" + "".join(lines)
