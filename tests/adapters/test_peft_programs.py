"""Programs written for PEFT, each run with PEFT and with what stands in for it: values, types of errors, warnings."""

import importlib
import itertools
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from torchgraft.adapters import as_peft

transformers = pytest.importorskip("transformers")

X = torch.linspace(-1, 1, 24).view(3, 8)
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])
METHODS = {
    "LoraConfig": {"r": 2, "init_lora_weights": False},
    "IA3Config": {"feedforward_modules": [], "init_ia3_weights": False},
    "OFTConfig": {"r": 0, "oft_block_size": 2, "init_weights": False},
    "VeraConfig": {"r": 4, "init_weights": False},
    "LoHaConfig": {"r": 2, "init_weights": False},
    "LoKrConfig": {"r": 2, "init_weights": False},
    "VBLoRAConfig": {"r": 2, "num_vectors": 8, "vector_length": 2},
    "AdaLoraConfig": {"init_r": 4, "target_r": 2, "total_step": 10, "init_lora_weights": False},
    "BOFTConfig": {"boft_block_size": 2, "init_weights": False},
    "BeftConfig": {"init_weights": False},
    "C3AConfig": {"block_size": 2, "init_weights": "kaiming_uniform"},
    "DeftConfig": {"r": 2, "init_weights": False},
    "DeloraConfig": {"r": 2, "init_weights": False},
    "FourierFTConfig": {"n_frequency": 10, "scaling": 0.1},
    "GloraConfig": {"r": 2, "init_weights": False},
    "GraloraConfig": {"r": 4, "gralora_k": 2, "init_weights": False},
    "HiraConfig": {"r": 2, "init_weights": False},
    "HRAConfig": {"r": 2, "init_weights": False},
    "MissConfig": {"r": 2, "init_weights": False},
    "OSFConfig": {"effective_rank": 2, "init_weights": False},
    "RandLoraConfig": {"r": 2, "randlora_alpha": 2, "init_weights": False},
    "RoadConfig": {"group_size": 2, "init_weights": False},
    "PeanutConfig": {"r": 2, "init_weights": False},
    "PsoftConfig": {"r": 2, "init_weights": False},
    "ShiraConfig": {"r": 1, "init_weights": False},
    "SupertuningConfig": {"sparsity": 0.8, "init_weights": False},
    "TinyLoraConfig": {"r": 1, "u": 2},
    "UniLoraConfig": {"r": 2, "theta_d_length": 8},
    "WaveFTConfig": {"n_frequency": 10, "init_weights": False},
}
"""PEFT's TinyLoRA without `init_weights` computes with memory that nobody wrote; its PVeRA samples in evaluation too,
for its layers begin in training mode."""
SMALL = {"block_size": 4, "vector_length": 4, "r": 2}
EVERY = pytest.mark.parametrize("method", METHODS)
NOT_HERE = (
    *("vera_A", "vera_B", "randlora_A", "randlora_B", "ranknum", "shira_indices"),
    *("base_model.vblora_vector_bank", "base_model.tinylora_v", "base_model.unilora_theta_d"),
)
"""What state dicts of whole models have once more, or otherwise, than here: see docs/differences.md."""
ONLY_PEFTS = (
    "Failed to load the CUDA extension",
    "Setting boft_n_butterfly",
    "Unmerge result can be inaccurate",
    "Sparse invariant checks",
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.drop, self.lin1 = nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, x):
        return self.lin1(self.drop(self.lin0(x.to(self.lin0.weight.dtype)).relu())).log_softmax(-1)


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.conv, self.lin = nn.Embedding(12, 6), nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.lin(self.conv(self.emb(x)[:, None]).amax((2, 3)))


def seeded(make, *args):
    torch.manual_seed(0)
    return make(*args).eval()


def llama(**fields):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return seeded(transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**sizes, **heads, **fields}))


def gpt2():
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return seeded(transformers.GPT2LMHeadModel, transformers.GPT2Config(**sizes))


def bert():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, num_labels=3)
    return seeded(transformers.BertForSequenceClassification, config)


def config(peft, method, **more):
    return getattr(peft, method)(**{"target_modules": ["lin0", "lin1"], **METHODS[method], **more})


def wrapped(peft, method="LoraConfig", name="default", model=None, **more):
    model = seeded(Model) if model is None else model
    torch.manual_seed(1)
    return moved(peft.get_peft_model(model, config(peft, method, **more), name), name)


def moved(model, name="default"):
    """Give an adapter numbers that do something."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in f"{key}." and "ranknum" not in key:
                parameter.add_(torch.linspace(0.05, 0.2, parameter.numel()).view_as(parameter))
    return model


def outputs(model, x=X):
    with torch.no_grad():
        found = model(x)
        return getattr(found, "logits", found)


def once(state):
    """Return a state dict without what PEFT's have once more for each module."""
    again = (".randlora_A", ".randlora_B")
    return {key: one for key, one in state.items() if key.count(".") == 1 or not key.endswith(again)}


def here(names):
    return sorted(name for name in names if not any(one in name for one in NOT_HERE))


def trained(model):
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def grads(model):
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def tried(call, *args, **kwargs):
    """Return a result, or the error in its place."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return error


def steps(program, *args):
    """Run a program; return what it yields, each with the classes of warnings that it took."""
    found = []
    torch.manual_seed(0)
    running = program(importlib.import_module("peft"), *args)
    while True:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value = next(running)
            except StopIteration:
                return found
        own = [one for one in caught if not str(one.message).startswith(ONLY_PEFTS)]
        found.append((value, {one.category.__name__ for one in own if issubclass(one.category, UserWarning)}))


def same(mine, theirs):
    """Compare results; an error may be of a more special class than PEFT's."""
    if isinstance(mine, Exception) or isinstance(theirs, Exception):
        return type(theirs).__name__ in [one.__name__ for one in type(mine).__mro__]
    if isinstance(mine, torch.Tensor):
        if mine.is_meta or theirs.is_meta:
            return mine.is_meta == theirs.is_meta
        return mine.dtype == theirs.dtype and torch.allclose(mine, theirs, atol=2e-5, rtol=2e-4)
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, (list, tuple)):
        return len(mine) == len(theirs) and all(itertools.starmap(same, zip(mine, theirs, strict=True)))
    return bool(mine == theirs)


def compared(program, *args, folder=None):
    with warnings.catch_warnings():
        theirs = steps(program, *args, *([folder / "theirs"] if folder else []))
        with as_peft():
            mine = steps(program, *args, *([folder / "mine"] if folder else []))
    assert len(mine) == len(theirs)
    for index, ((one, warned), (two, pefts)) in enumerate(zip(mine, theirs, strict=True)):
        assert same(one, two), f"step {index}: {one} is not {two}"
        assert warned == pefts, f"step {index}"


# -- every method --------------------------------------------------------------------------------------------------


def life(peft, method):
    model = wrapped(peft, method)
    yield [
        outputs(model),
        here(model.state_dict()),
        trained(model),
        sorted(once(peft.get_peft_model_state_dict(model))),
    ]
    yield [model.peft_type == method.removesuffix("Config").upper(), model.peft_type.value, model.base_model.prefix]
    yield [model.active_adapter, model.base_model.active_adapter, model.targeted_module_names]
    model.train()
    yield [module.training for module in model.modules()].count(False)
    model.eval()(X).square().sum().backward()
    yield grads(model)
    yield [tried(model.delete_adapter, "x"), tried(model.set_adapter, "x"), tried(model.load_adapter, "/nowhere", "x")]
    yield tried(model.add_adapter, "default", config(peft, method))
    layer = model.lin0
    yield [layer.in_features, layer.out_features, tuple(layer.weight.shape), tuple(layer.bias.shape)]
    yield [layer.active_adapters, layer.active_adapter, layer.merged, layer.merged_adapters, layer.disable_adapters]
    yield sorted(layer.adapter_layer_names)[:1]
    yield all(name in layer.other_param_names for name in ("tinylora_A", "shira_indices") if hasattr(layer, name))


def stored(peft, method, folder):
    model = wrapped(peft, method)
    model.save_pretrained(folder)
    yield once(load_file(folder / "adapter_model.safetensors"))
    fields = json.loads((folder / "adapter_config.json").read_text())
    yield {key: sorted(one) if key == "target_modules" else one for key, one in fields.items()}
    again = peft.PeftModel.from_pretrained(seeded(Model), folder)
    yield [outputs(again), trained(again)]
    again = peft.PeftModel.from_pretrained(seeded(Model), str(folder), "b2", is_trainable=True, low_cpu_mem_usage=True)
    yield [outputs(again), trained(again), {one.device.type for one in again.parameters()}]
    found = peft.PeftConfig.from_pretrained(folder)
    yield [type(found).__name__, found.inference_mode]
    other = peft.get_peft_model(seeded(Model), found)
    yield [trained(other), peft.set_peft_model_state_dict(other, peft.load_peft_weights(folder)).unexpected_keys]
    yield outputs(other)


def halves(peft, method):
    for dtype, autocast in itertools.product((torch.float16, torch.bfloat16), (True, False)):
        model, given = seeded(Model).to(dtype), config(peft, method)
        model = peft.get_peft_model(model, given, autocast_adapter_dtype=autocast)
        yield sorted((str(one.dtype), one.requires_grad) for name, one in model.named_parameters() if here([name]))
        yield str(model(X.to(dtype)).dtype)


def training(peft, method, folder):
    model = wrapped(peft, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    yield outputs(model)
    yield here(name for name, one in model.state_dict().items() if not torch.equal(one, before[name]))
    model.save_pretrained(folder)
    yield outputs(peft.PeftModel.from_pretrained(seeded(Model), folder))
    with model.disable_adapter():
        yield outputs(model)
    if method != "OSFConfig":  # which PEFT cannot unmerge, and merges twice
        model.merge_adapter()
        yield outputs(model)
        model.unmerge_adapter()
        yield outputs(model)
    if method not in ("GloraConfig", "OSFConfig"):  # whose layers pass over it in PEFT
        model.unmerge_adapter()  # a warning
    yield outputs(model.merge_and_unload())


def statuses(peft, method):
    model = wrapped(peft, method)
    for one in model.get_layer_status():
        yield [one.name, one.module_type.rpartition(".")[2], one.requires_grad, one.quantization_backend]
    whole = model.get_model_status()
    yield [whole.adapter_model_type, whole.peft_types, whole.trainable_params, whole.requires_grad, whole.enabled]
    model.base_model.disable_adapter_layers()
    yield [model.get_model_status().enabled, outputs(model)]
    yield [tried(peft.get_model_status, seeded(Model)), tried(peft.get_layer_status, seeded(Model))]


@EVERY
@pytest.mark.parametrize("program", [life, halves, statuses], ids=lambda one: one.__name__)
def test_programs_of_every_method(program, method):
    compared(program, method)


@EVERY
@pytest.mark.parametrize("program", [stored, training], ids=lambda one: one.__name__)
def test_programs_of_every_method_with_files(program, method, tmp_path):
    compared(program, method, folder=tmp_path)


def language_model(peft, method, folder):
    fields = {key: SMALL.get(key, one) for key, one in METHODS[method].items() if not key.startswith("init_")}
    fields |= {"GraloraConfig": {"r": 4}, "OFTConfig": {"r": 0}}.get(method, {})
    fields |= {"target_modules": ["q_proj"]} if method in ("LoHaConfig", "LoKrConfig") else {}
    fields.pop("feedforward_modules", None)
    torch.manual_seed(1)
    biased = {"attention_bias": True}  # BEFT merges into biases alone
    model = peft.get_peft_model(llama(**biased), getattr(peft, method)(task_type="CAUSAL_LM", **fields))
    moved(model)
    yield [type(model).__name__, trained(model), outputs(model, IDS)]
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    yield [loss.detach(), sorted(grads(model)) if method == "C3AConfig" else grads(model)]
    model.eval()
    yield model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    model.save_pretrained(folder)
    yield outputs(peft.PeftModel.from_pretrained(llama(**biased), folder), IDS)
    yield outputs(model.merge_and_unload(), IDS)


@EVERY
def test_language_models_with_default_targets(method, tmp_path):
    compared(language_model, method, folder=tmp_path)


# -- AdaLoRA's budget ----------------------------------------------------------------------------------------------


def budgeted(peft, folder):
    fields = {"target_modules": ["q_proj", "v_proj"], "init_r": 4, "target_r": 2, "init_lora_weights": False}
    schedule = {"total_step": 8, "tinit": 1, "tfinal": 2, "deltaT": 1}
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), peft.AdaLoraConfig(task_type="CAUSAL_LM", **fields, **schedule)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        yield [
            loss.detach(),
            {name: one.detach().clone() for name, one in model.named_parameters() if "lora_E" in name},
        ]
    yield outputs(model.eval(), IDS)
    yield outputs(model.merge_and_unload(), IDS)


def test_adalora_trains_with_its_regulariser_and_budget(tmp_path):
    compared(budgeted, folder=tmp_path)


def test_a_file_after_the_budget_has_all_triplets_and_computes_the_same_in_both(tmp_path):
    import peft as theirs

    with as_peft():
        peft = importlib.import_module("peft")
        fields = {"init_r": 4, "target_r": 1, "total_step": 2, "tinit": 0, "tfinal": 1, "deltaT": 1}
        model = wrapped(peft, "AdaLoraConfig", **fields)
        for step in range(2):
            model(X).square().mean().backward()
            model.base_model.update_and_allocate(step)
        layers = [model.lin0, model.lin1]
        assert sum(int((layer.lora_E["default"] != 0).sum()) for layer in layers) == 2 and model.lin0.r["default"] == 4
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(seeded(Model), tmp_path)
        torch.testing.assert_close(outputs(again), outputs(model))
    torch.testing.assert_close(outputs(theirs.PeftModel.from_pretrained(seeded(Model), tmp_path)), outputs(model))


def test_the_regulariser_is_in_the_loss_of_any_task():
    class Losing(Model):
        def forward(self, x):
            return transformers.modeling_outputs.CausalLMOutput(loss=super().forward(x).mean())

    with as_peft():
        peft = importlib.import_module("peft")
        model = wrapped(peft, "AdaLoraConfig", model=seeded(Losing), orth_reg_weight=0.25)
        norms = []
        for layer in (model.lin0, model.lin1):
            for rows in (layer.lora_A["default"], layer.lora_B["default"].T):
                norms.append(torch.linalg.norm((rows @ rows.T).double() - torch.eye(4)))
        bare = model.get_base_model()(X).loss
        torch.testing.assert_close(model(X).loss, bare + 0.25 * torch.stack(norms).mean().float())
        assert model(X)["loss"] is not None


def test_what_a_budget_needs():
    with as_peft():
        peft = importlib.import_module("peft")
        model = wrapped(peft, "AdaLoraConfig")
        with pytest.raises(ValueError, match=r"lin0: lora_A has no gradient; call update_and_allocate after loss.back"):
            model.base_model.update_and_allocate(0)
        model.set_adapter("default", inference_mode=True)
        with pytest.raises(ValueError, match=r"no adapter of type ADALORA is trained; the model has \['default'\]"):
            model.base_model.update_and_allocate(0)
        model.set_adapter("default")
        model(X).sum().backward()
        model.base_model.update_and_allocate(0)
        model.delete_adapter("default")
        model.add_adapter("default", config(peft, "AdaLoraConfig", target_modules=["lin1"]))
        model.set_adapter("default")
        model(X).sum().backward()
        model.base_model.update_and_allocate(1)  # of another adapter, so with nothing of the first


# -- targets, tasks, modules that are trained as a whole -----------------------------------------------------------


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.weights = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return self.lin(x) @ self.weights


def parameters_as_targets(peft, folder):
    model = seeded(lambda: nn.Sequential(Inner()))
    model = wrapped(peft, model=model, target_modules=[], target_parameters=["0.weights"])
    yield [sorted(model.state_dict()), trained(model), outputs(model)]
    model.save_pretrained(folder)
    yield sorted(peft.load_peft_weights(folder))


def copies(peft):
    model = wrapped(peft, target_modules=["lin0"], modules_to_save=["lin1"])
    model.add_adapter("other", config(peft, "LoraConfig", target_modules=["lin0"], modules_to_save=["lin1"]))
    yield [trained(model), model.lin1.active_adapter, sorted(model.state_dict())]
    model.set_adapter("other")
    yield [trained(model), model.lin1.active_adapter, model.lin1.active_adapters, model.modules_to_save]
    with model.disable_adapter():
        yield [trained(model), outputs(model)]
    model.delete_adapter("other")
    yield sorted(model.state_dict())
    yield sorted(model.merge_and_unload().state_dict())


def biased(peft):
    model = wrapped(peft, bias="all")
    yield [trained(model), sorted(peft.get_peft_model_state_dict(model))]
    yield [tried(model.add_adapter, name, config(peft, "LoraConfig", bias=name)) for name in ("all", "lora_only")]
    yield sorted(model.peft_config)


CASES = [
    {"target_modules": ["none"]},
    {"target_modules": "none"},
    {"target_modules": None},
    {"target_modules": []},
    {"target_modules": ["drop"]},
    {"target_modules": ["lin0"], "exclude_modules": ["lin0"]},
    {"target_modules": ["lin0"], "exclude_modules": ["other"]},
    {"target_modules": ["lin0", "lin1"], "exclude_modules": "lin1"},
    {"target_modules": "all-linear"},
    {"target_modules": r".*lin\d$"},
    {"target_modules": ("lin0",)},
    {"r": 0},
    {"r": -1},
    {"init_lora_weights": "other"},
    {"rank_pattern": {"lin0": 3}, "alpha_pattern": {"lin1": 4}},
    {"use_rslora": True},
    {"use_dora": True},
    {"lora_bias": True},
]


def targets(peft):
    for case in CASES:
        model = tried(lambda case=case: wrapped(peft, **case))
        yield model if isinstance(model, Exception) else [trained(model), outputs(model)]


NAMES = [
    {"layers_to_transform": [1]},
    {"layers_to_transform": 0},
    {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"layers_to_transform": [5]},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    {"exclude_modules": r".*layers\.0.*"},
    {"rank_pattern": {"q_proj": 3, r"^model.layers.1.self_attn.v_proj": 5}},
    {"target_modules": ["lm_head", "embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {"layer_replication": [[0, 2], [1, 2]]},
    {"trainable_token_indices": [1, 2]},
    {"modules_to_save": ["model"]},
    {"target_modules": ["mlp.up_proj"]},
]


def names_in_llama(peft):
    for case in NAMES:
        fields = {"task_type": "CAUSAL_LM", "r": 2, "init_lora_weights": False, **case}
        torch.manual_seed(1)
        model = tried(lambda fields=fields: peft.get_peft_model(llama(), peft.LoraConfig(**fields)))
        if isinstance(model, Exception):
            yield model
        else:
            yield [trained(model), outputs(model, IDS), sorted(peft.get_peft_model_state_dict(model))]


def tied(peft):
    more = {"trainable_token_indices": [1, 2]}, {"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}
    for case in more:
        fields = {"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False, **case}
        torch.manual_seed(1)
        given = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
        model = moved(peft.get_peft_model(llama(tie_word_embeddings=True), given))
        yield [trained(model), outputs(model, IDS)]


def other_layers(peft):
    kinds = ("LoraConfig", "HiraConfig", "LoHaConfig", "LoKrConfig", "IA3Config", "AdaLoraConfig", "ShiraConfig")
    for method in kinds:
        named = [["conv", "lin"]] if method not in ("AdaLoraConfig", "ShiraConfig") else [["lin"]]
        for chosen in [*named, *([["emb"]] if method in ("LoraConfig", "HiraConfig") else [])]:
            model = tried(lambda m=method, c=chosen: wrapped(peft, m, model=seeded(Embedded), target_modules=c))
            if isinstance(model, Exception):
                yield model
                continue
            yield [outputs(model, IDS), here(model.state_dict())]
            model.merge_adapter()
            yield outputs(model, IDS)


def transposed(peft):
    for method, fields in (("LoraConfig", {"r": 2}), ("VeraConfig", {"r": 4}), ("LoraConfig", {"use_dora": True})):
        torch.manual_seed(1)
        given = getattr(peft, method)(task_type="CAUSAL_LM", fan_in_fan_out=True, **fields)
        model = moved(peft.get_peft_model(gpt2(), given))
        yield [trained(model), outputs(model, IDS)]
        yield outputs(model.merge_and_unload(), IDS)


def classified(peft, folder):
    torch.manual_seed(1)
    model = moved(peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)))
    yield [type(model).__name__, trained(model), sorted(model.modules_to_save)]
    yield model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.detach()
    model.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(bert(), folder)
    yield [sorted(peft.load_peft_weights(folder)), outputs(again, IDS)]


def checkpointed(peft):
    for reentrant in (True, False):
        model = llama()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        yield grads(model)


def configs(peft, folder):
    given = config(peft, "LoraConfig", rank_pattern={"lin0": 3}, task_type="CAUSAL_LM")
    given.save_pretrained(folder)
    read = peft.LoraConfig.from_pretrained(folder)
    yield [read == given, read.peft_type.value, peft.LoraConfig.from_pretrained(folder, r=7).r]
    yield [type(peft.PeftConfig.from_peft_type(peft_type=one)).__name__ for one in ("LORA", peft.PeftType.IA3)]
    yield [tried(peft.PeftConfig.from_pretrained, folder / "other"), tried(peft.LoraConfig, task_type="other")]
    given.r = 5
    yield [
        given.r,
        given.is_prompt_learning,
        given.to_dict()["peft_type"] == "LORA",
        type(given.target_modules).__name__,
    ]
    yield peft.get_peft_config({"peft_type": "LORA", "r": 4, "task_type": "SEQ_CLS"}).r


def hooks_and_pickles(peft, folder):
    model, seen = wrapped(peft), []
    handle = model.register_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    yield [outputs(model), seen]
    handle.remove()
    folder.mkdir()
    torch.save(model, folder / "model.pt")
    torch.save(model.state_dict(), folder / "state.pt")
    again = torch.load(folder / "model.pt", weights_only=False)
    yield [outputs(again), type(again).__name__, type(again.base_model).__name__]
    other = wrapped(peft)
    yield [str(other.load_state_dict(torch.load(folder / "state.pt"))), outputs(other)]


PROGRAMS = [copies, biased, targets, names_in_llama, tied, other_layers, transposed, checkpointed]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: one.__name__)
def test_programs(program):
    compared(program)


@pytest.mark.parametrize(
    "program", [parameters_as_targets, classified, configs, hooks_and_pickles], ids=lambda one: one.__name__
)
def test_programs_with_files(program, tmp_path):
    compared(program, folder=tmp_path)


# -- what is otherwise on purpose ----------------------------------------------------------------------------------


def test_what_peft_passes_over_is_an_error():
    with as_peft():
        peft = importlib.import_module("peft")
        model = wrapped(peft)
        for call in (model.set_requires_grad, lambda name: model.merge_adapter([name])):
            with pytest.raises(ValueError, match=r"the model has no adapter 'x'; it has \['default'\]"):
                call("x")
        with pytest.raises(ValueError, match=r"modules_to_save has 'other', which is no module of the model"):
            wrapped(peft, modules_to_save=["other"])
        with pytest.raises(ValueError, match=r"target_parameters=\['x.y'\] match no parameter"):
            wrapped(peft, target_parameters=["x.y"])
        with pytest.raises(TypeError, match=r"model is a PeftModel already; call its add_adapter"):
            peft.get_peft_model(model, config(peft, "LoraConfig"))
        with pytest.raises(Exception, match=r"update_layer: torchgraft's layers get their adapters whole"):
            model.lin0.update_layer("other", 4, lora_alpha=8)


def test_names_of_layers_and_types():
    with as_peft():
        peft = importlib.import_module("peft")
        model = wrapped(peft, "IA3Config")
        assert model.get_layer_status()[0].module_type == "ia3.Linear"
        assert f"{model.peft_type}" == "IA3"
        mixed = peft.get_peft_model(seeded(Model), config(peft, "LoraConfig"), "one", mixed=True)
        mixed.add_adapter("two", config(peft, "LoHaConfig"))
        assert "base_model.model.lin0.lora_A.one.weight" in mixed.state_dict()  # PEFT: lin0.base_layer.lora_A


def test_loading_draws_no_numbers(tmp_path):
    with as_peft():
        peft = importlib.import_module("peft")
        wrapped(peft).save_pretrained(tmp_path)
        base = seeded(Model)
        before = torch.get_rng_state()
        peft.PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(torch.get_rng_state(), before)


def test_two_adalora_adapters_may_be_trained():
    with as_peft():
        peft = importlib.import_module("peft")
        model = wrapped(peft, "AdaLoraConfig")
        one = model.get_nb_trainable_parameters()
        model.add_adapter("other", config(peft, "AdaLoraConfig"))
        model.set_adapter("other")
        assert model.get_nb_trainable_parameters()[0] == one[0] and one == (184, 396)  # PEFT: 398, with two ranks
