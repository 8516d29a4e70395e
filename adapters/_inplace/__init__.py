"""Adapters in the user's own model: PEFT's low-level API, and what it lacks."""

from .beside.modules_to_save import ModulesToSaveWrapper as ModulesToSaveWrapper
from .inject import inject_adapter_in_model as inject_adapter_in_model
from .layer.tuner_layer import BaseTunerLayer as BaseTunerLayer
from .merging import merge_adapter as merge_adapter
from .merging import merge_and_unload as merge_and_unload
from .merging import unload as unload
from .merging import unmerge_adapter as unmerge_adapter
from .rows.rows import AdapterRows as AdapterRows
from .rows.rows import adapter_rows as adapter_rows
from .states.base_state import get_base_model_state_dict as get_base_model_state_dict
from .states.base_state import set_base_model_state_dict as set_base_model_state_dict
from .states.extract import extract_config as extract_config
from .states.extract import extract_graft as extract_graft
from .states.extract import extract_params as extract_params
from .states.state import get_peft_model_state_dict as get_peft_model_state_dict
from .states.state import set_peft_model_state_dict as set_peft_model_state_dict
from .switch import active_adapters as active_adapters
from .switch import adapter_names as adapter_names
from .switch import cast_adapter_dtype as cast_adapter_dtype
from .switch import delete_adapter as delete_adapter
from .switch import disable_adapter as disable_adapter
from .switch import disable_adapter_layers as disable_adapter_layers
from .switch import enable_adapter_layers as enable_adapter_layers
from .switch import set_adapter as set_adapter
from .switch import set_requires_grad as set_requires_grad
