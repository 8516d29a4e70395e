"""Every method in a bank: whatever comes, goes and shares batches, its adapters are what they are alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from torchgraft import adapters
from torchgraft.adapters import Bank, load_adapter, sgd
from torchgraft.functional import bind

from ..contract.cases import KINDS, case
from ..contract.methods import METHODS
from .subjects import SUBJECTS, Subject, trained

HYPER = {"lr": 0.05, "momentum": 0.5}
NAMES = "abcd"
CLOSE = {"rtol": 1e-9, "atol": 1e-10}

FIRST = {type(row.config): name for name, row in reversed(METHODS.items())}.values()
CASES = [
    pytest.param(name, site, marks=pytest.mark.slow if site == sites[0] and name in FIRST else pytest.mark.full)
    for name, sites in KINDS.items()
    for site in sites
]
"""The table of the contract: each method on each kind of site, in two configs that differ as far as they may."""


def subject_of(name: str, site: str) -> Subject:
    """Return a row of the contract as a subject: its model, its inputs, and its two configs."""
    one = case(name, site)
    return Subject(lambda: one.model, lambda rows: one.x[torch.arange(rows) % len(one.x)], [one.config, one.other])


def train(subject: Subject, folder: Path) -> None:
    """Train the adapters of a subject in shared batches and alone, and compare; then save and load them."""
    configs = subject.configs
    bank = Bank(bind(subject.base(), configs), slots=len(configs), optimizer=sgd(**HYPER))
    given: list[str | None] = [*map(str, range(len(configs))), "0", "1", None]
    runs = {}
    for i, config in enumerate(configs):
        graft = bind(bank.graft.model, config)
        params = trained(graft.init(torch.Generator().manual_seed(i)))
        bank.add(str(i), config, params=params)
        leaves = [leaf for leaves in params.values() for leaf in leaves.values()]
        runs[str(i)] = graft, params, torch.optim.SGD(leaves, **HYPER)
    for _ in range(3):
        x = subject.inputs(len(given))
        with bank.rows(given) as adapted:
            adapted(x).square().mean(0).sum().backward()
        bank.step([*runs])
        for one, (graft, params, optimizer) in runs.items():
            optimizer.zero_grad()
            rows = torch.tensor([name == one for name in given])
            (graft(params, x[rows]).square().sum(0) / len(given)).sum().backward()
            optimizer.step()
    for one, (graft, params, _) in runs.items():
        own = bank.tensors(one)
        for path, leaves in params.items():
            for leaf, value in leaves.items():
                torch.testing.assert_close(own[path][leaf], value.detach(), **CLOSE)
        loaded = load_adapter(graft, bank.save(one, folder / one), dtype=torch.float64)
        if getattr(bank.config(one), "save_only_topk_weights", False):  # such files are not for going on
            continue
        assert all(torch.equal(loaded[p][n], t) for p, leaves in own.items() for n, t in leaves.items())


def test_every_method_is_here() -> None:
    every = {one for one in vars(adapters).values() if isinstance(one, type) and hasattr(one, "method")}
    here = {type(row.config) for row in METHODS.values()} | {type(s.configs[0]) for s in SUBJECTS.values()}
    assert every == here


@pytest.mark.parametrize(("name", "site"), CASES)
def test_a_method_is_in_a_bank_what_it_is_alone(name: str, site: str, tmp_path: Path) -> None:
    train(subject_of(name, site), tmp_path)


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_may_differ_is_in_a_bank_what_it_is_alone(name: str, tmp_path: Path) -> None:
    train(SUBJECTS[name], tmp_path)


# -- any interleaving of batches, steps, comings and goings -----------------------------------------------------------

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

    def __init__(self, subject: Subject, folder: Path):
        self.subject, self.folder, self.count = subject, folder, 0
        self.bank = Bank(bind(subject.base(), subject.configs), slots=2, resting="memory", optimizer=sgd(**HYPER))
        self.alone: dict[str, tuple[Any, Any, Any]] = {}
        for name in NAMES:
            self.enter(name)

    def enter(self, name: str) -> None:
        self.count += 1
        config = self.subject.configs[self.count % len(self.subject.configs)]
        graft = bind(self.bank.graft.model, config)
        params = trained(graft.init(torch.Generator().manual_seed(self.count)))
        self.bank.add(name, config, params=params)
        leaves = [leaf for leaves in params.values() for leaf in leaves.values()]
        self.alone[name] = graft, params, torch.optim.SGD(leaves, **HYPER)

    def batch(self, given: list[str | None]) -> None:
        seen = [*dict.fromkeys(name for name in given if name is not None)][:2]
        given = [name if name in seen else None for name in given]
        x = self.subject.inputs(len(given))
        with self.bank.rows(given) as adapted:
            y = adapted(x)
            if seen:
                (y.square().sum() / 50).backward()
        for name in seen:
            graft, params, _ = self.alone[name]
            mine = torch.tensor([one == name for one in given])
            own = graft(params, x[mine])
            torch.testing.assert_close(y[mine], own, **CLOSE)
            (own.square().sum() / 50).backward()

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
                    torch.testing.assert_close(value, params[path][leaf].detach(), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)  # fmt: skip
@given(happened=events)
def test_adapters_are_what_they_would_be_alone_whatever_happens(
    name: str, happened: list[tuple[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    twice = Twice(SUBJECTS[name], tmp_path_factory.mktemp("bank"))
    for event, argument in [*happened, ("step", {*NAMES})]:
        getattr(twice, event)(argument)
    twice.check()
