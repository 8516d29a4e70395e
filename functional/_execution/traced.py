"""Calls as `torch.compile` traces them: through skeletons of their own, to which no compiled call ever writes.

While dynamo traces a call, the call's adapters and tensors stand in dicts of the skeleton. Dynamo would have the
compiled code write these dicts at the end, as they were, and refuses to write them within `torch.cond`, checkpointing
and other operators. As each trace leaves them as they were, it is told to keep these writes to itself.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any, Protocol

from .._skeleton.context import CallContext
from .._skeleton.skeleton import Skeleton

_KNOWN = 8
"""Skeletons kept for modes of a model that compiled calls ran in."""


_PACKAGE = __name__.rpartition("._execution.")[0]

_MACHINERY = (
    "_call", "_graft", "_binding.binding", "_skeleton.recorded", "_skeleton.skeleton", "_skeleton.swaps",
    "_execution.bound_model", "_execution.fill", "_execution.pool", "_execution.run", "_execution.trial",
)  # fmt: skip
"""Modules of this package whose functions have a part in a call."""


_AROUND = ("functional_call", "__call__")
"""Those that users may compile."""


_OVER = ("_execution.run.call", "_execution.run.run", "_execution.run._forward")
"""Those that run the model."""


class TracedContext(CallContext):
    """A context that keeps the call's facts in a dict, as dynamo tracks the contents of dicts one by one."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        super().__init__()


def _kept(name: str) -> property:
    def get(self: TracedContext) -> Any:
        return self.state[name]

    def put(self: TracedContext, value: Any) -> None:
        self.state[name] = value

    return property(get, put)


for _name in ("apart", "finder", "kept", "reached", "see", "trees", "weights"):
    setattr(TracedContext, _name, _kept(_name))


class Bound(Protocol):
    """A bound model."""

    compiled: Traced

    def pool(self) -> Any:
        """Return the skeletons that fit the model as it is now."""
        ...


class Traced:
    """The skeletons that compiled calls of one graft run through.

    Attributes:
        modules: The model's modules.
        skeletons: One for each set of modes that they were in, in the order of `modules`.
    """

    def __init__(self) -> None:
        self.modules: list[Any] = []
        self.skeletons: dict[tuple[bool, ...], Skeleton] = {}

    def put(self, skeleton: Skeleton) -> None:
        """Have compiled calls use a skeleton as long as the model is in its modes."""
        modules = [theirs for theirs, _ in skeleton.modules]
        if len(modules) != len(self.modules) or any(a is not b for a, b in zip(modules, self.modules, strict=True)):
            self.modules, self.skeletons = modules, {}
        modes = tuple(module.training for module in modules)
        if self.skeletons.get(modes) is not skeleton:
            self.skeletons[modes] = skeleton
            if len(self.skeletons) > _KNOWN:
                del self.skeletons[next(iter(self.skeletons))]


def skeleton_for(bound: Bound) -> Skeleton:
    """Return the skeleton for a model as it is while a call of its graft is traced.

    Whatever is read here is guarded by dynamo, so that a later change of the model compiles anew.
    """
    from torch._dynamo.comptime import comptime

    comptime(_refresh)
    skeleton = bound.compiled.skeletons[tuple([module.training for module in bound.compiled.modules])]
    for registry, children in skeleton.children:
        if len(registry) != len(children):
            raise RuntimeError("the model's modules changed while a call of its graft was compiled")
        for name, child in children.items():
            if registry.get(name) is not child:
                raise RuntimeError("the model's modules changed while a call of its graft was compiled")
    keep_private(skeleton.containers)
    return skeleton


def keep_private(containers: tuple[Any, ...]) -> None:
    """Have dynamo forget what the traced call writes to containers, which it leaves as they were."""
    from torch._dynamo.comptime import comptime

    comptime(_ignore_writes)


def forget_writes(skeleton: Skeleton) -> None:
    """Have dynamo forget what the model's forward wrote to a skeleton: the compiled call leaves it as it was."""
    from torch._dynamo.comptime import comptime

    comptime(_forget)


def within(tree: Any) -> Any:
    """Return a tree, or an `ActiveTree`, whose leaves are computed where the call is traced.

    An attribute such as `.mT` of a tensor from outside of an operator is computed outside of it, once for each place
    that asks for it, and `torch.cond` refuses operands that are views of each other.
    """
    if type(tree) is not dict:
        return tree.with_tree(within(tree.tree))
    return {path: {name: leaf.view_as(leaf) for name, leaf in leaves.items()} for path, leaves in tree.items()}


def _refresh(context: Any) -> None:
    """Make a skeleton of the model as it is now, while dynamo traces `skeleton_for`."""
    bound = _local(context, "bound").value
    bound.compiled.put(bound.pool().traced)
    _compile_whole()


def _ignore_writes(context: Any) -> None:
    """Mark containers whose writes dynamo forgets, while dynamo traces `keep_private`."""
    tx = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    effects = tx.output.side_effects
    for container in _local(context, "containers").unpack_var_sequence(tx):
        effects.ignore_mutations_on(container.realize())


def _forget(context: Any) -> None:
    """Drop the writes to a skeleton, while dynamo traces `forget_writes`."""
    output = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output
    effects, ids = output.side_effects, _local(context, "skeleton").value.recorded.ids
    for key, variable in [(k, v) for k, v in effects.id_to_variable.items() if k in ids and effects.is_modified(v)]:
        if effects.store_attr_mutations.pop(variable, None) is not None:
            getattr(effects, "attr_mutation_kinds", {}).pop(variable, None)
        else:
            del effects.id_to_variable[key]
            for source in [s for s, v in output.variable_tracker_cache.items() if v is variable]:
                del output.variable_tracker_cache[source]


@functools.cache
def _compile_whole() -> None:
    """Have dynamo compile a call as a part of its caller or not at all: then it compiles the model's own code."""
    from torch._dynamo.eval_frame import FrameAction, FrameExecStrategy, set_code_exec_strategy  # type: ignore[attr-defined,unused-ignore]

    for name in _MACHINERY:
        module = sys.modules[f"{_PACKAGE}.{name}"]
        classes = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
        for function in (x for owner in (module, *classes) for x in vars(owner).values()):
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                if function.__name__ in _AROUND:
                    continue
                inner = FrameAction.DEFAULT if f"{name}.{function.__qualname__}" in _OVER else FrameAction.SKIP
                set_code_exec_strategy(function.__code__, FrameExecStrategy(FrameAction.SKIP, inner))


def _local(context: Any, name: str) -> Any:
    tx = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    return tx.symbolic_locals[name].realize()
