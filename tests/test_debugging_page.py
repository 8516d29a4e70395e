"""`docs/debugging.md` quotes what each error of `test_messages.py` says, in groups with what they mean.

python -m tests.test_debugging_page    writes the page's tables
"""

import ast
import inspect
import re
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


def between(text, group):
    assert START.format(group) in text, f"docs/debugging.md lacks the group {group!r}, with what its errors mean"
    return text.partition(START.format(group))[2].partition(END)[0].strip().splitlines()


@pytest.mark.parametrize("group", mistakes())
def test_each_error_is_quoted_as_it_is(group):
    written = between(PAGE.read_text(encoding="utf-8"), group)
    assert written == list(lines_of(group)), "python -m tests.test_debugging_page writes the page"


def write():
    """Write the tables into the page."""
    text = PAGE.read_text(encoding="utf-8")
    for group in mistakes():
        start = START.format(group)
        assert start in text, f"docs/debugging.md has no line {start}"
        before, _, rest = text.partition(start)
        text = "\n".join([before + start, *lines_of(group), END + rest.partition(END)[2]])
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
