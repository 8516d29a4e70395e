"""The calls of one batch whose rows have adapters of a bank, and the gradients that come of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchgraft.functional import Routed, StackedGraft
from torchgraft.functional.extending import Tree

from .state import Gathered


class Batch:
    """The model with an adapter for each row of a batch, as `with bank.rows(names) as adapted` gives it.

    Within the block it is called like the model, as often as there are micro-batches of these rows.

    Args:
        graft: The stack that the bank's slots are places of.
        stack: The adapters that are present, over the rows.
        gathered: Their leaves.
        random_base: Whether the model may draw random numbers.
    """

    def __init__(self, graft: StackedGraft, stack: Routed, gathered: Gathered, random_base: bool = True):
        self._graft, self._tree = graft, gathered.tree
        self._like = next(leaf for leaves in gathered.tree.values() for leaf in leaves.values())
        self._watched = not random_base and self._like.requires_grad
        self._stack: Routed | None = stack
        if self._like.requires_grad:
            for leaf in (leaf for leaves in gathered.tree.values() for leaf in leaves.values()):
                leaf.register_hook(self._check_open)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; row `i` has the adapter that is named for it.

        Raises:
            RuntimeError: The block is over; the model draws random numbers.
            ValueError: A batch of another number of rows, or one whose rows cannot be followed.
        """
        if not self._watched or torch.compiler.is_compiling():
            return self._graft(self._open(), *args, **kwargs)
        before = _generator_state(self._like)
        y = self._graft(self._open(), *args, **kwargs)
        if not torch.equal(before, _generator_state(self._like)) and self._draws(args, kwargs):
            raise RuntimeError(
                "the model draws random numbers in training (dropout, stochastic depth) from a generator that all rows "
                "share, so that an adapter would depend on who is in its batch; set the model's own dropout to 0, or "
                "declare it: Bank(..., random_base=True)"
            )
        return y

    def _draws(self, args: Any, kwargs: Any) -> bool:
        """Return whether it is the call that moved torch's generator, and not another thread."""
        stack = self._open()
        noise = [(generator, generator.get_state()) for generator in stack.rows.noise or ()]
        with torch.no_grad(), SeesDraws() as seen:
            self._graft(stack, *args, **kwargs)
        for generator, state in noise:
            generator.set_state(state)
        drawn: bool = seen.drawn
        return drawn

    def view(self) -> nn.Module:
        """Return a module like the model with the adapters in, for other methods than its forward.

        Raises:
            RuntimeError: The block is over.
        """
        return self._graft.view(self._open())

    def gradients(self) -> Tree | None:
        """Return the gradients of the block, leaves `"n ..."`, where there are any; `None` if no backward has come."""
        found = {
            path: {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
            for path, leaves in self._tree.items()
        }
        return found if any(found.values()) else None

    def close(self) -> None:
        """End the block: calls and gradients after it are errors."""
        self._stack, self._tree = None, {}

    def _open(self) -> Any:
        if self._stack is None:
            raise RuntimeError("the block of bank.rows is over; call what it gave within: with bank.rows(names) as f")
        return self._stack

    def _check_open(self, gradient: Tensor) -> None:
        if self._stack is None:
            raise RuntimeError(
                "backward: the block of bank.rows is over, and its gradients are counted; call backward within it"
            )


class SeesDraws(TorchDispatchMode):
    """See whether anything draws from torch's generator in this thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self.drawn = self.drawn or given.get("dropout_p", 1) != 0
        return func(*args, **kwargs)


def _generator_state(like: Tensor) -> Tensor:
    """Return the state of torch's generator on the device of a tensor."""
    return torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()
