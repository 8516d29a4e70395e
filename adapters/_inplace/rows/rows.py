"""Giving each row of a batch an injected adapter of its own: PEFT's `adapter_names`, on any model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from torchgraft.functional import UnsupportedCall, functional_call
from torchgraft.functional.extending import given_type

from ..placed import Placed
from ..switch import check_known
from ..walk import unwrap
from .bound import BoundRows, bound_rows
from .generating import positions_of_step, with_forward

BASE = "__base__"
"""The name of the base without an adapter, as in PEFT."""


class AdapterRows:
    """A model with injected adapters, called with an adapter for each row of the batch; made by `adapter_rows`.

    Attributes:
        model: The model.
        names: The adapter of each row.
        tasks: The task of each row; `None` where none were given.
        positions: -1 for tokens that the base has, `"rows tokens"`; `None` where none were given.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        declared: Mapping[str, Any],
        tasks: Sequence[int] | None = None,
        positions: Tensor | None = None,
    ):
        self.model, self.names, self._declared = model, tuple(names), dict(declared)
        self.tasks, self.positions = None if tasks is None else tuple(tasks), positions

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model: row `i` of the output is that of a call with `set_adapter(model, names[i])`.

        Raises:
            ValueError: Another number of rows than of names; a model in which the rows cannot be followed; merged or
                partly disabled adapters.
            UnsupportedCall: Something that a call by rows would run past; names the layer.
        """
        bound, params = self._bound((args, kwargs))
        y, buffers = functional_call(bound.graft, params, args, kwargs, return_buffers=True)
        _write_back(bound.graft.model, buffers)
        return y

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's `generate`; with beams or several sequences for a row, each has the row's adapter.

        Positions are those of the prompt, and the tokens after it are as its last one.

        Raises:
            ValueError, UnsupportedCall: As a call does.
        """
        if self.positions is not None:
            return with_forward(self.model, self._step).generate(*args, **kwargs)
        bound, params = self._bound((args, kwargs))
        view: Any = bound.graft.view(params)
        return view.generate(*args, **kwargs)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model in a step of `generate`."""
        assert self.positions is not None
        positions = positions_of_step(self.positions, args, kwargs)
        each = len(positions) // len(self.names)
        names = [name for name in self.names for _ in range(each)]
        tasks = None if self.tasks is None else [task for task in self.tasks for _ in range(each)]
        return AdapterRows(self.model, names, self._declared, tasks, positions)(*args, **kwargs)

    def view(self) -> nn.Module:
        """Return a module like the user's, for its other methods; a view as `Graft.view` makes them.

        It has the adapters' numbers as they are now: take a new one after a step of an optimizer.

        Raises:
            ValueError, UnsupportedCall: As a call does.
        """
        bound, params = self._bound(())
        return bound.graft.view(params)

    def _bound(self, inputs: Any) -> tuple[BoundRows, Any]:
        """Return the graft and its parameters, after all checks."""
        if torch.compiler.is_compiling():
            raise UnsupportedCall(
                "adapter_names: rows with adapters of their own in an injected model are not compiled; compile a "
                "function of a graft: graft(route(stack(trees), rows), x), with graft = extract_graft(model) and "
                "trees of extract_params(model, name)"
            )
        self._check_length(inputs)
        bound = bound_rows(self.model)
        check_known(self.model, {*self.names} - bound.names - {BASE})
        disabled = _check_state(bound.parts)
        tasks = self._tasks(bound.tasks)
        names = [None if disabled or name == BASE else name for name in self.names]
        return bound, bound.params([*zip(names, tasks, strict=True)], self.positions, self._declared)

    def _tasks(self, counts: Mapping[str, int | None]) -> list[int]:
        """Return the task of each row, 0 for adapters without tasks; refuse what adapters do not have.

        Args:
            counts: How many tasks adapters have; `None` where their method knows none.
        """
        if self.tasks is not None and not any(counts.values()):
            raise ValueError(f"task_ids are given, and none of the adapters {sorted(counts)} is of tasks")
        found = []
        for row, name in enumerate(self.names):
            count, task = counts.get(name) or 1, 0 if self.tasks is None else self.tasks[row]
            if count > 1 and self.tasks is None:
                raise ValueError(
                    f"adapter {name!r} is of {count} tasks, and nothing says which one each row is of; give task_ids, "
                    "a number from 0 on for each row"
                )
            if counts.get(name) and not 0 <= task < count:
                raise ValueError(f"task_ids[{row}] is {task}, and adapter {name!r} has tasks 0 to {count - 1}")
            found.append(task if counts.get(name) else 0)
        return found

    def _check_length(self, inputs: Any) -> None:
        lengths = [len(x) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.ndim]
        if lengths and len(self.names) not in lengths:
            raise ValueError(
                f"adapter_names has {len(self.names)} names, and the inputs have {lengths[0]} rows; give a name for "
                f"each row, {BASE!r} for the base alone"
            )

    def __repr__(self) -> str:
        return f"AdapterRows({type(self.model).__name__}, {list(self.names)})"


def adapter_rows(
    model: nn.Module,
    adapter_names: Sequence[str],
    *,
    task_ids: Tensor | Sequence[int] | None = None,
    positions: Tensor | None = None,
    batch_dim: int | Mapping[str, int] | None = None,
    mixed: Sequence[str] = ("loss",),
    check: bool = False,
) -> AdapterRows:
    """Give each row of a batch an injected adapter of its own: `adapter_rows(model, ["a", "b"])(x)`.

    Row `i` of the output is row `i` of the model's after `set_adapter(model, adapter_names[i])`, and that of the base
    for `"__base__"`; the active adapters do not count, and stay active. Adapters of all methods can meet in a batch.
    In training mode too: gradients reach the parameters that require them, `set_requires_grad(model, names)`. While
    all adapters are disabled, every row has the base.

    It is `route` on the model beneath the adapters, with its proof of where rows are (`functional/ROWS.md`); each call
    stacks the parameters of the adapters that its rows have. Modules run as copies that share the model's tensors, and
    hooks see these; hooks within an adapted layer are an error. What the forward writes to buffers is written to the
    model's. The model is bound at the first call, and again when something of it has changed; parameters may be
    written to.

    Args:
        model: A model with injected adapters.
        adapter_names: The name of an adapter for each row, or `"__base__"`.
        task_ids: The task of each row, for adapters that are one for each of several tasks (Poly); others pass over it.
        positions: -1 for tokens that the base is to have, `"rows tokens"`, as `activated_positions` returns it; for
            `generate` those of the prompt.
        batch_dim: As for `route`.
        mixed: As for `route`; by default a `loss`, which models of transformers return where they are given labels.
        check: As for `route`.

    Returns:
        A function with the model's arguments; `.generate(...)` and `.view()` are for its other methods.

    Raises:
        TypeError: Names that are no list of strings; a model in `DistributedDataParallel`, or in FSDP1.
        ValueError: A name that the model does not have; another number of tasks than of names.

    >>> from torchgraft.adapters import IA3Config, LoraConfig, inject_adapter_in_model, set_adapter
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> for name, config in {"a": LoraConfig(init_lora_weights=False), "b": IA3Config(feedforward_modules=[])}.items():
    ...     config.target_modules = ["0"]
    ...     model = inject_adapter_in_model(config, model, name)
    >>> x = torch.randn(3, 4)
    >>> y = adapter_rows(model, ["a", "__base__", "b"])(x)
    >>> set_adapter(model, "a")
    >>> torch.allclose(y[0], model(x)[0]), torch.equal(y[1], model[0].base_layer(x)[1])
    (True, True)
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(f"adapter_names is {given_type(adapter_names)}, expected a list with a name for each row")
    _refuse_parallel(model)
    model = unwrap(model)
    check_known(model, [name for name in adapter_names if name != BASE])
    declared = {"batch_dim": batch_dim, "mixed": mixed, "check": check}
    rows = len(adapter_names)
    if positions is not None and (positions.ndim != 2 or len(positions) != rows or positions.is_floating_point()):
        raise ValueError(
            f"positions has shape {tuple(positions.shape)} and dtype {positions.dtype}, expected long numbers for the "
            f"{rows} rows and their tokens, -1 where the base is"
        )
    return AdapterRows(model, adapter_names, declared, _numbers(task_ids, rows), positions)


def _numbers(task_ids: Any, rows: int) -> list[int] | None:
    """Return tasks as numbers."""
    if task_ids is None:
        return None
    given: Any = torch.as_tensor(task_ids)
    if given.shape != (rows,) or given.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"task_ids has shape {tuple(given.shape)} and dtype {given.dtype}, expected one long number for each of "
            f"the {rows} rows"
        )
    numbers: list[int] = given.tolist()
    return numbers


def _refuse_parallel(model: Any) -> None:
    """Refuse wrappers that have to be called, and not the module within."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"model is a {type(model).__name__}, whose share in gradients a call of the module within would run past; "
            "give it a PeftModel, whose forward takes adapter_names, or call adapter_rows(model.module, names)"
        )
    if isinstance(model, nn.Module) and any("_fsdp_wrapped_module" in module._modules for module in model.modules()):
        raise TypeError(
            "the model is wrapped by FullyShardedDataParallel, whose flat parameters rows with adapters of their own "
            "cannot be given; shard it with torch.distributed.fsdp.fully_shard instead, or call "
            "set_adapter(model, name) and the model"
        )


def _check_state(parts: Iterable[Placed]) -> bool:
    """Return whether all adapters are disabled; refuse those that are in part, and merged ones."""
    disabled = set()
    for part in parts:
        if part.merged_adapters:
            raise ValueError(
                f"adapter_names: adapters {part.merged_adapters} are merged into the model, so that rows have these "
                "already; call unmerge_adapter(model) first"
            )
        disabled.add(part.disable_adapters)
    if len(disabled) > 1:
        raise ValueError(
            "adapter_names: adapters are disabled in some layers of the model and not in others; call "
            "enable_adapter_layers(model), or disable_adapter_layers(model) for the base alone"
        )
    return disabled == {True}


@torch.no_grad()
def _write_back(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Have what a forward wrote to buffers of its own in those of the model, as a call of the model does."""
    for name, own in model.named_buffers():
        new = buffers.get(name)
        if new is None or new.shape != own.shape:
            shape = "removed" if new is None else tuple(new.shape)
            raise UnsupportedCall(
                f"{name}: this buffer of shape {tuple(own.shape)} is {shape} after the forward, which rows with "
                "adapters of their own cannot keep; call set_adapter(model, name) and the model"
            )
        if not (own.is_meta or own.equal(new)):
            own.copy_(new)
