"""Rows of a batch with injected adapters of their own: PEFT's numbers, one adapter at a time, and what is refused."""

import contextlib
import copy
import gc
import pickle
import threading
import types
import weakref

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize

import torchgraft.adapters as ours
from torchgraft.adapters import (
    AdapterRows,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    VeraConfig,
    adapter_rows,
    disable_adapter,
    disable_adapter_layers,
    inject_adapter_in_model,
    merge_adapter,
    set_adapter,
    set_requires_grad,
)
from torchgraft.functional import UnsupportedCall

IDS = torch.randint(3, 20, (5, 6), generator=torch.Generator().manual_seed(0))
NAMES = ["b", "__base__", "c", "a", "b"]
FIELDS = {"init_lora_weights": False}


def llama(**fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    tokens = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **tokens, **fields)).eval()


def classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=20)).eval()


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def three(model, targets=("q_proj", "down_proj"), **fields):
    """Inject LoRA of two ranks and IA3, away from their starts."""
    torch.manual_seed(1)
    targets = list(targets)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, **FIELDS, **fields), model, "a")
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=1, target_modules=targets[:1], **FIELDS, **fields), model, "b")
    ia3 = IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False)
    return inject_adapter_in_model(ia3, model, "c")


def alone(model, names, call):
    """Return what `call(i)` gives for each row, with its adapter the active one."""
    found = []
    for i, name in enumerate(names):
        with disable_adapter(model) if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                set_adapter(model, name)
            found.append(call(i))
    return found


@pytest.mark.filterwarnings(
    "ignore:Adapter name 'a' should not be contained", "ignore:.is_gradient_checkpointing. is deprecated"
)
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_numbers_are_pefts(task):
    make, targets = {"CAUSAL_LM": (llama, ["q_proj", "down_proj"]), "SEQ_CLS": (classifier, ["query", "dense"])}[task]
    models = []
    for library in (ours, peft):
        torch.manual_seed(1)
        configs = [library.LoraConfig(r=r, task_type=task, target_modules=targets, **FIELDS) for r in (2, 4, 2)]
        model = library.get_peft_model(make(), configs[0], "a")
        for name, config in zip("bc", configs[1:], strict=True):
            model.add_adapter(name, config)
        models.append(model.eval())
    models[0].load_state_dict(models[1].state_dict())
    torch.manual_seed(2)
    for (_, one), (_, two) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        with torch.no_grad():
            one.add_(0.1 * torch.randn_like(one))  # also heads, of which each adapter has its own
            two.copy_(one)
    given, expected = (model(IDS, adapter_names=NAMES).logits for model in models)
    torch.testing.assert_close(given, expected)
    assert len({tuple(row.flatten().tolist()) for row in given}) == 5
    if task == "CAUSAL_LM":
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
        for beams in (1, 3):
            one, two = (m.generate(input_ids=IDS, adapter_names=NAMES, num_beams=beams, **options) for m in models)
            assert torch.equal(one, two)


def test_encoders_and_decoders_generate_each_alone():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    three(model, ("q", "wo"))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    given = adapter_rows(model, NAMES).generate(IDS, **options)
    each = alone(model, NAMES, lambda i: model.generate(IDS[i : i + 1], **options))
    width = max(given.shape[1], *(ids.shape[1] for ids in each))
    padded = [nn.functional.pad(ids, (0, width - ids.shape[1])) for ids in (given, *each)]
    assert torch.equal(padded[0], torch.cat(padded[1:]))


def test_generating_is_each_alone():
    model = three(llama())
    options = {"max_new_tokens": 6, "do_sample": False}
    for extra in ({}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}):
        given = adapter_rows(model, NAMES).generate(IDS, attention_mask=torch.ones_like(IDS), **options, **extra)

        def one(i, extra=extra):
            ids = IDS[i : i + 1]
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options, **extra)

        each = alone(model, NAMES, one)
        width = max(ids.shape[1] for ids in each)
        assert torch.equal(given, torch.cat([nn.functional.pad(ids, (0, width - ids.shape[1])) for ids in each]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_steps_are_each_alone(checkpointing):
    model = three(llama()).double().train()
    if checkpointing:
        model.activation_checkpointing_enable()
    grads = {}

    def loss_of(model, ids):
        out = model(ids, labels=ids, use_cache=False)
        loss = nn.functional.cross_entropy(out.logits.flatten(0, 1), ids.roll(-1, 1).flatten())
        return loss + 0 * out.loss  # which transformers compute in float32

    def step(i):
        model.zero_grad()
        loss = loss_of(model, IDS[i : i + 1])
        if loss.requires_grad:
            loss.backward()
        for key, p in model.named_parameters():
            if p.grad is not None:
                grads[key] = grads.get(key, 0) + p.grad / len(NAMES)
        return loss.detach()

    expected = torch.stack(alone(model, NAMES, step)).mean()
    model.zero_grad()
    set_requires_grad(model, ["a", "b", "c"])
    given = loss_of(adapter_rows(model, NAMES), IDS)
    given.backward()
    torch.testing.assert_close(given.detach(), expected, rtol=1e-10, atol=1e-12)
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, grads, rtol=1e-4, atol=1e-8)  # norms are in float32
    assert len(found) == 2 * (4 + 2 + 2)


def equal_alone(model, names, x):
    y = adapter_rows(model, names)(x)
    torch.testing.assert_close(y, torch.cat(alone(model, names, lambda i: model(x[i : i + 1]))), rtol=1e-10, atol=1e-12)
    return y


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


class Experts(nn.Module):
    """Three matrices, of which each row of the input meets all."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        return torch.stack([torch.nn.functional.linear(x, self.weight[i]).tanh() for i in range(3)]).sum(0)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.q, self.head = nn.Embedding(20, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.q(self.embed(ids)).tanh())


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["head"]},
        {"modules_to_save": ["head"], "use_dora": True},
        {"trainable_token_indices": {"embed": [3, 5]}},
        {"modules_to_save": ["embed"]},
    ],
    ids=str,
)
def test_what_stands_beside_layers_is_each_rows_own(fields):
    model = Tokens().double()
    names = ["b", "__base__", "a", "c", "a"]
    for name, r in (("a", 2), ("b", 3)):
        inject_adapter_in_model(LoraConfig(r=r, target_modules=["q"], **fields, **FIELDS), model, name)
    config = VeraConfig(r=3, target_modules=["q"], modules_to_save=["head"])
    moved(inject_adapter_in_model(config, model, "c"))
    for training in (False, True):
        equal_alone(model.train(training), names, IDS)
    expected = [p for key, p in model.named_parameters() if "a" in key.split(".") or "lora_A.a" in key]
    set_requires_grad(model, ["a", "b", "c"])
    adapter_rows(model, names)(IDS)[2].sum().backward()
    assert expected and all(p.grad is not None for p in expected)


def test_experts_and_groups_of_several_ranks_are_each_rows_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 1, groups=2), nn.Flatten(), nn.Linear(12, 4), Experts()).double()
    for name, r in (("a", 2), ("b", 6), ("c", 4)):
        fields = {"target_modules": ["0", "2"], "target_parameters": ["3.weight"]}
        inject_adapter_in_model(LoraConfig(r=r, **fields, **FIELDS), model, name)
    x, names = torch.randn(4, 4, 2).double(), ["b", "a", "__base__", "c"]
    equal_alone(model, names, x)
    set_requires_grad(model, ["a", "b", "c"])
    adapter_rows(model, names)(x)[1].sum().backward()
    grads = {key: p.grad for key, p in model.named_parameters() if ".a" in key}
    set_adapter(model, "a")
    model.zero_grad()
    model(x[1:2]).sum().backward()
    assert len(grads) == 6
    for key, parameter in model.named_parameters():
        if key in grads:
            torch.testing.assert_close(grads[key], parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_rows_of_their_adapter_whichever_is_active(bias):
    model = small()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], bias=bias, **FIELDS), model, "a")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], **FIELDS), model, "b")
    set_adapter(model, "a")
    with torch.no_grad():
        model[0].base_layer.bias.add_(1)
    x, names = torch.randn(3, 4).double(), ["a", "b", "__base__"]
    expected = torch.cat(alone(model, names, lambda i: model(x[i : i + 1])))
    for active in ("a", "b", "a"):
        set_adapter(model, active)
        torch.testing.assert_close(adapter_rows(model, names)(x), expected, rtol=1e-10, atol=1e-12)
    adapter_rows(model, names)(x).sum().backward()
    assert torch.equal(model[0].base_layer.bias.grad[:1] != 0, torch.tensor([True]))


def test_what_changes_is_followed():
    model = three(small(), ("0", "2"))
    x, names = torch.randn(5, 4).double(), NAMES
    equal_alone(model, names, x)
    moved(model)
    equal_alone(model, names, x)
    model[0].scaling["a"] *= 2
    equal_alone(model, names, x)
    model[0].lora_A["a"].weight = nn.Parameter(torch.randn(2, 4).double())
    equal_alone(model, names, x)
    model[2].base_layer.weight.data = torch.randn(3, 6).double()
    equal_alone(model, names, x)
    inject_adapter_in_model(LoHaConfig(r=2, target_modules=["2"], init_weights=False), model, "d")
    equal_alone(model, ["d", "a", "d", "__base__", "c"], x)
    ours.delete_adapter(model, "a")
    equal_alone(model, ["d", "b", "d", "__base__", "c"], x)
    with pytest.raises(ValueError, match=r"no adapter 'a'; it has \['b', 'c', 'd'\]"):
        adapter_rows(model, ["a"] * 5)
    model.append(nn.Tanh())
    equal_alone(model, ["d"] * 5, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = adapter_rows(model, ["b", "d", "b", "d", "d"])
    set_requires_grad(model, ["b", "d"])
    rows(x).sum().backward()
    optimizer.step()
    equal_alone(model, list(rows.names), x)


class Configured(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.tail, self.config = nn.Linear(4, 4), nn.Linear(4, 4), types.SimpleNamespace(scale=1.0)
        self.after = [self.tail]

    def forward(self, x):
        return self.after[0](self.q(x)) * self.config.scale


def test_what_is_written_to_a_models_config_counts():
    model = Configured()
    for name in "ab":
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q"], **FIELDS), model, name)
    model, x, names = model.double(), torch.randn(3, 4).double(), ["b", "__base__", "a"]
    equal_alone(model, names, x)
    model.config.scale = 3.0
    equal_alone(model, names, x)
    graft = ours.extract_graft(model, "a")
    model.config.scale = 2.0
    torch.testing.assert_close(graft(ours.extract_params(model, "a"), x), (set_adapter(model, "a"), model(x))[1])


def test_the_model_stays_as_it_is_and_is_let_go():
    model = three(small(), ("0", "2"))
    set_adapter(model, ["a", "b"])
    before = {id(m): dict(vars(m)) for m in model.modules()}
    flags = [p.requires_grad for p in model.parameters()]
    x = torch.randn(5, 4).double()
    y = adapter_rows(model, NAMES)(x)
    assert before == {id(m): dict(vars(m)) for m in model.modules()}
    assert flags == [p.requires_grad for p in model.parameters()] and ours.active_adapters(model) == ["a", "b"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(adapter_rows(other, NAMES)(x), y)
    del before, y
    removed = weakref.ref(model[0].lora_A["a"].weight)
    ours.delete_adapter(model, "a")
    gc.collect()
    assert removed() is None
    adapter_rows(model, ["b", "c"] * 2 + ["b"])(x)
    gone = weakref.ref(model)
    del model, other
    gc.collect()
    assert gone() is None


def test_disabled_adapters_are_the_base_in_all_rows():
    model = three(small(), ("0", "2"))
    x = torch.randn(5, 4).double()
    with disable_adapter(model):
        assert torch.equal(adapter_rows(model, NAMES)(x), model(x))
    assert torch.equal(adapter_rows(model, ["__base__"] * 5)(x), model[2].base_layer(model[0].base_layer(x).tanh()))


def test_base_parameters_that_are_trained_get_gradients():
    model = three(small(), ("0",))
    model[2].requires_grad_(True)
    x = torch.randn(5, 4).double()
    for call in (adapter_rows(model, NAMES), adapter_rows(model, NAMES).view()):
        model.zero_grad()
        call(x).square().sum().backward()
        given = model[2].weight.grad
        model.zero_grad()
        torch.cat(alone(model, NAMES, lambda i: model(x[i : i + 1]))).square().sum().backward()
        torch.testing.assert_close(given, model[2].weight.grad, rtol=1e-10, atol=1e-12)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.q(x)


def test_buffers_that_the_forward_writes_are_the_models():
    model = Counting()
    for name in "ab":
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q"]), model, name)
    for _ in range(3):
        adapter_rows(model, ["a", "b"])(torch.randn(2, 4))
    assert model.calls == 3


def test_dropout_is_each_adapters_own_and_leaves_the_base_rows():
    model = three(small(), ("0", "2"), lora_dropout=0.5).train()
    x = torch.randn(5, 4).double()
    one, two = (adapter_rows(model, NAMES)(x) for _ in range(2))
    assert [torch.equal(a, b) for a, b in zip(one, two, strict=True)] == [False, True, True, False, False]
    equal_alone(model.eval(), NAMES, x)


def test_hooks_run_on_modules_and_on_layers_and_autocast_counts():
    model, seen = three(small().float(), ("0", "2")), []
    handle = model[0].register_forward_hook(lambda module, args, y: y + 1)
    model[2].register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
    model[1].register_forward_hook(lambda module, args, y: seen.append(y.dtype) or y * 2)
    x = torch.randn(5, 4)
    given = adapter_rows(model, NAMES)(x)
    assert seen
    torch.testing.assert_close(given, torch.cat(alone(model, NAMES, lambda i: model(x[i : i + 1]))))
    handle.remove()
    torch.testing.assert_close(
        adapter_rows(model, NAMES)(x), torch.cat(alone(model, NAMES, lambda i: model(x[i : i + 1])))
    )
    with torch.autocast("cpu", torch.bfloat16):
        given = adapter_rows(model, NAMES)(x)
        expected = torch.cat(alone(model, NAMES, lambda i: model(x[i : i + 1])))
    assert given.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(given, expected, rtol=0.05, atol=0.05)


def test_threads_share_a_model():
    model = three(small(), ("0", "2"))
    x, found = torch.randn(5, 4).double(), {}
    orders = [NAMES, ["a"] * 5, ["c", "c", "b", "a", "__base__"], ["b"] * 5]
    expected = [adapter_rows(copy.deepcopy(model), names)(x) for names in orders]

    def run(i):
        found[i] = [adapter_rows(model, orders[i])(x) for _ in range(10)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(y, expected[i], rtol=1e-10, atol=1e-12) for i in range(4) for y in found[i])


def test_wrong_names_say_what_to_write():
    model, x = three(small(), ("0", "2")), torch.randn(5, 4).double()
    assert repr(adapter_rows(model, ["a"])) == "AdapterRows(Sequential, ['a'])"
    assert isinstance(adapter_rows(model, ["a"]), AdapterRows)
    with pytest.raises(
        ValueError, match=r"adapter_names has 2 names, and the inputs have 5 rows; give a name for each"
    ):
        adapter_rows(model, ["a", "b"])(x)
    with pytest.raises(ValueError, match=r"the model has no adapter 'aa'; it has \['a', 'b', 'c'\].*did you mean 'a'"):
        adapter_rows(model, ["aa", "b"])
    with pytest.raises(TypeError, match="adapter_names is of type str, expected a list with a name for each row"):
        adapter_rows(model, "a")
    with pytest.raises(TypeError, match="adapter_name is None, expected one name"):
        adapter_rows(model, ["a", None])
    with pytest.raises(
        TypeError, match=r"model is a DataParallel, .*: adapter_rows\(model.module, names\)|call adapter"
    ):
        adapter_rows(nn.DataParallel(model), ["a"])


def test_states_that_rows_cannot_have_are_errors():
    model, x = three(small(), ("0", "2")), torch.randn(5, 4).double()
    merge_adapter(model, ["a"])
    with pytest.raises(ValueError, match=r"merged into .*; call unmerge_adapter\(model\) first"):
        adapter_rows(model, NAMES)(x)
    ours.unmerge_adapter(model)
    model[0].enable_adapters(False)
    with pytest.raises(ValueError, match="disabled in some layers of the model and not in others; call enable_adapter"):
        adapter_rows(model, NAMES)(x)
    disable_adapter_layers(model)
    adapter_rows(model, NAMES)(x)
    with pytest.raises(Exception, match="not compiled; compile a function of a graft"):
        torch.compile(lambda x: adapter_rows(model, NAMES)(x), backend="eager", fullgraph=True)(x)


def attach(model):
    yield "hook", model[0].register_full_backward_hook(lambda *_: None).remove
    yield "hook", model[0].base_layer.register_forward_hook(lambda *_: None).remove
    yield "hook", model[0].lora_A["b"].register_forward_pre_hook(lambda *_: None).remove
    yield "hook", model[2].lora_B["a"].register_full_backward_hook(lambda *_: None).remove
    model[0].forward = lambda x: x
    yield "forward of its own", lambda: vars(model[0]).pop("forward")
    parametrize.register_parametrization(model[0].lora_A["a"], "weight", nn.Tanh())
    yield "adapter 'a' computes", lambda: parametrize.remove_parametrizations(model[0].lora_A["a"], "weight")
    model[0].lora_dropout["a"].p = 0.25
    yield "adapter 'a' computes", lambda: setattr(model[0].lora_dropout["a"], "p", 0.5)


def test_what_is_attached_to_adapters_is_an_error_before_and_after_a_call():
    for called in (True, False):
        model, x = three(small(), ("0", "2"), lora_dropout=0.5), torch.randn(5, 4).double()
        for words, remove in attach(model):
            with pytest.raises(UnsupportedCall, match=rf"^[02]: .*{words}.*set_adapter\(model, name\)"):
                adapter_rows(model, NAMES)(x)
            remove()
            if called:
                adapter_rows(model, NAMES)(x)


def test_hooks_on_adapted_parameters_are_an_error():
    model, x = small(), torch.randn(2, 4).double()
    for name in "ab":
        inject_adapter_in_model(LoraConfig(r=2, target_parameters=["0.weight"], **FIELDS), model, name)
    equal_alone(model, ["b", "a"], x)
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedCall, match="0.weight: a hook is attached"):
        adapter_rows(model, ["b", "a"])(x)


def test_parameters_without_values_and_rows_that_meet_are_errors():
    model = small()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model, "a", low_cpu_mem_usage=True)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], **FIELDS), model, "b")
    x = torch.randn(2, 4).double()
    with pytest.raises(UnsupportedCall, match="0: lora_A of adapter 'a' is sharded, offloaded, computed or without"):
        adapter_rows(model, ["a", "b"])(x)
    adapter_rows(model, ["b", "__base__"])(x)
    model.append(nn.BatchNorm1d(3).double())
    with pytest.raises(ValueError, match="rows meet in the output"):
        adapter_rows(model, ["b", "__base__"])(x)


def test_copies_of_modules_with_other_buffers_are_errors():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], **FIELDS)
    for name in "ab":
        inject_adapter_in_model(config, model, name)
    adapter_rows(model, ["a", "b"])(torch.randn(2, 4))
    model[1].modules_to_save["b"].running_mean += 1
    with pytest.raises(UnsupportedCall, match="1.running_mean: this buffer of adapter 'b' is not the base's"):
        adapter_rows(model, ["a", "b"])(torch.randn(2, 4))
    adapter_rows(model, ["a", "a"])(torch.randn(2, 4))


def test_a_first_call_in_inference_mode_leaves_others_differentiable():
    model, x = three(small(), ("0", "2")), torch.randn(5, 4).double()
    with torch.inference_mode():
        adapter_rows(model, NAMES)(x)
    set_requires_grad(model, ["a", "b", "c"])
    adapter_rows(model, NAMES)(x).sum().backward()
    assert model[0].lora_A["b"].weight.grad.any()
