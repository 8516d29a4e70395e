"""`target_parameters`: which parameters it means, what it excludes, and its files, both ways with PEFT."""

import copy
import json

import optree
import peft
import pytest
import torch
import transformers
from torch import nn

from torchgraft.adapters import LoraConfig, inject_adapter_in_model, load_adapter, save_adapter
from torchgraft.functional import bind, merge, route, stack, value_and_grad

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
}
MODELS = {
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4)
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SIZES, intermediate_size=24, moe_intermediate_size=8, head_dim=8, num_experts=4, num_experts_per_tok=2
        )
    ),
    "gpt-oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **SIZES, intermediate_size=24, head_dim=8, num_local_experts=4, num_experts_per_tok=2, eos_token_id=1
        )
    ),
    "llama4": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **SIZES, intermediate_size=24, intermediate_size_mlp=24, head_dim=8, num_local_experts=4
        )
    ),
    "jetmoe": lambda: transformers.JetMoeForCausalLM(
        transformers.JetMoeConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=8,
            vocab_size=20,
        )
    ),
}
TARGETS = {"jetmoe": ["output_linear.weight", "mlp.input_linear.weight"]}

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers


def build(name="mixtral", implementation=None):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    if implementation:
        model.set_experts_implementation(implementation)
    return model


def lora(**fields):
    fields = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": BOTH, **fields}
    return LoraConfig(**copy.deepcopy(fields)), peft.LoraConfig(**copy.deepcopy(fields))


def names(model, **fields):
    return LoraConfig(**fields).targets(model)


# -- matching -----------------------------------------------------------------------------------------------------


def test_names_match_whole_or_after_a_dot_in_the_order_of_the_model():
    model = build()
    where = "model.layers.{}.mlp.experts.{}"
    expected = [where.format(i, name) for i in (0, 1) for name in ("gate_up_proj", "down_proj")]
    assert names(model, target_parameters=["experts.down_proj", "experts.gate_up_proj"]) == expected
    assert names(model, target_parameters=[expected[2]]) == expected[2:3]
    mixed = names(model, target_modules=["q_proj"], target_parameters=["down_proj"])
    assert mixed == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)] + expected[1::2]


def test_what_matches_nothing():
    model = build()
    with pytest.raises(ValueError, match=r"target_parameters=\['xperts.down_proj'\] match no.*experts.gate_up_proj'"):
        names(model, target_parameters=["xperts.down_proj"])
    with pytest.warns(RuntimeWarning, match=r"target_parameters \['gate_proj'\] match no parameter"):
        names(model, target_parameters=["gate_proj", "down_proj"])
    with pytest.raises(ValueError, match="target_parameters is 'down_proj', expected"):
        LoraConfig(target_parameters="down_proj")
    with pytest.raises(ValueError, match="target_modules is None"):
        names(nn.Sequential(nn.Linear(2, 2)), target_parameters=[])


def test_patterns_speak_of_parameters():
    fields = {"rank_pattern": {"0.mlp.experts.down_proj": 4}, "alpha_pattern": {"down_proj": 8}, "use_rslora": True}
    graft = bind(build(), lora(**fields)[0])
    found = {path: site.constants for path, site in graft.sites[""].items()}
    first, second = (found[f"model.layers.{i}.mlp.experts.down_proj"] for i in (0, 1))
    assert (first.r, first.scaling, second.r) == (4, 4.0, 2) and second.scaling == 8 / 2**0.5


@pytest.mark.parametrize(
    "fields",
    [{"lora_dropout": 0.1}, {"init_lora_weights": "pissa"}, {"lora_bias": True}, {"use_dora": True}],
    ids=lambda fields: next(iter(fields)),
)
def test_what_parameters_cannot_have(fields):
    with pytest.raises(ValueError, match=f"LoraConfig: {next(iter(fields))} is"):
        bind(build(), LoraConfig(target_parameters=BOTH, **fields))


# -- the same numbers as PEFT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *(("mixtral", one) for one in ("eager", "batched_mm", "grouped_mm")),
        *(("gpt-oss", one) for one in ("eager", "batched_mm", "grouped_mm")),
        ("llama4", None),
        ("jetmoe", None),
    ],
)
def test_real_models_have_pefts_numbers(name, implementation):
    ours, theirs = lora(target_parameters=TARGETS.get(name, BOTH), init_lora_weights=False)
    model, wrapped = build(name, implementation), build(name, implementation)
    graft = bind(model, ours)
    torch.manual_seed(5)
    params = graft.init()
    torch.manual_seed(5)
    wrapped = peft.inject_adapter_in_model(theirs, wrapped).eval()
    expected = peft.get_peft_model_state_dict(wrapped)
    tensors = sorted(expected.values(), key=lambda t: (tuple(t.shape), t.flatten()[0].item()))
    mine = sorted(optree.tree_leaves(params), key=lambda t: (tuple(t.shape), t.flatten()[0].item()))
    assert all(map(torch.equal, mine, tensors)) and len(mine) == len(tensors)
    leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), params)
    y, z = graft(leaves, IDS).logits, wrapped(IDS).logits
    torch.testing.assert_close(y, z)
    assert not torch.allclose(y, model(IDS).logits, atol=1e-4)
    grads = torch.autograd.grad(y.square().sum(), optree.tree_leaves(leaves))
    z.square().sum().backward()
    norms = sorted(g.norm().item() for g in grads)
    expected = sorted(p.grad.norm().item() for p in wrapped.parameters() if p.requires_grad)
    torch.testing.assert_close(norms, expected, rtol=1e-3, atol=1e-6)
    twin = copy.deepcopy(model)
    twin.load_state_dict(merge(graft, params))
    torch.testing.assert_close(twin(IDS).logits, y)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"target_modules": ["q_proj"]}, {"target_modules": None}], ids=str)
def test_a_grafts_files_are_read_by_peft_and_back(tmp_path, fields):
    graft = bind(build(), lora(**fields, init_lora_weights=False)[0])
    params = graft.init(torch.Generator().manual_seed(0))
    y = graft(params, IDS).logits
    save_adapter(graft, tmp_path / "ours", params=params)
    wrapped = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    torch.testing.assert_close(wrapped(IDS).logits, y)
    wrapped.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        loaded = load_adapter(graft, tmp_path / folder)
        assert optree.tree_all(optree.tree_map(torch.equal, loaded, params))
        torch.testing.assert_close(load_adapter(build(), tmp_path / folder)(IDS).logits, y)
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["target_parameters"] == BOTH and config["target_modules"] == (fields.get("target_modules") or [])


def test_one_parameter_alone_has_pefts_keys(tmp_path):
    graft = bind(build(), lora(target_parameters=["gate_up_proj"], init_lora_weights=False)[0])
    params = graft.init()
    save_adapter(graft, tmp_path, params=params)
    wrapped = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(wrapped(IDS).logits, graft(params, IDS).logits)


def test_plain_files_are_the_same_files(tmp_path):
    model = inject_adapter_in_model(lora(init_lora_weights=False)[0], build())
    y = model(IDS).logits
    save_adapter(model, tmp_path, plain=True)
    torch.testing.assert_close(load_adapter(build(), tmp_path)(IDS).logits, y)


def test_files_of_other_parameters_are_refused(tmp_path):
    graft = bind(build(), lora()[0])
    save_adapter(graft, tmp_path, params=graft.init())
    other = bind(build(), lora(target_parameters=["down_proj"])[0])
    with pytest.raises(ValueError, match=r"the config adapts other modules than the graft: only the file has.*gate_up"):
        load_adapter(other, tmp_path)
    smaller = transformers.MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=2)
    with pytest.raises(ValueError, match=r"lora_[AB].weight' has shape \(8, .*expected \(4, "):
        load_adapter(transformers.MixtralForCausalLM(smaller), tmp_path)


# -- rows of one batch -----------------------------------------------------------------------------------------------

ROWS = torch.tensor([2, 0, -1, 2, 1])


def several(graft, dtype):
    draws, initial = torch.Generator().manual_seed(0), graft.init()
    return [
        optree.tree_map(lambda t: 0.3 * torch.randn(t.shape, generator=draws, dtype=dtype), initial) for _ in range(3)
    ]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_of_each_row_are_its_own(name, implementation):
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # which it has no kernel for
    model = build(name, implementation).to(dtype)
    graft = bind(model, lora(target_modules=["q_proj"], target_parameters=[*BOTH, "gate.weight"])[0])
    trees, ids = several(graft, dtype), torch.randint(20, (5, 6), generator=torch.Generator().manual_seed(0))
    y = graft(route(stack(trees), ROWS), ids).logits
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    for i, row in enumerate(ROWS.tolist()):
        state = merge(graft, trees[row]) if row >= 0 else {}
        expected = torch.func.functional_call(model, state, (ids[i : i + 1],)).logits
        torch.testing.assert_close(y[i : i + 1], expected, **close)
    assert torch.equal(y[2], model.requires_grad_(False)(ids).logits[2])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
def test_experts_of_rows_while_tokens_are_generated_and_activations_checkpointed():
    model = build()
    graft = bind(model, lora()[0], allow_unreached=True)
    trees, ids = several(graft, torch.float32), torch.randint(1, 20, (5, 4), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = graft.view(route(stack(trees), ROWS)).generate(ids, **options)
    for i, row in enumerate(ROWS.tolist()):
        alone = graft.view(trees[row]) if row >= 0 else model
        assert torch.equal(tokens[i : i + 1], alone.generate(ids[i : i + 1], **options))

    def loss(many):
        return graft(route(many, ROWS), ids, use_cache=False).logits.square().sum()

    model.train()
    expected = value_and_grad(loss)(stack(trees))
    model.gradient_checkpointing_enable()
    given = value_and_grad(loss)(stack(trees))
    optree.tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4), given, expected)
