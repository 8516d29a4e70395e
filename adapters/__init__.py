"""Adapter methods, one file each, and their configs."""

from torchgraft.functional import __version__ as __version__

from .adalora import AdaLoraConfig as AdaLoraConfig
from .budget import adalora_state as adalora_state
from .budget import allocate as allocate
from .budget import orthogonality as orthogonality
from .budget import prune as prune
from .config import AdapterConfig as AdapterConfig
from .ia3 import IA3Config as IA3Config
from .lora import LoraConfig as LoraConfig
from .oft import OFTConfig as OFTConfig
from .vera import VeraConfig as VeraConfig
