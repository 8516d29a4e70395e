r"""Regular expressions from untrusted configs, matched in bounded time.

Python's `re` tries one way through an expression after the other, and `(\w+\.?)+!` has 2^n of them through a name of n
characters. Expressions with few ways go through `re`. The others are followed on all ways at once: a set of places in
the name, a bit for each, goes through the expression part by part. What cannot be followed so, since it depends on the
way that was taken (backreferences, atomic groups), is refused unless it has few ways.

Thompson, *Regular Expression Search Algorithm*, 1968, CACM 11(6).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
from typing import Any

_FEW = 4 * 10**6
"""Ways through a name of `_LENGTH` characters up to which an expression is left to `re`."""
_LENGTH = 100
_LONGEST = 2**20
"""Characters of an expression."""
_STEPS = 50_000
"""Steps that matching one name may take, beside fifty for each part of the expression."""

_CHARACTERS = {
    _constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.ANY_ALL, _constants.IN, _constants.RANGE,
    _constants.CATEGORY,
}  # fmt: skip
_REPEATS = {_constants.MAX_REPEAT, _constants.MIN_REPEAT}
_POSSESSIVE = getattr(_constants, "POSSESSIVE_REPEAT", None)
_ATOMIC = getattr(_constants, "ATOMIC_GROUP", None)
_BY_WAY = {_constants.GROUPREF, _constants.GROUPREF_EXISTS, _POSSESSIVE, _ATOMIC}

Step = Callable[["_Places", int, bool], int]
"""Take places in a name through a part of an expression, forward or back."""


def fullmatch(pattern: str, name: str, what: str = "pattern") -> bool:
    r"""Return whether an expression matches a whole name, as `re.fullmatch` does.

    Args:
        pattern: The expression.
        name: The name.
        what: How an error calls the expression: the config and the field.

    Raises:
        ValueError: An expression that is none, or that cannot be matched in bounded time.

    >>> fullmatch(r".*\.(q|v)_proj", "layers.0.q_proj"), fullmatch(r"(\w+\.?)+!", "layers.0.q_proj" * 9)
    (True, False)
    """
    return _made(pattern, what)(name, True)


def match(pattern: str, name: str, what: str = "pattern") -> bool:
    """Return whether an expression matches the start of a name, as `re.match` does.

    Raises:
        ValueError: As `fullmatch`.

    >>> match("a+", "aab"), match("b", "aab")
    (True, False)
    """
    return _made(pattern, what)(name, False)


def first_group(pattern: str, name: str, what: str = "pattern") -> str | None:
    r"""Return what the first group of an expression matches at the start of a name, `None` where there is no match.

    Raises:
        ValueError: An expression with more than a few ways through a name; which is taken decides the group.

    >>> first_group(r".*?\.(\d+)\.", "layers.12.q_proj")
    '12'
    """
    if _made(pattern, what).ways > _FEW:
        raise ValueError(
            f"{what} has {pattern!r:.200}, which can be matched in too many ways; repeat less in it (+, *, {{}}), or "
            "give a name"
        )
    found = re.match(pattern, name)
    return None if found is None else found[1]


def check(pattern: str, what: str = "pattern", given: str | None = None) -> None:
    r"""Refuse what is no expression, or cannot be matched in bounded time.

    Args:
        pattern: The expression.
        what: How an error calls it.
        given: What was given of it, for errors; by default all.

    Raises:
        ValueError: Says which expression, and why.

    >>> check(r".*\.q_proj")
    """
    _made(pattern, what, given)


def _made(pattern: str, what: str, given: str | None = None) -> _Expression:
    given = pattern if given is None else given
    if len(pattern) > _LONGEST:
        raise ValueError(
            f"{what} has an expression of {len(pattern):,} characters, {given!r:.60}..., expected at most "
            f"{_LONGEST:,}; give a list of names"
        )
    try:
        return _expression(pattern)
    except _Unbounded as error:
        raise ValueError(f"{what} has {given!r:.200}, {error}; write it without, or give a list of names") from None
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{what} has {given!r:.200}, which is no regular expression: {error}; escape its special characters, or "
            "give a list of names"
        ) from None


class _Unbounded(Exception):
    """An expression that takes time without bound."""


class _Expression:
    """One expression, ready to be matched.

    Attributes:
        ways: About how many ways there are through a name.
    """

    def __init__(self, pattern: str):
        self.pattern = pattern
        parsed = _parser.parse(pattern)
        self.ways = _ways(parsed)
        self._compiled = re.compile(pattern) if self.ways <= _FEW else None
        self._parts = 0
        self._step: Step | None = None
        if self._compiled is None:
            self._step = self._sequence(parsed, parsed.state.flags)

    def __call__(self, name: str, whole: bool) -> bool:
        if self._compiled is not None:
            return (self._compiled.fullmatch(name) if whole else self._compiled.match(name)) is not None
        assert self._step is not None
        places = _Places(name, _STEPS + 50 * self._parts)
        try:
            ends = self._step(places, 1, True)
        except (_Unbounded, RecursionError):
            raise ValueError(
                f"the expression {self.pattern!r:.200} takes too long on {name!r:.200}; repeat less within what is "
                "repeated, or give a list of names"
            ) from None
        return bool(ends >> len(name) & 1 if whole else ends)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _sequence(self, nodes: Any, flags: int) -> Step:
        steps = [self._node(op, value, flags) for op, value in nodes]
        self._parts += len(steps)

        def step(places: _Places, at: int, forward: bool) -> int:
            for one in steps if forward else reversed(steps):
                if not at:
                    break
                at = one(places, at, forward)
            return at

        return steps[0] if len(steps) == 1 else step

    def _node(self, op: Any, value: Any, flags: int) -> Step:
        if op in _CHARACTERS:
            return _character(_single(op, value, flags))
        if op is _constants.AT:
            where = _single(op, value, flags)
            return lambda places, at, forward: at & places.where(where)
        if op in _REPEATS:
            least, most, body = value
            return _repeat(self._sequence(body, flags), least, None if most is _constants.MAXREPEAT else most)
        if op is _constants.SUBPATTERN:
            _, added, removed, body = value
            return self._sequence(body, _with_flags(flags, added, removed))
        if op is _constants.BRANCH:
            return _either([self._sequence(one, flags) for one in value[1]])
        if op in (_constants.ASSERT, _constants.ASSERT_NOT):
            return _look(self._sequence(value[1], flags), value[0] < 0, op is _constants.ASSERT_NOT)
        if op is _constants.FAILURE:
            return lambda places, at, forward: 0
        raise _Unbounded("which has a backreference, a condition or an atomic part beside too many repetitions")


class _Places:
    """A name, and where parts of an expression may stand in it; a place is a bit, from 0 to the length."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps = name, steps
        self.every = (1 << len(name) + 1) - 1
        self._characters: dict[str, int] = {}
        for index, character in enumerate(name):
            self._characters[character] = self._characters.get(character, 0) | 1 << index
        self._known: dict[Any, int] = {}

    def count(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise _Unbounded

    def characters(self, single: re.Pattern[str]) -> int:
        """Return the places that a character of a kind follows."""
        if single not in self._known:
            kinds = (bits for character, bits in self._characters.items() if single.match(character))
            self._known[single] = functools.reduce(int.__or__, kinds, 0)
        return self._known[single]

    def where(self, empty: re.Pattern[str]) -> int:
        """Return the places where something without width holds: a start, an end, the edge of a word."""
        if empty not in self._known:
            self._known[empty] = sum(1 << i for i in range(len(self.name) + 1) if empty.match(self.name, i))
        return self._known[empty]


def _character(single: re.Pattern[str]) -> Step:
    def step(places: _Places, at: int, forward: bool) -> int:
        places.count()
        found = places.characters(single)
        return (at & found) << 1 if forward else at >> 1 & found

    return step


def _either(steps: list[Step]) -> Step:
    def step(places: _Places, at: int, forward: bool) -> int:
        ends = 0
        for one in steps:
            ends |= one(places, at, forward)
        return ends

    return step


def _repeat(body: Step, least: int, most: int | None) -> Step:
    def step(places: _Places, at: int, forward: bool) -> int:
        for _ in range(least):
            places.count()
            before, at = at, body(places, at, forward)
            if at in (0, before):
                break
        new, ends, left = at, at, math.inf if most is None else most - least
        while new and left > 0:
            places.count()
            new = body(places, new, forward) & ~ends
            ends, left = ends | new, left - 1
        return ends

    return step


def _look(body: Step, behind: bool, negative: bool) -> Step:
    """Return where something stands ahead, or behind: those places from which it leads anywhere, backwards."""

    def step(places: _Places, at: int, forward: bool) -> int:
        found = body(places, places.every, behind)
        return at & (~found if negative else found)

    return step


# -- parts -------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _expression(pattern: str) -> _Expression:
    return _Expression(pattern)


def _single(op: Any, value: Any, flags: int) -> re.Pattern[str]:
    """One part as an expression of its own; `re` says what it means under these flags."""
    key = repr((op, value, flags))
    if key not in _SINGLE:
        if len(_SINGLE) > 4096:
            _SINGLE.clear()
        state = _parser.State()
        state.flags = flags
        _SINGLE[key] = _compiler.compile(_parser.SubPattern(state, [(op, value)]), flags)
    return _SINGLE[key]


_SINGLE: dict[str, re.Pattern[str]] = {}


def _with_flags(flags: int, added: int, removed: int) -> int:
    types = _parser.TYPE_FLAGS
    return ((flags & ~types if added & types else flags) | added) & ~removed


def _ways(nodes: Any) -> float:
    """About how many ways there are through a name, in the worst case; infinite where repetitions are nested."""
    total = 1.0
    for op, value in nodes:
        total *= _ways_of(op, value)
    return total


def _ways_of(op: Any, value: Any) -> float:
    if op in _REPEATS or op is _POSSESSIVE:
        least, most, body = value
        if len(body) == 1 and body[0][0] in _CHARACTERS:
            result: float = min(int(most) - least + 1, _LENGTH)
            return result
        return 1 + _ways(body) if int(most) == 1 else math.inf
    if op is _constants.SUBPATTERN:
        return _ways(value[3])
    if op is _constants.BRANCH:
        return sum(map(_ways, value[1]))
    if op in (_constants.ASSERT, _constants.ASSERT_NOT):
        return _ways(value[1])
    if op is _constants.GROUPREF_EXISTS:
        return _ways(value[1]) + (_ways(value[2]) if value[2] else 0)
    return _ways(value) if op is _ATOMIC else 1
