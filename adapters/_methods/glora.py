"""GLoRA: generalised low-rank adaptation, a weight and a bias that are rescaled and shifted.

    y = (W + W * A + B) x + b + b * D + E + W C,    W and b the base's own weight and bias

Each of the five is a product of thin matrices, a vector for all columns, one number, or nothing. Without a bias in the
base there are no `C`, `D` and `E`.

Chavan et al., *One-for-All: Generalized LoRA for Parameter-Efficient Fine-Tuning*, 2023, arXiv:2306.07967. Names,
defaults and initial distributions are those of PEFT's `tuners/glora`, which fixes the form of each where the paper
searches for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchgraft.functional import Constants, Layer, MergesOver, Method, Site, Weights, widen
from torchgraft.functional.extending import Dense, Original, add_scaled

from .._config.base import AdapterConfig
from .._config.messages import require
from .._config.peft_format import PeftFormat, Value
from .shared import fused, remade

PATHS = {"A": "config_A_B", "B": "config_A_B", "C": "config_C", "D": "config_D_E", "E": "config_D_E"}
"""The five, in the order of PEFT's draws, and the field that says what each is made of."""
FORMS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("vector", "constant", "none"),
}


@dataclasses.dataclass(kw_only=True)
class GloraConfig(AdapterConfig):
    """GLoRA rescales and shifts each targeted weight and bias, each in a form of its own.

    Supports linear layers and, what PEFT refuses, `transformers`' `Conv1D`. The weight is made for a call and not kept
    for the backward. Beside other adapters what is rescaled is the base's own, as in PEFT.

    Where PEFT does otherwise: its layers and files have zeros for what is not there, as large as the weight for `A` and
    `B`; here they are read past, and not written.

    Attributes:
        r: Rank of the products.
        config_A_B: What `A` and `B` are: `"lora"`, `"vector"` (one number for each output), `"constant"` or `"none"`.
        config_C: What `C`, with one number for each input, is: `"lora"`, `"vector"` or `"none"`.
        config_D_E: What `D` and `E` are: `"vector"`, `"constant"` or `"none"`.
        init_weights: `True` for a start without change, `False` for random numbers.

    >>> GloraConfig(r=4, config_A_B="vector", target_modules=["q_proj"]).config_D_E
    'constant'
    """

    r: int = 8
    config_A_B: str = "lora"
    config_C: str = "lora"
    config_D_E: str = "constant"
    init_weights: bool = True

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r > 0, self, f"r is {self.r}, expected a positive integer")
        for name, known in FORMS.items():
            value = getattr(self, name)
            require(value in known, self, f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")


def plan(config: GloraConfig, sites: list[Site], weights: Weights) -> dict[str, Constants]:
    """Check that there is something to train at each site.

    Raises:
        ValueError: Nothing is; names the site.
    """
    for site in sites:
        what = f"there is nothing to train at {site.path}, which has no bias and no A and B; set config_A_B"
        if site.has_bias:
            what = "config_A_B, config_C and config_D_E are all 'none', so there is nothing to train; set one of them"
        require(bool(shapes(config, site)), config, what)
    return {site.path: Constants() for site in sites}


def shapes(config: GloraConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """Products are `Xd`, `"n r"`, and `Xu`, `"r m"`; `X` is `"n 1"` (of `D` and `E` `"out"`), or `"1"`.

    `n` is the number of outputs, of `C` the number of inputs, and `m` the number of inputs, of `C` 1.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path, field in PATHS.items():
        form, name = getattr(config, field), f"glora_{path}"
        n, m = (site.in_features, 1) if path == "C" else (site.out_features, site.in_features)
        if form == "none" or (path in "CDE" and not site.has_bias):
            continue
        if form == "lora":
            found |= {f"{name}.Xd": (n, config.r), f"{name}.Xu": (config.r, m)}
        else:
            found[f"{name}.X"] = (1,) if form == "constant" else (n,) if path in "DE" else (n, 1)
    return found


def init(
    config: GloraConfig, sites: list[Site], generator: torch.Generator | None, weights: Weights
) -> dict[str, dict[str, Tensor]]:
    """Draw parameters, in PEFT's order of draws."""
    made = {}
    for site in sites:
        leaves = {leaf: torch.zeros(shape, dtype=torch.float32) for leaf, shape in shapes(config, site).items()}
        for leaf in sorted(leaves, key=lambda leaf: (leaf[:7], leaf.endswith("d"))):  # Xu before Xd
            tensor = leaves[leaf]
            if config.init_weights and not leaf.endswith("Xu"):
                continue
            if leaf.endswith("X") and getattr(config, PATHS[leaf[6]]) == "constant":
                tensor.normal_(0.0, 0.02, generator=generator)
            else:
                matrix = tensor.unsqueeze(0) if tensor.ndim == 1 else tensor
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
        made[site.path] = leaves
    return made


def apply(config: GloraConfig, site: Site, leaves: dict[str, Tensor], base: Layer, x: Tensor) -> Tensor:
    """`(W + W * A + B) x + b + b * D + E + W C`, in the wider dtype and rounded once to the base's.

    A linear layer of full precision is one product with `W + W * A + B`, which is not kept for the backward.
    """
    names = tuple(name for name in leaves if name[6] in "AB")
    factors = [leaves[name] for name in names]
    own = base.original
    shift = _shift(leaves, own.weight, own.bias)
    linear = None if torch.compiler.is_compiling() else base.as_linear
    some = next(iter(leaves.values()))
    if linear is not None and x.itemsize >= 4 and fused.fits(x, linear[0], some, some):
        bias = linear[1] if shift is None or linear[1] is None else linear[1] + shift
        return remade.linear(functools.partial(_moved, names), x, linear[0], bias, *factors)
    y, (x, *factors) = base(x), widen(x, *factors)
    if shift is not None:
        shift = shift.to(x.dtype).expand(site.out_features)
    if not names:
        assert shift is not None
        return add_scaled(y, shift, 1.0)
    return add_scaled(y, remade.linear(functools.partial(_delta, names), x, own.weight, shift, *factors), 1.0)


def merge(config: GloraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    """`W' = W + W * A + B` and `b' = b + b * D + E + W C`."""
    return merge_over(config, site, leaves, weight, bias, lambda: (weight, bias))


def merge_over(
    config: GloraConfig, site: Site, leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None, original: Original
) -> Dense:
    """`merge` on a weight and a bias that other adapters are in; what is rescaled is the base's own."""
    own, own_bias = original()
    names = tuple(name for name in leaves if name[6] in "AB")
    shift = _shift(leaves, own, own_bias)
    changed = weight + _delta(names, own, *(leaves[name] for name in names)) if names else weight
    return changed, bias if bias is None or shift is None else bias + shift


def _value(leaves: Mapping[str, Tensor], path: str) -> Tensor | None:
    """Return a matrix in the form that a config gives it: a product, a vector or a number; `None` for none."""
    name = f"glora_{path}"
    if f"{name}.Xd" in leaves:
        return leaves[f"{name}.Xd"] @ leaves[f"{name}.Xu"]
    return leaves.get(f"{name}.X")


def _delta(names: tuple[str, ...], weight: Tensor, *factors: Tensor) -> Tensor:
    """`W * A + B`, in the shape of the weight."""
    return _moved(names, weight, *factors, start=False)


def _moved(names: tuple[str, ...], weight: Tensor, *factors: Tensor, start: bool = True) -> Tensor:
    """`W + W * A + B`, bit for bit `W` where `A` and `B` are zero."""
    leaves = dict(zip(names, factors, strict=True))
    a, b = _value(leaves, "A"), _value(leaves, "B")
    moved = weight if start else torch.zeros_like(weight)
    moved = moved if a is None else torch.addcmul(moved, weight, a)
    return moved if b is None else moved + b


def _shift(leaves: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`b * D + E + W C`, in float32 or wider, with one entry or one for each output; `None` for nothing."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    c, d, e = (_value({leaf: one.to(wide) for leaf, one in leaves.items() if leaf[6] == path}, path) for path in "CDE")
    terms: list[Tensor] = [] if e is None else [e]
    if d is not None and bias is not None:
        terms.append(d * bias)
    if c is not None:
        terms.append(remade.product(c.mT, weight.mT).squeeze(-2))
    return functools.reduce(torch.add, terms) if terms else None


GloraConfig.method = Method(
    name="GLORA",
    config=GloraConfig,
    kinds=frozenset({"linear"}),
    plan=plan,
    shapes=shapes,
    init=init,
    apply=apply,
    merge=merge,
    varying=frozenset({"r", "init_weights"}),
    abilities=(MergesOver(merge_over),),
)

LEAVES = tuple(f"glora_{path}.{part}" for path in PATHS for part in ("Xd", "Xu", "X"))


def _infer(config: GloraConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the rank and the forms, as far as tensors tell."""
    shapes = {leaf: leaves[leaf].shape for leaves in found.values() for leaf in leaves if leaf in LEAVES}
    fields: dict[str, Any] = {}
    for path, field in PATHS.items():
        name = f"glora_{path}"
        if f"{name}.Xd" in shapes:
            fields |= {field: "lora", "r": shapes[f"{name}.Xd"][1]}
        elif f"{name}.X" in shapes:
            single = shapes[f"{name}.X"] == (1,)
            fields[field] = "constant" if single else "vector"
        elif path in "AB" or any(leaf[6] in "CDE" for leaf in shapes):
            fields[field] = "none"
    return fields


def _unpack(config: GloraConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the zeros that PEFT writes for what is not there."""
    return {key: tensor for key, tensor in state.items() if not re.search(r"\bglora_[A-E]\.zeros$", key)}


GloraConfig.form = PeftFormat(
    prefix="glora_",
    layers="Glora{}",
    grouped=LEAVES,
    values={"r": Value(lambda config, site: config.r)},
    infer=_infer,
    unpack=_unpack,
    only_here=("exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform"),
)
