"""`docs/debugging.md` quotes what each error of `test_messages.py` says, in groups with what they mean.

python -m tests.test_debugging_page    writes the page's tables
"""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from . import test_messages
from .test_messages import TABLE, World

PAGE = Path(__file__).parents[1] / "docs" / "debugging.md"
START, END = "<!-- {}: tests/test_debugging_page.py -->", "<!-- end -->"
SOURCE = inspect.getsource(test_messages)


def mistakes():
    """Return the mistakes of each group, the code of each as a reader of the page would write it."""
    heads = {number: head for number, line in enumerate(SOURCE.splitlines(), 1) for head in groups_in(line)}
    table = next(
        node.value
        for node in ast.parse(SOURCE).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TABLE"
    )
    found = {head: {} for head in heads.values()}
    for key, value in zip(table.keys, table.values, strict=True):
        head = heads[max(number for number in heads if number < key.lineno)]
        found[head][key.value] = as_a_reader_writes(ast.unparse(value.elts[0].body))
    return found


def as_a_reader_writes(code):
    for name, other in ((r"w\.", ""), (r"THEIRS\b", "config_of_pefts"), (r"X\b", "x"), (r"ROWS\b", "rows")):
        code = re.sub(rf"\b{name}", other, code)
    return code.replace("'", '"')


def groups_in(line):
    return re.findall(r"^    # -- (.*?) -+$", line)


def said(mistake):
    """Return the class of a mistake's error, and its words, without the place of the test's files."""
    make, error, _ = TABLE[mistake]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error) as caught:
            make(World(Path(folder)))
        words = str(caught.value.args[0]).replace(folder, "folder")
    return type(caught.value).__name__, words


def lines_of(group):
    """Return a group's list: what is written, and below it what is said of it; equal errors stand once."""
    found = {}
    for mistake, written in mistakes()[group].items():
        found.setdefault(said(mistake), []).append(written)
    for (kind, words), codes in found.items():
        yield f"- {', '.join(map(code, codes))}<br>**{kind}** {code(words)}"


def code(text):
    """Quote a text as code on one line."""
    text = " ".join(text.split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def test_each_error_is_quoted_as_it_is(tmp_path):
    """The errors are a fresh process's, whose list of methods has none of the tests' own."""
    copy = tmp_path / PAGE.name
    shutil.copy(PAGE, copy)
    subprocess.run([sys.executable, "-m", "tests.test_debugging_page", str(copy)], cwd=PAGE.parents[1], check=True)
    written, quoted = (page.read_text(encoding="utf-8").splitlines() for page in (copy, PAGE))
    assert quoted == written, "python -m tests.test_debugging_page writes the page"


def write(page):
    """Write the tables into the page."""
    text = page.read_text(encoding="utf-8")
    for group in mistakes():
        start = START.format(group)
        assert start in text, f"docs/debugging.md lacks the group {group!r}, with what its errors mean: {start}"
        before, _, rest = text.partition(start)
        text = "\n".join([before + start, *lines_of(group), END + rest.partition(END)[2]])
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(*sys.argv[1:]) if sys.argv[1:] else PAGE)
