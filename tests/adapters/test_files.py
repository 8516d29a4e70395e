"""Files move both ways: what PEFT wrote loads here, what is written here loads in PEFT, with the same outputs."""

import copy
import dataclasses
import gc
import json
import threading

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import torchgraft.adapters
from torchgraft.adapters import (
    AdaLoraConfig,
    AdapterConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    adapter_names,
    extract_params,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    merge_adapter,
    save_adapter,
)
from torchgraft.functional import bind, stack, unstack
from torchgraft.functional._layers.base import Base

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BOTH = {"target_modules": ["first", "second"]}


class Model(nn.Module):
    """Two sites of different sizes, and a head."""

    def __init__(self, first, second, head=None):
        super().__init__()
        self.first, self.second, self.head = first, second, head or nn.Identity()

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()))


def linear():
    return Model(nn.Linear(4, 6), nn.Linear(6, 4, bias=False), nn.Linear(4, 3)), torch.randn(5, 4)


def transposed():
    model = Model(Conv1D(6, 4), Conv1D(4, 6))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, torch.randn(5, 4)


def embedding():
    return Model(nn.Embedding(7, 4), nn.Linear(4, 4)), torch.arange(7)


def conv():
    return Model(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 2, stride=2)), torch.randn(2, 4, 6, 6)


def pointwise():
    return Model(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)), torch.randn(2, 4, 5, 5)


SCALED = {"rank_pattern": {"second": 5}, "alpha_pattern": {"^first": 11}}
CASES = {
    "lora": ("LoraConfig", linear, {"r": 2, "lora_alpha": 3}),
    "lora, rank-stabilised": ("LoraConfig", linear, {"r": 3, "lora_alpha": 5, "use_rslora": True}),
    "lora, patterns": ("LoraConfig", linear, {"r": 3, **SCALED}),
    "lora, head saved": ("LoraConfig", linear, {"r": 3, "modules_to_save": ["head"]}),
    "lora, regex": ("LoraConfig", linear, {"r": 3, "target_modules": "first|sec.*"}),
    "lora, all linear": ("LoraConfig", linear, {"r": 3, "target_modules": "all-linear"}),
    "lora, Conv1D": ("LoraConfig", transposed, {"r": 3, "fan_in_fan_out": True}),
    "lora, embedding": ("LoraConfig", embedding, {"r": 3, **SCALED}),
    "lora, conv2d": ("LoraConfig", conv, {"r": 3, "use_rslora": True, **SCALED}),
    "ia3": ("IA3Config", linear, {"feedforward_modules": []}),
    "ia3, feed-forward": ("IA3Config", linear, {"feedforward_modules": ["second"]}),
    "ia3, Conv1D": ("IA3Config", transposed, {"feedforward_modules": ["second"], "fan_in_fan_out": True}),
    "ia3, conv2d": ("IA3Config", conv, {"feedforward_modules": ["first"]}),
    "adalora": ("AdaLoraConfig", linear, {"init_r": 4, "target_r": 2, "total_step": 9}),
    "adalora, conv2d": ("AdaLoraConfig", conv, {"init_r": 4, "target_r": 2, "total_step": 9, "lora_alpha": 3}),
    "oft": ("OFTConfig", linear, {"oft_block_size": 2}),
    "oft, exact": ("OFTConfig", linear, {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False}),
    "oft, shared": ("OFTConfig", linear, {"oft_block_size": 2, "block_share": True}),
    "oft, conv2d": ("OFTConfig", pointwise, {"oft_block_size": 2}),
    "oft, embedding": ("OFTConfig", embedding, {"oft_block_size": 2}),
    "vera": ("VeraConfig", linear, {"r": 5}),
    "vera, seed alone": ("VeraConfig", linear, {"r": 5, "projection_prng_key": 3, "save_projection": False}),
    "vera, Conv1D": ("VeraConfig", transposed, {"r": 5, "fan_in_fan_out": True}),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not save vera_A and vera_B:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not load vera_A and vera_B:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning"),
]


class Case:
    """A model, PEFT's config for it and ours, and an adapter of PEFT's with numbers that matter."""

    def __init__(self, name):
        kind, make, fields = CASES[name]
        torch.manual_seed(1)
        self.model, self.x = make()
        self.model.eval().requires_grad_(False)
        fields = {**BOTH, **fields}
        self.theirs = getattr(peft, kind)(**copy.deepcopy(fields))
        self.ours = getattr(torchgraft.adapters, kind)(**copy.deepcopy(fields))

    def peft_model(self, adapter_name="default"):
        made = peft.get_peft_model(copy.deepcopy(self.model), copy.deepcopy(self.theirs), adapter_name).eval()
        for parameter in made.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        return made

    def mine(self, adapter_name="default"):
        made = inject_adapter_in_model(copy.deepcopy(self.ours), copy.deepcopy(self.model), adapter_name)
        for parameter in made.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        return made


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


def fields_of(folder):
    fields = json.loads((folder / "adapter_config.json").read_text())
    return {key: sorted(value) if key == "target_modules" and isinstance(value, list) else value
            for key, value in fields.items()}  # fmt: skip


@pytest.mark.parametrize("adapter_name", ["default", "style"])
def test_what_peft_saved_loads_here(case, adapter_name, tmp_path):
    theirs = case.peft_model(adapter_name)
    theirs.save_pretrained(tmp_path)
    y = theirs(case.x)
    model = load_adapter(copy.deepcopy(case.model), tmp_path, adapter_name)
    torch.testing.assert_close(model(case.x), y, **CLOSE)
    assert not torch.allclose(case.model(case.x), y, atol=1e-2)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    again = load_adapter(
        copy.deepcopy(case.model), tmp_path / "." / ("" if adapter_name == "default" else "style"), "x"
    )
    torch.testing.assert_close(again(case.x), y, **CLOSE)
    graft = bind(case.model, case.ours)
    params = load_adapter(graft, tmp_path, adapter_name)
    torch.testing.assert_close(graft(params, case.x), y, **CLOSE)
    assert params.keys() == graft.init().keys()


@pytest.mark.parametrize("adapter_name", ["default", "style"])
def test_what_is_saved_here_loads_in_peft(case, adapter_name, tmp_path):
    model = case.mine(adapter_name)
    y = model(case.x)
    folder = save_adapter(model, tmp_path / "ours", adapter_name)
    assert folder == (tmp_path / "ours" if adapter_name == "default" else tmp_path / "ours" / "style")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(case.model), folder, adapter_name).eval()
    torch.testing.assert_close(theirs(case.x), y, **CLOSE)
    theirs.save_pretrained(tmp_path / "theirs")
    other = tmp_path / "theirs" / folder.relative_to(tmp_path / "ours")
    ours, expected = (load_file(one / "adapter_model.safetensors") for one in (folder, other))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in ours)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    given, wanted = fields_of(folder), fields_of(other)
    if case.ours.target_modules == "all-linear":
        wanted["target_modules"] = "all-linear"
    assert given == wanted
    text = (folder / "adapter_config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
    graft = bind(case.model, case.ours)
    again = save_adapter(graft, tmp_path / "graft", adapter_name, params=extract_params(model, adapter_name))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    named = bind(case.model, {adapter_name: case.ours})
    tree = load_adapter(named, tmp_path / "ours", adapter_name)
    torch.testing.assert_close(named({adapter_name: tree}, case.x), y, **CLOSE)


def test_the_fresh_config_has_the_fields_of_peft(case, tmp_path):
    case.peft_model().save_pretrained(tmp_path / "theirs")
    save_adapter(case.mine(), tmp_path / "ours")
    ours, theirs = fields_of(tmp_path / "ours"), fields_of(tmp_path / "theirs")
    if case.ours.target_modules == "all-linear":
        assert theirs.pop("target_modules") == ["first", "head", "second"]
        ours.pop("target_modules")
    assert ours == theirs
    read = AdapterConfig.from_dict(case.theirs.to_dict())
    assert type(read) is type(case.ours) and not read.unknown_fields


# PEFT's own, for its own files too: it takes AdaLoRA's rank_pattern for LoRA's.
peft_takes_the_pattern_for_loras = pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
peft_asks_transformers_for_an_old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkp:FutureWarning")


def pruned():
    """AdaLoRA trained by PEFT until its budget is spent."""
    torch.manual_seed(1)
    model, x = linear()
    fields = {"init_r": 4, "target_r": 2, "total_step": 6, "tinit": 1, "tfinal": 1, "lora_alpha": 3}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.AdaLoraConfig(**BOTH, **fields))
    optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=0.3)
    for step in range(8):
        theirs(x).square().sum().backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model, x, theirs.eval()


@peft_takes_the_pattern_for_loras
def test_adalora_that_peft_has_pruned_moves_both_ways(tmp_path):
    model, x, theirs = pruned()
    y = theirs(x)
    keys = list(theirs.peft_config["default"].rank_pattern)
    theirs.save_pretrained(tmp_path / "theirs")
    pattern = load_config(tmp_path / "theirs").rank_pattern
    assert keys[0].endswith(".lora_E.default") and list(pattern) == ["first.lora_E", "second.lora_E"]
    assert 0 < sum(map(sum, pattern.values())) < 8
    mine = load_adapter(copy.deepcopy(model), tmp_path / "theirs", "pruned")
    torch.testing.assert_close(mine(x), y, **CLOSE)
    graft = bind(model, AdapterConfig.from_pretrained(tmp_path / "theirs"))
    params = load_adapter(graft, tmp_path / "theirs")
    torch.testing.assert_close(graft(params, x), y, **CLOSE)
    save_adapter(mine, tmp_path / "ours", "pruned")
    save_adapter(graft, tmp_path / "graft", params=params)
    for folder in (tmp_path / "ours" / "pruned", tmp_path / "graft"):
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder, "other").eval()
        torch.testing.assert_close(again(x), y, **CLOSE)


@pytest.mark.parametrize("form", ["first.lora_E", "first.lora_E.style", "base_model.model.first.lora_E.default"])
def test_adalora_reads_every_form_of_key_that_peft_has_for_its_pattern(form):
    config = AdapterConfig.from_dict({"peft_type": "ADALORA", "rank_pattern": {form: [True, False]}})
    assert config.rank_pattern == {"first.lora_E": [True, False]}


@peft_takes_the_pattern_for_loras
def test_adalora_pruned_to_nothing_moves_both_ways(tmp_path):
    model, x = linear()
    mask = {"first.lora_E": [False, False], "second.lora_E": [True, False]}
    graft = bind(model, AdaLoraConfig(init_r=2, target_r=1, total_step=9, rank_pattern=mask, **BOTH))
    params = graft.init()
    params["second"]["lora_E"].fill_(2.0)
    save_adapter(graft, tmp_path, params=params)
    assert load_adapter(graft, tmp_path)["first"]["lora_A"].shape == (0, 4)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(theirs(x), graft(params, x), **CLOSE)


# -- VeRA's shared matrices ----------------------------------------------------------------------------------------


def with_other_projections(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.vera_A"] = tensors["base_model.vera_A"] * 2 + 1
    save_file(tensors, file, {"format": "pt"})
    return tensors["base_model.vera_A"]


def test_a_model_takes_the_projections_of_the_file(tmp_path):
    case = Case("vera")
    save_adapter(case.mine(), tmp_path)
    other = with_other_projections(tmp_path)
    model = load_adapter(copy.deepcopy(case.model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(case.model), tmp_path)
    assert torch.equal(model.first.vera_A["default"], other)
    torch.testing.assert_close(model(case.x), theirs(case.x), **CLOSE)
    save_adapter(model, tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again" / "adapter_model.safetensors")["base_model.vera_A"], other)


def test_a_graft_refuses_other_projections_than_its_own(tmp_path):
    case = Case("vera")
    save_adapter(case.mine(), tmp_path)
    with_other_projections(tmp_path)
    with pytest.raises(
        ValueError, match=r"safetensors: 'base_model.vera_A' is not what this graft has made of its seed"
    ):
        load_adapter(bind(case.model, case.ours), tmp_path)


def test_projections_that_the_config_denies_are_used_if_they_are_the_seeds_and_refused_else(tmp_path):
    case = Case("vera")
    save_adapter(case.mine(), tmp_path)
    edit(tmp_path, save_projection=False)
    load_adapter(copy.deepcopy(case.model), tmp_path)
    with_other_projections(tmp_path)
    with pytest.raises(ValueError, match="'base_model.vera_A' is not what the config's seed gives"):
        load_adapter(case.model, tmp_path)


def edit(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# -- tensors of the base -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=19, num_key_value_heads=2, tie_word_embeddings=False, **size)).eval()


def saved_by_peft(llama, folder, change=False, **how):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(llama), config).eval()
    if change:
        theirs.get_input_embeddings().weight.data.mul_(1.5)
    theirs.save_pretrained(folder, **how)
    return theirs


@peft_asks_transformers_for_an_old_name
@pytest.mark.parametrize("how", [{}, {"save_embedding_layers": True}, {"save_embedding_layers": False}])
def test_embeddings_that_peft_saved_are_the_bases_own(llama, how, tmp_path):
    y = saved_by_peft(llama, tmp_path, **how)(torch.arange(6)[None]).logits
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert any("base_layer.weight" in key for key in keys) == how.get("save_embedding_layers", True)
    torch.testing.assert_close(load_adapter(copy.deepcopy(llama), tmp_path)(torch.arange(6)[None]).logits, y, **CLOSE)
    graft = bind(llama, AdapterConfig.from_pretrained(tmp_path))
    torch.testing.assert_close(graft(load_adapter(graft, tmp_path), torch.arange(6)[None]).logits, y, **CLOSE)


@peft_asks_transformers_for_an_old_name
def test_embeddings_that_changed_replace_a_models_with_a_warning_and_are_refused_by_a_graft(llama, tmp_path):
    y = saved_by_peft(llama, tmp_path, change=True)(torch.arange(6)[None]).logits
    model = copy.deepcopy(llama)
    with pytest.warns(UserWarning, match=r"model.embed_tokens.weight of the base is replaced"):
        load_adapter(model, tmp_path)
    torch.testing.assert_close(model(torch.arange(6)[None]).logits, y, **CLOSE)
    before = {key: value.clone() for key, value in llama.state_dict().items()}
    graft = bind(llama, AdapterConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"differs from 'model.embed_tokens.weight' of the model, which a graft never"):
        load_adapter(graft, tmp_path)
    assert all(torch.equal(before[key], value) for key, value in llama.state_dict().items())


def test_a_head_that_was_not_targeted_may_come_along(llama, tmp_path):
    save_adapter(inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), copy.deepcopy(llama)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    head = torch.randn(19, 16)
    save_file({**load_file(file), "base_model.model.lm_head.weight": head}, file)
    model = copy.deepcopy(llama)
    with pytest.warns(UserWarning, match=r"lm_head.weight of the base is replaced"):
        load_adapter(model, tmp_path)
    assert torch.equal(model.lm_head.weight, head)


def test_where_the_model_came_from_is_written(llama, tmp_path):
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), copy.deepcopy(llama))
    model.name_or_path = "somebody/llama"
    with pytest.warns(UserWarning, match="somebody/llama, the base model, is not on this machine"):
        save_adapter(model, tmp_path)
    fields = fields_of(tmp_path)
    assert fields["base_model_name_or_path"] == "somebody/llama" and fields["auto_mapping"] is None
    assert model.peft_config["default"].base_model_name_or_path is None


# -- modules to save, dtypes, names --------------------------------------------------------------------------------


def test_a_graft_takes_a_saved_head_only_if_it_is_the_bases(tmp_path):
    case = Case("lora, head saved")
    model = inject_adapter_in_model(case.ours, copy.deepcopy(case.model))
    save_adapter(model, tmp_path)
    graft = bind(case.model, LoraConfig(r=3, **BOTH))
    assert load_adapter(graft, tmp_path).keys() == {"first", "second"}
    with torch.no_grad():
        model.head.modules_to_save["default"].weight.add_(1)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"head.weight' differs from 'head.weight' of the model, which a graft never"):
        load_adapter(graft, tmp_path)


def test_dtypes_and_trainable_parameters_follow_the_target_unless_told(tmp_path):
    case = Case("lora")
    save_adapter(case.mine(), tmp_path)
    half = copy.deepcopy(case.model).bfloat16()

    def dtypes(**how):
        model = load_adapter(copy.deepcopy(half), tmp_path, **how)
        return {leaf.dtype for leaves in extract_params(model).values() for leaf in leaves.values()}

    assert dtypes() == {torch.bfloat16}
    assert dtypes(dtype=torch.float32) == {torch.float32}
    graft = bind(half, case.ours)
    assert load_adapter(graft, tmp_path)["first"]["lora_A"].dtype == torch.float32
    assert load_adapter(graft, tmp_path, dtype=torch.float16)["first"]["lora_A"].dtype == torch.float16
    assert load_adapter(graft, tmp_path, device="meta")["first"]["lora_A"].is_meta
    assert load_adapter(bind(copy.deepcopy(case.model).double(), case.ours), tmp_path)["first"][
        "lora_A"
    ].dtype == torch.float64  # fmt: skip
    with pytest.raises(ValueError, match=r"lora_A.weight' has values of up to 1e\+06, more than torch.float16"):
        load_adapter(copy.deepcopy(case.model).half(), large(case, tmp_path / "large"))
    trained = load_adapter(copy.deepcopy(case.model), tmp_path, is_trainable=True)
    assert [name for name, p in trained.named_parameters() if p.requires_grad] == [
        f"{site}.{leaf}.default.weight" for site in ("first", "second") for leaf in ("lora_A", "lora_B")
    ]


def large(case, folder):
    model = case.mine()
    nn.init.constant_(model.first.lora_A["default"].weight, 1e6)
    return save_adapter(model, folder)


def test_a_second_adapter_joins_the_first_and_own_names_come_first(tmp_path):
    case = Case("lora")
    one, two = case.mine(), case.mine("style")
    save_adapter(one, tmp_path)
    save_adapter(two, tmp_path, "style")
    model = load_adapter(load_adapter(copy.deepcopy(case.model), tmp_path), tmp_path, "style")
    assert adapter_names(model) == ["default", "style"] and model.first.active_adapters == ["style"]
    torch.testing.assert_close(model(case.x), two(case.x))
    other = load_adapter(copy.deepcopy(case.model), tmp_path, "unknown")
    torch.testing.assert_close(other(case.x), one(case.x))


def test_loading_beside_merged_adapters_and_behind_a_compiled_model(tmp_path):
    case = Case("lora")
    other = case.mine("style")
    first = save_adapter(other, tmp_path, "style")
    model = case.mine()
    merge_adapter(model)
    compiled = torch.compile(model, backend="eager")
    assert load_adapter(compiled, tmp_path, "style") is compiled
    torch.testing.assert_close(model(case.x), other(case.x))
    folder = save_adapter(compiled, tmp_path / "again", "style")
    saved = [load_file(one / "adapter_model.safetensors") for one in (first, folder)]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


def test_a_base_on_the_meta_device_gets_values_on_the_cpu(tmp_path):
    case = Case("lora")
    save_adapter(case.mine(), tmp_path)
    model = load_adapter(copy.deepcopy(case.model).to("meta"), tmp_path)
    assert model.first.base_layer.weight.is_meta and model.first.lora_A["default"].weight.device.type == "cpu"


def test_loading_draws_no_random_numbers_and_saving_changes_nothing(tmp_path):
    case = Case("vera")
    model = case.mine()
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.peft_config)
    save_adapter(model, tmp_path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.peft_config == config
    state = torch.get_rng_state()
    load_adapter(copy.deepcopy(case.model), tmp_path)
    load_adapter(bind(case.model, case.ours), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_views_transposes_and_tensors_in_two_places_are_saved(tmp_path):
    case = Case("lora")
    graft = bind(case.model, case.ours)
    many = stack([graft.init() for _ in range(3)])
    tree = unstack(many)[1]
    tree["first"]["lora_B"] = torch.randn(2, 6).T.requires_grad_()
    tree["second"]["lora_A"] = tree["first"]["lora_B"].view_as(tree["first"]["lora_B"]).T
    save_adapter(graft, tmp_path, params=tree)
    loaded = load_adapter(graft, tmp_path)
    for path, leaves in tree.items():
        for leaf, tensor in leaves.items():
            assert torch.equal(loaded[path][leaf], tensor)
            assert loaded[path][leaf].is_contiguous() and not loaded[path][leaf].requires_grad
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2000


def test_what_cannot_be_saved_is_an_error_and_leaves_nothing(tmp_path):
    case = Case("lora")
    graft, folder = bind(case.model, case.ours), tmp_path / "new"
    params = graft.init()
    with pytest.raises(TypeError, match=r"params is None, expected the graft's parameter tree: save_adapter\(graft"):
        save_adapter(graft, folder)
    with pytest.raises(ValueError, match="it looks like a stack of 2 adapters: use route or torch.vmap, or unstack it"):
        save_adapter(graft, folder, params=stack([params, params]))
    with pytest.raises(ValueError, match=r"first.lora_A.weight' is on the meta device, so it has no values to save"):
        save_adapter(graft, folder, params=graft.init(device="meta"))
    with pytest.raises(KeyError, match="params lacks site 'second'"):
        save_adapter(graft, folder, params={"first": params["first"]})
    with pytest.raises(ValueError, match=r"adapter_name is 'default'; this graft was bound with \['style'\]"):
        save_adapter(bind(case.model, {"style": case.ours}), folder, params={"style": params})
    with pytest.raises(ValueError, match="the model has no adapter 'style'; it has"):
        save_adapter(case.mine(), folder, "style")
    with pytest.raises(TypeError, match="params go with a graft"):
        save_adapter(case.mine(), folder, params=params)
    with pytest.raises(TypeError, match="model is of type int"):
        load_adapter(3, tmp_path)
    for name in ("..", "/etc", "a/b", "a\\b", "", ".", "c:", None):
        with pytest.raises(ValueError, match="adapter_name is .*, expected a name without slashes"):
            save_adapter(graft, folder, name, params=params)
    assert not folder.exists()


@pytest.mark.parametrize("form", ["tree", "by name"])
def test_a_named_graft_saves_one_of_its_adapters(form, tmp_path):
    case = Case("lora")
    graft = bind(case.model, {"first": case.ours, "other": IA3Config(**BOTH)})
    params = graft.init()
    save_adapter(graft, tmp_path, "other", params=params if form == "by name" else params["other"])
    assert load_config(tmp_path, "other").peft_type == "IA3"
    save_adapter(graft, tmp_path, "first", params=params if form == "by name" else params["first"])
    assert load_adapter(graft, tmp_path, "first")["first"].keys() == {"lora_A", "lora_B"}


def test_fields_of_a_newer_peft_warn_and_survive(tmp_path):
    case = Case("lora")
    save_adapter(case.mine(), tmp_path / "a")
    edit(tmp_path / "a", future={"x": [1, None]}, peft_version="9.0.0")
    with pytest.warns(UserWarning, match=r"LoraConfig: unknown fields \['future'\], perhaps of a newer PEFT"):
        model = load_adapter(copy.deepcopy(case.model), tmp_path / "a")
    save_adapter(model, tmp_path / "b")
    assert fields_of(tmp_path / "b") == fields_of(tmp_path / "a")
    with pytest.warns(UserWarning, match="unknown fields"):
        load_config(tmp_path / "b").save_pretrained(tmp_path / "c")
    assert fields_of(tmp_path / "c") == fields_of(tmp_path / "a")


def test_a_users_config_whose_annotations_mean_nothing_elsewhere_is_read_without_their_check():
    class Unseen:
        pass

    @dataclasses.dataclass(kw_only=True)
    class OwnConfig(LoraConfig):
        method = dataclasses.replace(LoraConfig.method, name="OWN")
        extra: "Unseen | int" = 3

    try:
        assert AdapterConfig.from_dict({"peft_type": "OWN", "r": 2, "extra": 4}).extra == 4
    finally:
        del OwnConfig
        gc.collect()


def test_configs_are_saved_and_read_by_their_classes(tmp_path):
    IA3Config(target_modules={"b", "a"}).save_pretrained(tmp_path / "new" / "folder")
    assert IA3Config.from_pretrained(tmp_path / "new", subfolder="folder").target_modules == {"a", "b"}
    with pytest.raises(TypeError, match="LoraConfig: .* holds a IA3Config"):
        LoraConfig.from_pretrained(tmp_path / "new" / "folder")


# -- a graft's config and the file's -------------------------------------------------------------------------------

DIFFERENT = {
    "scaling": (LoraConfig(r=2, lora_alpha=3), LoraConfig(r=2, lora_alpha=4), "alpha of first is 3 in the file and 4"),
    "rank-stabilised": (LoraConfig(r=2), LoraConfig(r=2, use_rslora=True), "scaling of first is 4.0 in the file and"),
    "rank": (LoraConfig(r=2), LoraConfig(r=4, lora_alpha=16), "r of first is 2 in the file and 4 in the graft"),
    "modules": (LoraConfig(), LoraConfig(target_modules=["first"]), "only the file has 'second'"),
    "method": (LoraConfig(), IA3Config(), "peft_type is LORA, and the graft was bound with IA3Config"),
    "form": (OFTConfig(oft_block_size=2), OFTConfig(oft_block_size=2, use_cayley_neumann=False), "use_cayley_neumann"),
    "init_r": (AdaLoraConfig(init_r=2), AdaLoraConfig(init_r=3), "in the graft; bind the model with the file's config"),
    "side": (IA3Config(), IA3Config(feedforward_modules=["first"]), "feedforward of first is False in the file"),
    "seed": (
        VeraConfig(r=2, projection_prng_key=1, save_projection=False),
        VeraConfig(r=2),
        "vera_A of first differs; bind the model with the file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_graft_refuses_a_file_that_means_something_else(name, tmp_path):
    saved, bound, message = copy.deepcopy(DIFFERENT[name])
    for config in (saved, bound):
        config.target_modules = config.target_modules or ["first", "second"]
    model, _ = linear()
    graft = bind(model, saved)
    save_adapter(graft, tmp_path, params=graft.init())
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(bind(model, bound), tmp_path)
    assert str(tmp_path) in str(caught.value)


class Recording:
    """A config that notes which of its fields are read."""

    def __init__(self, config):
        self.__dict__.update(config=config, read=set())

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.config, name)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, **BOTH),
        IA3Config(**BOTH),
        AdaLoraConfig(init_r=2, target_r=1, **BOTH),
        OFTConfig(oft_block_size=2, coft=True, **BOTH),
        OFTConfig(oft_block_size=2, **BOTH),
        VeraConfig(r=2, **BOTH),
    ],
    ids=lambda config: config.method.name,
)
def test_fields_that_outputs_depend_on_are_those_that_a_graft_compares(config):
    model, x = linear()
    graft = bind(model, config)
    params = graft.init()
    recording = Recording(config)
    for path, site in graft.sites[""].items():
        x = torch.randn(2, site.in_features)
        weight = model.get_submodule(path).weight
        config.method.apply(recording, site, params[path], Base(model.get_submodule(path), site), x)
        config.method.merge(recording, site, params[path], weight, None)
    training_alone = {"lora_dropout", "vera_dropout", "module_dropout"}
    shaped = {"block_share"}
    assert recording.read - training_alone - shaped <= set(config.form.reads)


@pytest.mark.slow
def test_threads_load_into_their_own_models(tmp_path):
    names = list(CASES)
    cases = {name: Case(name) for name in names}
    expected = {}
    for index, (name, case) in enumerate(cases.items()):
        model = case.mine()
        save_adapter(model, tmp_path / str(index))
        expected[name] = model(case.x)
    register, failures = nn.Module.register_parameter, []
    start = threading.Barrier(6)

    def work(offset):
        try:
            start.wait()
            for index in [*range(offset, len(names)), *range(offset)]:
                case = cases[names[index]]
                model = load_adapter(copy.deepcopy(case.model), tmp_path / str(index))
                assert nn.Module.register_parameter is register
                torch.testing.assert_close(model(case.x), expected[names[index]])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(3 * offset,)) for offset in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
