"""What the command prints: columns, JSON, errors of one line, bars of progress."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


def columns(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows in columns, numbers to the right.

    >>> print(columns([("module", "rank"), ("q", 4), ("long_name", 16)]))
    module     rank
    q             4
    long_name    16
    """
    texts = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for text in texts:
        cells = [
            text[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(text[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Return a cell of a table.

    >>> shown(0.25), shown(None), shown(1234567), shown((2, 3))
    ('0.25', '-', '1,234,567', '2x3')
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def as_json(value: Mapping[str, Any]) -> str:
    """Return JSON; numbers that it does not have become `null`.

    >>> as_json({"a": float("nan")})
    '{\\n  "a": null\\n}'
    """
    return json.dumps(_finite(value), indent=2, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line.

    >>> one_line(KeyError("no 'a'")), one_line(ValueError("two:\\n- a\\n- b"))
    ("no 'a'", 'two: a; b')
    """
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error) or type(error).__name__
    first, *more = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join([first, "; ".join(line.removeprefix("- ") for line in more)]).strip()


@contextmanager
def bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield `(done, total) -> None`, which shows how far something is: by tqdm, where it is installed, on a terminal.

    Args:
        what: What the bar says.
        quiet: Whether there is none.
    """
    made: Any = None

    def report(done: int, total: int) -> None:
        nonlocal made
        if made is None:
            made = _tqdm(what, total, quiet)
        if made:
            made.update(done - made.n)

    try:
        yield report
    finally:
        if made:
            made.close()


def on_terminal(quiet: bool) -> bool:
    """Return whether a progress bar is shown: standard error is a terminal."""
    return not quiet and sys.stderr.isatty()


def _tqdm(what: str, total: int, quiet: bool) -> Any:
    """Return a bar, or `False` for none."""
    if not on_terminal(quiet):
        return False
    try:
        from tqdm import tqdm
    except ImportError:
        return False
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False)
