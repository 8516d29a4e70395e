"""What clients of tinker_server.py send, as jobs, and what those give, as they read it: JSON, and protocol buffers."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _tinker_worker import LOSSES, ROWS, Continuation, Forward, Row, Sample
from _writer import CONTEXT, SYMBOLS
from tinker import types
from tinker.proto import tinker_public_pb2 as wire
from torch import Tensor

LONGEST = 1024
"""How many symbols a continuation has at most."""
DTYPES = {wire.DTYPE_FLOAT32: np.float32, wire.DTYPE_INT64: np.int64}


def _checked(tokens: Sequence[int], what: str, most: float = math.inf) -> Tensor:
    """Symbols of the model as a tensor, or an error that says what they are."""
    if not tokens or len(tokens) > most or not all(0 <= token < SYMBOLS for token in tokens):
        size = "" if most == math.inf else f" to {most:g}"
        raise ValueError(f"{what} is {tokens!r:.60}, expected 1{size} symbols from 0 to {SYMBOLS - 1}")
    return torch.tensor(tokens)


def parse_forward(body: bytes) -> Any:
    """A request as a message, with a `model_id` and a `seq_id`."""
    return wire.ForwardBackwardRequest.FromString(body)


def read_forward(request: Any) -> Forward:
    """The job that a request is for.

    Raises:
        ValueError: What this server does not answer; says what it would.
    """
    if request.loss_fn not in LOSSES:
        raise ValueError(f"loss_fn is {request.loss_fn!r}, and this server has {', '.join(LOSSES)}")
    if request.loss_fn_config or request.loss_fn_config_v2:
        raise ValueError("loss_fn_config is given, and the losses of this server have none")
    if not 1 <= len(request.data) <= ROWS:
        raise ValueError(f"a request has {len(request.data)} rows, expected 1 to {ROWS}")
    rows = [_read_row(datum, f"row {i}", LOSSES[request.loss_fn][1]) for i, datum in enumerate(request.data)]
    backward = not request.forward_only
    return Forward(adapter=request.model_id, rows=rows, loss=request.loss_fn, backward=backward)


def _read_row(datum: Any, what: str, needed: Sequence[str]) -> Row:
    if not all(chunk.HasField("encoded_text") for chunk in datum.model_input):
        raise ValueError(f"{what} has more than tokens, and this server's model reads nothing else")
    parts = [np.frombuffer(chunk.encoded_text.tokens, np.int32) for chunk in datum.model_input]
    tokens = _checked([int(token) for part in parts for token in part], f"the input of {what}", CONTEXT)
    given = {name: _read_tensor(tensor, f"{name} of {what}") for name, tensor in datum.loss_fn_inputs.items()}
    expected = {"target_tokens", *needed}
    if given.keys() != expected:
        raise ValueError(f"{what} has {sorted(given)} for its loss, expected {sorted(expected)}")
    for name, tensor in given.items():
        if tensor.shape != tokens.shape:
            raise ValueError(f"{name} of {what} has shape {[*tensor.shape]}, expected that of its input, {len(tokens)}")
    targets = _checked([int(token) for token in given.pop("target_tokens")], f"target_tokens of {what}")
    return Row(tokens, targets, {name: tensor.float() for name, tensor in given.items()})


def _read_tensor(tensor: Any, what: str) -> Tensor:
    if tensor.dtype not in DTYPES or tensor.HasField("sparse_csr"):
        raise ValueError(f"{what} is sparse, or neither float32 nor int64, which this server does not read")
    return torch.from_numpy(np.frombuffer(tensor.dense, DTYPES[tensor.dtype]).copy()).view(*tensor.shape)


def write_forward(result: tuple[list[Tensor], float]) -> bytes:
    """The log-probability of each target, and the loss, as the client reads them."""
    lines, loss = result
    output = wire.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics={"loss:sum": loss})
    record = output.loss_fn_outputs.add()
    record.num_datums = len(lines)
    field = record.fields["logprobs"]
    field.dtype, field.data = wire.DTYPE_FLOAT32, torch.cat(lines).float().numpy().tobytes()
    field.offsets = np.cumsum([0, *(4 * len(line) for line in lines)], dtype=np.int64).tobytes()
    return bytes(output.SerializeToString())


def read_sample(request: types.SampleRequest, adapter: str | None) -> Sample:
    """The job that a request is for.

    Raises:
        ValueError: What this server does not answer; says what.
    """
    unknown = (
        "topk_prompt_logprobs topk_sample_logprobs target_prompt_logprobs prompt_alt_tokens_k prompt_logprobs_last_n "
        "record_stability_info"
    )
    if asked := [name for name in unknown.split() if getattr(request, name)]:
        raise ValueError(f"{', '.join(asked)}: this server does not answer that")
    how, scores = request.sampling_params, bool(request.prompt_logprobs)
    if not 1 <= request.num_samples <= ROWS:
        raise ValueError(f"num_samples is {request.num_samples}, expected 1 to {ROWS}")
    prompt = _checked(request.prompt.to_ints(), "the prompt", CONTEXT if scores else math.inf).tolist()
    length = CONTEXT if how.max_tokens is None else how.max_tokens
    if not 1 <= length <= LONGEST or not how.temperature >= 0 or not 0 < how.top_p <= 1:
        raise ValueError(
            f"max_tokens is {length}, temperature {how.temperature:g}, top_p {how.top_p:g}; expected 1 to {LONGEST}, "
            "0 or more, and above 0 to 1"
        )
    return Sample(
        adapter=adapter,
        prompt=prompt,
        count=request.num_samples,
        length=length,
        seed=secrets.randbits(48) if how.seed is None else how.seed,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        stop=[how.stop] if isinstance(how.stop, str) else how.stop or [],
        score_prompt=scores,
    )


def write_sample(result: tuple[list[Continuation], list[float] | None]) -> bytes:
    """Continuations, as the client reads them."""
    rows, scores = result
    response = wire.SampleResponse()
    for row in rows:
        response.sequences.add(
            stop_reason=wire.STOP_REASON_STOP if row.stopped else wire.STOP_REASON_LENGTH,
            tokens=np.array(row.tokens, np.int32).tobytes(),
            logprobs=np.array(row.logprobs, np.float32).tobytes(),
        )
    if scores is not None:
        response.prompt_logprobs = np.array(scores, np.float32).tobytes()
    return bytes(response.SerializeToString())
