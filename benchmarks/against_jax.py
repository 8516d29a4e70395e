"""A training step of many adapters, here and as JAX's `jit(vmap(grad))` on the same maths.

The same transformer with the same weights on both sides, LoRA of rank 16 on all its linear layers, AdamW. Before
anything is timed, the gradients of both sides are compared. Needs the extra `jax`.

    python benchmarks/against_jax.py [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optree
import torch
import torch.nn.functional as F
from _models import lively, trained
from _picture import bars
from _plain import LINEARS, Transformer, jax_loss, to_jax
from _results import apart, write
from _rounds import Cases, measure, ratios, table
from torch import Tensor

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind, route, stack

RANK, ALPHA, RATE = 16, 32, 1e-5
VOCABULARY, HEADS = 512, 8


class Setting(NamedTuple):
    """How many adapters, and how much work each has."""

    adapters: int
    batch: int
    length: int
    hidden: int
    layers: int = 4

    def __str__(self) -> str:
        return f"{self.adapters} adapters, {self.batch} x {self.length} tokens each, hidden {self.hidden}"


SETTINGS = [Setting(32, 1, 32, 128), Setting(8, 1, 64, 512), Setting(8, 4, 128, 512), Setting(8, 1, 8, 128)]


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def adamw(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
    """One step of AdamW, as torch's defaults have it."""
    first, second, count = state
    count = count + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grads)

    def update(p: Any, m: Any, v: Any) -> Any:
        return p * (1 - RATE * 0.01) - RATE * (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.999**count)) + 1e-8)

    return jax.tree.map(update, params, first, second), (first, second, count)


def with_jax(base: Any, many: Any, each: Any) -> Callable[[], None]:
    """`jit` of the step, `vmap` over adapters, `grad` of one adapter's loss."""

    def loss(adapter: Any, ids: Any) -> Any:
        return jax_loss(base, adapter, ids, ALPHA / RANK, HEADS)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        return adamw(params, jax.vmap(jax.grad(loss))(params, each), state)

    zeros = jax.tree.map(jnp.zeros_like, many)
    held = [(many, (zeros, zeros, jnp.zeros(())))]

    def run() -> None:
        held[0] = jax.block_until_ready(step(*held[0]))

    return run


def with_torch(forward: Callable[[Any], Tensor], many: Any) -> Callable[[], None]:
    """Forward and one backward for all, a fused AdamW."""
    optimizer = torch.optim.AdamW(trained(many), lr=RATE, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(many).backward()
        optimizer.step()

    return run


def folded(model: Any, many: Any, ids: Tensor, adapters: int) -> Tensor:
    """The same by hand: one product for the base, one batched product for the adapters."""

    def linear(path: str, x: Tensor) -> Tensor:
        y = F.linear(x, model.get_parameter(f"{path}.weight"))
        if path not in many:
            return y
        a, b = many[path]["lora_A"], many[path]["lora_B"]
        down = torch.bmm(x.reshape(adapters, -1, x.shape[-1]), a.mT)
        return torch.baddbmm(y.view(adapters, -1, y.shape[-1]), down, b.mT, alpha=ALPHA / RANK).view(y.shape)

    x = model.embed(ids)
    for index, block in enumerate(model.blocks):
        at, h = f"blocks.{index}", block.norm1(x)
        q, k, v = (linear(f"{at}.{n}", h).unflatten(-1, (HEADS, -1)).transpose(-2, -3) for n in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(f"{at}.o", mixed.transpose(-2, -3).flatten(-2))
        h = block.norm2(x)
        x = x + linear(f"{at}.down", F.silu(linear(f"{at}.gate", h)) * linear(f"{at}.up", h))
    return linear("head", model.norm(x))


def cases(setting: Setting) -> Cases:
    torch.manual_seed(0)
    model = Transformer(setting.hidden, setting.layers, HEADS, VOCABULARY).requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS)
    graft = bind(model, config)
    n = setting.adapters
    ids = torch.randint(VOCABULARY, (n * setting.batch, setting.length))
    rows = torch.arange(n).repeat_interleave(setting.batch)

    def fresh() -> Any:
        return stack([lively(graft.init(), seed) for seed in range(n)])

    def ours(many: Any) -> Tensor:
        return loss_of(graft(route(many, rows), ids), ids) * n

    base = to_jax(dict(model.named_parameters()))
    each = jnp.asarray(ids.view(n, setting.batch, setting.length).numpy())
    compare(ours, fresh(), base, each)
    return {
        "torchgraft, eager": with_torch(ours, fresh()),
        "torchgraft, compiled": with_torch(torch.compile(ours, fullgraph=True), fresh()),
        "written by hand, eager": with_torch(lambda many: loss_of(folded(model, many, ids, n), ids) * n, fresh()),
        "JAX, jit(vmap(grad))": with_jax(base, to_jax(fresh()), each),
    }


def compare(ours: Callable[[Any], Tensor], many: Any, base: Any, each: Any) -> None:
    """Hold the gradients of both sides against each other."""
    leaves = trained(many)
    grads = torch.autograd.grad(ours(many), leaves)
    theirs = jax.vmap(jax.grad(lambda p, ids: jax_loss(base, p, ids, ALPHA / RANK, HEADS)))(to_jax(many), each)
    for own, other in zip(grads, optree.tree_leaves(theirs), strict=True):
        torch.testing.assert_close(own, torch.tensor(jax.device_get(other)), rtol=1e-3, atol=1e-5)


def main() -> None:
    """Measure, print, write `results/against_jax.json` and draw `results/against_jax.png`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if args.quick:
        apart()
    torch.set_num_threads(2)
    found = {}
    for setting in [Setting(3, 1, 8, 64, 1)] if args.quick else SETTINGS:
        torch._dynamo.reset()
        seconds = measure(cases(setting), 1 if args.quick else args.rounds, label=str(setting))
        found[str(setting)] = ratios(seconds, "JAX, jit(vmap(grad))")
        print(f"{setting}\n{table(found[str(setting)], 'JAX, jit(vmap(grad))')}")
    write(
        "against_jax",
        {"claim": "a stacked training step keeps up with JAX", "jax": jax.__version__, "ratios_to_jax": found},
    )
    bars("against_jax", "A training step of many adapters against JAX", found, "JAX's jit(vmap(grad))")


if __name__ == "__main__":
    main()
