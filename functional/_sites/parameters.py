"""Bare parameters as sites: a matrix, or one for each expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .site import Kind, Routing, Site, add_kind

Key = tuple[int, str]
"""What a site is in a model, whatever its names: a module's id and `""`, or the name of one of its parameters."""


def _call(site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    raise TypeError(f"{site.path}: a bare parameter is not called; the forward of its module reads it")


def _pieces(site: Site) -> str | None:
    return f"a parameter of {site.experts} experts has leaves of all experts in one"


PARAMETER = add_kind(Kind("parameter", _call, features=0, routing=Routing(by_module=True), is_parameter=True))

EXPERTS = add_kind(
    Kind(
        "experts",
        _call,
        features=0,
        routing=Routing(by_module=True, by_entry=True),
        is_parameter=True,
        pieces=_pieces,
    )
)


HIDES_PRODUCT: list[Callable[[nn.Module, Tensor], bool | None]] = []
"""Rules, `(module, weight) -> bool`, of whether a forward multiplies where `torch.compile` shows no objects; `None`
where a rule does not know."""


def register_hidden_product(rule: Callable[[nn.Module, Tensor], bool | None]) -> None:
    """Let a library say where its modules multiply by a product that `torch.compile` hides from objects (torch 2.13).

    Args:
        rule: `(module, weight) -> bool`, `None` for modules that it does not know.
    """
    HIDES_PRODUCT.append(rule)


def find(modules: Mapping[str, nn.Module], path: str) -> tuple[nn.Module | None, str]:
    """Return the module at a path and `""`, or a parameter's module and its name there.

    >>> model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    >>> find(dict(model.named_modules()), "a.weight")[1]
    'weight'
    """
    if path in modules:
        return modules[path], ""
    owner, _, leaf = path.rpartition(".")
    module = modules.get(owner)
    return (module, leaf) if module is not None and module._parameters.get(leaf) is not None else (None, "")


def key_of(modules: Mapping[str, nn.Module], path: str) -> Key:
    """Return a key of the parameter or module at a path, the same for all names of one site."""
    module, leaf = find(modules, path)
    return id(module), leaf


def describe_parameter(path: str, module: nn.Module, leaf: str) -> Site:
    """Describe a parameter as a site: a matrix `"out in"`, or a stack of them, `"experts out in"`.

    Experts are `"experts in out"` in a module that says `is_transposed`, as `transformers`' experts do.

    Args:
        path: Dotted name of the parameter in the user's model.
        module: The module that has it.
        leaf: Its name there.

    Raises:
        ValueError: A parameter of another number of axes, or one that is not of floating point.

    >>> layer = nn.Linear(3, 2)
    >>> describe_parameter("head.weight", layer, "weight").weight_shape
    (2, 3)
    """
    parameter: Any = module._parameters[leaf]
    shape = tuple(parameter.shape)
    if not (parameter.is_floating_point() or parameter.is_complex()):
        raise ValueError(
            f"{path}: the parameter has dtype {parameter.dtype}, expected floating point; a product cannot be added to "
            "it, so leave it out of target_parameters, or dequantise it first"
        )
    if len(shape) == 2:
        return Site(path, "parameter", shape[1], shape[0], weight_names=(leaf,))
    if len(shape) != 3:
        raise ValueError(
            f"{path}: the parameter has shape {shape}, expected 2 axes, or 3 of which the first counts experts; leave "
            "it out of target_parameters"
        )
    transposed = bool(getattr(module, "is_transposed", False))
    rows, columns = shape[1:]
    sizes = (rows, columns) if transposed else (columns, rows)
    return Site(path, "experts", *sizes, transposed=transposed, weight_names=(leaf,), experts=shape[0])
