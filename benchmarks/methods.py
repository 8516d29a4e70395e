"""The cost of each method over the frozen base, and of PEFT's: training step, inference, activations kept.

Each method at its defaults, but for fields that a model of this size asks for, on all linear layers of a Llama with
random weights: one of width 512 with a batch of 4 x 128, and a launch-bound one, of width 256 with a batch of 1 x 8 on
one thread, whose processor time is taken. Peers in the same rounds: the frozen base, PEFT's layers of the same config.

    python benchmarks/methods.py [--quick] [--only LORA VERA]
"""

from __future__ import annotations

import argparse
import copy
import inspect
import time
import warnings
from typing import Any

import peft
import torch
from _memory import saved_bytes
from _models import LINEARS, lively, llama, tokens, trained
from _picture import dots
from _results import apart, write
from _rounds import Cases, measure, ratios, table
from single import frozen, loss_of, step
from torch import Tensor

from torchgraft import adapters
from torchgraft.adapters import AdapterConfig
from torchgraft.functional import bind

SETTINGS = ("training step", "inference", "training step, launch-bound", "inference, launch-bound")
"""Two of the larger model, two of the smaller."""

UNCALLED = {"POLY"}
"""Methods whose layers PEFT's model cannot be called with alone: they want the tasks of a batch."""


def special(block: int) -> dict[str, dict[str, Any]]:
    """Return fields of a method beside its rank, for a model whose sizes are multiples of a number."""
    return {
        "ADALORA": {"total_step": 1000},
        "C3A": {"block_size": block},
        "IA3": {"feedforward_modules": ["down_proj"]},
        "OFT": {"oft_block_size": block},
        "PVERA": {"r": 256},
        "ROAD": {"group_size": block},
        "VBLORA": {"vector_length": block},
        "VERA": {"r": 256},
        "WAVEFT": {"n_frequency": 1000},
    }


def config_of(cls: type[AdapterConfig], block: int) -> AdapterConfig:
    """Return a method's config for the linear layers of the Llama: rank 8 where it has one."""
    name, fields = cls.method.name, inspect.signature(cls).parameters
    given = {rank: 8 for rank in ("r", "init_r") if rank in fields and name != "OFT"}
    given |= {"target_r": 4} if "target_r" in fields else {}
    return cls(target_modules=LINEARS, **{**given, **special(block).get(name, {})})


def theirs_of(config: AdapterConfig, model: Any) -> Any:
    """Inject PEFT's adapter of the same config into a copy of the model, its parameters away from the initial ones."""
    theirs = getattr(peft, type(config).__name__)
    fields = {name: value for name, value in config.to_dict().items() if name in inspect.signature(theirs).parameters}
    fields.pop("peft_type", None)
    injected: Any = peft.get_peft_model(copy.deepcopy(model), theirs(**fields)).base_model.model  # VeRA needs this way
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in injected.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return injected


def method_cases(model: Any, ids: Tensor, config: AdapterConfig) -> tuple[Cases, Cases, dict[str, int]]:
    """Return training steps, forward passes, and the bytes that autograd keeps in a forward."""
    graft = bind(model, config)
    params = lively(graft.init())
    view: Any = graft.view(params)
    theirs = theirs_of(config, model)
    training = {
        "frozen base": frozen(model, ids),
        "torchgraft": step(lambda: graft(params, ids).logits, trained(params), ids),
        "PEFT": step(lambda: theirs(ids).logits, [p for p in theirs.parameters() if p.requires_grad], ids),
    }
    inference = {"frozen base": lambda: model(ids), "torchgraft": lambda: view(ids), "PEFT": lambda: theirs(ids)}
    constants = (value for site in graft.sites[""].values() for _, value in site.constants.items())
    own = [*model.parameters(), *model.buffers(), *(value for value in constants if isinstance(value, Tensor))]
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    kept = {
        "frozen base": saved_bytes(lambda: loss_of(model(inputs_embeds=embedded).logits, ids), own),
        "torchgraft": saved_bytes(lambda: loss_of(graft(params, ids).logits, ids), [*own, *trained(params)]),
        "PEFT": saved_bytes(lambda: loss_of(theirs(ids).logits, ids), [*own, *theirs.parameters(), *theirs.buffers()]),
    }
    return training, {name: torch.no_grad()(run) for name, run in inference.items()}, kept


def main() -> None:
    """Measure, print, write `results/methods.json` and draw `results/methods.png`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small models and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", help="methods by their peft_type")
    given = parser.parse_args()
    if given.quick or given.only:
        apart()
    found = {name: measured(cls, given.quick, given.rounds) for name, cls in config_classes(given.only).items()}
    write("methods", {"claim": "what each method costs over the frozen base, beside PEFT's", "methods": found})
    draw(found)


def measured(cls: type[AdapterConfig], quick: bool, rounds: int) -> dict[str, Any]:
    """Return what a method costs in each setting, and the bytes that it keeps for the backward of the larger model."""
    large, small = ((64, 1, 2, 16, 4), (64, 1, 1, 8, 4)) if quick else ((512, 4, 4, 128, 32), (256, 8, 1, 8, 16))
    *cases, kept = cases_of(cls, *large)
    found: dict[str, Any] = {"kept_bytes": kept}
    torch.set_num_threads(2)
    for setting, each in zip(SETTINGS[:2], cases, strict=True):
        seconds = measure(each, 1 if quick else rounds, label=f"{cls.method.name}: {setting}")
        found[setting] = ratios(seconds, "frozen base")
    *cases, _ = cases_of(cls, *small)
    torch.set_num_threads(1)
    for setting, each in zip(SETTINGS[2:], cases, strict=True):
        many: dict[str, Any] = {"rounds": 1} if quick else {"rounds": 3 * rounds, "repeat": 3}
        seconds = measure(each, **many, label=f"{cls.method.name}: {setting}", clock=time.thread_time)
        found[setting] = ratios(seconds, "frozen base")
    for setting in SETTINGS:
        print(f"{cls.method.name}: {setting}\n{table(found[setting], 'frozen base')}")
    print(f"  kept for backward: {kept}")
    return found


def cases_of(
    cls: type[AdapterConfig], hidden: int, layers: int, batch: int, length: int, block: int
) -> tuple[Cases, Cases, dict[str, int]]:
    """Return `method_cases` of a method on a Llama, with a number of which its sizes are multiples."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method_cases(llama(hidden, layers), tokens(batch, length), config_of(cls, block))


def config_classes(only: list[str] | None) -> dict[str, type[AdapterConfig]]:
    """Return the config of each method that PEFT has too, by its type."""
    names = [name for name, one in vars(adapters).items() if hasattr(one, "method") and hasattr(peft, name)]
    classes: list[type[AdapterConfig]] = [getattr(adapters, name) for name in names]
    here = {cls.method.name: cls for cls in classes if cls.method.kinds and cls.method.name not in UNCALLED}
    return {name: cls for name, cls in here.items() if not only or name in only}


def draw(found: dict[str, dict[str, Any]]) -> None:
    """Draw a panel for each setting, methods sorted by what their training step costs here."""
    rows = sorted(found, key=lambda name: found[name][SETTINGS[0]]["torchgraft"]["ratio"])
    who = ("PEFT", "torchgraft")
    panels = {setting: {row: {one: found[row][setting][one] for one in who} for row in rows} for setting in SETTINGS}
    dots("methods", "What each method costs over the frozen base", panels, "the frozen base's")


if __name__ == "__main__":
    main()
