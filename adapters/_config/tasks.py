"""Adapters of several tasks, of which each row of a batch has one: what methods say of them, for calls by rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchgraft.functional.extending import Tree


@dataclasses.dataclass(frozen=True)
class Tasks:
    """An adapter that is one for each task, with parameters that the tasks have together.

    Attributes:
        count: `(config) -> int`, the number of tasks.
        single: `(config) -> config` of an adapter of one of the tasks.
        choose: `(stack, tasks) -> stack` of adapters of one task: leaves `"N ..."`, tasks `"N"`, long.
    """

    count: Callable[[Any], int]
    single: Callable[[Any], Any]
    choose: Callable[[Tree, Tensor], Tree]
