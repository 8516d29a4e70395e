"""Calls: a base, an adapter and inputs meet in a skeleton."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ._execution.run import call
from ._given import check_graft
from ._graft import Graft
from ._messages import given_type
from ._method import Tree
from ._routing.route import Routed


def functional_call(
    graft: Graft,
    params: Tree | Routed | tuple[Mapping[str, Tensor], Tree | Routed],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    return_buffers: bool = False,
) -> Any:
    """Run the bound model as a pure function of adapter parameters, base tensors and inputs.

    Args:
        graft: What `bind` returned.
        params: A parameter tree, or `(base_params, params)` to give base tensors as data too: a dict from names of
            the user's model's parameters or buffers to tensors of any dtype, differentiable and vmappable. What it
            does not name is the model's own.
        args: Positional arguments of the model's forward (a tuple; one bare tensor is taken as one argument).
        kwargs: Keyword arguments of the forward.
        return_buffers: Also return what the forward left in the model's buffers.

    Returns:
        The model's output, or `(output, buffers)`, where `buffers` maps names of the user's model to tensors.

    Raises:
        KeyError, TypeError, ValueError: A tree that does not fit, a base tensor that does not exist.
        RuntimeError: The forward ran past a site, so that its adapter had no effect.

    >>> import torch
    >>> from torchgraft.adapters import IA3Config
    >>> from torchgraft.functional import bind
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    >>> graft = bind(model, IA3Config(target_modules=["0"], feedforward_modules=[]))
    >>> y, buffers = functional_call(graft, graft.init(), (torch.ones(4, 2),), return_buffers=True)
    >>> buffers["1.num_batches_tracked"], model[1].num_batches_tracked
    (tensor(1), tensor(0))
    """
    check_graft(graft, "functional_call")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"functional_call: kwargs is {given_type(kwargs)}, expected a dict of keyword arguments; positional ones "
            "are a tuple: functional_call(graft, params, (x,))"
        )
    return call(graft.bound, params, args, kwargs, return_buffers)
