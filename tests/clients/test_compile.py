"""torch.compile of a model with injected adapters: in one piece, and once."""

import copy

import peft
import peft.functional
import pytest
import torch

from torchgraft.adapters import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    adapter_names,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_adapter,
    set_peft_model_state_dict,
)

TARGETS = ["q_proj", "v_proj", "down_proj"]
FIELDS = {"r": 2, "target_modules": TARGETS, "init_lora_weights": False}
CONFIGS = {
    "lora": LoraConfig(**FIELDS),
    "dora": LoraConfig(use_dora=True, **FIELDS),
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "adalora": AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=TARGETS),
    "oft": OFTConfig(oft_block_size=2, target_modules=TARGETS),
    "vera": VeraConfig(r=4, target_modules=TARGETS),
}


@pytest.fixture
def llama(llama):
    llama.config.num_hidden_layers = 1  # twice as fast to compile
    return llama


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


def injected(llama, config, names=("one", "two")):
    model = llama.model()
    for name in names:
        inject_adapter_in_model(config, model, name)
        randomise(model)
    return model


def randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def never_again():
    return torch._dynamo.config.patch(error_on_recompile=True)


@pytest.mark.parametrize("method", CONFIGS)
def test_compiles_whole_and_once_for_all_values_and_all_adapters_of_one_shape(llama, method):
    model = injected(llama, CONFIGS[method])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(llama.logits(compiled), llama.logits(model))
    seen = []
    with never_again():
        for name in ("one", "two", "one"):
            set_adapter(model, name)
            seen.append(llama.logits(compiled))
            torch.testing.assert_close(seen[-1], llama.logits(model))
        randomise(model)
        seen.append(llama.logits(compiled))
        torch.testing.assert_close(seen[-1], llama.logits(model))
        state = {key: torch.zeros_like(tensor) for key, tensor in get_peft_model_state_dict(model, None, "one").items()}
        set_peft_model_state_dict(model, state, "one")
        torch.testing.assert_close(llama.logits(compiled), llama.logits(model))
    assert torch.equal(seen[0], seen[2])
    assert not torch.allclose(seen[0], seen[1], atol=1e-5)
    assert not torch.allclose(seen[0], seen[3], atol=1e-5)


def test_assigned_parameters_do_not_compile_again(llama):
    model = injected(llama, CONFIGS["ia3"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    llama.logits(compiled)
    state = {key: torch.full_like(tensor, 0.5) for key, tensor in get_peft_model_state_dict(model, None, "two").items()}
    with never_again():
        set_peft_model_state_dict(model, state, "two", low_cpu_mem_usage=True)
        given = llama.logits(compiled)
    torch.testing.assert_close(given, llama.logits(model))


def test_training_steps(llama):
    model = injected(llama, CONFIGS["lora"])
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step, name in enumerate(("one", "one", "two", "two")):
        for module, call in ((model, compiled), (twin, twin)):
            set_adapter(module, name)
            optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
            ids = llama.inputs["input_ids"]
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                call(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (key, given), expected in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(given, expected, msg=key)


def test_with_inductor():
    x, model = torch.randn(2, 8), torch.nn.Sequential(torch.nn.Linear(8, 8))
    for name in ("one", "two"):
        inject_adapter_in_model(LoraConfig(**{**FIELDS, "target_modules": ["0"]}), model, name)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        with never_again():
            set_adapter(model, "one")
            torch.testing.assert_close(compiled(x), model(x))


def test_adapters_injected_after_compiling_are_seen(llama):
    model = injected(llama, CONFIGS["lora"], ["one"])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = llama.logits(compiled)
    inject_adapter_in_model(LoraConfig(**{**FIELDS, "r": 4}), compiled, "wide")
    assert adapter_names(model) == ["one", "wide"]
    torch.testing.assert_close(llama.logits(compiled), llama.logits(model))
    assert not torch.allclose(llama.logits(compiled), before, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_peft_compiles_again_for_each_adapter(llama):
    model = llama.model()
    for name in ("one", "two"):
        peft.inject_adapter_in_model(peft.LoraConfig(**FIELDS), model, name)
    peft.functional.set_adapter(model, "one")
    compiled = torch.compile(model, backend="aot_eager")
    llama.logits(compiled)
    peft.functional.set_adapter(model, "two")
    with never_again(), pytest.raises(torch._dynamo.exc.RecompileError):
        llama.logits(compiled)
