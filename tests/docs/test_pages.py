"""The pages of the site as they are in the repository: blocks run, links and anchors lead somewhere."""

import doctest
import importlib
import re
from pathlib import Path

import blocks
import hypothesis
import hypothesis.strategies as st
import links
import pytest
import yaml
from pymdownx import slugs

ROOT = Path(__file__).parents[2]
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
ELSEWHERE = {
    "docs/first-hour.md": "tests/test_readme.py",
    "docs/distributed.md": "tests/bank/test_replicated.py",
    "docs/serving.md": "tests/adapters/test_servers.py",
}
"""Pages whose blocks other tests run, and which."""

LONG = ("docs/tutorial.md", "docs/recipes/")
"""Pages, and folders of pages, that train for more than a moment."""

OTHERS = re.findall(r"\.\./(\S+\.md)", (ROOT / "mkdocs.yml").read_text())
"""Pages of other folders that the site has."""


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def with_blocks():
    for page in DOCS:
        if "```python\n" in text_of(page) and page not in ELSEWHERE:
            yield pytest.param(page, marks=pytest.mark.full if page.startswith(LONG) else ())


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torchao")
@pytest.mark.parametrize("page", [*with_blocks()])
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(cell.text for cell in blocks.run(text_of(page), page) if cell.is_code)


@pytest.mark.parametrize("page", ELSEWHERE)
def test_blocks_that_other_tests_run_are_run_there(page):
    assert Path(page).name in (ROOT / ELSEWHERE[page]).read_text()


def test_blocks_see_what_those_before_them_left_and_say_where_they_fail():
    with pytest.raises(ZeroDivisionError) as caught:
        blocks.run("```python\nx = 1\n```\n\nThen.\n\n```python\ny = x\ny / 0\n```\n", "page.md")
    assert caught.traceback[-1].frame.code.raw.co_filename == "page.md, block 2"


def anchors_of(page):
    slug = slugs.slugify(case="lower")
    heads = re.findall(
        r"^#+ (.+)$", links.CODE.sub(lambda code: code[0].strip("`").replace("#", ""), text_of(page)), re.M
    )
    return {slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head), "-") for head in heads}


@pytest.mark.parametrize("page", [*DOCS, *OTHERS])
def test_links_lead_to_files_and_heads_that_are_there(page):
    for target in links.targets(text_of(page)):
        path, anchor = links.resolved(target, page)
        assert (ROOT / path).exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors_of(path), f"{page}: {target} has no such head"


@pytest.mark.parametrize("page", DOCS)
def test_every_page_is_in_the_navigation(page):
    path = page.removeprefix("docs/")
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert f": {path}\n" in navigation or f": {path.rpartition('/')[0]}/\n" in navigation


def test_targets_in_code_are_left_alone():
    text = "[a](b.md) `x[0](y)`\n\n```python\nx[0](y)\n```\n"
    assert list(links.targets(text)) == ["b.md"]
    assert links.moved(text, "docs/a.md", "docs/methods/a.md") == text.replace("b.md", "../b.md")


NAMES = st.sampled_from(["a", "b", ".."])
PAGES = st.lists(st.sampled_from(["a", "b", "c"]), max_size=3).map(lambda parts: "/".join(["docs", *parts, "page.md"]))


@hypothesis.given(st.lists(NAMES, max_size=3), st.sampled_from(["", "#head"]), PAGES, PAGES)
def test_a_link_that_is_moved_leads_to_the_same(folders, anchor, page, to):
    target = "/".join([*folders, "x.md"]) + anchor
    there = links.moved(f"[words]({target})", page, to)
    assert links.resolved(next(links.targets(there)), to) == links.resolved(target, page)


def test_nothing_of_the_sites_settings_is_from_a_network():
    class Loader(yaml.SafeLoader):
        """Read tags as what they are on, for only words are looked at here."""

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    settings = yaml.load(text_of("mkdocs.yml"), Loader)
    assert settings["theme"]["font"] is False and settings["strict"] is True
    assert not re.findall(r"https?://", text_of("mkdocs.yml"))


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "docs" / "_make").glob("*.py"))])
def test_examples_of_the_modules_that_make_the_site_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
