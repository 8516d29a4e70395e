"""One frozen language model serves many adapters: every row of a batch may use another one.

A small transformer learns to spell from the texts of Python's `help()` and is frozen. Nine LoRA adapters, trained at
once, teach it nine registers: shouting, lisping, doing without vowels and so on. Then requests come in, each for a
prompt and an adapter or for the base alone, and share one batch: `graft(route(many, rows), ids)`, token by token.
While that goes on the ninth adapter is read from disk, joins the stack, and leaves again.

    pip install torchgraft[demo]
    python examples/serve.py --out serve-out
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import random
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.adapters import LoraConfig, load_adapter, save_adapter
from torchgraft.functional import Graft, Tree, bind, route, stack, unstack

try:
    import _characters as lm
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"This example needs {error.name}, which is not installed: pip install torchgraft[demo]") from None

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
TEMPERATURE = 0.5


# -- the adapters: each has learned another way to write -------------------------------------------------------------

# Ways to write. Each is kept where applying it once more changes nothing, which is how answers are judged.
REGISTERS: dict[str, Callable[[str], str]] = {
    "shouted": str.upper,
    "lisped": lambda text: re.sub("s+", "th", text),
    "vowelless": lambda text: re.sub("[aeiouAEIOU]", "", text),
    "all_snake": lambda text: text.replace(" ", "_"),
    "l33t": lambda text: text.translate(str.maketrans("aeiostAEIOST", "431057431057")),
    "Titled": lambda text: re.sub(r"\b[a-z]", lambda m: m[0].upper(), text),
    "camelCase": lambda text: re.sub(" +([a-z]?)", lambda m: m[1].upper(), text),
    "exclaimed": lambda text: re.sub("[!.,]* +", "! ", text),
    "moo": lambda text: re.sub("[aeiou]", "o", text),
}
NEWCOMER = list(REGISTERS)[-1]


def lesson(prose: Sequence[str], register: Callable[[str], str], choose: random.Random) -> tuple[list[int], list[int]]:
    """A plain opening that goes on in a register, and what to predict: -1 for nothing."""
    words = choose.choice(prose).split(" ")
    start, opening = choose.randrange(len(words) - 5), choose.randint(2, 5)
    prompt = " ".join(words[start : start + opening]) + " "
    ids = lm.encode(prompt + register(" ".join(words[start + opening :])))[: lm.WINDOW + 1]
    rest = lm.WINDOW + 1 - len(ids)
    return ids[:-1] + rest * [0], [-1] * (len(prompt) - 1) + ids[len(prompt) :] + rest * [-1]


def train_adapters(graft: Graft, prose: Sequence[str], steps: int, seed: int) -> dict[str, Tree]:
    """Train one adapter for each register, all in one batch of equal parts and one step."""
    many = stack([graft.init(lm.seeded(seed + i)) for i in range(len(REGISTERS))])
    leaves = [leaf.requires_grad_() for leaf in optree.tree_leaves(many)]
    choose = random.Random(seed)

    def loss() -> Tensor:
        lessons = [lesson(prose, register, choose) for register in REGISTERS.values() for _ in range(8)]
        x, y = (torch.tensor(part) for part in zip(*lessons, strict=True))
        return F.cross_entropy(graft(route(many), x).flatten(0, 1), y.flatten(), ignore_index=-1)

    lm.minimise(loss, leaves, steps, 1.5e-2, f"{len(REGISTERS)} adapters ")
    return dict(zip(REGISTERS, unstack(optree.tree_map(torch.Tensor.detach, many)), strict=True))


# -- serving ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Request:
    """A prompt to continue by `length` characters; `adapter=None` asks the base alone."""

    prompt: str
    adapter: str | None
    length: int
    seed: int = 0

    def __post_init__(self) -> None:
        self.ids, self.position = lm.encode(self.prompt), 0
        uniform = torch.rand(self.length + 1, len(lm.ALPHABET), generator=lm.seeded(self.seed))
        self.noise = TEMPERATURE * -(-uniform.log()).log()  # added to logits, it makes their maximum a random draw

    @property
    def done(self) -> bool:
        return len(self.ids) == len(self.prompt) + self.length

    @property
    def answer(self) -> str:
        return "".join(lm.ALPHABET[i] for i in self.ids[len(self.prompt) :])

    def feed(self, token: int) -> None:
        """Go to the next character: one of the prompt as long as it lasts, then what the model chose."""
        if not self.done:
            self.position += 1
            self.ids += [token] * (self.position == len(self.ids))


@torch.no_grad()
def next_logits(forward: Forward, requests: Sequence[Request], memory: Tensor) -> Tensor:
    """What a model says about the next character of every request of a batch, `"requests alphabet"`."""
    ids = torch.tensor([[request.ids[request.position]] for request in requests])
    return forward(ids, torch.tensor([request.position for request in requests]), memory)[:, 0]


def advance(forward: Forward, requests: Sequence[Request], memory: Tensor) -> None:
    """Take every request of a batch one character further."""
    noise = torch.stack([request.noise[len(request.ids) - len(request.prompt)] for request in requests])
    chosen = (next_logits(forward, requests, memory) + noise).argmax(-1)
    for request, token in zip(requests, chosen.tolist(), strict=True):
        request.feed(token)


class Server:
    """A batch of slots that requests take as they come; adapters come and go between two steps.

    Attributes:
        many: The stacked adapters, leaves `"N ..."`.
        names: Their names, in the order of the stack.
        slots: The request in each row of the batch; one that is done makes place for the next of the queue.
        history: The slots' adapters at each step: an index of `names`, -1 for the base and -2 for none.
    """

    def __init__(self, graft: Graft, adapters: Mapping[str, Tree], slots: int):
        self.graft, self.many, self.names = graft, stack(list(adapters.values())), list(adapters)
        self.memory = lm.empty_memory(graft.model, slots)
        self.slots = [Request(" ", None, 0) for _ in range(slots)]
        self.queue: deque[Request] = deque()
        self.history: list[list[int]] = []

    @property
    def rows(self) -> Tensor:
        """The adapter of each row, as `route` wants it."""
        return torch.tensor([-1 if r.done or not r.adapter else self.names.index(r.adapter) for r in self.slots])

    def add(self, name: str, adapter: Tree) -> None:
        """A longer stack; the graft and the model know nothing of it."""
        self.many = optree.tree_map(lambda leaf, new: torch.cat([leaf, new[None]]), self.many, adapter)
        self.names.append(name)

    def remove(self, name: str) -> None:
        if any(request.adapter == name for request in [*self.slots, *self.queue] if not request.done):
            raise ValueError(f"{name} still has requests; let them finish before it goes")
        index = self.names.index(name)
        self.many = optree.tree_map(lambda leaf: torch.cat([leaf[:index], leaf[index + 1 :]]), self.many)
        self.names.remove(name)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.graft(route(self.many, self.rows), *inputs)

    def step(self) -> None:
        self.slots = [self.queue.popleft() if one.done and self.queue else one for one in self.slots]
        self.history.append([-2 if one.done else row for one, row in zip(self.slots, self.rows.tolist(), strict=True)])
        advance(self.forward, self.slots, self.memory)

    def serve(self, requests: Sequence[Request]) -> None:
        """Step until these are done."""
        while not all(request.done for request in requests):
            self.step()

    def peek(self) -> Tensor:
        """The next logits of every slot, without a step."""
        return next_logits(self.forward, self.slots, self.memory.clone())


def serve_with_a_guest(
    server: Server, requests: Sequence[Request], late: Sequence[Request], folder: Path, patience: int
) -> tuple[range, bool]:
    """Serve `requests`, and amid them an adapter that comes from disk, is asked for at once, and leaves.

    Returns:
        The steps it was there, and whether its coming and going left every bit of the others' logits as it was.
    """
    server.queue.extend(requests)
    for _ in range(patience):
        server.step()
    logits, arrival = server.peek(), len(server.history)
    server.add(NEWCOMER, load_adapter(server.graft, folder))
    kept = torch.equal(logits, server.peek())
    server.queue.extendleft(late)
    server.serve(late)
    logits, leaving = server.peek(), len(server.history)
    server.remove(NEWCOMER)
    kept = kept and torch.equal(logits, server.peek())
    server.serve(requests)
    return range(arrival, leaving), kept


def find_differing(graft: Graft, adapters: Mapping[str, Tree], served: Sequence[Request]) -> list[Request]:
    """Ask everything once more, each on its own and without `route`; returns what got another answer."""
    differing = []
    for request in tqdm(served, desc="one by one ", unit="answer"):
        forward = functools.partial(graft, adapters[request.adapter]) if request.adapter else graft.model
        again, memory = dataclasses.replace(request), lm.empty_memory(graft.model, 1)
        while not again.done:
            advance(forward, [again], memory)
        if again.answer != request.answer:
            differing.append(request)
    return differing


@torch.no_grad()
def measure(graft: Graft, adapters: Sequence[Tree], rows: int, rounds: int) -> dict[str, float]:
    """Tokens per second of four ways to take a batch one token further; medians of interleaved rounds."""
    each = max(1, rows // len(adapters))
    index = torch.arange(len(adapters)).repeat_interleave(each)[torch.randperm(each * len(adapters))]
    parts = [(index == i).nonzero()[:, 0] for i in range(len(adapters))]
    ids, position = torch.randint(len(lm.ALPHABET), (len(index), 1)), torch.full((len(index),), lm.CONTEXT // 2)
    many, memory = stack(list(adapters)), lm.empty_memory(graft.model, len(index))

    def one_by_one() -> None:
        for part, adapter in zip(parts, adapters, strict=True):
            graft(adapter, ids[part], position[part], memory[:, :each])

    ways: dict[str, Callable[[], Any]] = {
        "the base, no adapter": lambda: graft.model(ids, position, memory),
        "one adapter for all": lambda: graft(adapters[0], ids, position, memory),
        f"{len(adapters)} adapters, mixed": lambda: graft(route(many, index), ids, position, memory),
        f"{len(adapters)} adapters, in turn": one_by_one,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in tqdm(range(rounds + 1), desc="throughput ", unit="round"):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(10):
                way()
            if turn:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / 10)
    return {name: len(index) / median(taken) for name, taken in seconds.items()}


# -- the picture ------------------------------------------------------------------------------------------------------

PAPER, PANEL, FAINT, GREY, MUTED, INK = "#0d1117", "#161b22", "#30363d", "#6b7480", "#9aa4b0", "#f0f6fc"
COLORS = ["#ff7b72", "#ffa657", "#f2cc60", "#b8e986", "#5fd38d", "#4fd6be", "#58b7ff", "#a592ff", "#f78fd0"]


def draw(path: Path, shown: Sequence[Request], speed: Mapping[str, float], server: Server, stay: range) -> None:
    """Draw answers to one prompt, tokens per second, and which adapter each row of the batch used at each step."""
    figure = Figure(figsize=(15, 9.4), facecolor=PAPER)
    write = functools.partial(figure.text, parse_math=False)
    write(0.03, 0.925, "One frozen model, one batch, an adapter for every row", color=INK, fontsize=30, weight="bold")
    story = f"Asked to go on after “{shown[0].prompt.strip()}”, each adapter has its own way. All share one batch."
    write(0.03, 0.882, story, color=MUTED, fontsize=17)
    for i, (request, color) in enumerate(zip(shown, [INK, *COLORS], strict=True)):
        y = 0.82 - 0.046 * i
        write(0.03, y, request.adapter or "the base", color=color, fontsize=16, weight="bold")
        write(0.132, y, request.answer[:74], color=color, fontsize=13.5, family="monospace")

    most = max(speed.values())
    bars = figure.add_axes((0.76, 0.37, 0.21, 0.43), xlim=(0, most))
    for i, (name, value) in enumerate(speed.items()):
        mixed = name.endswith("mixed")
        bars.barh(-i, value, height=0.36, color=COLORS[6] if mixed else FAINT)
        bars.text(0, 0.28 - i, name, color=INK if mixed else MUTED, fontsize=14, weight="bold" if mixed else "normal")
        bars.text(most, 0.28 - i, f"{value:,.0f}", color=INK, fontsize=15, weight="bold", ha="right")
    strip = figure.add_axes((0.03, 0.04, 0.94, 0.25), ylim=(len(server.slots) - 0.5, -0.5))
    cells, shades = torch.tensor(server.history).T.numpy(), ListedColormap([PANEL, GREY, *COLORS])
    strip.imshow(cells, cmap=shades, vmin=-2, vmax=len(COLORS) - 1, aspect="auto", interpolation="nearest")
    strip.hlines([i + 0.5 for i in range(len(server.slots))], -0.5, len(server.history) - 0.5, color=PAPER, linewidth=1)
    for step, what, side in ((stay.start, "arrives", "right"), (stay.stop, "leaves", "left")):
        strip.axvline(step - 0.5, color=INK, linewidth=1.8)
        note = f" {NEWCOMER} {what} "
        strip.text(step, -0.9, note, color=COLORS[-1], fontsize=14, ha=side, va="bottom", weight="bold")
    title = "The batch, step by step: a line is a slot, a colour an adapter, grey the base"
    for axes, text, pad in ((bars, f"Tokens per second, {len(server.slots)} rows", 18), (strip, title, 26)):
        axes.set_title(text, color=INK, fontsize=16, loc="left", pad=pad)
        axes.axis("off")
    figure.savefig(path, dpi=90, facecolor=PAPER)


# -- the whole story --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("serve-out"), help="folder for the adapters and the picture")
    parser.add_argument("--base-steps", type=int, default=400, help="training steps of the base model")
    parser.add_argument("--steps", type=int, default=100, help="training steps of the adapters")
    parser.add_argument("--slots", type=int, default=24, help="rows of the batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a short run with weaker results")
    parser.set_defaults(dim=128, prompts=8, length=48, rounds=15)
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(base_steps=20, steps=10, slots=8, dim=32, prompts=2, length=16, rounds=1)
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    args, start = parse(argv), time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    choose, prose = random.Random(args.seed), lm.read_prose()

    # A frozen model, and an adapter in a folder of its own for each register.
    model = lm.Transformer(args.dim)
    lm.train_base(model, prose, args.base_steps, args.seed)
    before = copy.deepcopy(model.state_dict())
    graft = bind(model, LoraConfig(r=8, lora_alpha=16, target_modules=["qkv", "out", "up", "down", "head"]))
    adapters = train_adapters(graft, prose, args.steps, args.seed)
    folders = {name: save_adapter(graft, args.out / name, params=tree) for name, tree in adapters.items()}

    # Requests for the base and for each adapter, in random order; the last adapter's come later.
    openings = sorted({" ".join(paragraph.split()[:3]) + " " for paragraph in prose})
    prompts = choose.sample([one for one in openings if len(one) < lm.CONTEXT - 2 * args.length], args.prompts)
    names = [None, *adapters]

    def ask(name: str | None) -> list[Request]:
        return [Request(one, name, choose.randint(args.length, 2 * args.length), i) for i, one in enumerate(prompts)]

    served, late = [request for name in names[:-1] for request in ask(name)], ask(NEWCOMER)
    choose.shuffle(served)

    server = Server(graft, {name: adapters[name] for name in adapters if name != NEWCOMER}, args.slots)
    began = time.perf_counter()
    stay, kept = serve_with_a_guest(server, served, late, folders[NEWCOMER], args.length)
    serving, served = time.perf_counter() - began, served + late
    differing = find_differing(graft, adapters, served)
    speed = measure(graft, list(adapters.values())[:-1], args.slots, args.rounds)
    after = model.state_dict()
    unchanged = all(torch.equal(before[key], after[key]) for key in before)

    answers = {(request.adapter, request.prompt): request for request in served}
    picture = args.out / "serve.png"
    draw(picture, [answers[name, prompts[0]] for name in names], speed, server, stay)
    for prompt in prompts[:2]:
        print(f"\n{'adapter':<12}kept  {prompt!r} goes on (kept: answers of the adapter that keep to its register)")
        for name in names:
            own = [request.answer for request in served if request.adapter == name]
            share = f"{mean(REGISTERS[name](text) == text for text in own):.0%}" if name else ""
            print(f"{name or 'the base':<12}{share:>4}  {answers[name, prompt].answer}")
    print()
    for way, value in speed.items():
        print(f"{way:<22}{value:>8,.0f} tokens/s")
    tokens, seconds = sum(request.position for request in served), time.perf_counter() - start
    print(f"\nserved        {len(served)} requests, {tokens:,} characters in {serving:.1f} s; {seconds:.0f} s in all")
    print(f"each alone    {'the same answers' if not differing else f'{len(differing)} DIFFERENT ANSWERS'}")
    print(f"hot-add       {NEWCOMER} came and went; the others' logits {'kept every bit' if kept else 'CHANGED'}")
    print(f"base model    {'unchanged, bit for bit' if unchanged else 'CHANGED'}")
    print(f"picture       {picture}")
    checks = {"rows_equal_alone": not differing, "others_kept": kept, "base_unchanged": unchanged}
    return {**checks, "served": served, "server": server, "folders": folders, "speed": speed, "picture": picture}


if __name__ == "__main__":
    measured = main()
    if not all(measured[check] for check in ("rows_equal_alone", "others_kept", "base_unchanged")):
        raise SystemExit("A check failed; see above.")
