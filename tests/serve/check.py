"""Compare what vLLM serves of saved adapters with what the graft computes: `make serve-check`, which is not part of CI.

    python tests/serve/check.py --engine serve-out/venv/bin/python [--models llama qwen3] [--out serve-out]

Small random models without a tokenizer, several adapters in one batch, log-probabilities of all tokens, in float32.
Writes a table, `table.md`; what vLLM cannot run here is in it too, with its words.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from torchgraft.adapters import LoHaConfig, LoraConfig, OFTConfig, save_adapter, to_lora
from torchgraft.functional import bind

SIZES: dict[str, Any] = dict(  # noqa: C408 - as it is passed
    vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=128, tie_word_embeddings=False, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **EXPERTS),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
TARGETS = {"llama": [*ATTENTION, *MLP], "qwen3": [*ATTENTION, *MLP], "phi3": FUSED}


def configs(kind: str) -> dict[str, Any]:
    """Return the configs of the adapters that a model is served with, by name."""
    targets = TARGETS.get(kind, ATTENTION)
    found: dict[str, Any] = {
        "lora": LoraConfig(r=4, lora_alpha=6, target_modules=targets),
        "rslora": LoraConfig(r=8, use_rslora=True, target_modules=targets[:1]),
        "patterns": LoraConfig(
            r=4, rank_pattern={"o_proj": 7}, alpha_pattern={"layers.1.*": 3}, target_modules=targets
        ),
    }
    found |= {
        "dora": LoraConfig(r=4, use_dora=True, target_modules=targets[:2]),
        "oft": OFTConfig(oft_block_size=16, target_modules=targets[:2]),
        "loha": LoHaConfig(r=2, target_modules=targets[:2]),
    }
    return found


def make(kind: str, out: Path) -> tuple[Any, dict[str, Any]]:
    """Write a model and its adapters; return the case for the engine, and the log-probabilities that are expected."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[kind](), dtype=torch.float32).eval()
    model.save_pretrained(out / "model")
    tokens = torch.randint(3, 128, (2, 12))
    rows, expected, folders = [], [], {}
    for number, (name, config) in enumerate([("", None), *configs(kind).items()]):
        if config is None:
            run: Any = model
        else:
            graft, params = trained(model, config, number)
            run = graft.view(params)
            folders[name] = str(save(graft, params, out / name))
        rows += [[name or None, one.tolist()] for one in tokens]
        expected += run(tokens).logits[:, -1].log_softmax(-1).tolist()
    options: dict[str, Any] = {"max_lora_rank": 320}
    if kind not in TARGETS:  # vLLM's kernels for adapted experts need Triton, which no CPU has
        options["lora_target_modules"] = ["qkv_proj", "o_proj"]
    return {"model": str(out / "model"), "adapters": folders, "rows": rows, "options": options}, {"rows": expected}


def trained(model: Any, config: Any, seed: int) -> tuple[Any, Any]:
    graft = bind(model, config)
    generator = torch.Generator().manual_seed(seed)
    params = graft.init(generator)
    for leaves in params.values():
        for leaf in leaves.values():
            leaf.add_(0.05 * torch.randn(leaf.shape, generator=generator))
    return graft, params


def save(graft: Any, params: Any, folder: Path) -> Path:
    """Write an adapter for vLLM, as a LoRA of full rank where it is none."""
    config = graft.configs[""]
    if not isinstance(config, LoraConfig) or config.use_dora:
        config, params, _ = to_lora(graft, params)
        graft = bind(graft.model, config)
    return save_adapter(graft, folder, params=params, server="vllm")


def check(kind: str, out: Path, engine: str, seconds: int) -> str:
    """Return a row of the table for each adapter of a model."""
    with torch.no_grad():
        case, expected = make(kind, out)
    files = out / "case.json", out / "result.json"
    files[0].write_text(json.dumps(case))
    files[1].unlink(missing_ok=True)
    command = [engine, str(Path(__file__).with_name("engine.py")), *map(str, files)]
    with (out / "engine.log").open("w") as log:
        try:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return f"| {kind} | - | not within {seconds} s |\n"
    if not files[1].exists():
        said = [line for line in (out / "engine.log").read_text().splitlines() if "Error" in line]
        return f"| {kind} | - | not run: {said[-1].strip()[-150:] if said else 'see engine.log'} |\n"
    found = json.loads(files[1].read_text())
    base = torch.tensor(expected["rows"][:2])
    lines = ""
    for i in range(0, len(found), 2):
        mine, theirs = torch.tensor(expected["rows"][i : i + 2]), torch.tensor(found[i : i + 2])
        name = case["rows"][i][0] or "(none)"
        lines += f"| {kind} | {name} | {(mine - theirs).abs().max():.1e} | {(mine - base).abs().max():.2f} |\n"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, help="the Python of an environment with vLLM")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("serve-check-out"))
    parser.add_argument("--seconds", type=int, default=600, help="that a model may take")
    given = parser.parse_args()
    table = "| model | adapter | largest difference | the adapter's own change |\n|---|---|---|---|\n"
    for kind in given.models:
        out = given.out / kind
        out.mkdir(parents=True, exist_ok=True)
        table += check(kind, out.resolve(), given.engine, given.seconds)
        (given.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
