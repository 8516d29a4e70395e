"""Pages that show a source, or name the files of a folder, for links that lead to one."""

from __future__ import annotations

from collections.abc import Iterable

from links import ROOT, place, relative

UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".txt": "text"}


def page_of(path: str, shown: Iterable[str]) -> str:
    """Return the page of a file, or of a folder with links to those of its files that are shown."""
    return _folder(path, set(shown)) if (ROOT / path).is_dir() else _source(path)


def _source(path: str) -> str:
    file = ROOT / path
    text = file.read_text(encoding="utf-8")
    fence = "~" * 8
    return f"{UNSEARCHED}# `{path}`\n\n{fence}{LANGUAGES.get(file.suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def _folder(path: str, shown: set[str]) -> str:
    names = sorted(entry.name for entry in (ROOT / path).iterdir() if not entry.name.startswith(("__pycache__", ".")))
    lines = []
    for name in names:
        file = f"{path}/{name}"
        lines.append(f"- [`{name}`]({relative(place(file), place(path))})" if file in shown else f"- `{name}`")
    return f"{UNSEARCHED}# `{path}/`\n\n" + "\n".join(lines) + "\n"
