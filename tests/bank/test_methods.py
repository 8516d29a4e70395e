"""Any interleaving of batches, steps, comings and goings: adapters of each method are what they are alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from torchgraft.adapters import Bank, sgd
from torchgraft.functional import bind

from .alone import model
from .test_bank import METHODS, trained

HYPER = {"lr": 0.05, "momentum": 0.5}
NAMES = "abcd"

names = st.sampled_from(NAMES)
events = st.lists(
    st.one_of(
        st.tuples(st.just("batch"), st.lists(st.one_of(names, st.none()), min_size=2, max_size=6)),
        st.tuples(st.just("step"), st.sets(names, min_size=1)),
        st.tuples(st.sampled_from(["renew", "reload"]), names),
    ),
    min_size=6,
    max_size=14,
)


class Twice:
    """A bank of one method's adapters, and each alone with an optimizer of torch's."""

    def __init__(self, configs: list[Any], folder: Path):
        self.configs, self.folder, self.count = configs, folder, 0
        self.bank = Bank(bind(model(), configs), slots=2, resting="memory", optimizer=sgd(**HYPER))
        self.alone: dict[str, tuple[Any, Any, Any]] = {}
        for name in NAMES:
            self.enter(name)

    def enter(self, name: str) -> None:
        self.count += 1
        config = self.configs[self.count % len(self.configs)]
        graft = bind(self.bank.graft.model, config)
        params = trained(graft.init(torch.Generator().manual_seed(self.count)))
        self.bank.add(name, config, params=params)
        leaves = [leaf for leaves in params.values() for leaf in leaves.values()]
        self.alone[name] = graft, params, torch.optim.SGD(leaves, **HYPER)

    def batch(self, given: list[str | None]) -> None:
        seen = [*dict.fromkeys(name for name in given if name is not None)][:2]
        given = [name if name in seen else None for name in given]
        x = torch.randn(len(given), 5, dtype=torch.float64)
        with self.bank.rows(given) as adapted:
            y = adapted(x)
            if seen:
                y.square().sum().backward()
        for name in seen:
            graft, params, _ = self.alone[name]
            mine = torch.tensor([one == name for one in given])
            own = graft(params, x[mine])
            torch.testing.assert_close(y[mine], own, rtol=1e-9, atol=1e-9)
            own.square().sum().backward()

    def step(self, chosen: set[str]) -> None:
        waiting = [name for name in sorted(chosen) if self.bank._roster.get(name, "").pending]
        self.bank.step(waiting)
        for name in waiting:
            self.alone[name][2].step()
            self.alone[name][2].zero_grad()

    def renew(self, name: str) -> None:
        self.bank.remove(name)
        self.enter(name)

    def reload(self, name: str) -> None:
        self.bank.save(name, self.folder / name)
        self.bank.remove(name)
        self.bank.load(self.folder / name, name)

    def check(self) -> None:
        for name, (_, params, _) in self.alone.items():
            for path, leaves in self.bank.tensors(name).items():
                for leaf, value in leaves.items():
                    torch.testing.assert_close(value, params[path][leaf].detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)  # fmt: skip
@given(happened=events)
def test_adapters_of_any_method_are_what_they_would_be_alone(
    method: str, happened: list[tuple[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    twice = Twice(METHODS[method], tmp_path_factory.mktemp("bank"))
    for event, argument in [*happened, ("step", {*NAMES})]:
        getattr(twice, event)(argument)
    twice.check()
