"""Ask vLLM for log-probabilities, each row of a batch with an adapter of its own; runs in vLLM's environment.

    python tests/serve/engine.py case.json result.json

A case has `model`, `adapters` (name to folder), `rows` (of each prompt `[adapter or null, token ids]`) and `options`.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(case_file: str, result_file: str) -> None:
    case = json.loads(Path(case_file).read_text())
    engine = LLM(
        case["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        enable_lora=True,
        max_loras=len(case["adapters"]),
        max_model_len=64,
        max_num_seqs=8,
        enforce_eager=True,
        gpu_memory_utilization=0.2,  # which vLLM takes of the machine's memory, on a CPU
        enable_prefix_caching=False,
        max_logprobs=-1,
        **case["options"],
    )
    requests = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(case["adapters"].items(), 1)}
    found = [None] * len(case["rows"])
    for adapted in (True, False):  # apart: on a CPU, rows without an adapter get one in a batch of rows with adapters
        rows = [i for i, (name, _) in enumerate(case["rows"]) if (name is not None) is adapted]
        outputs = engine.generate(
            [{"prompt_token_ids": case["rows"][i][1]} for i in rows],
            SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False),
            lora_request=[requests.get(case["rows"][i][0]) for i in rows] if adapted else None,
        )
        for i, output in zip(rows, outputs, strict=True):
            after = output.outputs[0].logprobs[0]  # of every token; those of prompts fail with adapters
            found[i] = [after[token].logprob for token in range(len(after))]
    Path(result_file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
