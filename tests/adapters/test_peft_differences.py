"""What is otherwise than with PEFT on purpose, as its own tests show it: the page of differences has a row for each."""

import importlib
import warnings

import pytest
import torch
from torch import nn

from torchgraft.adapters import as_peft

from .test_peft_programs import Embedded, Model, X, config, moved, outputs, seeded, wrapped


def test_layers_of_parameters_have_their_names_in_a_status():
    with as_peft():
        peft = importlib.import_module("peft")
        model = wrapped(peft, target_modules=[], target_parameters=["lin0.weight"])
        assert [one.name for one in model.get_layer_status()] == ["model.lin0.weight"]  # PEFT: model.lin0


def test_a_status_of_an_injected_model_says_what_it_is():
    """PEFT's says `"other"`, and no types."""
    with as_peft():
        peft = importlib.import_module("peft")
        status = peft.get_model_status(peft.inject_adapter_in_model(config(peft, "LoraConfig"), seeded(Model)))
        assert (status.base_model_type, status.peft_types) == ("Model", {"default": "LORA"})


def test_what_is_wrong_in_a_config_is_a_value_error():
    """Where PEFT's are of three classes, each where the field is looked at first."""
    with as_peft():
        peft = importlib.import_module("peft")
        with pytest.raises(ValueError, match=r"target_parameters is 'lin0.weight', expected list\[str\] \| None"):
            peft.LoraConfig(target_parameters="lin0.weight")
        with pytest.raises(ValueError, match="bias is 'some', expected 'none', 'all' or 'lora_only'"):
            peft.LoraConfig(bias="some")
        with pytest.raises(ValueError, match="trainable_token_indices names emb, which target_modules does too; leave"):
            wrapped(peft, model=seeded(Embedded), target_modules=["emb"], trainable_token_indices={"emb": [1]})
        with pytest.raises(ValueError, match=r"target_modules=\['no'\] matches no module"):
            wrapped(peft, target_modules=["no"], target_parameters=["lin0.weight"], lora_dropout=0.0)


def test_files_have_the_parameters_whatever_state_dict_says(tmp_path):
    with as_peft():
        peft = importlib.import_module("peft")
        model = moved(wrapped(peft))
        model.state_dict = dict
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(outputs(peft.PeftModel.from_pretrained(seeded(Model), tmp_path)), outputs(model))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(self.emb(x))


def test_a_tied_module_has_the_rows_of_the_embedding():
    """In PEFT both have them, and a module that the method alone adapts is its own layer."""
    with as_peft():
        peft = importlib.import_module("peft")
        given = peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[1, 2])
        model = moved(peft.get_peft_model(seeded(Tied), given))
        assert [name for name, one in model.named_parameters() if one.requires_grad] == [
            "base_model.model.emb.token_adapter.trainable_tokens_delta.default"
        ]
        assert not model.head.token_adapter.trainable_tokens_delta
        assert torch.equal(model.head.weight, model.emb.weight)
        assert not torch.equal(model.head.weight, model.get_base_model().emb.token_adapter.base_layer.weight)
        assert [*peft.get_peft_model_state_dict(model)] == ["base_model.model.emb.trainable_tokens_delta"]


def test_ties_are_those_of_tensors_whatever_a_config_says():
    """PEFT asks `tie_word_embeddings`, and adapts one of the two."""
    with as_peft():
        peft = importlib.import_module("peft")
        tied = seeded(Tied)
        tied.config = {"tie_word_embeddings": False}
        model = moved(wrapped(peft, model=tied, target_modules="all-linear", ensure_weight_tying=True))
        assert torch.equal(model.head.lora_A["default"].weight, model.emb.lora_embedding_B["default"].T)


def test_what_pefts_refuses_works_here():
    with as_peft():
        peft = importlib.import_module("peft")
        vera = wrapped(peft, "VeraConfig", target_modules=["lin0"])
        vera.add_adapter("other", config(peft, "VeraConfig", projection_prng_key=1, r=8))
        parameters = wrapped(peft, target_modules=[], target_parameters=["lin0.weight"])
        parameters.add_adapter(
            "other", config(peft, "LoraConfig", target_modules=[], target_parameters=["lin1.weight"])
        )
        for model in (vera, parameters):
            moved(model, "other")
            model.set_adapter("other")
            assert not torch.equal(outputs(model), outputs(seeded(Model)))
        for fields in (
            {"target_modules": [], "target_parameters": ["0.weight"]},
            {"target_modules": ["0"], "use_dora": True},
        ):
            model = wrapped(peft, model=nn.Sequential(nn.Linear(8, 4)), **fields)
            rows = model(X, adapter_names=["default", "__base__", "default"])
            torch.testing.assert_close(rows[::2], outputs(model)[::2])
            with model.disable_adapter():
                torch.testing.assert_close(rows[1], outputs(model)[1])
        image = torch.randn(2, 4, 5, 5)
        for method, fields in (("HRAConfig", {}), ("RoadConfig", {"group_size": 4}), ("HiraConfig", {})):
            grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
            model = moved(wrapped(peft, method, model=grouped, target_modules=["0"], **fields))
            expected = outputs(model, image)
            with model.disable_adapter():
                assert not torch.allclose(outputs(model, image), expected)
            torch.testing.assert_close(outputs(model.merge_and_unload(), image), expected)


def test_adapters_of_parameters_are_summed_where_peft_refuses():
    with as_peft():
        peft = importlib.import_module("peft")
        fields = {"target_modules": [], "target_parameters": ["0.weight"]}
        model = wrapped(peft, model=nn.Sequential(nn.Linear(8, 4)).double(), **fields)
        model.add_adapter("other", config(peft, "LoraConfig", **fields))
        moved(model, "other")
        model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", "cat")
        change = {}
        for name in ("default", "other", "sum"):
            model.set_adapter(name)
            change[name] = outputs(model, X.double()) - outputs(model.get_base_model()[0].get_base_layer(), X.double())
        torch.testing.assert_close(change["sum"], 0.5 * change["default"] - 2 * change["other"])
        assert change["other"].abs().max() > 0.1


def test_eva_takes_its_default_config_and_asks_for_data():
    """PEFT warns of the first."""
    with as_peft():
        peft = importlib.import_module("peft")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert peft.LoraConfig(init_lora_weights="eva").eva_config.rho == 2.0
        with pytest.warns(
            RuntimeWarning, match="init_lora_weights is 'eva', and the config has no statistics of 'lin0'"
        ):
            wrapped(peft, init_lora_weights="eva")
