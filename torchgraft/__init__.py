"""Adapters for PyTorch as pytrees: a frozen model and an adapter meet at forward time, in a pure function.

    import torchgraft as tg

A model and a config make a graft, which holds no parameters; an adapter is a tree of tensors.

>>> import torch
>>> import torchgraft as tg
>>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
>>> graft = tg.bind(model, tg.LoraConfig(r=4, target_modules=["0", "2"]))
>>> params = graft.init(torch.Generator().manual_seed(0))
>>> sorted(params), sorted(params["0"])
(['0', '2'], ['lora_A', 'lora_B'])
>>> x, t = torch.randn(8, 16), torch.randint(4, (8,))
>>> torch.equal(graft(params, x), model(x))  # an adapter begins as the identity
True

It is differentiated like any function, here by plain autograd; `torch.func` and `torch.compile` do as well.

>>> def loss(params, x, t):
...     return torch.nn.functional.cross_entropy(graft(params, x), t)
>>> value, grads = tg.value_and_grad(loss)(params, x, t)
>>> grads["0"]["lora_B"].shape
torch.Size([32, 4])

Many adapters are a stack: trained at once, or one for each row of a batch.

>>> many = tg.stack([params, graft.init()])
>>> torch.vmap(loss, in_dims=(0, None, None))(many, x, t).shape
torch.Size([2])
>>> graft(tg.route(many, torch.tensor([0, 1, -1, 0, 1, 1, 0, -1])), x).shape  # -1 is the base
torch.Size([8, 4])

A view is a module like the model, a merged state dict is the model's own, and files are PEFT's.

>>> adapted, state = graft.view(params), tg.merge(graft, params)
>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     _ = tg.save_adapter(graft, folder, params=params)
...     again = tg.load_adapter(graft, folder)
>>> torch.equal(again["0"]["lora_A"], params["0"]["lora_A"])
True

The same adapter can be put into the model, in place, under PEFT's names.

>>> model = tg.inject_adapter_in_model(tg.LoraConfig(target_modules=["0"]), model)

Everything else is in `torchgraft.functional` and `torchgraft.adapters`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import AdaLoraConfig as AdaLoraConfig
    from .adapters import AdamssConfig as AdamssConfig
    from .adapters import AdapterConfig as AdapterConfig
    from .adapters import ArrowLoraConfig as ArrowLoraConfig
    from .adapters import Bank as Bank
    from .adapters import BeftConfig as BeftConfig
    from .adapters import BOFTConfig as BOFTConfig
    from .adapters import BottleneckConfig as BottleneckConfig
    from .adapters import C3AConfig as C3AConfig
    from .adapters import DeftConfig as DeftConfig
    from .adapters import DeloraConfig as DeloraConfig
    from .adapters import FourierFTConfig as FourierFTConfig
    from .adapters import FrodConfig as FrodConfig
    from .adapters import GloraConfig as GloraConfig
    from .adapters import GraloraConfig as GraloraConfig
    from .adapters import HiraConfig as HiraConfig
    from .adapters import HRAConfig as HRAConfig
    from .adapters import IA3Config as IA3Config
    from .adapters import LilyConfig as LilyConfig
    from .adapters import LNTuningConfig as LNTuningConfig
    from .adapters import LoHaConfig as LoHaConfig
    from .adapters import LoKrConfig as LoKrConfig
    from .adapters import LoraConfig as LoraConfig
    from .adapters import LoraXSConfig as LoraXSConfig
    from .adapters import LoReftConfig as LoReftConfig
    from .adapters import MissConfig as MissConfig
    from .adapters import OFTConfig as OFTConfig
    from .adapters import OSFConfig as OSFConfig
    from .adapters import PeanutConfig as PeanutConfig
    from .adapters import PolyConfig as PolyConfig
    from .adapters import PsoftConfig as PsoftConfig
    from .adapters import PveraConfig as PveraConfig
    from .adapters import RandLoraConfig as RandLoraConfig
    from .adapters import RoadConfig as RoadConfig
    from .adapters import ShiraConfig as ShiraConfig
    from .adapters import SupertuningConfig as SupertuningConfig
    from .adapters import TinyLoraConfig as TinyLoraConfig
    from .adapters import TrainableTokensConfig as TrainableTokensConfig
    from .adapters import UniLoraConfig as UniLoraConfig
    from .adapters import VBLoRAConfig as VBLoRAConfig
    from .adapters import VeraConfig as VeraConfig
    from .adapters import WaveFTConfig as WaveFTConfig
    from .adapters import extract_params as extract_params
    from .adapters import inject_adapter_in_model as inject_adapter_in_model
    from .adapters import inspect_adapter as inspect_adapter
    from .adapters import load_adapter as load_adapter
    from .adapters import load_stack as load_stack
    from .adapters import save_adapter as save_adapter
    from .adapters import save_stack as save_stack
    from .adapters import summary as summary
    from .functional import AdapterModule as AdapterModule
    from .functional import Graft as Graft
    from .functional import __version__ as __version__
    from .functional import bind as bind
    from .functional import functional_call as functional_call
    from .functional import grad as grad
    from .functional import merge as merge
    from .functional import route as route
    from .functional import stack as stack
    from .functional import trainable as trainable
    from .functional import unstack as unstack
    from .functional import value_and_grad as value_and_grad

_ADAPTERS = (
    "AdaLoraConfig", "AdamssConfig", "AdapterConfig", "ArrowLoraConfig", "Bank", "BeftConfig", "BOFTConfig",
    "BottleneckConfig", "C3AConfig", "DeftConfig", "DeloraConfig", "FourierFTConfig", "FrodConfig", "GloraConfig",
    "GraloraConfig", "HiraConfig", "HRAConfig", "IA3Config", "LilyConfig", "LNTuningConfig", "LoHaConfig",
    "LoKrConfig", "LoraConfig", "LoraXSConfig", "LoReftConfig", "MissConfig", "OFTConfig", "OSFConfig",
    "PeanutConfig", "PolyConfig", "PsoftConfig", "PveraConfig", "RandLoraConfig", "RoadConfig", "ShiraConfig",
    "SupertuningConfig", "TinyLoraConfig", "TrainableTokensConfig", "UniLoraConfig", "VBLoRAConfig", "VeraConfig",
    "WaveFTConfig", "extract_params", "inject_adapter_in_model", "inspect_adapter", "load_adapter", "load_stack",
    "save_adapter", "save_stack", "summary",
)  # fmt: skip
_FUNCTIONAL = (
    "AdapterModule", "Graft", "__version__", "bind", "functional_call", "grad", "merge", "route", "stack", "trainable",
    "unstack", "value_and_grad",
)  # fmt: skip

__all__ = sorted((*_ADAPTERS, *_FUNCTIONAL, "adapters", "functional"))


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that `torchgraft.functional` alone loads no adapters."""
    if name in ("adapters", "functional"):
        return importlib.import_module(f"{__name__}.{name}")
    for package, names in (("adapters", _ADAPTERS), ("functional", _FUNCTIONAL)):
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{package}"), name)
    close = importlib.import_module(f"{__name__}.functional.extending").did_you_mean(name, __all__)
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}{close or '; see torchgraft.functional and .adapters'}"
    )


def __dir__() -> list[str]:
    return [*__all__]
