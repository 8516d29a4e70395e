"""Each promise for each row of the table: on which sites, in which tier, and with which exemptions."""

from pathlib import Path

import pytest

from .cases import KINDS, exemptions, promises, selected
from .methods import METHODS

HERE = Path(__file__).parent


def pytest_generate_tests(metafunc):
    test = metafunc.function.__name__
    if test in promises():
        chosen = selected(test)
        cases = [
            pytest.param(name, site, id=f"{name}-{site}", marks=[] if (name, site) in chosen else pytest.mark.full)
            for name, sites in KINDS.items()
            for site in sites
        ]
        metafunc.parametrize(("name", "site"), cases)
    elif "name" in metafunc.fixturenames:
        metafunc.parametrize("name", METHODS)


def pytest_collection_modifyitems(items):
    """Expect a promise to be broken where a row is exempt from it; that it is kept is a failure then."""
    for item in items:
        if item.path.parent != HERE:
            continue
        item.add_marker(pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"))
        given = item.callspec.params if hasattr(item, "callspec") else {}
        for exempt in exemptions(given["name"], given.get("site")) if "name" in given else ():
            if item.originalname in exempt.promises:
                reason = f"exempt: {given['name']}: {exempt.reason}"
                item.add_marker(pytest.mark.xfail(reason=reason, raises=exempt.raises, strict=True))
