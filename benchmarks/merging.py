"""Times an adapter's merge into a model on disk, and sums of adapters, here, in PEFT and in mergekit.

Merging: a Llama made here with random weights in bfloat16, in shards, and a LoRA on all its linear layers. Each library
runs in a process of its own, from the files to the files; seconds are those after its imports, memory is the most that
the process had in RAM, beside that of a process which only imports. mergekit merges adapters through PEFT, and runs if
it is installed (`pip install mergekit`).

Sums: three LoRAs of a smaller Llama become one by each way that PEFT has, `combine` here, `add_weighted_adapter` there.
Rounds take turns, and what counts is the median of the ratios within a round. Run it with

    python benchmarks/merging.py
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _memory import most_mb
from _results import apart, folder, write
from _rounds import measure, ratios, spread, table

WAYS = ("cat", "linear", "svd", "magnitude_prune", "ties", "dare_linear", "magnitude_prune_svd", "ties_svd")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS = [0.7, 0.5, -0.2]


def llama(hidden: int, layers: int) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=8192,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def make_files(at: Path, hidden: int, layers: int) -> None:
    """Write the model in shards, and the adapter beside it."""
    from torchgraft.adapters import LoraConfig, save_adapter
    from torchgraft.functional import bind

    model = llama(hidden, layers).to(torch.bfloat16)
    model.save_pretrained(at / "base", max_shard_size="512MB")
    graft = bind(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, init_lora_weights=False))
    save_adapter(graft, at / "adapter", params=graft.init(torch.Generator().manual_seed(1)))


def by_torchgraft(base: Path, adapter: Path, out: Path) -> Callable[[], object]:
    """Merge tensor by tensor."""
    from torchgraft.adapters import merge_files

    return partial(merge_files, base, adapter, out)


def by_peft(base: Path, adapter: Path, out: Path) -> Callable[[], object]:
    """Load the model, merge, save it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def run() -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        merged: Any = PeftModel.from_pretrained(model, adapter)
        merged.merge_and_unload().save_pretrained(out, max_shard_size="512MB")

    return run


def by_mergekit(base: Path, adapter: Path, out: Path) -> Callable[[], object]:
    """Let mergekit pass the model through, with the adapter on it."""
    config_module: Any = importlib.import_module("mergekit.config")
    merge_module: Any = importlib.import_module("mergekit.merge")

    plan = {"merge_method": "passthrough", "dtype": "bfloat16", "models": [{"model": f"{base}+{adapter}"}]}
    config = config_module.MergeConfiguration.model_validate(plan)
    options = merge_module.MergeOptions(
        lora_merge_cache=str(out) + "-cache", copy_tokenizer=False, quiet=True, write_model_card=False
    )
    return partial(merge_module.run_merge, config, str(out), options)


def by_nobody(base: Path, adapter: Path, out: Path) -> Callable[[], object]:
    """Import what the others do, and nothing more."""
    import peft  # noqa: F401

    import torchgraft.adapters  # noqa: F401

    return lambda: None


MERGERS = {"torchgraft": by_torchgraft, "PEFT": by_peft, "mergekit": by_mergekit, "imports only": by_nobody}


def child(name: str, base: Path, adapter: Path, out: Path) -> None:
    """Merge in this process, and print the seconds and the most memory."""
    run = MERGERS[name](base, adapter, out)
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": most_mb()}))


def merging(hidden: int, layers: int, rounds: int) -> dict[str, Any]:
    """Measure merges of files, by library."""
    names = [name for name in MERGERS if name != "mergekit" or importlib.util.find_spec("mergekit")]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as directory:
        at = Path(directory)
        make_files(at, hidden, layers)
        size = sum(file.stat().st_size for file in (at / "base").glob("*.safetensors")) / 2**20
        for index in range(rounds):
            for name in names[index % len(names) :] + names[: index % len(names)]:
                with tempfile.TemporaryDirectory(dir=at) as out:
                    command = [
                        sys.executable,
                        __file__,
                        "--child",
                        name,
                        str(at / "base"),
                        str(at / "adapter"),
                        f"{out}/merged",
                    ]
                    run = subprocess.run(command, capture_output=True, text=True, check=True)
                found[name].append(json.loads(run.stdout.splitlines()[-1]))
                print(f"  {name:<14} {found[name][-1]['seconds']:7.2f} s  {found[name][-1]['peak_mb']:8.0f} MB")
    return {
        "model_mb": round(size),
        "cases": {name: _summary(found, name) for name in names if name != "imports only"},
    } | {"imports_only_peak_mb": round(spread([one["peak_mb"] for one in found["imports only"]])[1])}


def _summary(found: dict[str, list[dict[str, float]]], name: str) -> dict[str, float]:
    """Seconds over PEFT's in the same round, and megabytes."""
    each = [a["seconds"] / b["seconds"] for a, b in zip(found[name], found["PEFT"], strict=True)]
    low, middle, high = spread(each)
    return {
        "ratio": round(middle, 4),
        "quartile_1": round(low, 4),
        "quartile_3": round(high, 4),
        "median_s": round(spread([one["seconds"] for one in found[name]])[1], 3),
        "peak_mb": round(spread([one["peak_mb"] for one in found[name]])[1]),
    }


def sums(hidden: int, layers: int, rounds: int) -> dict[str, Any]:
    """Measure sums of three adapters, by way: PEFT's time is 1."""
    import peft

    from torchgraft.adapters import LoraConfig, combine
    from torchgraft.functional import bind

    model = llama(hidden, layers)
    config = LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)
    graft = bind(model, config)
    pairs = [(config, graft.init(torch.Generator().manual_seed(seed))) for seed in range(3)]
    theirs = peft.LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)
    names = ["a", "b", "c"]
    wrapped: Any = peft.get_peft_model(model, theirs, adapter_name="a")
    for name in names[1:]:
        wrapped.add_adapter(name, theirs)

    def by_peft(way: str) -> None:
        more = {"density": 0.5} if way.startswith(("magnitude", "ties", "dare")) else {}
        wrapped.add_weighted_adapter(names, WEIGHTS, "sum", combination_type=way, svd_rank=8, **more)
        wrapped.delete_adapter("sum")

    def here(way: str) -> None:
        more: dict[str, Any] = {"density": 0.5} if way.startswith(("magnitude", "ties", "dare")) else {}
        if way.startswith("dare"):
            more["generator"] = torch.Generator().manual_seed(0)
        combine(pairs, WEIGHTS, way, rank=8 if "svd" in way else None, **more)

    found = {}
    for way in WAYS:
        seconds = measure(
            {"torchgraft": partial(here, way), "PEFT": partial(by_peft, way)}, rounds, label=way, warmup=1
        )
        found[way] = ratios(seconds, "PEFT")
        print(way, table(found[way], "PEFT"), sep="\n")
    return found


def draw(result: dict[str, Any]) -> None:
    """Draw the merges' seconds and memory, and the sums' ratios."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (times, memory, ways) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    cases = result["merging"]["cases"]
    times.barh(list(cases), [one["median_s"] for one in cases.values()], color="#3182bd")
    times.set_title(f"Merging into {result['merging']['model_mb']} MB of files, s")
    memory.barh(list(cases), [one["peak_mb"] for one in cases.values()], color="#3182bd")
    memory.axvline(result["merging"]["imports_only_peak_mb"], color="0.4", linestyle=":")
    memory.set_title("Most memory, MB (dots: imports alone)")
    each = [one["torchgraft"]["ratio"] for one in result["sums"].values()]
    ways.barh(list(result["sums"]), each, color="#3182bd")
    ways.axvline(1, color="0.4", linestyle=":")
    ways.set_xscale("log")
    ways.set_title("A sum of three adapters, time over PEFT's")
    for axes in (times, memory, ways):
        axes.invert_yaxis()
        axes.bar_label(axes.containers[0], fmt="%.3g", padding=3)
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder() / "merging.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small model, one round; results stay apart")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], *map(Path, args.child[1:]))
        return
    torch.set_num_threads(2)
    hidden, layers, rounds = (256, 2, 1) if args.quick else (2048, 16, args.rounds)
    if args.quick:
        apart()
    claim = "an adapter is merged into files faster than by PEFT and in bounded memory, and so are sums of adapters"
    result = {
        "claim": claim,
        "merging": merging(hidden, layers, rounds),
        "sums": sums(min(hidden, 768), min(layers, 4), rounds),
    }
    draw(result)
    write("merging", result)


if __name__ == "__main__":
    main()
