"""A training service on this machine that the `tinker` package is a client of: one base, many adapters, one bank.

Each client trains and samples from adapters of its own through futures, and knows of no other; waiting requests of all
clients are mixed into one batch. The model writes characters: symbol 0 is a newline, 1 to 95 are " " to "~".

    pip install torchgraft[tinker]
    python examples/tinker_server.py --out tinker-out

    client = tinker.ServiceClient(base_url="http://127.0.0.1:8420", api_key="tml-local")
    training = client.create_lora_training_client("writer", rank=8).result()

Answered: create_lora_training_client, forward, forward_backward (also custom losses, which the client differentiates),
optim_step with AdamParams, save_state, save_weights_for_sampler, save_weights_and_get_sampling_client,
create_training_client_from_state and ..._with_optimizer, create_sampling_client, sample, compute_logprobs,
get_server_capabilities. A client's adapters and snapshots stay until it is closed. Metadata, tags and telemetry are not
kept. Refused, in words: bases, ranks, losses, optimizers, inputs and options of samples that are not here, load_state
into a model that exists, checkpoints that expire, and every other route (lists of runs and checkpoints, copies,
publishing). It listens on loopback, for there are no accounts: every client that reaches it may use it.
"""

from __future__ import annotations

import argparse
import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

try:
    import uvicorn
    from _resume import claim, digest, trained_base
    from _tinker_service import BASE, Service
    from _tinker_wire import parse_forward, read_forward, read_sample, write_forward, write_sample
    from _tinker_worker import ROWS, Call, Job
    from _writer import CONTEXT, reference
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from tinker import types
    from tinker.types.future_retrieve_request import FutureRetrieveRequest
except ImportError as error:
    wanted = "torchgraft[tinker]"
    raise SystemExit(f"This example needs {error.name}, which is not installed: pip install {wanted}") from None

HOST = "127.0.0.1"
KEPT, PATIENCE = 4096, 20
"""How many answers are kept for clients who ask again, and for how many seconds one that asks is kept waiting."""
REFUSED = (ValueError, TypeError, KeyError, RuntimeError, OSError)
"""Errors that are the answer to what a client asked for; others are the server's own."""


class Api:
    """The routes. Work is answered with the name of a future, which clients ask for until it is done.

    Args:
        service: What does it.
    """

    def __init__(self, service: Service):
        self.service = service
        self.promises: OrderedDict[str, tuple[Future[Any], Callable[[Any], bytes] | None]] = OrderedDict()

    def app(self) -> FastAPI:
        """All routes, for loopback alone."""
        app = FastAPI(title="An example of torchgraft", openapi_url=None)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
        posted: list[Callable[..., Any]] = [
            *(self.create_session, self.session_heartbeat, self.telemetry, self.create_sampling_session),
            *(self.create_model, self.get_info, self.unload_model, self.forward_backward, self.optim_step),
            *(self.save_weights, self.save_weights_for_sampler, self.load_weights, self.asample, self.retrieve_future),
        ]
        routes: dict[str, Callable[..., Any]] = {route.__name__: route for route in posted}
        routes |= {"client/config": self.client_config, "client/dynamic_config": self.client_dynamic_config}
        for path, route in {**routes, "sessions/{name}/finish": self.finish}.items():
            app.add_api_route(f"/api/v1/{path}", route, methods=["POST"])
        app.add_api_route("/api/v1/get_server_capabilities", self.capabilities, methods=["GET"])
        app.add_api_route("/api/v1/samplers/{name}", self.get_sampler, methods=["GET"])
        app.add_api_route("/{path:path}", self.refuse, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
        return app

    # -- futures

    def promise(
        self, name: str, make: Callable[[], Job], write: Callable[[Any], bytes] | None = None
    ) -> dict[str, Any]:
        """Submit a job, once: a client that did not hear the answer sends the same request again."""
        if name not in self.promises:
            try:
                job = make()
            except REFUSED as error:  # it is refused where the client waits for it
                job = Call(adapter=None, run=dict)
                job.future.set_exception(error)
            else:
                self.service.worker.submit(job)
            self.promises[name] = job.future, write
            if len(self.promises) > KEPT:
                self.promises.popitem(last=False)
        return {"request_id": name}

    def call(self, name: str, adapter: str, run: Callable[..., Any], *args: Any) -> dict[str, Any]:
        """Submit a call of the service's."""
        return self.promise(name, lambda: Call(adapter=adapter, run=lambda: run(*args)))

    async def retrieve_future(self, request: FutureRetrieveRequest) -> Response:
        if request.request_id not in self.promises:
            raise HTTPException(404, f"no request is {request.request_id!r:.80}, or its answer is no longer kept")
        future, write = self.promises[request.request_id]
        done, _ = await asyncio.wait([asyncio.wrap_future(future)], timeout=PATIENCE)
        if not done:
            again = {"type": "try_again", "request_id": request.request_id, "queue_state": "active"}
            return JSONResponse(again, 408)
        if (error := done.pop().exception()) is not None:
            return JSONResponse(
                {"error": _words(error), "category": "user" if isinstance(error, REFUSED) else "server"}
            )
        if write is None:
            return JSONResponse(future.result())
        return Response(write(future.result()), media_type="application/x-protobuf")

    # -- sessions

    async def client_config(self) -> dict[str, Any]:
        return {"fwdbwd_max_chunk_len": ROWS, "use_pyqwest_transport": False}

    async def client_dynamic_config(self) -> dict[str, Any]:
        return {}

    async def create_session(self) -> dict[str, Any]:
        return {"session_id": uuid.uuid4().hex, "type": "create_session"}

    async def session_heartbeat(self) -> dict[str, Any]:
        return {"type": "session_heartbeat"}

    async def telemetry(self) -> dict[str, Any]:
        return {"status": "accepted"}

    async def finish(self, name: str) -> dict[str, Any]:
        """Remove all that a client has, after what it waits for."""
        for own in {*self.service.bank.names, *self.service.samplers}:
            if own.startswith(f"{name}:"):
                self.call(f"{own}:finish", own, self.service.remove, own)
        return {}

    # -- models

    async def capabilities(self) -> dict[str, Any]:
        known = {"model_name": BASE, "max_context_length": CONTEXT, "trainable": True, "sampleable": True}
        return {"supported_models": [known]}

    async def create_model(self, request: types.CreateModelRequest) -> dict[str, Any]:
        name = f"{request.session_id}:train:{request.model_seq_id}"
        return self.call(f"{name}:0", name, self.service.create, name, request)

    async def get_info(self, request: types.GetInfoRequest) -> dict[str, Any]:
        if request.model_id not in self.service.bank:
            raise HTTPException(404, f"no model is {request.model_id!r:.80}")
        return self.service.info(request.model_id)

    async def unload_model(self, request: types.UnloadModelRequest) -> dict[str, Any]:
        name = request.model_id
        return self.call(f"{name}:unload", name, self.service.remove, name)

    async def forward_backward(self, request: Request) -> dict[str, Any]:
        given = parse_forward(await request.body())
        return self.promise(f"{given.model_id}:{given.seq_id}", lambda: read_forward(given), write_forward)

    async def optim_step(self, request: types.OptimStepRequest) -> dict[str, Any]:
        name = request.model_id
        return self.call(f"{name}:{request.seq_id}", name, self.service.step, name, request)

    async def save_weights(self, request: types.SaveWeightsRequest) -> dict[str, Any]:
        name = request.model_id
        return self.call(f"{name}:{request.seq_id}", name, self.service.save, name, "weights", request)

    async def save_weights_for_sampler(self, request: types.SaveWeightsForSamplerRequest) -> dict[str, Any]:
        name, future = request.model_id, f"{request.model_id}:{request.seq_id}"
        if request.sampling_session_seq_id is None:
            return self.call(future, name, self.service.save, name, "sampler_weights", request)
        sampler = f"{name.partition(':')[0]}:sample:{request.sampling_session_seq_id}"
        return self.call(future, name, self.service.snapshot, name, sampler, request.kind)

    async def load_weights(self, request: types.LoadWeightsRequest) -> dict[str, Any]:
        if request.session_id is None:
            raise HTTPException(422, "load_state into a model is not answered; create_training_client_from_state is")
        name = f"{request.session_id}:train:{request.model_seq_id}"
        return self.call(f"{name}:0", name, self.service.load, name, request)

    # -- sampling

    async def create_sampling_session(self, request: types.CreateSamplingSessionRequest) -> Any:
        name = f"{request.session_id}:sample:{request.sampling_session_seq_id}"
        future = f"{name}:begin"
        self.call(future, name, self.service.sampler, name, request)
        try:
            return await asyncio.wrap_future(self.promises[future][0])
        except REFUSED as error:
            raise HTTPException(422, _words(error)) from error

    async def get_sampler(self, name: str) -> dict[str, Any]:
        if name not in self.service.samplers:
            raise HTTPException(404, f"no sampler is {name!r:.80}")
        return {"sampler_id": name, "base_model": BASE}

    async def asample(self, request: types.SampleRequest) -> dict[str, Any]:
        sampler = request.sampling_session_id
        if sampler not in self.service.samplers:
            raise HTTPException(422, f"no sampler is {sampler!r:.80}; create_sampling_client makes one")
        name, adapter = f"{sampler}:{request.seq_id}", self.service.samplers[sampler]
        ids = [f"{name}:{i}" for i in range(request.num_samples)]
        return {**self.promise(name, lambda: read_sample(request, adapter), write_sample), "sample_sequence_ids": ids}

    async def refuse(self, request: Request) -> None:
        raise HTTPException(
            404, f"{request.method} {request.url.path:.80} is not answered; the head of tinker_server.py says what is"
        )


def _words(error: BaseException) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


# -- the whole story --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tinker-out"), help="folder for the base and checkpoints")
    parser.add_argument("--port", type=int, default=8420, help=f"where to listen, on {HOST}")
    parser.add_argument("--rank", type=int, default=32, help="the largest rank of an adapter")
    parser.add_argument("--base-steps", type=int, default=1000, help="training steps of the base model")
    parser.add_argument("--quick", action="store_true", help="a tiny base with weak results")
    parser.set_defaults(dim=128, depth=4)
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(dim=32, depth=2, base_steps=60)
    if min(args.rank, args.base_steps) < 1:
        parser.error("--rank and --base-steps are at least 1")
    return args


def start(args: argparse.Namespace) -> Service:
    """Train the base, or read it; returns the service over it."""
    text = reference()[0]
    claim(
        args.out,
        "a server",
        {**{key: getattr(args, key) for key in ("dim", "depth", "base_steps")}, "texts": digest([text])},
    )
    return Service(
        trained_base(args.out / "base.safetensors", text, args.dim, args.depth, args.base_steps), args.out, args.rank
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until it is interrupted."""
    args = parse(argv)
    service = start(args)
    print(f'tinker.ServiceClient(base_url="http://{HOST}:{args.port}", api_key="tml-local")', flush=True)
    try:
        uvicorn.run(Api(service).app(), host=HOST, port=args.port, log_level="warning")
    finally:
        service.worker.close()


if __name__ == "__main__":
    main()
