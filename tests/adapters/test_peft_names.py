"""Names that PEFT's own tests use, beside those of other programs: run with PEFT and with what stands in for it."""

import importlib
import json
import warnings

import pytest
import torch
from torch import nn

from torchgraft.adapters import as_peft

from .test_peft_programs import Embedded, Model, X, compared, config, moved, outputs, seeded, wrapped


def statuses_of_what_is_beside_layers(peft):
    saved = wrapped(peft, target_modules=["lin0"], modules_to_save=["lin1"])
    rows = wrapped(peft, model=seeded(Embedded), target_modules=["lin"], trainable_token_indices={"emb": [1, 2]})
    for model in (saved, rows):
        yield [vars(one) for one in model.get_layer_status()]
        yield model.get_model_status().num_adapter_layers
        layer = model.get_submodule("base_model.model.lin0" if model is saved else "base_model.model.lin")
        layer.enable_adapters(False)
        yield model.get_model_status().enabled


def names_of_targets(peft):
    utils = importlib.import_module("peft.tuners.tuners_utils")
    model = wrapped(peft, target_modules=["lin0", "lin1"], exclude_modules=["lin1"])
    tuner = model.base_model
    yield [tuner.targeted_module_names, tuner.targeted_parameter_names, tuner.get_model_config(model)]
    yield utils.inspect_matched_modules(tuner)["matched"]
    for key in ("lin0", "a.lin0", "alin0", "lin1"):
        yield bool(utils.check_target_module_exists(model.peft_config["default"], key))
    both = wrapped(peft, target_modules=["lin1"], target_parameters=["lin0.weight"], lora_dropout=0.0)
    yield [both.base_model.targeted_module_names, both.base_model.targeted_parameter_names]


def rows_of_tokens(peft):
    given = peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[1, 2])
    model = peft.get_peft_model(seeded(Embedded), given)
    yield [model.emb.token_indices, model.emb.trainable_tokens_delta["default"]]
    yield [model.emb.active_adapters, model.emb.weight]


def adapters_on_some_layers(peft):
    model = wrapped(peft, target_modules=["lin1"])
    model.add_adapter("other", config(peft, "LoraConfig", target_modules=["lin0", "lin1"]))
    yield model.base_model.targeted_module_names
    for name in ("default", "other"):
        model.merge_adapter([name])
        yield model.get_model_status().merged_adapters
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of each layer that has nothing merged
            model.unmerge_adapter()
    model.lin1.merge(adapter_names=["other"])
    yield model.get_model_status().merged_adapters


def checkpoints(peft):
    model = wrapped(peft, model=seeded(Frame))
    model.prepare_model_for_gradient_checkpointing(model)
    yield model.lin0.get_base_layer()(X).requires_grad


class Frame(nn.Module):
    """A model whose embeddings require gradients only when they are told to."""

    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(8, 8), nn.Linear(8, 4)

    def get_input_embeddings(self):
        return self.lin0

    def forward(self, x):
        return self.lin1(self.lin0(x))


def shared(peft):
    model = wrapped(peft, "VBLoRAConfig")
    yield [model.vblora_vector_bank["default"], model.get_nb_savable_parameters()]
    few = wrapped(peft, "VBLoRAConfig", save_only_topk_weights=True, target_modules=["lin0"])
    few.lin1.requires_grad_(True)
    yield few.get_nb_savable_parameters()
    model = wrapped(peft, "VeraConfig")
    yield [model.vera_A["default"], model.base_model.vera_B["default"]]


def rates(peft):
    optimizers = importlib.import_module("peft.optimizers")
    model = wrapped(peft)
    optimizer = optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)
    yield [[group["lr"], len(group["params"])] for group in optimizer.param_groups]


def left_out_of_files(peft, folder):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "runtime_config": {"a": 1}}))
    yield peft.LoraConfig.from_json_file(str(folder / "adapter_config.json"))
    model = wrapped(peft)
    model.lin0.lora_A["default"].weight.data = torch.zeros(4)
    yield model.save_pretrained(folder / "parts")


def without_biases(peft):
    yield wrapped(peft, model=nn.Sequential(nn.Linear(8, 4, bias=False)), target_modules=["0"], init_lora_weights=True,
                  lora_bias=True) is None  # fmt: skip


def configs_in_configs(peft, folder):
    made = peft.LoraConfig(target_modules=["lin0"])
    made.eva_config, made.lora_ga_config = peft.EvaConfig(rho=7.5), peft.LoraGAConfig(direction="ArBr")
    made.save_pretrained(folder)
    again = peft.LoraConfig.from_pretrained(folder)
    yield [type(again.eva_config).__name__, again.eva_config.rho, again.lora_ga_config.direction]


class Renamed(nn.Module):
    """A model that has got another name for what it consists of, and says so as transformers' do."""

    _checkpoint_conversion_mapping = {"^lin": "body.lin"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.body = Model()

    def forward(self, x):
        return self.body(x)


def files_of_an_older_model(peft, folder):
    moved(wrapped(peft)).save_pretrained(folder)
    yield outputs(peft.PeftModel.from_pretrained(seeded(Renamed), folder))


PROGRAMS = [
    *(statuses_of_what_is_beside_layers, names_of_targets, adapters_on_some_layers, checkpoints, shared, rates),
    *(without_biases, rows_of_tokens),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: one.__name__)
def test_programs(program):
    compared(program)


@pytest.mark.parametrize(
    "program", [left_out_of_files, configs_in_configs, files_of_an_older_model], ids=lambda one: one.__name__
)
def test_programs_with_files(program, tmp_path):
    compared(program, folder=tmp_path)


def test_biases_that_nothing_trains_are_left_out_and_named():
    """PEFT writes them into the base, where they stay when the adapter is disabled or deleted."""
    with as_peft():
        peft = importlib.import_module("peft")
        state = peft.get_peft_model_state_dict(wrapped(peft, bias="all"))
        state = {key: tensor + 1 for key, tensor in state.items()}
        other = wrapped(peft)
        before = [layer.bias.clone() for layer in (other.lin0, other.lin1)]
        with pytest.warns(UserWarning, match=r"\['lin0.base_layer.bias', 'lin1.base_layer.bias'\] \(2 in all\), b"):
            result = peft.set_peft_model_state_dict(other, state)
        assert [*result.unexpected_keys] == ["lin0.base_layer.bias", "lin1.base_layer.bias"]
        assert all(torch.equal(one, layer.bias) for one, layer in zip(before, (other.lin0, other.lin1), strict=True))


@pytest.mark.parametrize("named", [False, True])
def test_a_card_names_the_base_that_the_model_says(tmp_path, named):
    """Not what the config says, which may be a name that no hub has."""
    with as_peft():
        peft = importlib.import_module("peft")
        model = seeded(Model)
        if named:
            model.config = {"_name_or_path": "someone/base"}
        wrapped(peft, model=model, base_model_name_or_path="elsewhere").save_pretrained(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert ('\nbase_model: "someone/base"\n' in text) == ("\nbase_model: " in text) == named


def test_a_config_that_was_changed_since_does_not_change_what_is_plain(tmp_path):
    """PEFT's programs set `init_lora_weights=True` before they save what an adapter started with."""
    with as_peft():
        peft = importlib.import_module("peft")
        model = wrapped(peft, init_lora_weights="pissa")
        expected = outputs(model)
        model.peft_config["default"].init_lora_weights = True
        with pytest.warns(UserWarning, match="init_lora_weights was set to True after .* base that lost s B0 A0"):
            model.save_pretrained(tmp_path / "start")
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
        torch.testing.assert_close(outputs(peft.PeftModel.from_pretrained(seeded(Model), tmp_path / "plain")), expected)
