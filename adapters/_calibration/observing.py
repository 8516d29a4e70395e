"""Running the user's model to look at what it does with data, without touching it."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import Graft, UnsupportedConfig, bind
from torchgraft.functional.extending import Site

from .._config.messages import names_of, require
from .._methods.lora.lora import LoraConfig
from .initial import FROM_DATA
from .initial.configs import PLAIN

Forward = Callable[[nn.Module, Any], Any]
"""`(model, batch) -> output`; the model is one like the user's, for the time of the call."""


def run(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a mapping's entries by name, those of a tuple or list in order, or the batch itself.

    >>> run(nn.Identity(), (torch.ones(1),))
    tensor([1.])
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a model returns for a batch: its output's `loss`, or the output itself.

    Raises:
        ValueError: An output without loss.
    """
    output = run(model, batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"the output of {type(model).__name__} is no loss and has none; give batches with labels, or "
            "loss=lambda model, batch: ..."
        )
    return loss


def looked_at(model: nn.Module, config: Any, kind: str) -> tuple[Graft, dict[str, Site]]:
    """Return a graft of the model with plain LoRA where the config has it, and its linear sites."""
    require(
        isinstance(config, LoraConfig) and config.init_lora_weights == kind,
        config,
        f"{FROM_DATA[kind]} takes a LoraConfig with init_lora_weights={kind!r}, and this one has "
        f"{getattr(config, 'init_lora_weights', None)!r}",
    )
    plain = dataclasses.replace(config, **PLAIN, modules_to_save=None, bias="none")
    graft = bind(model, plain, allow_unreached=True)
    for path, site in graft.sites[""].items():
        allowed = ("linear",) if kind == "corda" else ("linear", "embedding")
        require(
            site.kind in allowed,
            config,
            f"init_lora_weights is {kind!r}, which is for linear modules, and {path} is of kind {site.kind}; leave it "
            "out of target_modules",
            UnsupportedConfig,
        )
    return graft, {path: site for path, site in graft.sites[""].items() if site.kind == "linear"}


def first(batches: Iterable[Any], passes: int) -> tuple[Any, Iterator[Any]]:
    """Return the first batch, and all of them."""
    if passes > 1 and iter(batches) is batches:
        raise ValueError(
            f"passes is {passes}, and batches is of type {type(batches).__name__}, which can be gone through once; "
            "give a list or a DataLoader"
        )
    every = itertools.chain.from_iterable(itertools.repeat(batches, passes))
    for one in every:
        return one, itertools.chain([one], every)
    raise ValueError("batches is empty; give at least one batch of what forward takes")


def same_inputs(graft: Graft, forward: Forward, batch: Any) -> dict[str, str]:
    """For modules that get the very tensor that another got before, which one that was."""
    seen: list[tuple[str, weakref.ref[Tensor]]] = []
    leaders: dict[str, str] = {}

    def see(path: str, x: Tensor) -> None:
        if graft.sites[""][path].kind != "linear" or path in leaders or path in {name for name, _ in seen}:
            return
        leader = next((name for name, ref in seen if ref() is x), None)
        if leader is None:
            seen.append((path, weakref.ref(x)))
        else:
            leaders[path] = leader

    with graft.looking(see) as base:
        forward(base, batch)
    return leaders


def check_reached(sites: Iterable[str], reached: Iterable[str], what: str) -> None:
    """Refuse modules that data says nothing about."""
    missing = [path for path in sites if path not in set(reached)]
    if missing:
        raise ValueError(
            f"{what}: no batch reached {names_of(missing)}; give batches that do, or leave them out of target_modules"
        )


def wide(x: Tensor) -> Tensor:
    """Return a tensor in float32 or wider, without autograd."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
