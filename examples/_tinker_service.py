"""The adapters of tinker_server.py's clients, in a bank: made, stepped, saved, loaded, kept as they are, removed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from _tinker_worker import ROWS, Worker
from tinker import types
from torch import nn

from torchgraft.adapters import Bank, LoraConfig, load_adapter, load_config
from torchgraft.functional import bind

BASE = "writer"


class Service:
    """The adapters of all clients: those that are trained, and snapshots that are sampled from.

    Args:
        model: The base, which is frozen.
        folder: Where checkpoints are.
        rank: The largest rank of an adapter.
    """

    def __init__(self, model: nn.Module, folder: Path, rank: int = 32):
        self.folder, self.rank = folder, rank
        largest = types.LoraConfig(rank=rank)
        self.bank = Bank(bind(model, self.config(largest)), slots=ROWS, resting="memory")
        self.worker = Worker(model, self.bank)
        self.samplers: dict[str, str | None] = {}  # the adapter of each; None for the base alone

    def config(self, asked: types.LoraConfig) -> LoraConfig:
        if not 1 <= asked.rank <= self.rank:
            raise ValueError(f"rank is {asked.rank}, and this server's adapters have 1 to {self.rank}")
        parts = {"train_attn": ["qkv", "out"], "train_mlp": ["up", "down"], "train_unembed": ["head"]}
        targets = [name for part, names in parts.items() if getattr(asked, part) for name in names]
        return LoraConfig(r=asked.rank, lora_alpha=asked.rank, target_modules=targets)

    def create(self, name: str, request: types.CreateModelRequest) -> dict[str, Any]:
        _check_base(request.base_model)
        if request.optimizer_config.type != "adamw":
            raise ValueError(f"the optimizer is {request.optimizer_config.type!r}, and this server has adamw")
        asked = request.lora_config or types.LoraConfig(rank=min(32, self.rank))
        generator = torch.Generator()
        generator.seed() if asked.seed is None else generator.manual_seed(asked.seed)
        self.bank.add(name, self.config(asked), generator=generator)
        return {"model_id": name, "type": "create_model"}

    def info(self, name: str) -> dict[str, Any]:
        config = self.bank.config(name)
        assert isinstance(config, LoraConfig)
        known = {"model_id": name, "is_lora": True, "lora_rank": config.r, "model_name": BASE}
        return {"model_data": {"arch": "transformer", "model_name": BASE}, **known}

    def step(self, name: str, request: types.OptimStepRequest) -> dict[str, Any]:
        given = request.optim_params
        if not isinstance(given, types.AdamParams):
            raise ValueError(f"the optimizer is {given.type!r}, and this server has adamw with AdamParams")
        hyper = {"lr": given.learning_rate, "betas": (given.beta1, given.beta2), "eps": given.eps}
        hyper |= {"weight_decay": given.weight_decay, "max_norm": given.grad_clip_norm or None}
        done = self.bank.step({name: hyper})[name]
        if done.skipped:
            raise ValueError(f"{done.skipped}; the adapter is as it was, and they are dropped")
        return {"metrics": {"grad_norm:mean": done.norm, "step:max": float(done.steps)}}

    def save(
        self, name: str, kind: str, request: types.SaveWeightsRequest | types.SaveWeightsForSamplerRequest
    ) -> dict[str, Any]:
        if request.ttl_seconds is not None:
            raise ValueError(f"ttl_seconds is {request.ttl_seconds}, and checkpoints of this server do not expire")
        path = f"tinker://{name}/{kind}/{request.path or f'step-{self.bank.steps(name)}'}"
        folder = self.find(path)
        if folder.exists() and not getattr(request, "overwrite", False):
            raise ValueError(f"{path} is there already; give another name, or overwrite=True")
        self.bank.save(name, folder)
        return {"path": path}

    def find(self, path: str) -> Path:
        """The folder of a checkpoint, below the server's own."""
        found = re.fullmatch(r"tinker://(\w+:train:\d+)/(weights|sampler_weights)/(\w[\w.-]*)", path, re.ASCII)
        if found is None:
            raise ValueError(
                f"path is {path!r:.80}, expected tinker://MODEL/weights/NAME, a name of letters and digits"
            )
        return self.folder / found[1].replace(":", "-") / found[2] / found[3]

    def load(self, name: str, request: types.LoadWeightsRequest) -> dict[str, Any]:
        _check_base(request.base_model or BASE)
        if request.optimizer_config is not None and request.optimizer_config.type != "adamw":
            raise ValueError(f"the optimizer is {request.optimizer_config.type!r}, and this server has adamw")
        self._read(name, request.path, request.optimizer)
        return {"path": request.path, "model_id": name, "type": "load_weights"}

    def _read(self, name: str, path: str, optimizer: bool) -> None:
        folder = self.find(path)
        if not folder.exists():
            raise ValueError(f"{path} is not there")
        if optimizer:
            self.bank.load(folder, name)
        else:
            config = load_config(folder)
            self.bank.add(name, config, params=load_adapter(bind(self.worker.model, config), folder))

    def snapshot(self, name: str, sampler: str, kind: str) -> dict[str, Any]:
        """Keep an adapter as it is now, as another one, for sampling."""
        if kind != "snapshot":
            raise ValueError(f"kind is {kind!r}, and this server samples from snapshots")
        self.bank.add(sampler, self.bank.config(name), params=self.bank.tensors(name))
        self.samplers[sampler] = sampler
        return {"sampling_session_id": sampler}

    def sampler(self, sampler: str, request: types.CreateSamplingSessionRequest) -> dict[str, Any]:
        _check_base(request.base_model or BASE)
        if request.model_path is not None:
            self._read(sampler, request.model_path, False)
        self.samplers[sampler] = None if request.model_path is None else sampler
        return {"sampling_session_id": sampler, "type": "create_sampling_session"}

    def remove(self, name: str) -> dict[str, Any]:
        if name in self.bank:
            self.bank.remove(name)
        self.samplers.pop(name, None)
        return {"model_id": name, "type": "unload_model"}


def _check_base(name: str) -> None:
    if name != BASE:
        raise ValueError(f"base_model is {name!r:.60}, and this server has {BASE!r}")
