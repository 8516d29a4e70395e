"""A toy method whose sites train leaves together, a model for it, and its formula."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchgraft.adapters import AdapterConfig
from torchgraft.adapters._config.peft_format import PeftFormat
from torchgraft.functional import Constants, Method, SharesLeaves, Varying


@dataclasses.dataclass(kw_only=True)
class BankConfig(AdapterConfig):
    """`y = base(x) + s sum_k mix_k bank_k x`, the bank trained by all sites of a size together.

    Attributes:
        size: Number of matrices in a bank.
        alpha: `s` is `alpha / size`.
        by_size: Whether each size has a bank, `bank.5x5`; else there is one, `bank`, whose corner is taken.
        mixed: Whether sites have weights of their own; else each is 1.
    """

    size: int = 3
    alpha: float = 1.0
    by_size: bool = True
    mixed: bool = True
    method: ClassVar[Method]


@dataclasses.dataclass(frozen=True, eq=False)
class BankConstants(Constants):
    scaling: Varying[float]


def update(site, leaves):
    bank = leaves["bank"][:, : site.out_features, : site.in_features]
    return torch.einsum("k,koi->oi", leaves["mix"].to(bank), bank) if "mix" in leaves else bank.sum(0)


def apply(config, site, leaves, base, x):
    change = x @ update(site, leaves).to(x.dtype).mT
    scaling = site.constants.scaling
    return base(x) + change * (scaling.to(x.dtype) if isinstance(scaling, Tensor) else scaling)


def merge_bank(config, site, leaves, weight, bias):
    return weight + site.constants.scaling * update(site, leaves), bias


def banks(config, sites) -> dict[str, tuple[int, ...]]:
    if config.by_size:
        return {f"bank.{s.out_features}x{s.in_features}": (config.size, s.out_features, s.in_features) for s in sites}
    return {"bank": (config.size, max(s.out_features for s in sites), max(s.in_features for s in sites))}


def bank_of(config, site) -> str:
    return next(iter(banks(config, [site])))


def draw(config, sites, generator, weights) -> dict[str, Any]:
    made: dict[str, Any] = {site.path: {"mix": torch.zeros(config.size)} if config.mixed else {} for site in sites}
    for name, shape in banks(config, sites).items():
        bank = torch.randn(shape, generator=generator)
        made.setdefault("*", {})[name] = bank if config.mixed else bank * 0
    return made


METHOD = {
    "name": "BANK",
    "config": BankConfig,
    "kinds": frozenset({"linear"}),
    "plan": lambda config, sites, weights: {site.path: BankConstants(config.alpha / config.size) for site in sites},
    "shapes": lambda config, site: {"mix": (config.size,)} if config.mixed else {},
    "init": draw,
    "apply": apply,
    "merge": merge_bank,
    "constants": BankConstants,
    "varying": frozenset({"alpha"}),
    "abilities": (
        SharesLeaves(lambda config, sites: {site.path: {"bank": bank_of(config, site)} for site in sites}, banks),
    ),
}
BankConfig.method = Method(**METHOD)
BankConfig.form = PeftFormat(
    "bank_",
    parameters=("mix",),
    shared_leaves=("bank",),
    infer=lambda config, found: {"size": len(next(iter(found["*"].values())))},
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CONFIG = {"target_modules": ["first", "second", "out"]}


def away(params, seed=0):
    """Other numbers in each leaf."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: {leaf: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for leaf, t in leaves.items()}
        for path, leaves in params.items()
    }


def dense(model, params, scaling=1 / 3):
    """The formula, written apart from the method."""
    twin = Model().double()
    twin.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        for path in CONFIG["target_modules"]:
            layer = twin.get_submodule(path)
            shape = layer.out_features, layer.in_features
            bank = params["*"].get("bank", params["*"].get("bank.{}x{}".format(*shape)))
            for mix, matrix in zip(params.get(path, {}).get("mix", torch.ones(len(bank))), bank, strict=True):
                layer.weight += scaling * mix.double() * matrix.double()[: shape[0], : shape[1]]
    return twin
