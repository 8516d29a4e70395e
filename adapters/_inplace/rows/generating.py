"""Generating where some tokens of a prompt have the base: the tokens of each step, and a model that calls by rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import UnsupportedCall

_OWN = frozenset({"training", "_parameters", "_buffers", "_modules"})


def with_forward(model: Any, forward: Callable[..., Any]) -> Any:
    """Return a module of a model's class and with its attributes, whose forward is another and has none of its hooks.

    >>> layer = nn.Linear(2, 2)
    >>> doubled = with_forward(layer, lambda x: 2 * x)
    >>> doubled(torch.ones(1)), isinstance(doubled, nn.Linear), doubled.weight is layer.weight
    (tensor([2.]), True, True)
    """
    cls: Any = type(model)

    @functools.wraps(cls.forward)  # whose signature `generate` reads
    def instead(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    made: Any = object.__new__(type(cls.__name__, (cls,), {"__module__": cls.__module__, "forward": instead}))
    registries = {name: value for name, value in vars(nn.Module()).items() if name not in _OWN}
    attributes = {name: value for name, value in vars(model).items() if name != "forward"}
    object.__setattr__(made, "__dict__", attributes | registries)
    return made


def positions_of_step(prompt: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the positions of the tokens that a step of `generate` computes: those after the prompt are as its last.

    Args:
        prompt: The positions of the prompt's tokens, `"rows tokens"`.
        args: The arguments of the step.
        kwargs: Those by name.

    Returns:
        `"rows*k tokens"`, where each row became `k`, as for beams.

    >>> prompt = torch.tensor([[-1, 0, 0], [-1, -1, -1]])
    >>> positions_of_step(prompt, (), {"input_ids": torch.zeros(2, 5)})
    tensor([[-1,  0,  0,  0,  0],
            [-1, -1, -1, -1, -1]])
    """
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
    tokens: Any = next((one for one in given if isinstance(one, Tensor)), None)
    if tokens is None or tokens.ndim < 2 or len(tokens) % len(prompt):
        raise UnsupportedCall(
            f"positions: generate calls the model without input_ids or inputs_embeds of the {len(prompt)} rows, in "
            "which to tell the tokens apart; call the model step by step, with positions of each step"
        )
    before = cached_tokens(args, kwargs)
    after = before + tokens.shape[1] - prompt.shape[1]
    whole = torch.cat([prompt, prompt[:, -1:].expand(-1, max(0, after))], 1)
    return whole[:, before : before + tokens.shape[1]].repeat_interleave(len(tokens) // len(prompt), 0)


def cached_tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return how many tokens came before those of a call, in a cache of keys and values among its arguments.

    >>> cached_tokens((), {"past_key_values": [(torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 5, 3))]})
    5
    """
    for given in (*args, *kwargs.values()):
        if hasattr(given, "get_seq_length"):
            return int(given.get_seq_length())
    layers = kwargs.get("past_key_values")
    return int(layers[0][0].shape[-2]) if layers else 0
