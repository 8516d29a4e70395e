"""The `conftest.py` that PEFT's own tests get: torchgraft stands in for `peft` during the run, unless `REAL` is set.

Names that are absent are filled with classes that are an error when used, and parameters that are made of them
leave their tests out. Each failure is written to the file that `REPORT` names, for `run.py` to sort.
"""

import ast
import contextlib
import importlib
import json
import os
import re
import sys
import types
import zlib
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REAL = bool(os.environ.get("REAL"))
RESULTS = {}
OTHER_WORDS = set()
"""Names of tests in which an error or a warning was of the right class, with other words than PEFT's."""


def pytest_addoption(parser):
    parser.addoption("--regression", action="store_true", default=False)


def imported_names():
    """Yield the modules and names of PEFT's that the tests import."""
    for file in HERE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "peft":
                yield from ((node.module, alias.name) for alias in node.names)


def module_or_new(name):
    """Return a module of the stand-in, an empty one where it has none."""
    try:
        return importlib.import_module(name)
    except ImportError:
        made = sys.modules[name] = types.ModuleType(name)
        made.__path__ = []
        parent, _, child = name.rpartition(".")
        setattr(module_or_new(parent), child, made)
        return made


class Unmade:
    """What an absent class gives while tests are collected."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        raise AttributeError(name)


class InAnyWords:
    """The context of `pytest.raises` or `pytest.warns`, with the words compared here and a mismatch noted."""

    def __init__(self, context, match, strict):
        self.context, self.match, self.strict = context, match, strict

    def __getattr__(self, name):
        return getattr(self.strict, name)

    def __enter__(self):
        self.seen = self.context.__enter__()
        return self.seen

    def __exit__(self, *error):
        result = self.context.__exit__(*error)
        if error[0] is not None and not result:
            return result
        said = [one.message for one in self.seen] if hasattr(self.seen, "pop") else [self.seen.value]
        if not any(re.search(self.match, str(one)) for one in said):
            OTHER_WORDS.add(os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0])
        return result


def in_any_words(expect):
    """Return `pytest.raises` or `pytest.warns` so that other words do not end the test."""

    def made(*args, match=None, **fields):
        if match is None or len(args) > 1:
            return expect(*args, match=match, **fields) if match else expect(*args, **fields)
        return InAnyWords(expect(*args, **fields), match, expect(*args, match=match, **fields))

    return made


def absent_in(value, depth=0):
    """Return whether a parameter of a test is, or holds, something absent."""
    if isinstance(value, (Absent, Unmade)):
        return True
    if depth < 4 and isinstance(value, (list, tuple, set, frozenset)):
        return any(absent_in(one, depth + 1) for one in value)
    if depth < 4 and isinstance(value, dict):
        return any(absent_in(one, depth + 1) for one in value.values())
    if hasattr(value, "func") and hasattr(value, "args"):
        return absent_in([*value.args, *value.keywords.values()], depth + 1)
    return False


if not REAL:
    pytest.raises, pytest.warns = in_any_words(pytest.raises), in_any_words(pytest.warns)
    import transformers  # noqa: F401  its own look at peft comes before the stand-in, as in most programs

    from torchgraft.adapters import as_peft
    from torchgraft.adapters._peft.absent import Absent

    ALIAS = as_peft()  # for the life of the process
    for _module, _name in imported_names():
        _found = module_or_new(_module)
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{_module}.{_name}")
        if hasattr(_found, _name):
            continue
        if _module.endswith("import_utils") and _name.startswith("is_"):
            setattr(_found, _name, lambda *_, name=_name: "transformers_ge" in name)
        else:
            setattr(_found, _name, Absent(_name, (), {"about": "PEFT's own, and not here"}))
    BEFORE = Absent.__call__, Absent.__getattr__

    def _collecting(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Unmade()

    Absent.__call__, Absent.__getattr__ = Unmade, _collecting

    def pytest_collection_finish(session):
        Absent.__call__, Absent.__getattr__ = BEFORE


def pytest_collection_modifyitems(config, items):
    """Leave out tests with something absent among their parameters, and all but every so many-th by name."""
    every = int(os.environ.get("EVERY") or 1)
    chosen = [item for item in items if not zlib.crc32(item.nodeid.encode()) % every]
    if not REAL:
        chosen = [item for item in chosen if not absent_in(getattr(getattr(item, "callspec", None), "params", {}))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


class _Everything(dict):
    """Counts of models that were looked up: all of them, so that none is looked for online."""

    def __contains__(self, key):
        return True

    def __missing__(self, key):
        return 1


def pytest_collection(session):
    import tests.testing_utils

    tests.testing_utils._HUB_MODEL_ACCESSES = _Everything()


def pytest_runtest_logreport(report):
    if report.when == "call" or report.failed or report.skipped:
        lines = (report.longreprtext or "").splitlines() if report.failed else []
        words = [line[1:].strip() for line in lines if line.startswith("E ")]
        where = [line for line in lines if re.match(r"^\S+\.py:\d+:", line)]
        line = next((one for one in reversed(where) if "tests/" in one), "")
        outcome = "words" if report.passed and report.nodeid in OTHER_WORDS else report.outcome
        RESULTS[report.nodeid] = [outcome, " | ".join(words)[:700], line]


def pytest_sessionfinish(session):
    if os.environ.get("REPORT"):
        Path(os.environ["REPORT"]).write_text(json.dumps(RESULTS, indent=0))
