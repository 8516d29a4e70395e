"""What adapters cost: a table per adapter, as data and as text."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optree
from torch import Tensor, nn

from torchgraft.functional import Graft, StackedGraft
from torchgraft.functional.extending import SiteAdapter, Tree

from ..walk import bare_modules, layers, parts, unwrap


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapter.

    Attributes:
        name: Its name; `""` for the one adapter of a graft; of a stack also its place, as `"2"`.
        method: Name of the method.
        sites: Number of adapted modules.
        ranks: The different ranks, sorted; empty for a method without.
        parameters: Number of values, those of `modules_to_save` among them.
        trainable: Number of those that require gradients; all, in a graft.
        bytes: Their size.
        share: Parameters as a part of the model's own.
        state: `"active"`, `"merged"`, `"disabled"` or `""`; several joined by a comma.
    """

    name: str
    method: str
    sites: int
    ranks: tuple[int, ...]
    parameters: int
    trainable: int
    bytes: int
    share: float
    state: str


@dataclasses.dataclass(frozen=True)
class Summary:
    """The adapters of a model; `print` shows a table.

    Attributes:
        rows: One for each adapter.
        base_parameters: Number of values of the model itself, a tied one counted once.
        base_bytes: Their size.
        padding_bytes: What a stack of different ranks has in zeros, beyond the sizes of its adapters.
    """

    rows: tuple[Row, ...]
    base_parameters: int
    base_bytes: int
    padding_bytes: int = 0

    def __str__(self) -> str:
        head = ("adapter", "method", "sites", "rank", "parameters", "trainable", "of base", "size", "state")
        body = [
            (
                row.name or "(unnamed)",
                row.method,
                f"{row.sites:,}",
                _ranks(row.ranks),
                f"{row.parameters:,}",
                f"{row.trainable:,}",
                f"{row.share:.3%}",
                _size(row.bytes),
                row.state,
            )
            for row in self.rows
        ]
        base = ("(base)", "", "", "", f"{self.base_parameters:,}", "", "", _size(self.base_bytes), "")
        padding = ("(padding)", "", "", "", "", "", "", _size(self.padding_bytes), "")
        table = [head, *body, *([padding] if self.padding_bytes else []), base]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        left = (0, 1, 8)
        lines = [
            "  ".join(
                cell.ljust(width) if index in left else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        return "\n".join(lines)


def summary(target: nn.Module | Graft, params: Tree | None = None) -> Summary:
    """Count what each adapter has: modules, ranks, parameters, bytes.

    Args:
        target: A model with injected adapters, or a graft.
        params: The graft's parameter tree, or a stack: a row for each of its adapters, without padding.

    Raises:
        TypeError: A graft without its parameters, or parameters with a model, which has its own; a model whose adapters
            are another library's.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4))
    >>> print(summary(inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "1"]), model)))
    adapter  method  sites  rank  parameters  trainable  of base     size  state
    default  LORA        2     2         168        168  24.852%    672 B  active
    (base)                               676                      2.6 KiB
    """
    if isinstance(target, Graft):
        if params is None:
            raise TypeError("summary: target is a Graft, which holds no parameters; give them: summary(graft, params)")
        base = _values([*target.model.parameters()])
        if (trees := _unstacked(target, params)) is not None:
            return _of_stack(target, params, trees, base)
        active = target.binding.active(params)
        entries = {name: list(target.binding.adapters(name).values()) for name in active}
        tensors = {name: optree.tree_leaves(active[name]) for name in active}
        states = dict.fromkeys(active, "active")
    else:
        if params is not None:
            raise TypeError("summary: params are given with a model, whose adapters have their own; leave them out")
        if isinstance(target, nn.Module):
            _check_own(target)
        model = unwrap(target)
        base = _values(p for module in bare_modules(model).values() for p in module._parameters.values())
        configs: Mapping[str, Any] = getattr(model, "peft_config", {})
        found = layers(model).values()
        entries = {name: [layer.entries[name] for layer in found if name in layer.entries] for name in configs}
        tensors = {name: _injected(model, name) for name in configs}
        states = {name: _state(model, name) for name in configs}
    count, size = sum(t.numel() for t in base), sum(t.nbytes for t in base)
    functional = isinstance(target, Graft)
    rows = tuple(_row(name, entries[name], tensors[name], states[name], count, functional) for name in entries)
    return Summary(rows, count, size)


def _unstacked(graft: Graft, params: Tree) -> list[Tree] | None:
    """Return the trees of a stack; `None` for one tree."""
    if isinstance(graft, StackedGraft):
        return graft.unstack(params)
    try:
        graft.binding.active(params)
    except ValueError:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            return graft.unstack(params)
    return None


def _of_stack(graft: Graft, stacked: Tree, trees: Sequence[Tree], base: Sequence[Tensor]) -> Summary:
    """Return the rows of the adapters of a stack, and what their padding takes."""
    count, size = sum(t.numel() for t in base), sum(t.nbytes for t in base)
    rows = []
    for i, tree in enumerate(trees):
        binding = graft.binding.singles[i] if isinstance(graft, StackedGraft) else graft.binding
        place = getattr(graft, "names", None) or [str(k) for k in range(len(trees))]
        for name in binding.active(tree):
            entries, tensors = list(binding.adapters(name).values()), optree.tree_leaves(tree[name] if name else tree)
            rows.append(_row(f"{place[i]}.{name}" if name else place[i], entries, tensors, "active", count, True))
    held = sum(leaf.nbytes for leaf in optree.tree_leaves(stacked))
    return Summary(tuple(rows), count, size, held - sum(row.bytes for row in rows))


def _check_own(model: nn.Module) -> None:
    """Refuse a model with layers of another library, such as PEFT's own, which would count as none."""
    for path, module in model.named_modules():
        own = type(module).__module__.partition(".")[0] == __name__.partition(".")[0]
        if hasattr(type(module), "adapter_layer_names") and not own:
            raise TypeError(
                f"summary: {path or 'the model'} is a {type(module).__module__}.{type(module).__qualname__}, a layer "
                "of another library, whose adapters are not counted here; ask that library "
                "(model.print_trainable_parameters()), or save the adapter there and load_adapter it into the model"
            )


def _row(
    name: str, entries: list[SiteAdapter], tensors: Sequence[Tensor], state: str, base: int, functional: bool
) -> Row:
    configs: list[Any] = [entry.config for entry in entries]
    ranks = {
        config.form.values["r"].get(config, entry.site)
        for config, entry in zip(configs, entries, strict=True)
        if "r" in config.form.values
    }
    parameters = sum(tensor.numel() for tensor in tensors)
    return Row(
        name=name,
        method=configs[0].method.name if configs else "",
        sites=len(entries),
        ranks=tuple(sorted(ranks)),
        parameters=parameters,
        trainable=sum(tensor.numel() for tensor in tensors if functional or tensor.requires_grad),
        bytes=sum(tensor.nbytes for tensor in tensors),
        share=parameters / base if base else 0.0,
        state=state,
    )


def _injected(model: nn.Module, name: str) -> list[Tensor]:
    return _values(tensor for part in parts(model) for tensor in part.tensors_of(name))


def _state(model: nn.Module, name: str) -> str:
    found = [layer for layer in layers(model).values() if name in layer.entries]
    states = {
        "active": any(name in layer.active_adapters for layer in found),
        "merged": any(name in layer.merged_adapters for layer in found),
        "disabled": any(layer.disable_adapters for layer in found),
    }
    return ", ".join(state for state, holds in states.items() if holds)


def _values(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


def _ranks(ranks: tuple[int, ...]) -> str:
    return "-" if not ranks else f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
