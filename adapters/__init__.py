"""Adapter methods, one file each, and their configs; adapters in a model, in place; adapters in files."""

import typing as _typing

from torchgraft.functional import __version__ as __version__

from ._arithmetic.combine import combine as combine
from ._arithmetic.soups import GreedySoup as GreedySoup
from ._arithmetic.soups import greedy_soup as greedy_soup
from ._arithmetic.soups import soup as soup
from ._arithmetic.vectors import cosine as cosine
from ._arithmetic.vectors import difference as difference
from ._arithmetic.vectors import gram as gram
from ._arithmetic.vectors import interpolate as interpolate
from ._arithmetic.vectors import negate as negate
from ._arithmetic.vectors import project_out as project_out
from ._arithmetic.vectors import subspace_similarity as subspace_similarity
from ._arithmetic.weighted import add_weighted_adapter as add_weighted_adapter
from ._bank.bank import Bank as Bank
from ._bank.functional_optimizer import functional_optimizer as functional_optimizer
from ._bank.fused import adamw as adamw
from ._bank.fused import sgd as sgd
from ._bank.muon import muon as muon
from ._bank.replicated import ReplicatedBank as ReplicatedBank
from ._bank.resident import Stepped as Stepped
from ._calibration.initial import CordaConfig as CordaConfig
from ._calibration.initial import EvaConfig as EvaConfig
from ._calibration.initial import LoftQConfig as LoftQConfig
from ._calibration.initial import LoraGAConfig as LoraGAConfig
from ._calibration.statistics import fit_corda as fit_corda
from ._calibration.statistics import fit_eva as fit_eva
from ._calibration.statistics import fit_lora_ga as fit_lora_ga
from ._checkpoints.merge import merge_files as merge_files
from ._config.base import AdapterConfig as AdapterConfig
from ._config.errors import NoMatchingPeftModuleError as NoMatchingPeftModuleError
from ._config.errors import PeftError as PeftError
from ._config.errors import PeftWarning as PeftWarning
from ._config.peft_type import PeftType as PeftType
from ._config.peft_type import TaskType as TaskType
from ._conversion.extract import extract_lora as extract_lora
from ._conversion.formats import Formatted as Formatted
from ._conversion.formats import detect_format as detect_format
from ._conversion.formats import from_format as from_format
from ._conversion.formats import to_format as to_format
from ._conversion.fused import fuse_projections as fuse_projections
from ._conversion.fused import join_experts as join_experts
from ._conversion.fused import split_experts as split_experts
from ._conversion.fused import split_projections as split_projections
from ._conversion.report import ConversionReport as ConversionReport
from ._conversion.report import ModuleError as ModuleError
from ._conversion.shrink import canonical as canonical
from ._conversion.shrink import shrink as shrink
from ._conversion.to_lora import to_lora as to_lora
from ._files.configs import load_config as load_config
from ._files.configs import save_config as save_config
from ._files.inspected import AdapterFile as AdapterFile
from ._files.inspected import inspect_adapter as inspect_adapter
from ._files.load import load_adapter as load_adapter
from ._files.save import save_adapter as save_adapter
from ._files.servers.check import Servable as Servable
from ._files.servers.check import check_servable as check_servable
from ._files.stacks import load_stack as load_stack
from ._files.stacks import save_stack as save_stack
from ._inplace import AdapterRows as AdapterRows
from ._inplace import BaseTunerLayer as BaseTunerLayer
from ._inplace import ModulesToSaveWrapper as ModulesToSaveWrapper
from ._inplace import active_adapters as active_adapters
from ._inplace import adapter_names as adapter_names
from ._inplace import adapter_rows as adapter_rows
from ._inplace import cast_adapter_dtype as cast_adapter_dtype
from ._inplace import delete_adapter as delete_adapter
from ._inplace import disable_adapter as disable_adapter
from ._inplace import disable_adapter_layers as disable_adapter_layers
from ._inplace import enable_adapter_layers as enable_adapter_layers
from ._inplace import extract_config as extract_config
from ._inplace import extract_graft as extract_graft
from ._inplace import extract_params as extract_params
from ._inplace import get_base_model_state_dict as get_base_model_state_dict
from ._inplace import get_peft_model_state_dict as get_peft_model_state_dict
from ._inplace import inject_adapter_in_model as inject_adapter_in_model
from ._inplace import merge_adapter as merge_adapter
from ._inplace import merge_and_unload as merge_and_unload
from ._inplace import set_adapter as set_adapter
from ._inplace import set_base_model_state_dict as set_base_model_state_dict
from ._inplace import set_peft_model_state_dict as set_peft_model_state_dict
from ._inplace import set_requires_grad as set_requires_grad
from ._inplace import unload as unload
from ._inplace import unmerge_adapter as unmerge_adapter
from ._inplace.states.summaries import Row as Row
from ._inplace.states.summaries import Summary as Summary
from ._inplace.states.summaries import summary as summary
from ._methods.adalora.adalora import AdaLoraConfig as AdaLoraConfig
from ._methods.adalora.budget import adalora_state as adalora_state
from ._methods.adalora.budget import allocate as allocate
from ._methods.adalora.budget import orthogonality as orthogonality
from ._methods.adalora.budget import prune as prune
from ._methods.boft import BOFTConfig as BOFTConfig
from ._methods.c3a import C3AConfig as C3AConfig
from ._methods.delora import DeloraConfig as DeloraConfig
from ._methods.fourierft import FourierFTConfig as FourierFTConfig
from ._methods.gralora import GraloraConfig as GraloraConfig
from ._methods.hira import HiraConfig as HiraConfig
from ._methods.hra import HRAConfig as HRAConfig
from ._methods.ia3 import IA3Config as IA3Config
from ._methods.loha import LoHaConfig as LoHaConfig
from ._methods.lokr import LoKrConfig as LoKrConfig
from ._methods.lora.lora import LoraConfig as LoraConfig
from ._methods.lora.to_plain import to_plain as to_plain
from ._methods.miss import MissConfig as MissConfig
from ._methods.oft import OFTConfig as OFTConfig
from ._methods.osf import OSFConfig as OSFConfig
from ._methods.pvera import PveraConfig as PveraConfig
from ._methods.pvera import sample_latent as sample_latent
from ._methods.randlora import RandLoraConfig as RandLoraConfig
from ._methods.road import RoadConfig as RoadConfig
from ._methods.shira import ShiraConfig as ShiraConfig
from ._methods.supertuning import SupertuningConfig as SupertuningConfig
from ._methods.tinylora import TinyLoraConfig as TinyLoraConfig
from ._methods.unilora import UniLoraConfig as UniLoraConfig
from ._methods.vblora import VBLoRAConfig as VBLoRAConfig
from ._methods.vera import VeraConfig as VeraConfig
from ._methods.waveft import WaveFTConfig as WaveFTConfig
from ._optim.lora_fa import LoraFA as LoraFA
from ._optim.lora_fa import lora_fa_gradients as lora_fa_gradients
from ._optim.lora_plus import lora_plus_groups as lora_plus_groups
from ._optim.osf import osf_gradients as osf_gradients
from ._peft import names as _names
from ._peft.alias import Alias as Alias
from ._peft.alias import as_peft as as_peft
from ._peft.auto import AutoPeftModel as AutoPeftModel
from ._peft.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from ._peft.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from ._peft.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from ._peft.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from ._peft.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
from ._peft.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
from ._peft.configs import PeftConfig as PeftConfig
from ._peft.configs import get_peft_config as get_peft_config
from ._peft.conversion import convert_to_lora as convert_to_lora
from ._peft.conversion import save_as_lora as save_as_lora
from ._peft.conversion import supports_lora_conversion as supports_lora_conversion
from ._peft.eva import get_eva_state_dict as get_eva_state_dict
from ._peft.eva import initialize_lora_eva_weights as initialize_lora_eva_weights
from ._peft.helpers import rescale_adapter_scale as rescale_adapter_scale
from ._peft.hotswap import hotswap_adapter as hotswap_adapter
from ._peft.hotswap import hotswap_adapter_from_state_dict as hotswap_adapter_from_state_dict
from ._peft.hotswap import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
from ._peft.peft_model import PeftModel as PeftModel
from ._peft.precision import cast_mixed_precision_params as cast_mixed_precision_params
from ._peft.precision import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from ._peft.preprocess import preprocess_corda as preprocess_corda
from ._peft.preprocess import preprocess_loraga as preprocess_loraga
from ._peft.status import get_layer_status as get_layer_status
from ._peft.status import get_model_status as get_model_status
from ._peft.tasks import PeftMixedModel as PeftMixedModel
from ._peft.tasks import PeftModelForCausalLM as PeftModelForCausalLM
from ._peft.tasks import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from ._peft.tasks import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from ._peft.tasks import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from ._peft.tasks import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from ._peft.tasks import PeftModelForTokenClassification as PeftModelForTokenClassification
from ._peft.tasks import get_peft_model as get_peft_model
from ._peft.weights import load_peft_weights as load_peft_weights

__all__ = ["__version__", *(name for name in sorted(globals()) if not name.startswith("_"))]


def __dir__() -> list[str]:
    return [*__all__]


if not _typing.TYPE_CHECKING:  # or else type checkers would take any name

    def __getattr__(name: str) -> _typing.Any:
        """Say what stands for a name of PEFT's, or which name was perhaps meant."""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_names.instead_of(name, list(globals()))}")
