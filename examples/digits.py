"""Eight LoRA adapters on one frozen vision transformer, trained at once.

A small transformer learns scikit-learn's handwritten digits and is frozen. In eight other worlds, where digits are
turned, mirrored, swirled and so on, it fails. Each world gets a LoRA adapter. The eight are one stacked tree:
`torch.vmap` runs them, one backward pass and one optimizer step trains them, and the model itself never changes.

    pip install torchgraft[demo]
    python examples/digits.py --out demo-out
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import optree
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchgraft.adapters import LoraConfig
from torchgraft.functional import Graft, bind, merge, stack, unstack

try:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"This example needs {error.name}, which is not installed: pip install torchgraft[demo]") from None

Adapter = dict[str, dict[str, Tensor]]
SIDE, PATCH, HELD_OUT, BATCH = 32, 8, 500, 64


# -- the model: a plain vision transformer, which knows nothing of adapters -------------------------------------------


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(-4, -2).unbind(-3)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out((weights @ v).transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Images `"... 32 32"` to logits `"... 10"`."""

    def __init__(self, dim: int = 64, heads: int = 4, depth: int = 4):
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, dim)
        self.position = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = to_tiles(2 * images - 1, PATCH).flatten(-2)
        return self.head(self.norm(self.blocks(self.embed(patches) + self.position)).mean(-2))


def to_tiles(images: Tensor, size: int) -> Tensor:
    """Cut `"... h w"` into `"... tiles size size"`."""
    return images.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).transpose(-3, -2).flatten(-4, -3)


# -- the worlds: functions of clean images and a source of noise ------------------------------------------------------


def chequered(x: Tensor, noise: torch.Generator) -> Tensor:
    field = torch.arange(SIDE) // 4
    return (x - (field[:, None] + field) % 2).abs()


def noisy(x: Tensor, noise: torch.Generator) -> Tensor:
    return (x + 0.35 * torch.randn(x.shape, generator=noise)).clamp(0, 1)


def blurred(x: Tensor, noise: torch.Generator) -> Tensor:
    return F.avg_pool2d(x[:, None], 17, stride=1, padding=8)[:, 0] * 1.2


def swirled(x: Tensor, noise: torch.Generator) -> Tensor:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")
    angle = 2.6 * (1.2 - torch.hypot(rows, columns)).clamp(min=0)
    grid = torch.stack([columns * angle.cos() - rows * angle.sin(), columns * angle.sin() + rows * angle.cos()], -1)
    return F.grid_sample(x[:, None], grid.expand(len(x), -1, -1, -1), align_corners=True)[:, 0]


DOMAINS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "turned": lambda x, noise: x.rot90(1, (-2, -1)),
    "mirrored": lambda x, noise: x.flip(-1),
    "shifted": lambda x, noise: x.roll((10, 13), (-2, -1)),
    "inverted": lambda x, noise: 1 - x,
    "chequered": chequered,
    "swirled": swirled,
    "blurred": blurred,
    "noisy": noisy,
}


def in_every_domain(images: Tensor, seed: int) -> Tensor:
    """`"n 32 32"` to `"domain n 32 32"`."""
    return torch.stack([domain(images, seeded(seed + i)) for i, domain in enumerate(DOMAINS.values())])


# -- data and small tools ---------------------------------------------------------------------------------------------


def load_images(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Real digits, enlarged from 8x8, in a random order: images and labels to train on, then those held out."""
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(small, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)[:, 0]
    order = torch.randperm(len(images), generator=seeded(seed))
    images, labels = images[order], torch.tensor(digits.target)[order]
    return images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float().mean(-1)


def fingerprint(model: nn.Module) -> str:
    """A hash of every module's name and type and of every bit of every tensor."""
    digest = hashlib.sha256(repr([(name, type(module)) for name, module in model.named_modules()]).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def flatten(adapter: Adapter) -> dict[str, Tensor]:
    """`{path: {leaf: tensor}}` to `{"path.leaf": tensor}`, as files have it."""
    return {
        f"{path}.{leaf}": tensor.contiguous() for path, leaves in adapter.items() for leaf, tensor in leaves.items()
    }


def unflatten(tensors: dict[str, Tensor]) -> Adapter:
    adapter: Adapter = {}
    for key in sorted(tensors):
        path, _, leaf = key.rpartition(".")
        adapter.setdefault(path, {})[leaf] = tensors[key]
    return adapter


# -- training ---------------------------------------------------------------------------------------------------------


def train_base(model: nn.Module, images: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    """Ordinary training, on the digits as they are; leaves the model frozen."""
    choose = seeded(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="base model    ", unit="step"):
        rows = torch.randint(len(images), (BATCH,), generator=choose)
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    model.requires_grad_(False).eval()


def train_adapters(
    graft: Graft, images: Tensor, labels: Tensor, steps: int, seed: int, measure: Callable[[Adapter], Tensor]
) -> tuple[Adapter, dict[int, Tensor]]:
    """Train one adapter for each domain, all in the same step; returns the stack and measurements by step."""

    def loss(adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(graft(adapter, x), y)

    adapters = stack([graft.init(seeded(seed + i)) for i in range(len(DOMAINS))])
    leaves = [leaf.requires_grad_() for leaf in optree.tree_leaves(adapters)]
    optimizer = torch.optim.AdamW(leaves, weight_decay=0)  # works element by element, so the adapters stay independent
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    choose, curve = seeded(seed), {0: measure(adapters)}
    progress = tqdm(range(1, steps + 1), desc=f"{len(DOMAINS)} adapters    ", unit="step")
    for step in progress:
        rows = torch.randint(len(images), (BATCH,), generator=choose)
        x = in_every_domain(images[rows], seed + 1000 * step)
        losses = torch.vmap(loss, in_dims=(0, 0, None))(adapters, x, labels[rows])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 12) == 0 or step == steps:
            curve[step] = measure(adapters)
            progress.set_postfix_str(f"held-out accuracy {curve[step].mean():.1%}")
    return optree.tree_map(torch.Tensor.detach, adapters), curve


# -- the picture ------------------------------------------------------------------------------------------------------

PAPER, PANEL, FAINT, MUTED, INK = "#0d1117", "#161b22", "#30363d", "#9aa4b0", "#f0f6fc"
COLORS = ["#ff7b72", "#ffa657", "#f2cc60", "#8ddb8c", "#4fd6be", "#58b7ff", "#a592ff", "#f78fd0"]


def draw(
    path: Path,
    samples: Tensor,
    before: list[float],
    after: list[float],
    cross: Tensor,
    curve: dict[int, Tensor],
    verdict: str,
) -> None:
    """Draw rows of samples (`"1+domain k 32 32"`, clean ones first) with bars, learning curves and who knows what."""
    clean, names = before[0], ["the base", *DOMAINS]
    figure = Figure(figsize=(15, 9.4), facecolor=PAPER)
    write = figure.text
    write(0.03, 0.928, "One frozen model, eight adapters, trained at once", color=INK, fontsize=30, weight="bold")
    story = f"Held-out digits in eight worlds: {mean(before[1:]):.0%} right before, {mean(after[1:]):.0%} after."
    write(0.03, 0.882, f"{story} {verdict}", color=MUTED, fontsize=17)
    height, top = 0.079, 0.755
    for row, (name, color) in enumerate(zip(names, [INK, *COLORS], strict=True)):
        y = top - row * 0.0895 - (0.012 if row else 0)
        write(0.03, y + height / 2, name, color=color, fontsize=16, weight="bold", va="center")
        strip = figure.add_axes((0.125, y, 0.285, height), facecolor=PAPER)
        tiles = F.pad(samples[row], (1, 1, 1, 1), value=math.nan)
        shades = LinearSegmentedColormap.from_list(name, [PANEL, color])
        strip.imshow(torch.cat(list(tiles), -1).numpy(), cmap=shades, vmin=0, vmax=1, aspect="auto")
        strip.axis("off")
        bar = figure.add_axes((0.425, y, 0.17, height), xlim=(0, 1), ylim=(-1, 1))
        bar.axis("off")
        bar.barh(0, 1, height=0.5, color=PANEL)
        bar.barh(0, after[row], height=0.5, color=color)
        if row:
            bar.barh(0, before[row], height=0.5, color=PAPER, alpha=0.62)
            bar.text(0, 0.42, f"{before[row]:.0%}", color=MUTED, fontsize=12, va="bottom")
        bar.text(1, 0.42, f"{after[row]:.0%}", color=color, fontsize=15, weight="bold", ha="right", va="bottom")

    lines = figure.add_axes((0.665, 0.47, 0.31, 0.335), facecolor=PANEL, ylim=(0, 1.12), xlim=(0, max(curve)))
    lines.axhline(clean, color=INK, linestyle=(0, (4, 4)), linewidth=1)
    lines.text(max(curve), clean + 0.02, "the base on the digits it knows  ", color=INK, fontsize=12, ha="right")
    for domain, color in enumerate(COLORS):
        lines.plot(list(curve), [float(values[domain]) for values in curve.values()], color=color, linewidth=2.6)
    lines.set_title("Accuracy by step, on 200 held-out digits", color=INK, fontsize=16, loc="left", pad=10)
    lines.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    lines.grid(axis="y", color=FAINT)
    table = figure.add_axes((0.665, 0.04, 0.31, 0.335))
    table.imshow(
        cross.numpy(), cmap=LinearSegmentedColormap.from_list("cross", [PANEL, "#1f4f7d", "#58b7ff"]), vmin=0, vmax=1
    )
    table.set_aspect("auto")
    for i, values in enumerate(cross.tolist()):
        for j, value in enumerate(values):
            table.text(
                j, i, f"{100 * value:.0f}", color=PAPER if value > 0.6 else MUTED, fontsize=12, ha="center", va="center"
            )
    table.set_title("Each adapter (row) in each world (column), %", color=INK, fontsize=15, loc="left", pad=10)
    table.set_yticks(range(len(DOMAINS)), list(DOMAINS), fontsize=12)
    table.set_xticks([])
    for axes in (lines, table):
        axes.tick_params(colors=MUTED, length=0, labelsize=12)
        axes.spines[:].set_visible(False)
    for label, color in zip(table.get_yticklabels(), COLORS, strict=True):
        label.set_color(color)
    figure.savefig(path, dpi=90, facecolor=PAPER)


# -- the whole story --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the adapters and the picture")
    parser.add_argument("--base-steps", type=int, default=400, help="training steps of the base model")
    parser.add_argument("--steps", type=int, default=160, help="training steps of the adapters")
    parser.add_argument("--rank", type=int, default=4, help="rank of the adapters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a short run with weaker results")
    args = parser.parse_args(argv)
    if args.quick:
        args.base_steps, args.steps = 100, 30
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; returns what it measured."""
    args, start = parse(argv), time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    images, labels, test_images, test_labels = load_images(args.seed)
    worlds = in_every_domain(test_images, args.seed)

    # A model, trained and frozen.
    torch.manual_seed(args.seed)
    model = VisionTransformer()
    train_base(model, images, labels, args.base_steps, args.seed)
    clean, base = accuracy(model(test_images), test_labels), accuracy(model(worlds), test_labels)
    before = fingerprint(model)

    # Eight adapters, one stacked tree.
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=["qkv", "out", "up", "down"])
    graft = bind(model, config)

    @torch.no_grad()
    def measure(adapters: Adapter, count: int = 200) -> Tensor:
        return accuracy(torch.vmap(graft)(adapters, worlds[:, :count]), test_labels[:count])

    adapters, curve = train_adapters(graft, images, labels, args.steps, args.seed, measure)
    adapted = measure(adapters, len(test_labels))
    cross = accuracy(torch.vmap(graft, in_dims=(0, None))(adapters, worlds[:, :200]), test_labels[:200])
    after = fingerprint(model)

    # To disk and back.
    trained = dict(zip(DOMAINS, unstack(adapters), strict=True))
    files = {name: args.out / f"{name}.safetensors" for name in trained}
    for name, adapter in trained.items():
        save_file(flatten(adapter), files[name])
    loaded = {name: unflatten(load_file(file)) for name, file in files.items()}
    reload_equal = all(optree.tree_all(optree.tree_map(torch.equal, trained[name], loaded[name])) for name in trained)

    # One adapter baked into a fresh model, which needs no adapter any more.
    chosen = "swirled"
    merged = VisionTransformer()
    merged.load_state_dict(merge(graft, loaded[chosen]))
    digits = worlds[list(DOMAINS).index(chosen)]
    with torch.no_grad():
        merged_equal = torch.equal(merged(digits).argmax(-1), graft(loaded[chosen], digits).argmax(-1))

    picture = args.out / "digits.png"
    verdict = "The model kept every bit." if before == after else "THE MODEL CHANGED."
    samples = torch.cat([test_images[None, :6], worlds[:, :6]])
    draw(picture, samples, [float(clean), *base.tolist()], [float(clean), *adapted.tolist()], cross, curve, verdict)
    seconds = time.perf_counter() - start

    print(f"\n{'domain':<12}{'base':>8}{'adapted':>10}   (held-out digits; the base has {clean:.1%} on clean ones)")
    for name, x, y in [*zip(DOMAINS, base, adapted, strict=True), ("mean", base.mean(), adapted.mean())]:
        print(f"{name:<12}{x:>8.1%}{y:>10.1%}")
    size, total = sum(t.numel() for t in optree.tree_leaves(loaded[chosen])), sum(p.numel() for p in model.parameters())
    print(f"\n{len(trained)} adapters of {size:,} parameters each, on a base of {total:,}: {seconds:.0f} s in all")
    print(f"base model    {'unchanged, bit for bit' if before == after else 'CHANGED'} (sha256 {after[:12]})")
    print(f"adapters      {args.out}{'/*.safetensors, read back ' + ('equal' if reload_equal else 'DIFFERENT')}")
    print(f"merged model  predicts {'the same' if merged_equal else 'DIFFERENTLY'} on {len(digits)} {chosen} digits")
    print(f"picture       {picture}")
    return {
        "clean": float(clean),
        "base": dict(zip(DOMAINS, base.tolist(), strict=True)),
        "adapted": dict(zip(DOMAINS, adapted.tolist(), strict=True)),
        "base_unchanged": before == after,
        "reload_equal": reload_equal,
        "merged_equal": merged_equal,
        "files": list(files.values()),
        "picture": picture,
        "seconds": seconds,
    }


if __name__ == "__main__":
    measured = main()
    if not all(measured[check] for check in ("base_unchanged", "reload_equal", "merged_equal")):
        raise SystemExit("A check failed; see above.")
