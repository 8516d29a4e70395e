"""Any fields of any config: what PEFT takes is PEFT's here, from the same seed; an error here has a reason."""

import copy
import dataclasses
import re
import warnings

import peft
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from torchgraft.adapters import (
    AdapterConfig,
    adapter_rows,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torchgraft.adapters._config.base import config_types

from .cases import close
from .test_peft import PREFIX, SHARED, state_of

CONFIGS = {name: cls for name, cls in config_types().items() if hasattr(peft, cls.__name__) and cls.method.kinds}
CONFIGS.pop("PVERA")  # whose layers sample in PEFT, also in evaluation mode; its own tests compare the means
"""Those that have layers of their own, and that PEFT has."""

SEEDS, DROPOUTS, RANKS = [0, 3], [0.0, 0.5], [1, 2, 3, 4, 8]
CHOICES = {
    "ab_svd_init": ["psoft_init", "pissa_init"],
    "act_fn": ["relu", "gelu", "tanh"],
    "alpha": [1, 5, 16],
    "asa_importance_beta": [0.85, 0.5],
    "asa_schedule_exponent": [1.0, 3.0],
    "asa_target_subspaces": [1, 50],
    "asa_uncertainty_beta": [0.85, 0.5],
    "alpha_pattern": [{}, {"first": 3}],
    "bias": ["none", "all"],
    "block_size": [1, 2, 4],
    "block_size_pattern": [{}, {"first": 4}],
    "boft_block_num": [0, 2],
    "boft_block_size": [0, 2, 4],
    "boft_n_butterfly_factor": [1],  # PEFT takes one, where its CUDA extension is not there
    "cayley_neumann_eps": [None, 0.5],
    "config_A_B": ["lora", "vector", "constant"],
    "config_C": ["lora", "vector"],
    "config_D_E": ["constant", "vector"],
    "d_initial": [0.1, 1.0],
    "decomposition_method": ["relu", "qr"],
    "decompose_factor": [-1, 2, 4],
    "delora_lambda": [1, 15],
    "deltaT": [1, 2],
    "depth": [0, 1, 2],
    "effective_rank": [None, 2, 0.5],
    "eps": [6e-5, 0.1],
    "exclude_modules": [None, ["second"], ".*second"],
    "feedforward_modules": [[], ["first"]],
    "final_warmup": [1000],
    "generator_seed": [None, 3],
    "gralora_k": [1, 2, 4],
    "group_size": [2, 4, 8],
    "hybrid_r": [0, 2],
    "init_logits_std": [0.1, 1.0],
    "init_r": [2, 4],
    "init_scale": [1.0, 0.1],
    "init_theta_d_bound": [0.02, 1.0],
    "init_v_bound": [0.0, 0.02],
    "init_vector_bank_bound": [0.02, 1.0],
    "init_warmup": [0, 50],
    "lambda_pattern": [{}, {"first": 3.0}],
    "lora_alpha": [1, 5, 16],
    "mask_interval": [1, 100],
    "mini_r": [1, 2],
    "n_frequency": [3, 10],
    "n_frequency_pattern": [{}, {"first": 5}],
    "n_skills": [1, 2, 3],
    "n_splits": [1, 2, 4],
    "n_tasks": [1, 2, 3],
    "num_B": [2, 3],
    "num_cayley_neumann_terms": [2, 5],
    "num_subspaces": [1, 2, 5],
    "num_vectors": [8, 16],
    "oft_block_size": [0, 2, 4],
    "poly_type": ["poly"],
    "proj_seed": SEEDS,
    "projection_prng_key": SEEDS,
    "projection_seed": SEEDS,
    "psoft_alpha": [1, 32],
    "psoft_svd": ["full", "lowrank"],
    "psoft_svd_lowrank_niter": [2, 10],
    "r": RANKS,
    "randlora_alpha": [1, 640],
    "random_loc_seed": SEEDS,
    "random_seed": SEEDS,
    "rank_pattern": [{}, {"first": 3}, {"^second": 1}],
    "regularization_alpha": [1e-3, 0.1],
    "scaling": [1.0, 25.0],
    "sparse_rate": [0.0, 0.01, 0.3],
    "stride_A": [1, 2],
    "sparsity": [0.5, 0.9],
    "subspace_rank": [1, 2],
    "svd_threshold": [0.0, 0.1, 0.5],
    "target_modules": [["first", "second"], ["first"], "second|first", "all-linear"],
    "target_r": [1, 2],
    "theta_d_length": [9, 32],
    "topk": [1, 2, 3],
    "u": [1, 3],
    "variant": ["road_1", "road_2", "road_4"],
    "vector_length": [2, 4],
    "wavelet_family": ["db1", "db2"],
    "weight_tying": [0.0, 0.5, 1.0],
}
"""Values of fields; those that are bool take both, dropouts 0 and a half."""
OWN = {
    "ADAMSS": {"init_weights": ["orthogonal", None], "r": [2, 3, 6]},
    "ADALORA": {"rank_pattern": [None], "total_step": [10], "tinit": [0, 2], "tfinal": [0, 2]},
    "C3A": {"init_weights": [True, False, "gaussian", "kaiming_uniform", "xavier_uniform"]},
    "HIRA": {"init_weights": [True, False], "rank_pattern": [{}]},  # which PEFT passes over
    "LOKR": {"init_weights": [True, False]},
    "LORA": {"init_lora_weights": [True, False, "gaussian", "olora", "orthogonal", "pissa"]},
    "MISS": {"init_weights": [True, False, "mini", "bat"]},
    "DEFT": {"alpha": [None, 5, 16]},
    "OFT": {"r": [0, 2, 4]},
    "OSF": {"rank_pattern": [None, {"first": 3}], "init_weights": [True, False]},
    "PEANUT": {"scaling": [1.0, 3.0]},
    "SUPERTUNING": {"r": [None, 2], "lora_alpha": [None, 4]},
    "TINYLORA": {"init_weights": [True, "uniform"]},
}
"""Values that fields of one method have."""
ELSEWHERE = {
    "save_only_topk_weights",  # whose files have shares, which noise is none of
    "modules_to_save",  # their trained biases are in PEFT's state dicts twice
    "target_svd_config",
    "token_indices",
    *("alora_invocation_tokens", "arrow_config", "beta1", "beta2", "corda_config", "ensure_weight_tying", "eva_config"),
    *("kasa_config", "layer_replication", "loftq_config", "lora_ga_config", "mask_fn", "mask_type", "megatron_config"),
    *("megatron_core", "monteclora_config", "orth_reg_weight", "qalora_group_size", "statistics", "target_parameters"),
    *("trainable_token_indices", "use_bdlora", "use_qalora", "velora_config"),
    *(field.name for field in dataclasses.fields(AdapterConfig) if field.name not in CHOICES),
}
"""Fields that need data, other models or schedules, and have tests of their own."""
REFUSED = {
    "bias is 'all'": "a model without biases",
    "cannot be made orthonormal": "HRA's pairs of equal vectors, of which PEFT divides rounding noise by its length",
    "is not supported here": "what is refused and said to be",
    "so that some stay and some are trained": "OSF without anything to train",
    "proportional_parameters is True, so n_frequency": "a field that PEFT passes over",
}
"""Words of errors that PEFT does not have, and what they are about."""


class Model(nn.Module):
    """Two layers that most methods can divide, and one that is not adapted unless all are."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def values(name, field):
    """Return what a field of a method may be, and the default where that is all."""
    if field.name in OWN.get(name, {}):
        return OWN[name][field.name]
    if field.name in CHOICES:
        return CHOICES[field.name]
    if field.name.endswith("dropout"):
        return DROPOUTS
    return [False, True] if isinstance(field.default, bool) else None


def fields_of(name):
    """Return a strategy of fields: each of some others than the defaults."""
    found = {field.name: values(name, field) for field in dataclasses.fields(CONFIGS[name])}
    known = {field.name for field in dataclasses.fields(getattr(peft, CONFIGS[name].__name__))}
    some = {field: st.sampled_from(each) for field, each in found.items() if each and field in known - ELSEWHERE}
    always = ("target_modules", "r", *(("total_step", "init_r", "target_r") if name == "ADALORA" else ()))
    needed = {field: some.pop(field) for field in always if field in some} | sized(name, some)
    return st.fixed_dictionaries(needed, optional=some)


def sized(name, some):
    """Take out what has to fit the layers, whose default is for larger ones."""
    named = ("block_size", "group_size", "n_frequency", "num_vectors", "oft_block_size", "vector_length", "u")
    return {field: some.pop(field) for field in named if field in some}


def called(method, mine, theirs, x):
    """Return what both make of an input; of Poly's tasks the rows have each in turn."""
    if method != "POLY":
        return mine(x), theirs(x)
    tasks = torch.arange(len(x)) % theirs.peft_config["default"].n_tasks
    return adapter_rows(mine, ["default"] * len(x), task_ids=tasks)(x), theirs.base_model(x, task_ids=tasks)


def made(call):
    """Return what a call returns, or its error."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(), None
        except Exception as error:
            return None, error


@pytest.mark.parametrize("method", CONFIGS)
def test_each_field_has_values_or_tests_elsewhere(method):
    for field in dataclasses.fields(CONFIGS[method]):
        assert values(method, field) or field.name in ELSEWHERE, f"{method}: no values for {field.name}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", CONFIGS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_peft_takes_is_pefts_here(method, data):
    fields = data.draw(fields_of(method))
    torch.manual_seed(0)
    base, x = Model(), torch.randn(5, 8)
    config, error = made(lambda: CONFIGS[method](**copy.deepcopy(fields)))
    mine = None
    if error is None:
        mine, error = made(lambda: inject_adapter_in_model(config, copy.deepcopy(base)).eval())
    if method == "POLY":  # whose layers take inputs of three axes in PEFT
        x = x[:, None]
    if method == "LILY":  # whose router takes the mean over the batch in PEFT
        x = x[:1]
    theirs, refused = made(
        lambda: peft.get_peft_model(
            copy.deepcopy(base),
            getattr(peft, CONFIGS[method].__name__)(**copy.deepcopy(fields)),
            autocast_adapter_dtype=False,
        ).eval()
    )
    assume(refused is None)
    if error is not None:
        assert any(re.search(words, str(error)) for words in REFUSED), f"{fields}: {error!r}"
        return
    state, expected = dict(get_peft_model_state_dict(mine)), state_of(theirs)
    assert state.keys() == expected.keys(), fields
    close(state, expected, torch.float32)
    fixed = {key for key, t in expected.items() if key.startswith(SHARED) or not t.is_floating_point()}
    moved = {key: t if key in fixed else t + 0.3 * torch.randn_like(t) for key, t in expected.items()}
    assert set_peft_model_state_dict(mine, moved) == ([], [])
    peft.set_peft_model_state_dict(
        theirs, {key if key.startswith("base_model.") else PREFIX + key: t for key, t in moved.items()}
    )
    close(*called(method, mine, theirs, x), torch.float32)
    if method == "PEANUT":  # whose encoders are one parameter here, and as many as they are in files
        return
    trained = {key for key, p in mine.named_parameters() if p.requires_grad}
    assert {key.removeprefix(PREFIX) for key, p in theirs.named_parameters() if p.requires_grad} == trained, fields
