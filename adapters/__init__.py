"""Adapter methods, one file each, and their configs."""

from .config import AdapterConfig as AdapterConfig
from .lora import LoraConfig as LoraConfig

__version__ = "0.1.0"
