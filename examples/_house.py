"""Tenants, each a thread with an adapter in training; the scheduler that mixes what they wait for; their house."""

from __future__ import annotations

import functools
import json
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _resume import note
from _writer import CONTEXT, bits_per_character, draw_rows, loss_by_row, source, spread_rows
from torch import Tensor, nn
from tqdm import tqdm

from torchgraft.adapters import Bank, LoraConfig
from torchgraft.functional import bind

PATIENCE = 0.02
"""Seconds that a batch waits for tenants who have not asked yet."""


@dataclass(frozen=True)
class Tenant:
    """Who trains an adapter: on which text, how, from when, and for how long."""

    name: str
    seed: int
    rank: int
    rate: float
    rows: int
    """Rows of text in each of its steps."""
    arrives: int
    """The batch of the whole house before which it comes."""
    steps: int

    def config(self) -> LoraConfig:
        return LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=["qkv", "out", "up", "down", "head"])

    def fresh(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    @functools.cached_property
    def texts(self) -> tuple[Tensor, Tensor]:
        """Its module, but for the last tenth; and that."""
        text = source(self.name)
        cut = len(text) - max(len(text) // 10, 2 * CONTEXT)
        return text[:cut], text[cut:]

    def draw(self, step: int) -> Tensor:
        """The rows of a step, which depend on nothing else."""
        return draw_rows(self.texts[0], self.rows, torch.Generator().manual_seed(100_000 * self.seed + step))

    def hyper(self, step: int) -> dict[str, float]:
        """What its AdamW has in a step: a rate that falls to zero, and the norm that its gradient is clipped to."""
        return {"lr": self.rate * (1 - step / self.steps), "weight_decay": 0.01, "max_norm": 1.0}


@dataclass
class Request:
    """One step that a tenant waits for."""

    tenant: Tenant
    step: int
    rows: Tensor
    loss: Future[float] = field(default_factory=Future)


class Scheduler:
    """Mixes the requests that wait into one batch, the oldest first.

    Args:
        bank: The bank; only its adapters are named.
        most: How many rows a batch has at most.
    """

    def __init__(self, bank: Bank, most: int):
        self.bank, self.most = bank, most
        self.waiting: deque[Request] = deque()
        self.taken: list[Request] = []
        self.changed = threading.Condition()
        self.open = True

    def train(self, tenant: Tenant, step: int) -> float:
        """Ask for one step of a tenant's adapter, and wait for its loss."""
        request = Request(tenant, step, tenant.draw(step))
        with self.changed:
            if not self.open:
                raise CancelledError
            self.waiting.append(request)
            self.changed.notify_all()
        return request.loss.result()

    def collect(self) -> list[Request]:
        """Take what waits, as soon as all who are in the bank do, or a moment after the first."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting, timeout=1)
            self.changed.wait_for(lambda: len(self.waiting) >= len(self.bank), timeout=PATIENCE)
            self.taken = []
            while self.waiting and sum(len(one.rows) for one in [*self.taken, self.waiting[0]]) <= self.most:
                self.taken.append(self.waiting.popleft())
            return self.taken

    def run(self, requests: Sequence[Request]) -> list[float]:
        """One forward, one backward, one step of each adapter; returns losses by request."""
        rows = torch.cat([request.rows for request in requests])
        names = [request.tenant.name for request in requests for _ in request.rows]
        with self.bank.rows(names) as adapted:
            own = loss_by_row(adapted(rows[:, :-1]), rows).split([len(request.rows) for request in requests])
            losses = torch.stack([some.mean() for some in own])
            losses.sum().backward()
        self.bank.step({request.tenant.name: request.tenant.hyper(request.step) for request in requests})
        return losses.tolist()

    def close(self) -> None:
        """Send home who waits."""
        with self.changed:
            self.open = False
            for request in [*self.taken, *self.waiting]:
                request.loss.cancel()


class House:
    """A bank with its tenants; what is in its folder is enough to go on.

    Attributes:
        losses: Each tenant's, by name.
        bits: Held-out bits per character of those who have left, by name.
        log: The names in each batch.
        spans: The batch at which each one got a slot, and that at which it left.
    """

    def __init__(self, model: nn.Module, tenants: Sequence[Tenant], slots: int, most: int, folder: Path):
        self.tenants, self.folder = tenants, folder
        largest = max(tenants, key=lambda tenant: tenant.rank).config()
        self.bank = Bank(bind(model, largest), slots=slots)
        self.scheduler = Scheduler(self.bank, most)
        self.places = threading.Semaphore(slots)
        self.losses: dict[str, list[float]] = {tenant.name: [] for tenant in tenants}
        self.bits: dict[str, float] = {}
        self.log: list[list[str]] = []
        self.spans: dict[str, list[int]] = {}
        if (folder / "house.json").exists():
            vars(self).update(json.loads((folder / "house.json").read_text()))

    def live(self, tenant: Tenant) -> None:
        """The life of a tenant, in a thread of its own."""
        try:
            with self.places:
                self.enter(tenant)
                for step in range(self.bank.steps(tenant.name), tenant.steps):
                    self.scheduler.train(tenant, step)
                self.leave(tenant)
        except CancelledError:  # the house is closed
            pass

    def enter(self, tenant: Tenant) -> None:
        with self.bank.lock:
            if not self.scheduler.open:
                raise CancelledError
            if (self.folder / tenant.name / "adapter_config.json").exists():
                self.bank.load(self.folder / tenant.name, tenant.name)
            else:
                self.bank.add(tenant.name, tenant.config(), generator=tenant.fresh())
            del self.losses[tenant.name][self.bank.steps(tenant.name) :]
            self.spans.setdefault(tenant.name, [len(self.log), -1])

    def leave(self, tenant: Tenant) -> None:
        rows = spread_rows(tenant.texts[1], 16)
        bits = bits_per_character(self.bank.view([tenant.name] * len(rows)), rows)
        with self.bank.lock:
            self.save([tenant.name])
            self.bank.remove(tenant.name)
            self.bits[tenant.name], self.spans[tenant.name][1] = bits, len(self.log)
            self.save([])

    def save(self, names: Sequence[str] | None = None) -> None:
        """Write down all that is known, and then adapters: those on disk never have steps without a loss."""
        with self.bank.lock:
            note({key: getattr(self, key) for key in ("losses", "bits", "log", "spans")}, self.folder / "house.json")
            for name in self.bank.names if names is None else names:
                self.bank.save(name, self.folder / name)

    def run(self, save_every: int) -> None:
        """Let everyone live, or go on to; who had a slot comes first."""
        left = [tenant for tenant in self.tenants if tenant.name not in self.bits]
        to_come = deque(sorted(left, key=lambda tenant: (tenant.name not in self.spans, tenant.arrives)))
        lives: list[Future[None]] = []
        total, done = sum(tenant.steps for tenant in self.tenants), sum(map(len, self.losses.values()))
        with (
            ThreadPoolExecutor(len(self.tenants)) as pool,
            tqdm(initial=done, total=total, desc=f"{len(self.tenants)} tenants".ljust(13), unit="step") as progress,
        ):
            try:
                while to_come or not all(life.done() for life in lives):
                    while to_come and (to_come[0].arrives <= len(self.log) or all(life.done() for life in lives)):
                        lives.append(pool.submit(self.live, to_come.popleft()))
                    if requests := self.scheduler.collect():
                        self.serve(requests)
                        progress.update(len(requests))
                        progress.set_postfix_str(f"{len(self.bank)} in the bank, {len(requests)} in a batch")
                        if len(self.log) % save_every == 0:
                            self.save()
            finally:
                self.scheduler.close()
        for life in lives:
            life.result()

    def serve(self, requests: Sequence[Request]) -> None:
        """Answer some requests, and write down what they gave first."""
        losses = self.scheduler.run(requests)
        with self.bank.lock:
            self.log.append([request.tenant.name for request in requests])
            for request, loss in zip(requests, losses, strict=True):
                self.losses[request.tenant.name].append(loss)
        for request, loss in zip(requests, losses, strict=True):
            request.loss.set_result(loss)
