"""The examples in docstrings run, under the names that users import."""

import doctest
import importlib
import pkgutil

import pytest

PACKAGES = ("torchgraft", "torchgraft.functional", "torchgraft.adapters")


def modules() -> list[str]:
    found = list(PACKAGES)
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        found += [module.name for module in pkgutil.walk_packages(path, f"{package}.")]
    return sorted(found)


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert failed == 0, f"{failed} examples failed in {name}: see the captured output"
