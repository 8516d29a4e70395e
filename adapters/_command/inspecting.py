"""`torchgraft inspect` and `torchgraft diff`: what is in an adapter's directory, and how two differ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional import UnsupportedConfig

from .._arithmetic.products import Adapter, products
from .._arithmetic.vectors import gram
from .._files.inspected import AdapterFile, inspect_adapter
from .files import new_folder, read_adapter
from .output import as_json, columns


def inspect(path: str, json: bool = False, picture: str | None = None) -> int:
    """Print what an adapter is, where it is and how large its changes are; draw their norms by layer."""
    found, modules = inspect_adapter(path), _modules(path)
    if picture is not None:
        draw(modules, str(found.path), new_folder(picture))
    if json:
        print(as_json({**_as_dict(found), "modules": modules}))
        return 0
    print(found)
    if modules:
        rows = [tuple(modules[0])] + [tuple(one.values()) for one in modules]
        print("\n" + columns(rows))
    return 0


def _as_dict(found: AdapterFile) -> dict[str, Any]:
    names = ("method", "base", "targets", "ranks", "parameters", "bytes", "dtypes", "odd")
    fields = found.config.to_dict() if found.config else None
    return {"path": str(found.path), **{name: getattr(found, name) for name in names}, "config": fields}


def _modules(path: str) -> list[dict[str, Any]]:
    """Return rank, scaling factor, size and norm of the change of each module; none where no factors tell them."""
    try:
        config, tree = read_adapter(path)
        found = products(config, tree, "inspect")
    except (UnsupportedConfig, ValueError):
        return []
    rows = []
    for place, one in found.items():
        size = (one.b.shape[0] * one.b.shape[1], one.a.shape[-1])
        norm = one.scaling * float(_squared_norm(one.a, one.b).clamp(min=0).sqrt())
        rows.append(
            {"module": place, "rank": one.layout.rank(one.a), "scaling": one.scaling, "size": size, "norm": norm}
        )
    return rows


def _squared_norm(a: Tensor, b: Tensor) -> Tensor:
    """Return `|B A|^2`, from the factors alone."""
    a, b = a.double(), b.double()
    return ((b.mT @ b) * (a @ a.mT)).sum()


def draw(modules: list[dict[str, Any]], title: str, file: Path) -> None:
    """Draw the norms of the changes by layer, a line for each kind of module.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; says what to install.
        UnsupportedConfig: An adapter whose files tell no norms.
    """
    if not modules:
        raise UnsupportedConfig(f"{title}: tells no norms without a model; only plain LoRA has a picture")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ModuleNotFoundError("a picture needs matplotlib: pip install 'torchgraft[demo]'") from None
    lines: dict[str, list[tuple[int, float]]] = {}
    for one in modules:
        found = re.search(r"\.(\d+)\.", f".{one['module']}")
        lines.setdefault(one["module"].rpartition(".")[2], []).append((int(found[1]) if found else 0, one["norm"]))
    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    for name, points in sorted(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
    axes.set(xlabel="layer", ylabel="norm of the change of the weight", title=title)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


# -- two adapters --------------------------------------------------------------------------------------------------


def diff(first: str, second: str, json: bool = False) -> int:
    """Print where two adapters differ: fields of their configs, modules, and the change at each; 1 if they do."""
    one, two = read_adapter(first), read_adapter(second)
    fields = _different_fields(one, two)
    modules = _different_modules(one, two)
    same = not any(row["difference"] for row in modules)
    if json:
        print(as_json({"same": same and not fields, "fields": fields, "modules": modules}))
    else:
        print(_as_text(first, second, fields, modules))
    return 0 if same and not fields else 1


def _different_fields(one: Adapter, two: Adapter) -> dict[str, Any]:
    left, right = (adapter[0].to_dict() for adapter in (one, two))
    names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
    return {name: [left.get(name), right.get(name)] for name in names}


def _different_modules(one: Adapter, two: Adapter) -> list[dict[str, Any]]:
    """Return the norms of both changes at each module, that of their difference, and their cosine."""
    if one[0].method.name != "LORA" or two[0].method.name != "LORA":
        return _different_leaves(one[1], two[1])
    rows = []
    wide = [
        (config, {p: {n: x.double() for n, x in own.items()} for p, own in tree.items()}) for config, tree in (one, two)
    ]
    for path, inner in gram(wide).items():
        a, b, both = float(inner[0, 0]), float(inner[1, 1]), float(inner[0, 1])
        equal = all(_equal(one[1].get(path), two[1].get(path)).values()) and a == b
        far = 0.0 if equal else max(a + b - 2 * both, 0.0) ** 0.5
        cosine = both / (a * b) ** 0.5 if a and b else 0.0
        rows.append({"module": path, "first": a**0.5, "second": b**0.5, "difference": far, "cosine": cosine})
    return rows


def _different_leaves(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the largest difference of a leaf at each module, for methods whose changes no factors tell."""
    rows = []
    for path in sorted({**one, **two}):
        equal = _equal(one.get(path), two.get(path))
        far = float("inf") if not equal else 0.0
        for leaf in (leaf for leaf, same in equal.items() if not same):
            pair = [tree.get(path, {}).get(leaf) for tree in (one, two)]
            alike = all(x is not None for x in pair) and pair[0].shape == pair[1].shape
            far = max(far, float((pair[0].double() - pair[1].double()).abs().max()) if alike else float("inf"))
        rows.append({"module": path, "difference": far})
    return rows


def _equal(one: Mapping[str, Tensor] | None, two: Mapping[str, Tensor] | None) -> dict[str, bool]:
    one, two = one or {}, two or {}
    return {leaf: leaf in one and leaf in two and torch.equal(one[leaf], two[leaf]) for leaf in {**one, **two}}


def _as_text(first: str, second: str, fields: Mapping[str, Any], modules: list[dict[str, Any]]) -> str:
    lines = [f"{name}: {left!r} in {first}, {right!r} in {second}" for name, (left, right) in fields.items()]
    differing = [row for row in modules if row["difference"]]
    if differing:
        lines.append(columns([tuple(differing[0]), *(tuple(row.values()) for row in differing)]))
    count = len(modules) - len(differing)
    return "\n".join([*lines, f"{count} of {len(modules)} modules are equal"])
