"""Words of errors about names that are not here."""

from __future__ import annotations

from collections.abc import Iterable

from torchgraft.functional.extending import did_you_mean


def instead_of(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about a name that is not here.

    >>> instead_of("LoRAConfig", ["LoraConfig"])
    "; did you mean 'LoraConfig'?"
    """
    return did_you_mean(name, [one for one in known if not one.startswith("_")])
