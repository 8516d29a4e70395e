"""Why tests of PEFT's fail here, by kind: what is in the error, or which test it is.

"absent" and "inside" are what is not here and PEFT's private names; `docs/peft-suite.md` says what the others mean, and
`docs/differences.md` has rows for most.
"""

from __future__ import annotations

import re

ERRORS = {
    "absent": r"which torchgraft does not have|that torchgraft does not have|of which torchgraft has no method"
    r"|which is not supported here; leave it at None|__dataclass_fields__|KeyError: <PeftType"
    r"|kasa_config is 123"
    r"|peft\.(DoraCaching|KappaTuneSelector|find_kappa_target_modules|calculate_alora_offsets) is",
    "inside": r"PEFT's own, and not here|has no attribute '_\w+'|no setter|unsupported operand .*Absent|and 'Absent'"
    r"|'peft.config' .* has no attribute '__version__'|is the class of several layers|'is_bf16_available'"
    r"|does not have the attribute 'lora_variants'|stands in for peft here .* has no '_"
    r"|has no attribute '(frozen_peft_weight_names|trainable_tokens_original|res_num|sample_count)'"
    r"|'TrainableTokensLayer' object has no attribute 'active_adapter'|_LoraFactorsProxy",
    "the optimizer's groups": r"LoraFAOptimizer|KeyError: 'scaling_factors'",
    "an error here": r"so nothing would be learned|a PeftModel\w* already|which is for linear modules"
    r"|trained tensors is LoRA's A or B|init_weights is False, expected True|match(es)? no (parameter|module)",
    "an error of another class": r"expected 'none', 'all' or 'lora_only'|which target_modules does too"
    r"|expected list\[str\] \| None; one of them is a list",
    "words": r"Regex pattern did not match|^assert [\"'].* in [\"']<ExceptionInfo|^assert [\"'].* in str\(",
    "pickles": r"safe_serialization is False",
    "the Hub": r"nothing is downloaded|Cannot reach|outgoing traffic|couldn't connect|not fully cached",
    "another method's type": r"peft_type is 'test', expected",
    "a taken name": r"the model has an adapter '\w+' already",
    "the base stays": r"takes a part of the base out that data chooses",
    "the config is copied": r"argument of type 'NoneType' is not iterable",
    "one layer has all": r"adapter '\w+' is \w+, and \w+ has another kind of",
    "works here": r"DID NOT RAISE",
}
"""What the errors of a kind look like."""
TESTS = {
    "words": r"test_warning_name_|test_.*_when_init_lora_weights|test_(beta|tinit)|TestAdaLoraConfig"
    r"|test_default_embedding_name_cannot_be_inferred|_raises_target_layer_not_found|test_modules_to_save_excludes"
    r"|test_ensure_weight_tying_warns_when_model_not_tied|test_ia3_is_feedforward_subset_invalid_config"
    r"|test_prepare_model_for_compiled_hotswap_model_already_compiled_warns",
    "no warning of a default": r"test_lora_config_raises_warning_with_eva_init_but_not_eva_config",
    "ties are the tensors'": r"TestWeightTying",
    "fields of a newer PEFT": r"test_from_pretrained_forward_compatible",
    "the config is copied": r"test_from_pretrained_config_construction",
    "each adapter has its own": r"test_multiple_adapters_same_prng_weights|test_second_adapter_overlapping"
    r"|test_multiple_adapters_save_load_save_projection",
    "the base stays": r"(pissa|olora|corda|lora_ga).*(conversion|warns|hook|sample_count)"
    r"|test_save_load_with_weight_conversion|test_lora_config_pissa_olora_warns|test_load_pissa_olora_with_other_adapter_warns|test_cached_gradients",
    "works here": r"TestNamingConflictWarning|TestDecoderModelsTargetParameters::test_weighted_combination_of_adapters",
    "files have the parameters": r"test_from_pretrained_missing_keys_warning|test_hotswap_missing_key_works",
    "biases of the base": r"test_save_load_roundtrip_fsdp_wrapped_learnable_bias",
    "each layer's state comes back": r"test_disable_adapter_context_manager_.*irregular|test_disabling_.*irregular"
    r"|test_adapters_disabled_irregular|irregular_.*warns|test_disable_adapters_with_merging_irregular",
    "one layer has all": r"TestMixedAdapterTypes",
    "rows are in one place": r"TestTrainableTokens.*(standalone|weight_tying|tied|composite_model|same_model)",
    "a status says more": r"test_model_with_injected_layers|TestModelAndLayerStatus::test_target_parameters",
    "the stand-in is not tied": r"test_warn_for_tied_embeddings_merge",
    "inside": r"test_commit_hash|LoraGAPreprocessing|TestGetNoSplitModules|_internals|KeyPrefixes|tied_with_embedding"
    r"|test_prepare_model_for_compiled_hotswap_scalings_update_config|test_get_model_config_with_no_config"
    r"|test_mha_exposes_attributes",
}
"""Tests by name, whose assertions say nothing of the kind; any other error is of none."""


def kind_of(name: str, words: str, where: str) -> str:
    """Return the kind of a failure, `"unexpected"` where it is of none.

    >>> kind_of("tests/test_a.py::test_b", "AssertionError: Regex pattern did not match.", "")
    'words'
    """
    for kind, pattern in ERRORS.items():
        if re.search(pattern, words):
            return kind
    for kind, pattern in TESTS.items() if re.match("assert|AssertionError|Failed: DID NOT WARN", words) else ():
        if re.search(pattern, name.partition("::")[2]):
            return kind
    return "unexpected"
