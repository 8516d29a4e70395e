"""Models of each kind of site: two of a kind in each, of different sizes, and how a state dict has their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from torchgraft.functional import register_layer

from .methods import NOT_IN_PEFTS, PEFTS, Exempt


class Model(nn.Module):
    """Two sites, with a nonlinearity between them."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Lookup(Model):
    def forward(self, ids: Tensor) -> Tensor:
        return self.first(ids).tanh() + self.second(ids)


class Attending(Model):
    """Attends to itself, then from there to the input: one projection of all, and projections of parts."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first.batch_first else x.transpose(0, 1)
        y = self.attend(self.second, self.attend(self.first, x, x).tanh(), x)
        return y if self.first.batch_first else y.transpose(0, 1)

    def attend(self, module: nn.MultiheadAttention, query: Tensor, source: Tensor) -> Tensor:
        key = source if module.kdim == source.shape[-1] else source[..., : module.kdim]
        value = key if module.vdim == module.kdim else source[..., : module.vdim]
        return module(query, key, value)[0]


class Dense(nn.Module):
    """A linear layer of somebody's own, whose parameters have other names and lie the other way round."""

    def __init__(self, fan_in: int, out: int):
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.empty(fan_in, out)), nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel + self.shift


register_layer(Dense, "linear", weight="kernel", bias="shift", transposed=True)


class Matrix(nn.Module):
    """A module with a matrix that is no layer of torch."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Experts(Matrix):
    """A matrix for each expert, `"experts out in"`; each row of the input mixes what all of them say of it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, torch.einsum("bi,eoi->ebo", x, self.weight))

    def mix(self, x: Tensor, each: Tensor) -> Tensor:
        return (each * x[:, : len(each)].softmax(-1).mT.unsqueeze(-1)).sum(0)


class TransposedExperts(Experts):
    """The same, `"experts in out"`."""

    is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, torch.bmm(x.expand(len(self.weight), *x.shape), self.weight))


def tied() -> Model:
    model = Model(nn.Linear(4, 4), nn.Linear(4, 4))
    model.second.weight = model.first.weight
    return model


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model of two sites.

    Attributes:
        build: Makes the model.
        shape: Shape of its input; of an embedding's ids `None`.
        batch_dim: Axis of the batch in the inputs of the sites.
        targets: Fields of a config by which it finds the sites, where they are no modules.
        exempt: Promises that no method keeps here.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] | None
    batch_dim: int = 0
    targets: Callable[[Sequence[str]], Mapping[str, Any]] = lambda paths: {}
    exempt: tuple[Exempt, ...] = ()


def both(paths: Sequence[str]) -> Mapping[str, Any]:
    """Target both attentions: one that is not is the user's own, whose kernel goes by whether weights are trained."""
    return {"target_modules": ["first", "second"]}


def parameters(paths: Sequence[str]) -> Mapping[str, Any]:
    return {"target_modules": [], "target_parameters": [f"{path}.weight" for path in paths]}


TWICE = Exempt(PEFTS, "PEFT adds what out_proj's adapter says twice")
MERGED = (
    "test_merged_weights_are_the_formulas",
    "test_merged_weights_are_rounded_once",
    "test_merging_in_place_is_the_formula_and_unmerging_restores_every_bit",
    "test_named_beside_others",
    "test_model_is_what_it_was",
)
TIED = Exempt(MERGED, "no state dict has two merged weights under one tensor", raises=ValueError)
UNKNOWN = Exempt(
    NOT_IN_PEFTS,
    "PEFT does not know classes of layers of somebody's own",
    raises=(AssertionError, KeyError, NotImplementedError, TypeError, ValueError),
)
SAME_SIZES = Exempt(NOT_IN_PEFTS, "PEFT refuses keys and values of sizes of their own", raises=ValueError)

SITES = {
    "linear": Setting(lambda: Model(nn.Linear(4, 6), nn.Linear(6, 4, bias=False)), (5, 4)),
    "linear (3-d input)": Setting(lambda: Model(nn.Linear(4, 6), nn.Linear(6, 4)), (2, 5, 4)),
    "linear (Conv1D)": Setting(lambda: Model(Conv1D(6, 4), Conv1D(4, 6)), (3, 2, 4)),
    "linear (registered)": Setting(lambda: Model(Dense(4, 6), Dense(6, 4)), (5, 4), exempt=(UNKNOWN,)),
    "linear (tied)": Setting(tied, (5, 4), exempt=(TIED,)),
    "embedding": Setting(lambda: Lookup(nn.Embedding(7, 4), nn.Embedding(7, 4)), None),
    "conv1d": Setting(lambda: Model(nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 4, 1)), (3, 4, 7)),
    "conv2d": Setting(
        lambda: Model(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.Conv2d(6, 4, 2, stride=2, bias=False)),
        (3, 4, 5, 6),
    ),
    "conv2d (dilated)": Setting(lambda: Model(nn.Conv2d(4, 6, 2, dilation=2), nn.Conv2d(6, 4, 1)), (3, 4, 5, 6)),
    "conv3d": Setting(lambda: Model(nn.Conv3d(4, 6, 2, padding="same"), nn.Conv3d(6, 4, (1, 2, 2))), (2, 4, 2, 3, 4)),
    "attention": Setting(
        lambda: Attending(nn.MultiheadAttention(4, 2, batch_first=True), nn.MultiheadAttention(4, 1, batch_first=True)),
        (3, 2, 4),
        targets=both,
        exempt=(TWICE,),
    ),
    "attention (length first)": Setting(
        lambda: Attending(nn.MultiheadAttention(4, 1), nn.MultiheadAttention(4, 2)), (3, 2, 4), 1, both, (TWICE,)
    ),
    "attention (kdim, vdim)": Setting(
        lambda: Attending(nn.MultiheadAttention(4, 2, kdim=3, vdim=2), nn.MultiheadAttention(4, 1, kdim=2, vdim=2)),
        (3, 2, 4),
        1,
        both,
        (SAME_SIZES,),
    ),
    "parameter": Setting(lambda: Model(Matrix(6, 4), Matrix(4, 6)), (5, 4), targets=parameters),
    "experts": Setting(lambda: Model(Experts(3, 6, 4), Experts(2, 4, 6)), (5, 4), targets=parameters),
    "experts (transposed)": Setting(
        lambda: Model(TransposedExperts(3, 4, 6), TransposedExperts(2, 6, 4)),
        (5, 4),
        targets=parameters,
    ),
}


def kind(site: str) -> str:
    """Return the kind of layer that a site is, without what is special about it."""
    return site.split(" ")[0]


def on(config: Any, site: str) -> Any:
    """Return a config with a site's targets."""
    return dataclasses.replace(config, **SITES[site].targets(config.target_modules))


# -- weights in a state dict -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a state dict has a site's weight and bias, and how the weight lies there.

    Attributes:
        layer: Class of the module.
        weights: Keys of the weight: several are the blocks of a diagonal.
        bias: Key of the bias, where there is one.
        turned: Whether the weight is the linear map's transpose.
        experts: Whether its first axis counts experts.
    """

    layer: type[nn.Module]
    weights: tuple[str, ...]
    bias: str
    turned: bool = False
    experts: bool = False

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return the weight as a linear map, `"[experts] out in *kernel"`."""
        weights = [state[name] for name in self.weights]
        return torch.block_diag(*weights) if len(weights) > 1 else self.turn(weights[0])

    def turn(self, weight: Tensor) -> Tensor:
        return weight.mT if self.turned else weight

    def write(self, state: dict[str, Tensor], weight: Tensor) -> None:
        """Put a linear map where its weight is; of a diagonal of blocks, the blocks."""
        if len(self.weights) == 1:
            state[self.weights[0]] = self.turn(weight)
            return
        at = [0, 0]
        for name in self.weights:
            rows, columns = state[name].shape
            state[name] = weight[at[0] : at[0] + rows, at[1] : at[1] + columns]
            at = [at[0] + rows, at[1] + columns]


def stored(model: nn.Module, path: str) -> Stored:
    """Return where the weight of a site is."""
    owner, _, leaf = path.rpartition(".")
    if leaf == "weight":
        module = model.get_submodule(owner)
        return Stored(type(module), (path,), "", hasattr(module, "is_transposed"), isinstance(module, Experts))
    module = model.get_submodule(path)
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj",) if module.in_proj_weight is not None else ("q_proj", "k_proj", "v_proj")
        return Stored(type(module), tuple(f"{path}.{name}_weight" for name in names), f"{path}.in_proj_bias")
    if isinstance(module, Dense):
        return Stored(Dense, (f"{path}.kernel",), f"{path}.shift", turned=True)
    return Stored(type(module), (f"{path}.weight",), f"{path}.bias", isinstance(module, (Conv1D, nn.Embedding)))


def leaves_of_expert(leaves: Mapping[str, Tensor], expert: int, experts: int) -> dict[str, Tensor]:
    """Return one expert's factors as PEFT lays them out: `A` expert by expert, `B` rank by rank."""
    a, b = leaves["lora_A"], leaves["lora_B"]
    return {"lora_A": a.chunk(experts)[expert], "lora_B": b[:, expert::experts]}
