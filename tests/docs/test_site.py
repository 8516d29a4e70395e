"""The built site: complete, without a word from a network, its links right, its search on board."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import method_pages
import pytest
import reference_pages

ROOT = Path(__file__).parents[2]
LOADED = {("img", "src"), ("link", "href"), ("script", "src"), ("iframe", "src"), ("source", "src"), ("video", "src")}
"""Attributes of elements that a browser loads by itself."""

pytestmark = pytest.mark.full


class Links(HTMLParser):
    """The ids of a page, what it loads, and what it links to."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.loaded, self.linked = {""}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.add(value)
            elif (tag, name) in LOADED:
                self.loaded.append(value)
            elif (tag, name) == ("a", "href"):
                self.linked.append(value)


@pytest.fixture(scope="module")
def site(once_per_run):
    return once_per_run("site", build)


def build(out):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "WARNING" not in run.stderr, run.stderr


@pytest.fixture(scope="module")
def pages(site):
    return {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert not [(path.name, url) for path, page in pages.items() for url in page.loaded if "//" in url]
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\s]+", styles)


def test_links_and_anchors_lead_somewhere(site, pages):
    for path, page in pages.items():
        for target in (*page.linked, *page.loaded):
            file, _, anchor = unquote(target).partition("#")
            if file.startswith(("http://", "https://")) or path.name == "404.html":
                continue
            there = (path.parent / file).resolve() if file else path
            there = there / "index.html" if there.is_dir() else there
            assert there.exists(), f"{path.relative_to(site)}: {target}"
            assert there not in pages or anchor in pages[there].ids, f"{path.relative_to(site)}: {target}"


def test_each_method_and_each_part_of_the_reference_has_a_page(site):
    for path in (*method_pages.configs(), *reference_pages.pages()):
        page = site / path.removeprefix("docs/").replace(".md", ".html")
        assert "doc-heading" in page.read_text(encoding="utf-8"), page


def test_the_search_is_on_board(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {"tutorial.html", "debugging.html", "methods/hra.html", "reference/functional.html"} <= places
    assert not [place for place in places if place.endswith(".py.html")], "sources are not searched"
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index = ")


def test_notebooks_are_executed_and_the_page_shows_the_same(site):
    made = json.loads((site / "tutorial.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    assert made["nbformat"] == 4 and [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    page = (site / "tutorial.html").read_text(encoding="utf-8")
    printed = [line for output in outputs for line in output.get("text", [])]
    assert len(printed) > 10 and not [line for line in printed if line.split()[0] not in page]
    assert list(site.glob("tutorial-*.png"))


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_the_search_finds_in_pages_that_are_read_from_a_disk(site, tmp_path):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    address = f"{(site / 'index.html').as_uri()}?q=unmerge"
    run = subprocess.run(
        [*command, "--virtual-time-budget=20000", "--dump-dom", address], capture_output=True, text=True, check=True
    )
    assert re.search(r"\d+ matching documents", run.stdout) and "unmerge" in run.stdout
