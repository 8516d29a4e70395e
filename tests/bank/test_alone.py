"""The promise of a bank: whatever comes, goes and shares batches, each adapter is what it would be alone."""

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torchopt
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from torchgraft.adapters import Bank, adamw, functional_optimizer, muon, sgd
from torchgraft.functional import bind

from .alone import Alone, distance, lora, model

NAMES = "abcdefgh"
OPTIMIZERS: dict[str, tuple[Callable[..., Any], Any, dict[str, Any]]] = {
    "adamw": (adamw, torch.optim.AdamW, {"lr": 1e-2}),
    "muon": (muon, torch.optim.Muon, {"lr": 1e-2}),
    "sgd": (sgd, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.25}),
    "torchopt": (
        functools.partial(functional_optimizer, torchopt.sgd),
        torch.optim.SGD,
        {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.0},
    ),
}  # fmt: skip
HYPER: list[dict[str, Any]] = [{}, {"lr": 3e-3}, {"weight_decay": 0.1}, {"max_norm": 0.5, "lr": 0.1}]

PHASES = [Phase.explicit, Phase.reuse, Phase.generate]  # shrinking a history takes minutes

names = st.sampled_from(NAMES)
rows = st.lists(st.one_of(names, names, names, st.none()), min_size=2, max_size=9)
kinds = st.tuples(st.integers(1, 4), st.integers(0, 2), st.sampled_from([*OPTIMIZERS]))
adds = st.tuples(st.just("add"), names, kinds)
batches = st.tuples(st.just("batch"), rows, st.lists(names, max_size=1))
steps = st.tuples(
    st.just("step"),
    st.lists(st.sampled_from(HYPER), min_size=8, max_size=8),
    st.one_of(st.just(255), st.integers(0, 255)),
)
others = st.tuples(st.sampled_from(["remove", "save", "load", "prefetch"]), names)
starts = st.lists(kinds, min_size=2, max_size=8)
events = st.lists(st.one_of(batches, batches, steps, steps, adds, others), min_size=10, max_size=60)


class Twice:
    """A bank and the same adapters alone, to which the same things happen."""

    def __init__(self, folder: Path, by_tokens: bool, dropout: float, slots: int, resting: Any):
        self.base, self.folder, self.by_tokens, self.dropout = model(), folder, by_tokens, dropout
        self.bank = Bank(bind(self.base, lora(4, dropout=dropout)), slots=slots, resting=resting)
        self.alone: dict[str, Alone] = {}
        self.saved: dict[str, Alone] = {}
        self.source = torch.Generator().manual_seed(1)
        self.before: dict[str, Any] = {}

    def add(self, name: str, kind: tuple[int, int, str]) -> None:
        r, targets, optimizer = kind
        if name in self.alone:
            with pytest.raises(ValueError, match="is taken"):
                self.bank.add(name, lora(r))
            return
        make, cls, defaults = OPTIMIZERS[optimizer]
        seed, config = len(self.alone) + 17, lora(r, targets, self.dropout)
        self.alone[name] = Alone(self.base, config, (cls, defaults), seed)
        self.alone[name].functional = make(**defaults) if optimizer == "torchopt" else None
        generator = torch.Generator().manual_seed(seed)
        self.bank.add(name, config, generator=generator, optimizer=make(**defaults))

    def batch(self, given: list[str | None], broken: list[str]) -> None:
        given = [name for name in given if name is None or name in self.alone]
        if not any(given):
            return
        if len({*given} - {None}) > len(self.bank._slots):
            with pytest.raises(RuntimeError, match="slots are taken"):
                self.bank.rows(given, tokens=[1.0] * len(given) if self.by_tokens else None).__enter__()
            return
        x = torch.randn(len(given), 5, generator=self.source, dtype=torch.float64)
        tokens = torch.randint(1, 5, (len(given),), generator=self.source).double()
        weights = torch.tensor([float("nan") if name in broken else 1.0 for name in given], dtype=torch.float64)
        with self.bank.rows(given, tokens=tokens if self.by_tokens else None) as adapted:
            (adapted(x).square().sum(-1) * weights).sum().backward()
        for name in {*given} - {None}:
            mine = torch.tensor([one == name for one in given])
            self.alone[name].backward(x[mine], weights[mine], float(tokens[mine].sum()))

    def step(self, values: list[dict[str, Any]], chosen: int) -> None:
        pending = [name for i, name in enumerate(NAMES) if chosen >> i & 1 and name in self.alone]
        hyper = {name: values[NAMES.index(name)] for name in pending if self.alone[name].pending}
        others = {name: self.numbers(name) for name in self.alone if name not in hyper}
        report = self.bank.step(hyper)
        for name, own in hyper.items():
            assert (not report[name].skipped) == self.alone[name].step(own, self.by_tokens)
            assert report[name].steps == self.alone[name].steps
        for name, before in others.items():
            assert all(map(torch.equal, self.numbers(name), before)), "a step reached another adapter"

    def remove(self, name: str) -> None:
        if name in self.alone:
            self.bank.remove(name)
            del self.alone[name]

    def save(self, name: str) -> None:
        if name in self.alone:
            self.bank.save(name, self.folder / "saved" / name)
            self.saved[name] = self.alone[name].copy()

    def load(self, name: str) -> None:
        if name in self.saved:
            self.remove(name)
            own = self.saved[name].functional  # files do not name it
            self.bank.load(self.folder / "saved" / name, name, optimizer=own)
            self.alone[name] = self.saved[name].copy()

    def prefetch(self, name: str) -> None:
        if name in self.alone:
            self.bank.prefetch([name])

    def numbers(self, name: str) -> list[torch.Tensor]:
        resident, resting = self.bank._roster.get(name, ""), self.bank._roster._resting
        if resident.slot is not None:
            numbers = self.bank._slots.lift(resident)
        elif resting._folder is None:
            numbers = resting._numbers[name]
        else:
            numbers = resting.read(resident)
        return [numbers[key].nan_to_num(7.0) for key in sorted(numbers)]

    def check(self) -> None:
        assert sorted(self.bank.names) == sorted(self.alone)
        for name, alone in self.alone.items():
            assert distance(self.bank, name, alone) < 1e-10, name
            assert self.bank.steps(name) == alone.steps


@settings(max_examples=40, phases=PHASES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    starts, events, st.booleans(), st.sampled_from([0.0, 0.3]), st.sampled_from([(8, None), (2, "memory"), (3, "disk")])
)
def test_each_adapter_is_what_it_would_be_alone(
    tmp_path_factory: pytest.TempPathFactory,
    start: list[tuple[int, int, str]],
    happened: list[tuple[Any, ...]],
    by_tokens: bool,
    dropout: float,
    room: tuple[int, str | None],
) -> None:
    folder = tmp_path_factory.mktemp("bank")
    slots, resting = room
    twice = Twice(folder, by_tokens, dropout, slots, folder / "resting" if resting == "disk" else resting)
    for name, kind in zip(NAMES, start, strict=False):
        twice.add(name, kind)
    for event, *arguments in happened:
        getattr(twice, event)(*arguments)
        twice.check()
    hypothesis.event(f"steps of one adapter, at most: {max([0, *(one.steps for one in twice.alone.values())])}")


@pytest.mark.parametrize("seed", range(4))
def test_long_lives_are_what_they_would_be_alone(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    slots, resting = [(8, None), (4, "memory"), (5, tmp_path / "resting"), (8, None)][seed]
    twice = Twice(tmp_path, bool(seed % 2), [0.0, 0.2][seed // 2], slots, resting)

    def kind() -> tuple[int, int, str]:
        return draw.randint(1, 4), draw.randint(0, 2), draw.choice([*OPTIMIZERS])

    for name in NAMES[:6]:
        twice.add(name, kind())
    for _ in range(25):
        for _ in range(draw.randint(1, 2)):
            several = draw.sample(NAMES, min(slots, draw.randint(2, 6)))
            twice.batch(draw.choices([*several, None], k=9), draw.sample(NAMES, 1) if draw.random() < 0.1 else [])
        twice.step([draw.choice(HYPER) for _ in NAMES], draw.getrandbits(8) | draw.getrandbits(8))
        event = draw.choice(["add", "remove", "save", "load", "prefetch", "save", "load"])
        getattr(twice, event)(draw.choice(NAMES), *([kind()] if event == "add" else []))
        twice.check()
    assert max(alone.steps for alone in twice.alone.values()) >= 8
