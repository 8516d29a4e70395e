"""The same adapters twice: in a bank, and each alone, as `bind(model, config)` with an optimizer of torch's."""

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from torchgraft.adapters import Bank, LoraConfig
from torchgraft.functional import bind

TARGETS = (["0", "2"], ["0"], ["2"])


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(int(parameter.numel())))
    return made


def lora(r: int, targets: int = 0, dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(
        r=r, lora_alpha=2 + r, target_modules=TARGETS[targets], init_lora_weights=False, lora_dropout=dropout
    )


@contextlib.contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Make torch's generator go on from the state of another one, for a while."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        yield
        generator.set_state(torch.get_rng_state())


class Alone:
    """One adapter without any bank."""

    functional: Any = None

    def __init__(self, base: nn.Module, config: LoraConfig, optimizer: tuple[Any, dict[str, Any]], seed: int):
        self.config, self.graft = config, bind(base, config)
        self.generator = torch.Generator().manual_seed(seed)
        self.params = self.graft.init(self.generator)
        self.leaves = [leaf.requires_grad_() for tree in self.params.values() for leaf in tree.values()]
        cls, defaults = optimizer
        self.defaults, self.optimizer = defaults, cls(self.leaves, **defaults)
        self.initial = {name: value for name, value in self.optimizer.param_groups[0].items() if name != "params"}
        self.steps, self.tokens, self.pending = 0, 0.0, False

    def copy(self) -> "Alone":
        """Return the same adapter as it is now, which goes its own way."""
        new = Alone.__new__(Alone)
        new.__dict__.update(self.__dict__)
        new.params = {
            path: {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
            for path, leaves in self.params.items()
        }
        new.leaves = [leaf for tree in new.params.values() for leaf in tree.values()]
        for leaf, old in zip(new.leaves, self.leaves, strict=True):
            leaf.grad = None if old.grad is None else old.grad.clone()
        new.optimizer = type(self.optimizer)(new.leaves, **self.defaults)
        new.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        new.generator = torch.Generator()
        new.generator.set_state(self.generator.get_state())
        return new

    def backward(self, x: torch.Tensor, weights: torch.Tensor, tokens: float) -> None:
        with drawing_from(self.generator):
            y = self.graft(self.params, x)
        (y.square().sum(-1) * weights).sum().backward()
        self.tokens += tokens
        self.pending = True

    def step(self, hyper: Mapping[str, Any], by_tokens: bool) -> bool:
        """Step, and return whether it was not skipped."""
        hyper = dict(hyper)
        most = hyper.pop("max_norm", None)
        for leaf in self.leaves:
            if by_tokens:
                leaf.grad /= self.tokens
        fine = all(bool(leaf.grad.isfinite().all()) for leaf in self.leaves)
        if fine:
            if most is not None:
                torch.nn.utils.clip_grad_norm_(self.leaves, most)
            self.optimizer.param_groups[0].update({**self.initial, **hyper})
            self.optimizer.step()
            self.steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens, self.pending = 0.0, False
        return fine


def distance(bank: Bank, name: str, alone: Alone) -> float:
    """Return how far an adapter's parameters in a bank are from those of a run alone, of the largest of them."""
    own = bank.tensors(name)
    assert {p: {n: t.shape for n, t in leaves.items()} for p, leaves in own.items()} == {
        p: {n: t.shape for n, t in leaves.items()} for p, leaves in alone.params.items()
    }
    found = [
        float((leaf - alone.params[path][key].detach()).abs().max() / alone.params[path][key].detach().abs().max())
        for path, leaves in own.items()
        for key, leaf in leaves.items()
    ]
    assert all(map(math.isfinite, found))
    return max(found)
