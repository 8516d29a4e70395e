"""Where modules hang in a model, and what keeps one where no replacement reaches it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from torchgraft.functional.extending import (
    child_of_wrapper,
)


class Positions:
    """Where modules hang in a model, or the layers of their parameters do.

    Args:
        modules: The modules of the model by name, without adapters.
        wanted: Those that are looked for, by path.
        tops: The outermost of the layers around a module with adapted parameters, by the module's identity.

    Attributes:
        tops: The same; `put` takes the one that is there when it is called.

    Raises:
        ValueError: A module that is also kept where no replacement reaches it.
    """

    def __init__(self, modules: Mapping[str, nn.Module], wanted: Mapping[str, nn.Module], tops: dict[int, nn.Module]):
        self.tops = tops
        paths = {id(module): path for path, module in wanted.items()}
        bare = {id(top): key for key, top in tops.items()}
        self._places: dict[int, list[tuple[nn.Module, str]]] = {key: [] for key in paths}
        for module in dict.fromkeys(modules.values()):
            for name, child in module._modules.items():
                if child is None:
                    continue
                parent, name, child = _within_wrappers(module, name, child)
                if (key := bare.get(id(child), id(child))) in paths:
                    _check_uncompiled(paths[key], name)
                    self._places[key].append((parent, name))
            _check_outside(module, paths)

    def parents(self, module: nn.Module) -> list[nn.Module]:
        """Return the modules that a module hangs in; none if something else of ours hangs in its place already."""
        return [parent for parent, _ in self._places[id(module)]]

    def put(self, module: nn.Module, part: nn.Module) -> None:
        """Hang a part, or the layer at the top of those around its module, where the module hangs."""
        for parent, name in self._places[id(module)]:
            parent._modules[name] = self.tops.get(id(module), part)


def _check_uncompiled(path: str, name: str) -> None:
    if name == "_orig_mod":
        raise ValueError(
            f"{path}: was compiled by itself, and would go on without the adapter; inject first and compile afterwards"
        )


def _within_wrappers(parent: nn.Module, name: str, child: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    """Return where a child hangs: in its parent, or in the last of the wrappers around it."""
    while (inner := child_of_wrapper(child)) is not None:
        parent, name, child = child, inner, child._modules[inner]  # type: ignore[assignment]
    return parent, name, child


def _check_outside(module: nn.Module, targeted: Mapping[int, str]) -> None:
    """Refuse a target that is also kept where no replacement reaches it."""
    for attribute, value in vars(module).items():
        if attribute in ("_modules", "_parameters", "_buffers"):
            continue
        held = value.values() if isinstance(value, dict) else value
        items = list(held) if isinstance(value, (dict, list, tuple, set)) else [value]
        for item in items:
            owner = getattr(item, "__self__", item)
            if id(owner) in targeted and owner is not module:
                raise ValueError(
                    f"{targeted[id(owner)]}: {type(module).__name__}.{attribute} keeps this module too, outside of the "
                    "module tree, and would go on with the one without adapter; keep it in a submodule or a "
                    "ModuleList, leave it out of target_modules and modules_to_save, or use bind(model, config), which "
                    "follows it"
                )
