"""What the build does beside mkdocs: pages from other folders, from data and from docstrings, and outputs of blocks."""

from __future__ import annotations

import contextlib
import re
import tempfile
from typing import Any

import method_pages
import reference_pages
import source_pages
from blocks import run, shown
from links import ASSETS, ROOT, for_the_site, place, resolved, targets
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from notebook import notebook


class Build:
    """The pages of one build: where each comes from, and its text."""

    def __init__(self, config: MkDocsConfig) -> None:
        self.config = config
        self.texts: dict[str, str] = {}
        self.titles: dict[str, str] = {}
        for path, cls in method_pages.configs().items():
            self.titles[path], self.texts[path] = method_pages.title(cls), method_pages.page(path, cls)
        for path, (title, text) in reference_pages.pages().items():
            self.titles[path], self.texts[path] = title, text
        for file in sorted((ROOT / "docs").rglob("*.md")):
            self._read(str(file.relative_to(ROOT)))
        self.navigation = [made for entry in config.nav or [] for made in self._entries(entry)]

    def _read(self, path: str) -> str:
        self.texts[path] = (ROOT / path).read_text(encoding="utf-8")
        return place(path)

    def _entries(self, entry: Any) -> list[Any]:
        """Return an entry of the navigation with the site's paths; nothing for an entry without pages."""
        if isinstance(entry, str):
            return [self._read(entry.removeprefix("../")) if entry.startswith("../") else entry]
        ((name, content),) = entry.items()
        if isinstance(content, list):
            pages = [made for one in content for made in self._entries(one)]
        elif content.endswith("/"):
            pages = self._folder(f"docs/{content}")
        else:
            return [{name: page} for page in self._entries(content)]
        return [{name: pages}] if pages else []

    def _folder(self, folder: str) -> list[Any]:
        paths = [path for path in self.texts if path.startswith(folder)]
        return [{self.titles[path]: place(path)} if path in self.titles else place(path) for path in paths]

    def add_to(self, files: Files) -> None:
        """Add all that is not in `docs/`: pages, and the pictures and sources that they link to."""
        linked = {resolved(target, path)[0] for path, text in self.texts.items() for target in targets(text)}
        shown_here = {path for path in linked if path not in self.texts and (ROOT / path).exists()}
        for path, text in list(self.texts.items()):
            if not files.get_file_from_path(place(path)):
                self._add(files, place(path), text)
        for path in sorted(shown_here):
            if path.endswith(ASSETS):
                if not files.get_file_from_path(place(path)):
                    files.append(File.generated(self.config, place(path), abs_src_path=str(ROOT / path)))
            else:
                self._add(files, place(path), source_pages.page_of(path, shown_here))
        for page in self.config.extra["executed"]:
            self._run(files, page)

    def _add(self, files: Files, uri: str, content: str | bytes) -> None:
        files.append(File.generated(self.config, uri, content=content))

    def _run(self, files: Files, page: str) -> None:
        """Run a page: its text with what comes of the blocks, its pictures and its notebook."""
        uri, path = page.removesuffix(".md"), f"docs/{page}"
        name = uri.rpartition("/")[2]
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            found = run(self.texts[path], page)
        for number, cell in enumerate(found):
            if cell.picture:
                self._add(files, f"{uri}-{number}.png", cell.picture)
        self._add(files, f"{uri}.ipynb", notebook(found))
        head, _, rest = shown(found, f"{name}-{{}}.png").partition("\n\n")
        self.texts[path] = f"{head}\n\n[This page as a notebook]({name}.ipynb){{ download }}\n\n{rest}"

    def text(self, uri: str, text: str) -> str:
        """Return the text of a page of the site: blocks' outputs in it, and links as the site has them."""
        path = next((path for path in self.texts if place(path) == uri), None)
        if path is None:
            return text
        text = self.texts[path]
        if path == method_pages.METHODS:
            text = method_pages.with_links_to_pages(text)
        return for_the_site(side_by_side(with_bars(text)), path)


BUILD: dict[str, Build] = {}
"""The build that is running, under the name of its site."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read all pages, and put those of other folders into the navigation."""
    build = BUILD[config.site_name] = Build(config)
    config.nav = build.navigation
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in `docs/`."""
    BUILD[config.site_name].add_to(files)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Give a page its text."""
    return BUILD[config.site_name].text(page.file.src_uri, markdown)


def side_by_side(text: str) -> str:
    """Return a text whose HTML tables of code blocks are grids, which Markdown is read in."""

    def grid(found: re.Match[str]) -> str:
        heads = re.findall(r"<th>(.*?)</th>", found[0])
        columns = [column.strip() for column in re.findall(r"<td>(.*?)</td>", found[0], flags=re.DOTALL)]
        parts = (
            f"<div markdown>\n\n**{head}**\n\n{column}\n\n</div>" for head, column in zip(heads, columns, strict=True)
        )
        return '<div class="grid" markdown>\n\n' + "\n\n".join(parts) + "\n\n</div>"

    return re.sub(r"<table>.*?</table>", grid, text, flags=re.DOTALL)


def with_bars(text: str) -> str:
    """Return a text without the backslashes before bars within code, which tables need on GitHub and show here."""
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("\\|", "|"), text)
