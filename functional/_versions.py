"""Noticing writes to dicts, such as modules' attributes and registries, in a pass that reads a few bytes of each.

CPython counts the writes to all dicts, and each dict knows the number of its last one (PEP 509); torch's compiler
guards modules with it. A dict whose number is the same has the same keys and the same values, which need not be
fetched to know it: after a forward, when nothing of them is in the processor's near caches, that is most of the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch._C._dynamo.guards import dict_version as dict_version


def count_writes(dicts: Iterable[dict[Any, Any]]) -> int:
    """Return a number that grows with each write to any of some dicts: the sum of the numbers of their last writes.

    >>> cache = {"a": 1}
    >>> before = count_writes([cache])
    >>> cache["a"] = 2
    >>> count_writes([cache]) > before
    True
    """
    return sum(map(dict_version, dicts))


class DictContents:
    """What some dicts hold: those that were written to are compared with what they held.

    Values are the same if they are equal, but for tensors of one element: an equal one may be another tensor.

    Attributes:
        dicts: The dicts.
        saved: What each of them held.

    >>> cache = {"a": 1}
    >>> contents = DictContents([cache])
    >>> cache["a"] = 2
    >>> contents.same()
    False
    >>> cache["a"] = 1
    >>> contents.same()
    True
    """

    def __init__(self, dicts: Iterable[dict[Any, Any]]):
        self.dicts = tuple(sorted(dicts, key=id))  # as they lie in memory, which is read faster in this order
        self._note(count_writes(self.dicts))
        self.saved = [dict(one) for one in self.dicts]

    def same(self) -> bool:
        """Return whether each dict holds what it held, in the same order."""
        writes = count_writes(self.dicts)
        if writes != self._writes:
            for one, saved in zip(self.dicts, self.saved, strict=True):
                if dict_version(one) > self._last and not _is_equal(one, saved):
                    return False
            self._note(writes)
        return True

    def _note(self, writes: int) -> None:
        """Remember the writes that there were, and the last of them."""
        self._writes, self._last = writes, max(map(dict_version, self.dicts), default=0)


def is_single(x: Any) -> bool:
    """Return whether an object is a tensor of one element, to which another one may be equal."""
    return isinstance(x, Tensor) and all(size == 1 for size in x.shape)


def _is_equal(one: dict[Any, Any], saved: dict[Any, Any]) -> bool:
    if list(one) != list(saved):
        return False
    values, held = list(one.values()), list(saved.values())
    try:
        return values == held and all(a is b for a, b in zip(values, held, strict=True) if is_single(a))
    except Exception:  # tensors that were exchanged may refuse to be compared
        return False
