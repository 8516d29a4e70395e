"""Adapter methods, one file each, and their configs; adapters in a model, in place; adapters in files."""

from torchgraft.functional import __version__ as __version__

from .adalora import AdaLoraConfig as AdaLoraConfig
from .alias import Alias as Alias
from .alias import as_peft as as_peft
from .budget import adalora_state as adalora_state
from .budget import allocate as allocate
from .budget import orthogonality as orthogonality
from .budget import prune as prune
from .config import AdapterConfig as AdapterConfig
from .ia3 import IA3Config as IA3Config
from .inplace import BaseTunerLayer as BaseTunerLayer
from .inplace import ModulesToSaveWrapper as ModulesToSaveWrapper
from .inplace import adapter_names as adapter_names
from .inplace import cast_adapter_dtype as cast_adapter_dtype
from .inplace import delete_adapter as delete_adapter
from .inplace import disable_adapter as disable_adapter
from .inplace import disable_adapter_layers as disable_adapter_layers
from .inplace import enable_adapter_layers as enable_adapter_layers
from .inplace import extract_graft as extract_graft
from .inplace import extract_params as extract_params
from .inplace import get_base_model_state_dict as get_base_model_state_dict
from .inplace import get_peft_model_state_dict as get_peft_model_state_dict
from .inplace import inject_adapter_in_model as inject_adapter_in_model
from .inplace import merge_adapter as merge_adapter
from .inplace import merge_and_unload as merge_and_unload
from .inplace import set_adapter as set_adapter
from .inplace import set_base_model_state_dict as set_base_model_state_dict
from .inplace import set_peft_model_state_dict as set_peft_model_state_dict
from .inplace import set_requires_grad as set_requires_grad
from .inplace import unload as unload
from .inplace import unmerge_adapter as unmerge_adapter
from .lora import LoraConfig as LoraConfig
from .oft import OFTConfig as OFTConfig
from .peft_type import PeftType as PeftType
from .vera import VeraConfig as VeraConfig
