"""What users give to a bank, checked before anything changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional import Graft, StackedGraft
from torchgraft.functional.extending import StackedBinding, given_type

from .resident import Resident


def stacked(graft: Any) -> StackedGraft:
    """Return the stack whose places are slots.

    Raises:
        TypeError: No graft, or one with named adapters.
    """
    if isinstance(graft, StackedGraft):
        return graft
    if not isinstance(graft, Graft):
        raise TypeError(f"Bank: graft is {given_type(graft)}, expected what bind(model, config) returned")
    if graft.binding.named:
        raise TypeError(
            f"Bank: the graft has adapters by name, {sorted(graft.configs)}, which add up; bind the model to one "
            "config, the largest that a slot can hold: bind(model, config)"
        )
    binding = StackedBinding.of_singles(graft.model, [graft.binding])
    made = StackedGraft(graft.model, binding, allow_unreached=graft.bound.allow_unreached)
    return made if graft.bound.training is None else made.in_mode(graft.bound.training)


def leaf_like(graft: Graft, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """Return a leaf like all that an adapter of a bank has.

    Raises:
        ValueError: Leaves of several dtypes, or on several devices.
    """
    made = graft.init(torch.Generator().manual_seed(0), dtype=dtype, device=device)
    leaves: dict[Any, Tensor] = {
        (leaf.dtype, leaf.device): leaf for leaves in made.values() for leaf in leaves.values()
    }
    if len(leaves) > 1 or not all(dtype.is_floating_point for dtype, _ in leaves):
        raise ValueError(
            f"Bank: parameters would be of {sorted(f'{dtype} on {device}' for dtype, device in leaves)}; a bank has "
            "one real dtype and one device: give dtype= and device="
        )
    return next(iter(leaves.values()))


def check_slots(slots: Any) -> None:
    """Refuse what is no number of slots."""
    if not isinstance(slots, int) or isinstance(slots, bool) or slots < 1:
        raise ValueError(f"Bank: slots is {slots!r}, expected how many adapters have one at most, 1 or more")


def flat(names: Any) -> tuple[list[Any], int | None]:
    """Return the names of rows, or those of the tokens of packed rows and how many tokens a row has.

    >>> flat(["a", None]), flat([["a", "a"], ["b", "b"]])
    ((['a', None], None), (['a', 'a', 'b', 'b'], 2))
    """
    if isinstance(names, (str, Tensor)) or not isinstance(names, Sequence) or not names:
        raise TypeError(
            f"rows: names is {names!r:.60}, expected a list with a name for each row of the batch, None for the base"
        )
    if not any(isinstance(one, (list, tuple)) for one in names):
        return [*names], None
    if len({len(one) if isinstance(one, (list, tuple)) else -1 for one in names}) > 1 or not names[0]:
        raise ValueError("rows: packed rows differ in their number of tokens; give a name for each token of each row")
    return [name for one in names for name in one], len(names[0])


def token_counts(given: list[Any], packed: int | None, tokens: Any, residents: list[Resident]) -> list[float] | None:
    """Return how many tokens each adapter's losses are sums over; `None` where none are counted."""
    for resident in residents:
        if resident.pending and resident.by_tokens != (tokens is not None):
            now, before = ("" if tokens is not None else "not "), ("" if resident.by_tokens else "not ")
            raise ValueError(
                f"rows: tokens are {now}given, and were {before}given for the gradients that {resident.name!r} has "
                "since its last step; give them always, or never"
            )
    if tokens is None:
        return None
    if packed is not None:
        raise ValueError("rows: tokens are counted by row, and packed rows have several adapters; normalise the loss")
    counts = tokens.tolist() if isinstance(tokens, Tensor) else [*tokens]
    if len(counts) != len(given) or not all(isinstance(n, (int, float)) and 0 <= n < math.inf for n in counts):
        raise ValueError(f"rows: tokens is {counts!r:.60}, expected how many each of the {len(given)} rows has")
    sums = dict.fromkeys((resident.name for resident in residents), 0.0)
    for name, count in zip(given, counts, strict=True):
        if name is not None:
            sums[name] += count
    return [*sums.values()]


def hyper_by_name(hyper: Any) -> dict[str, Mapping[str, Any]]:
    """Return the hyper-parameters of each adapter that is to be stepped.

    >>> hyper_by_name(["poems"]), hyper_by_name({"code": {"lr": 0.1}})
    ({'poems': {}}, {'code': {'lr': 0.1}})
    """
    if isinstance(hyper, Mapping):
        for name, values in hyper.items():
            if values is not None and not isinstance(values, Mapping):
                raise TypeError(
                    f"step: the hyper-parameters of {name!r} are {given_type(values)}, expected a dict: "
                    "bank.step({'poems': {'lr': 1e-3}})"
                )
        return {name: values or {} for name, values in hyper.items()}
    if isinstance(hyper, str) or not isinstance(hyper, Sequence):
        raise TypeError(f"step: hyper is {hyper!r:.60}, expected a dict by name, or a list of names")
    return {name: {} for name in hyper}


def check_pending(resident: Resident) -> None:
    """Refuse to step an adapter that has no gradients."""
    if not resident.pending:
        raise RuntimeError(
            f"step: {resident.name!r} has no gradients since its last step; call backward in a block of bank.rows, and "
            "leave it"
        )


def checked_hyper(resident: Resident, given: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
    """Return an adapter's hyper-parameters for a step, and the norm to clip its gradient to.

    Raises:
        TypeError, ValueError: Hyper-parameters that are none, or out of their range.
    """
    what = f"step: {resident.name!r}"
    values = dict(given)
    most = values.pop("max_norm", None)
    if most is not None and not (isinstance(most, (int, float)) and most > 0):
        raise ValueError(f"{what}: max_norm is {most!r:.60}, expected a number above 0, or None")
    resident.optimizer.check_hyper(values, what)
    return {**resident.optimizer.hyper, **values}, most
