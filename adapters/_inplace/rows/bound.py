"""The adapters of a model as stacks over the model beneath them: what calls by rows run, kept while nothing changes."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import Binding, Graft, Routed, route
from torchgraft.functional.extending import JoinedBinding, StackedBinding, Tree, Watch

from ..beside.biases import biases_of
from ..beside.modules_to_save import ModulesToSaveWrapper
from ..bound_states import keep, kept
from ..states.bare import bare_copy
from ..states.extract import bind_extracted, check_bare, live_params
from ..states.layouts import config_of
from ..switch import adapter_names
from ..walk import layers, named, parts, placed_modules
from .attached import carry_hooks, check_buffers, check_held, check_unattached
from .copied import Contents, copied_constants
from .stacking import Stacking

_RECENT = 4
"""States of a model that are kept, such as those in training and in evaluation mode."""

_LOCK = threading.Lock()

_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
_REGISTRIES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", *_BACKWARD)


RowName = tuple[str | None, int]
"""The adapter of a row, `None` for the base, and its task."""


class Group:
    """Adapters that can be stacked.

    Args:
        names: Their names, in the order of the stack.
        binding: Their binding; of adapters of several tasks that of one task of each.
        trees: Their parameters.
        shapes: The shapes of these.
    """

    def __init__(
        self,
        names: Sequence[str],
        binding: Binding,
        trees: Sequence[Tree],
        shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    ):
        self.numbers = {name: number for number, name in enumerate(names)}
        self.binding = binding
        blocks = binding.blocks if isinstance(binding, StackedBinding) else {}
        self._stacking = Stacking(trees, shapes, blocks)

    def routed(self, names: Sequence[RowName], positions: Tensor | None, declared: Mapping[str, Any]) -> Routed | None:
        """Return the routed stack of those adapters that rows have; `None` where no row has one of these."""
        pairs = [(self.numbers.get(name, -1) if name is not None else -1, task) for name, task in names]
        used = sorted({pair for pair in pairs if pair[0] >= 0})
        if not used:
            return None
        numbers = [number for number, _ in used]
        members = None if numbers == [*self.numbers.values()] else torch.tensor(numbers)
        rows = torch.tensor([used.index(pair) if pair[0] >= 0 else -1 for pair in pairs])
        if positions is not None:
            rows = torch.where(positions.cpu() >= 0, rows.unsqueeze(1), -1)
        config: Any = self.binding.configs[""]
        stacked, tasks = self._stacking.stack(numbers), config.form.tasks
        if tasks is not None:
            stacked = tasks.choose(stacked, torch.tensor([task for _, task in used]))
        return route(stacked, rows, members=members, **declared)


class BoundRows:
    """A model's adapters, bound to the model beneath them.

    Args:
        model: A model with injected adapters.

    Attributes:
        graft: The graft of all that can be bound, by group.
        names: Names of the adapters.
        parameters: Identities of the model's parameters.
        parts: All that they have in the model.
        refused: Why some cannot be bound, by adapter.
        tasks: How many tasks each adapter has; `None` where its method knows none.
    """

    def __init__(self, model: nn.Module):
        check_bare(model)
        check_unattached(model)
        self._watch = _Watch(model)
        self.parts, self.names = parts(model), {*adapter_names(model)}
        self.parameters = {id(parameter) for parameter in model.parameters()}
        self.tasks = {name: _count_tasks(config_of(model, name)) for name in adapter_names(model)}
        self._copies = [(path, part) for path, part in named(model, ModulesToSaveWrapper).items() if _has_buffers(part)]
        base = bare_copy(model)
        carry_hooks(model, base)
        held = [*model.parameters(), *model.buffers(), *_biases(model)]
        self.refused: dict[str, tuple[type[Exception], str]] = {}
        self._groups: dict[str, Group] = {}
        bound: dict[str, tuple[Binding, Tree]] = {}
        copied: list[Tensor] = []
        for name in adapter_names(model):
            tree = live_params(model, name)
            try:
                check_held(name, tree, held)
                bound[name] = bind_extracted(model, name, base, config_of(model, name)), tree
            except (TypeError, ValueError, RuntimeError) as error:
                self.refused[name] = type(error), str(error)  # without its frames, which have the model
        for names, binding in _stackable(bound, base):
            trees, shapes = [bound[name][1] for name in names], binding.shapes[""]
            if any((self.tasks[name] or 1) > 1 for name in names):
                binding = _of_one_task(model, names, base)
            self._groups[", ".join(names)] = Group(names, binding, trees, shapes)
            copied += copied_constants(model, names, binding)
        self._copied = Contents(copied)
        binding = JoinedBinding.of_stacks(base, {key: group.binding for key, group in self._groups.items()})
        self.graft = Graft(base, binding, allow_unreached=True)
        self._parameters = list(base.named_parameters())

    def same(self) -> bool:
        """Return whether the model is still what was bound."""
        return self._watch.same() and self._copied.same()

    def params(
        self, names: Sequence[RowName], positions: Tensor | None, declared: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Any]:
        """Return the base's trained parameters and the routed stacks for a call.

        Args:
            names: The adapter of each row and its task; `None` for the base.
            positions: `"rows tokens"`, -1 for tokens that the base has; `None` for none.
            declared: What is said of where rows are, as `route` takes it.

        Raises:
            TypeError, ValueError, RuntimeError: An adapter that no row can have.
        """
        known = [name for name in dict.fromkeys(name for name, _ in names) if name is not None]
        for name in known:
            if name in self.refused:
                kind, words = self.refused[name]
                raise kind(words)
        for path, part in self._copies:
            check_buffers(path, part.modules_to_save, part.original_module, known)
        trained = self._parameters if torch.is_grad_enabled() else []
        base: dict[str, Tensor] = {name: parameter for name, parameter in trained if parameter.requires_grad}
        routed = {key: group.routed(names, positions, declared) for key, group in self._groups.items()}
        return base, {key: stack for key, stack in routed.items() if stack is not None}


def bound_rows(model: nn.Module) -> BoundRows:
    """Return a model's adapters as they are now, bound for calls by rows; bound anew where something has changed."""
    bound = _known(model)
    if bound is not None:
        return bound
    with _LOCK:
        bound = _known(model)
        if bound is None:
            with torch.inference_mode(False):  # calls that are differentiated use it too
                bound = BoundRows(model)
            tensors = {id(tensor) for tensor in model.parameters()}
            others = [other for other in kept(model) if other.parameters <= tensors]  # else it cannot come back
            keep(model, (bound, *others)[:_RECENT])
        return bound


def _known(model: nn.Module) -> BoundRows | None:
    states: tuple[BoundRows, ...] = kept(model)
    return next((bound for bound in states if bound.same()), None)


class _Watch:
    """A check that a model and the adapters in it are what they were, whichever of these are active.

    Of the modules that hold an adapter's parameters, which are many, only their registries are looked at, and whether
    they have more attributes.
    """

    def __init__(self, model: nn.Module):
        placed = [part for _, part in placed_modules(model)]
        beside = {id(module): module for part in placed for module in part.own_modules()}
        others: list[Any] = [layer.entries for layer in layers(model).values()]
        others += [vars(module)[name] for module in beside.values() for name in _REGISTRIES]
        if (biases := biases_of(model)) is not None:
            others.append({"in": biases.in_place, **biases.tensors()})
        dropouts = [module for module in beside.values() if isinstance(module, nn.Dropout)]
        users = [module for module in model.modules() if id(module) not in beside]
        others += [vars(module)[name] for module in users for name in _BACKWARD]
        self._watch = Watch((*users, *dropouts), others)
        self._attributes = [vars(module) for module in beside.values()]
        self._counts = [*map(len, self._attributes)]

    def same(self) -> bool:
        """Return whether nothing has changed."""
        return [*map(len, self._attributes)] == self._counts and self._watch.same()


def _biases(model: nn.Module) -> list[Tensor]:
    biases = biases_of(model)
    return [] if biases is None else [*biases.tensors().values()]


def _has_buffers(part: ModulesToSaveWrapper) -> bool:
    return next(part.original_module.buffers(), None) is not None


def _stackable(bound: Mapping[str, tuple[Binding, Tree]], base: nn.Module) -> list[tuple[list[str], Binding]]:
    """Divide adapters into groups that can be stacked, each with its binding."""
    alike: dict[Any, list[str]] = {}
    for name, (binding, tree) in bound.items():
        dtypes = {leaf.dtype for leaves in tree.values() for leaf in leaves.values()}
        alike.setdefault((binding.configs[""].method.name, *sorted(dtypes, key=str)), []).append(name)
    bindings = {name: binding for name, (binding, _) in bound.items()}
    return [group for names in alike.values() for group in _divided(names, bindings, base)]


def _divided(names: list[str], bindings: Mapping[str, Binding], base: nn.Module) -> list[tuple[list[str], Binding]]:
    """Divide adapters of one method: all of them if that goes, or those that go with the first, and the others."""
    if not names:
        return []
    stack = _stacked(names, bindings, base)
    if stack is not None:
        return [(names, stack)]
    first, *others = names
    if not others:  # one whose modules are tied, of which no stack is made
        return [(names, bindings[first])]
    fitting = [name for name in others if _stacked([first, name], bindings, base) is not None]
    fitting = fitting if len(fitting) < len(others) else []
    rest = [name for name in others if name not in fitting]
    return [*_divided([first, *fitting], bindings, base), *_divided(rest, bindings, base)]


def _count_tasks(config: Any) -> int | None:
    """Return how many tasks an adapter of a config has; `None` where its method knows none."""
    return None if config.form.tasks is None else int(config.form.tasks.count(config))


def _of_one_task(model: nn.Module, names: Sequence[str], base: nn.Module) -> Binding:
    """Return the binding of a stack of adapters of one task each, in the place of adapters of several."""
    configs: dict[str, Any] = {name: config_of(model, name) for name in names}
    singles = {name: config.form.tasks.single(config) for name, config in configs.items()}
    return StackedBinding.of_singles(base, [bind_extracted(model, name, base, one) for name, one in singles.items()])


def _stacked(names: Sequence[str], bindings: Mapping[str, Binding], base: nn.Module) -> StackedBinding | None:
    """Return the binding of a stack of these adapters, `None` where they differ in what a stack shares."""
    try:
        return StackedBinding.of_singles(base, [bindings[name] for name in names])
    except (TypeError, ValueError):
        return None
