"""What tinker_server.py does for its clients: it trains, samples and keeps adapters in a bank, for all clients.

Jobs wait in a queue, and one thread does them. Those of one client stay in order; what several of them wait for is one
batch, in training and in sampling.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from _writer import CONTEXT, decode
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from torchgraft.adapters import Bank

ROWS = 32
"""How many rows of text a batch has at most, and so how many adapters."""
PATIENCE = 0.01
"""Seconds that a batch waits for others to come."""


@dataclass(kw_only=True, eq=False)
class Job:
    """Something that a client waits for.

    Attributes:
        adapter: Its adapter in the bank, `None` for the base alone; jobs for one adapter are done in order.
        future: What it will be.
    """

    adapter: str | None
    future: Future[Any] = field(default_factory=Future)

    @property
    def kind(self) -> Any:
        """What jobs of one batch agree in; `None` for what is done alone."""
        return None

    @property
    def size(self) -> int:
        return 1


@dataclass(kw_only=True, eq=False)
class Call(Job):
    """Any other work on the bank."""

    run: Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """A text, the symbols that are to follow, and what a loss takes of each of them: all `"time"`."""

    tokens: Tensor
    targets: Tensor
    inputs: dict[str, Tensor]


@dataclass(kw_only=True, eq=False)
class Forward(Job):
    """Losses of some rows, and their gradients."""

    rows: list[Row]
    loss: str
    backward: bool

    @property
    def kind(self) -> Any:
        return Forward, self.backward

    @property
    def size(self) -> int:
        return len(self.rows)


@dataclass(kw_only=True, eq=False)
class Sample(Job):
    """Some continuations of a text."""

    prompt: list[int]
    count: int
    length: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    stop: Sequence[str] | Sequence[int]
    score_prompt: bool

    @property
    def kind(self) -> Any:
        return Sample

    @property
    def size(self) -> int:
        return self.count


@dataclass
class Continuation:
    """A text that a model goes on with."""

    text: list[int]
    noise: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


def cross_entropy(logprobs: Tensor, weights: Tensor) -> Tensor:
    return -(logprobs * weights).sum()


def importance_sampling(chosen: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
    return -((chosen - logprobs).exp() * advantages).sum()


LOSSES: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "cross_entropy": (cross_entropy, ["weights"]),
    "importance_sampling": (importance_sampling, ["logprobs", "advantages"]),
}
"""The losses that are known, each a sum over a row, and what else they take of it, by their names for clients."""


class Worker:
    """Does jobs, in a thread of its own.

    Args:
        model: The base, which is frozen.
        bank: The bank over it.

    Attributes:
        log: The adapters in each of the last batches in training.
    """

    def __init__(self, model: nn.Module, bank: Bank):
        self.model, self.bank = model, bank
        self.waiting: deque[Job] = deque()
        self.changed = threading.Condition()
        self.open = True
        self.log: deque[list[str | None]] = deque(maxlen=1000)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        with self.changed:
            if not self.open:
                job.future.set_exception(RuntimeError("the server is closing"))
                return
            self.waiting.append(job)
            self.changed.notify_all()

    def close(self) -> None:
        """Finish what is begun; all else is answered with an error."""
        with self.changed:
            self.open = False
            self.changed.notify_all()
        self.thread.join()
        for job in self.waiting:
            job.future.set_exception(RuntimeError("the server is closing"))

    def _work(self) -> None:
        while jobs := self._take():
            self._answer(jobs)

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Do some jobs, and each by itself if one of them cannot be done: it fails alone."""
        try:
            results = self._do(jobs)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job in jobs:
                self._answer([job])
        else:
            for job, result in zip(jobs, results, strict=True):
                job.future.set_result(result)

    def _take(self) -> list[Job]:
        """Wait for a job, and take all that can be done with it; none if the server closes."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or not self.open)
            if not self.open:
                return []
            if self.waiting[0].kind is None:
                return [self.waiting.popleft()]
        time.sleep(PATIENCE)
        with self.changed:
            taken: list[Job] = []
            kind, behind = self.waiting[0].kind, set()
            for job in self.waiting:
                fits = not taken or sum(one.size for one in taken) + job.size <= ROWS
                if job.kind == kind and fits and job.adapter not in behind:
                    taken.append(job)
                else:
                    behind.add(job.adapter)
            self.waiting = deque(job for job in self.waiting if job not in taken)
            return taken

    def _do(self, jobs: Sequence[Any]) -> Sequence[Any]:
        if isinstance(jobs[0], Forward):
            return self.forward(jobs)
        if isinstance(jobs[0], Sample):
            return self.sample(jobs)
        return [job.run() for job in jobs]

    def forward(self, jobs: Sequence[Forward]) -> list[tuple[list[Tensor], float]]:
        """Run some jobs as one batch; returns the log-probabilities of each one's targets, and its loss."""
        rows = [row for job in jobs for row in job.rows]
        tokens = pad_sequence([row.tokens for row in rows], batch_first=True)
        targets = pad_sequence([row.targets for row in rows], batch_first=True)
        backward = jobs[0].backward
        results: list[tuple[list[Tensor], Tensor]] = []
        with (
            torch.set_grad_enabled(backward),
            self.bank.rows([job.adapter for job in jobs for _ in job.rows]) as adapted,
        ):
            chosen = adapted(tokens).log_softmax(-1).gather(2, targets[..., None])[..., 0]
            lines = iter([line[: len(row.tokens)] for line, row in zip(chosen, rows, strict=True)])
            for job in jobs:
                own = [next(lines) for _ in job.rows]
                loss, needed = LOSSES[job.loss]
                values = [loss(p, *map(row.inputs.get, needed)) for p, row in zip(own, job.rows, strict=True)]
                results.append(([line.detach() for line in own], torch.stack(values).sum()))
            if backward:
                torch.stack([loss for _, loss in results]).sum().backward()
        self.log.append([job.adapter for job in jobs])
        return [(lines, loss.item()) for lines, loss in results]

    @torch.no_grad()
    def sample(self, jobs: Sequence[Sample]) -> list[tuple[list[Continuation], list[float] | None]]:
        """Go on with some texts as one batch; returns the continuations, and what each symbol of the text scores."""
        names = [job.adapter for job in jobs for _ in range(job.count)]
        run = self.model if all(name is None for name in names) else self.bank.view(names)
        rows = [
            [Continuation([*job.prompt], torch.Generator().manual_seed(job.seed + i)) for i in range(job.count)]
            for job in jobs
        ]
        every = [(job, row) for job, own in zip(jobs, rows, strict=True) for row in own]
        scores: dict[int, list[float]] = {}
        while True:
            windows = [torch.tensor(row.text[-CONTEXT:]) for _, row in every]
            logits = run(pad_sequence(windows, batch_first=True))
            for i, (job, row) in enumerate(every):
                if job.score_prompt and id(job) not in scores:
                    scores[id(job)] = _score(logits[i], windows[i])
                if not row.stopped and len(row.tokens) < job.length:
                    _go_on(job, row, logits[i, len(windows[i]) - 1])
            if all(row.stopped or len(row.tokens) >= job.length for job, row in every):
                return [(own, scores.get(id(job))) for job, own in zip(jobs, rows, strict=True)]


def _score(logits: Tensor, text: Tensor) -> list[float]:
    """The log-probability of each symbol after those before it; of the first there is none."""
    own = logits[: len(text) - 1].log_softmax(-1).gather(1, text[1:, None])[:, 0]
    return [float("nan"), *own.tolist()]


def _go_on(job: Sample, row: Continuation, logits: Tensor) -> None:
    """Choose the next symbol, with what the model itself says of it, before temperature and limits."""
    token = int(logits.argmax()) if job.temperature == 0 else _choose(job, logits, row.noise)
    row.logprobs.append(float(logits.log_softmax(-1)[token]))
    row.tokens.append(token)
    row.text.append(token)
    written = decode(torch.tensor(row.tokens))
    row.stopped = any(token == end if isinstance(end, int) else written.endswith(end) for end in job.stop)


def _choose(job: Sample, logits: Tensor, noise: torch.Generator) -> int:
    likely, order = (logits / job.temperature).softmax(-1).sort(descending=True, stable=True)
    likely[likely.cumsum(0) - likely >= job.top_p] = 0
    if job.top_k > 0:
        likely[job.top_k :] = 0
    return int(order[torch.multinomial(likely, 1, generator=noise)])
