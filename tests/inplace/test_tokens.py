"""Tokens whose embeddings are trained, and tied embeddings, against PEFT."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from torchgraft import adapters
from torchgraft.adapters import LoraConfig, extract_graft, extract_params, load_adapter, save_adapter
from torchgraft.functional import bind, merge, route, stack

from .models import trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:save_embedding_layers. an embedding is one of target_modules:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkp:FutureWarning"),
]
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
IDS = torch.tensor([[1, 3, 4, 9], [7, 2, 1, 0]])
CASES = {
    "tokens": (False, {"trainable_token_indices": [1, 3]}),
    "tokens, tied": (True, {"trainable_token_indices": [3, 1, 7]}),
    "tokens by name": (False, {"trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [2]}}),
    "tokens by name, tied": (True, {"trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [2]}}),
    "tokens by name, the same": (True, {"trainable_token_indices": {"lm_head": [2, 4], "embed_tokens": [2, 4]}}),
    "tokens of the head, tied": (True, {"trainable_token_indices": {"lm_head": [2]}}),
    "tokens, tied and ensured": (True, {"trainable_token_indices": [1, 3], "ensure_weight_tying": True}),
    "copy, tied": (True, {"modules_to_save": ["embed_tokens"]}),
    "copy, ensured": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "lora, ensured": (True, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "lora of the head, ensured": (True, {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
    "copy of the head, ensured": (True, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
}


def llama(tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=11,
        tie_word_embeddings=tied,
        pad_token_id=10,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config).double().eval()


def configs(more):
    fields = {"r": 2, "target_modules": ["q_proj"], **more}
    return LoraConfig(**copy.deepcopy(fields)), peft.LoraConfig(**copy.deepcopy(fields))


def pair(name):
    tied, more = CASES[name]
    ours, theirs = configs(more)
    torch.manual_seed(7)
    mine = adapters.inject_adapter_in_model(ours, llama(tied))
    torch.manual_seed(7)
    return mine, peft.inject_adapter_in_model(theirs, llama(tied)).eval()


def numbers(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in {id(p): p for _, p in sorted(model.named_parameters()) if p.requires_grad}.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@pytest.mark.parametrize("name", CASES)
def test_in_place_as_in_peft(name):
    mine, theirs = pair(name)
    assert trained(mine) == trained(theirs)
    state = peft.get_peft_model_state_dict(numbers(theirs), save_embedding_layers=False)
    own = adapters.get_peft_model_state_dict(mine, save_embedding_layers=False)
    assert own.keys() == state.keys()
    torch.testing.assert_close(mine(IDS).logits, llama(CASES[name][0])(IDS).logits)
    assert adapters.set_peft_model_state_dict(mine, state) == ([], [])
    own = adapters.get_peft_model_state_dict(mine)
    assert all(torch.equal(own[key], state[key]) for key in state)
    torch.testing.assert_close(mine(IDS).logits, theirs(IDS).logits, **CLOSE)
    for model in (mine, theirs):
        model(IDS).logits.square().sum().backward()
    ours, expected = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (mine, theirs))
    assert ours.keys() == expected.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], expected[key], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_functional_style_and_files_both_ways(name, tmp_path):
    tied, more = CASES[name]
    config, theirs_config = configs(more)
    base = llama(tied)
    mine = numbers(adapters.inject_adapter_in_model(config, llama(tied)))
    y = mine(IDS).logits
    graft, params = bind(base, config), extract_params(mine)
    assert torch.equal(graft(graft.init(), IDS).logits, base(IDS).logits)
    assert {p: sorted(leaves) for p, leaves in params.items()} == {p: sorted(ls) for p, ls in graft.init().items()}
    torch.testing.assert_close(graft(params, IDS).logits, y, **CLOSE)
    torch.testing.assert_close(extract_graft(mine)(params, IDS).logits, y, **CLOSE)
    planted = adapters.inject_adapter_in_model(config, llama(tied), params=params)
    torch.testing.assert_close(planted(IDS).logits, y, **CLOSE)
    first = save_adapter(mine, tmp_path / "a", save_embedding_layers=False)
    second = save_adapter(graft, tmp_path / "b", params=params)
    ours, again = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert ours.keys() == again.keys() and all(torch.equal(ours[key], again[key]) for key in ours)
    torch.testing.assert_close(load_adapter(graft, first), graft.init(dtype=torch.float64) | params, **CLOSE)
    torch.testing.assert_close(load_adapter(llama(tied), first)(IDS).logits, y, **CLOSE)
    theirs = peft.PeftModel.from_pretrained(llama(tied), first).eval()
    torch.testing.assert_close(theirs(IDS).logits, y, **CLOSE)
    theirs.save_pretrained(tmp_path / "theirs")
    written = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert [key for key in written if "base_layer" not in key] == list(ours)
    torch.testing.assert_close(load_adapter(llama(tied), tmp_path / "theirs")(IDS).logits, y, **CLOSE)
    made = numbers(peft.get_peft_model(llama(tied), theirs_config))
    made.eval().save_pretrained(tmp_path / "made")
    torch.testing.assert_close(load_adapter(llama(tied), tmp_path / "made")(IDS).logits, made(IDS).logits, **CLOSE)
    torch.testing.assert_close(graft(load_adapter(graft, tmp_path / "made"), IDS).logits, made(IDS).logits, **CLOSE)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("tokens by name, tied", "copy, tied")])
def test_merged(name):
    tied, more = CASES[name]
    graft = bind(llama(tied), configs(more)[0])
    mine = numbers(adapters.inject_adapter_in_model(configs(more)[0], llama(tied)))
    y, params = mine(IDS).logits, extract_params(mine)
    if name == "tokens of the head, tied":
        with pytest.raises(ValueError, match="is tied to model.embed_tokens.weight, which would change with it"):
            merge(graft, params)
        return
    twin = llama(tied)
    twin.load_state_dict(merge(graft, params))
    torch.testing.assert_close(twin(IDS).logits, y, **CLOSE)
    if name.startswith("lora"):
        with pytest.raises(ValueError, match="model.embed_tokens: its weight is tied to lm_head.weight"):
            adapters.merge_adapter(mine)
        return
    merged = adapters.merge_and_unload(copy.deepcopy(mine))
    torch.testing.assert_close(merged(IDS).logits, y, **CLOSE)
    assert not any("token_adapter" in key or "modules_to_save" in key for key in merged.state_dict())
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    unloaded = adapters.unload(mine)
    torch.testing.assert_close(unloaded(IDS).logits, llama(tied)(IDS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_batch_and_transforms(name):
    tied, more = CASES[name]
    graft = bind(llama(tied), configs(more)[0])
    trees = [
        extract_params(numbers(adapters.inject_adapter_in_model(configs(more)[0], llama(tied)), s)) for s in (1, 2)
    ]
    trees = [{p: {k: t.clone() for k, t in leaves.items()} for p, leaves in tree.items()} for tree in trees]
    ids = torch.cat([IDS, IDS[:1]])
    y = graft(route(stack(trees), torch.tensor([1, -1, 0])), ids).logits
    expected = [graft(trees[1], ids[:1]).logits, graft.model(ids[1:2]).logits, graft(trees[0], ids[2:]).logits]
    torch.testing.assert_close(y, torch.cat(expected), **CLOSE)
    embed = torch.func.vmap(lambda tree: graft(tree, IDS, attention_mask=None).logits)(stack(trees))
    torch.testing.assert_close(embed[1], graft(trees[1], IDS).logits, **CLOSE)


def test_switching_and_copies():
    model, base = numbers(pair("tokens, tied")[0]), llama(True)
    y, plain = model(IDS).logits, base(IDS).logits
    with adapters.disable_adapter(model):
        torch.testing.assert_close(model(IDS).logits, plain)
    assert torch.equal(model(IDS).logits, y)
    adapters.inject_adapter_in_model(configs({"trainable_token_indices": [5, 7]})[0], model, "b")
    torch.testing.assert_close(model(IDS).logits, plain)
    with pytest.raises(ValueError, match=r"adapters 'default' and 'b' both train token 7"):
        adapters.set_adapter(model, ["default", "b"])
    adapters.inject_adapter_in_model(configs({"trainable_token_indices": [5]})[0], model, "c")
    adapters.set_adapter(model, ["default", "c"])
    torch.testing.assert_close(model(IDS).logits, y, **CLOSE)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(one(IDS).logits, y, **CLOSE)
        with torch.no_grad():
            one.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].add_(1)
        assert one.lm_head.rows("default")[0] is one.model.embed_tokens.rows("default")[0]
    adapters.delete_adapter(model, "default")
    torch.testing.assert_close(model(IDS).logits, plain, **CLOSE)
    assert [name for name, on in trained(model).items() if on and "tokens" in name] == [
        "model.embed_tokens.token_adapter.trainable_tokens_delta.c"
    ]


def test_named_adapters_of_the_same_tokens():
    first, second = (configs({"trainable_token_indices": rows})[0] for rows in ([1, 3], [3, 4]))
    graft = bind(llama(True), {"a": first, "b": second})
    with pytest.raises(ValueError, match=r"adapters 'a' and 'b', which both replace model.embed_tokens.weight"):
        graft(graft.init(), IDS)
    apart = bind(llama(True), {"a": first, "c": configs({"trainable_token_indices": [4]})[0]})
    params = apart.init()
    params["a"]["model.embed_tokens"]["trainable_tokens_delta"] += 1
    params["c"]["model.embed_tokens"]["trainable_tokens_delta"] += 2
    twin = llama(True)
    with torch.no_grad():
        twin.model.embed_tokens.weight[[1, 3]] += 1
        twin.model.embed_tokens.weight[4] += 2
    torch.testing.assert_close(apart(params, IDS).logits, twin(IDS).logits, **CLOSE)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


def test_an_embedding_with_a_forward_of_its_own():
    model = nn.Sequential(Scaled(6, 4), nn.Linear(4, 4)).double()
    config = LoraConfig(target_modules=["1"], trainable_token_indices={"0": [2]})
    mine, x = numbers(adapters.inject_adapter_in_model(config, copy.deepcopy(model))), torch.arange(6)
    rows = mine[0].rows("default")[0]
    assert torch.equal(mine[0](x)[2], 3 * rows[0])
    torch.testing.assert_close(bind(model, config)(extract_params(mine), x), mine(x), **CLOSE)


REFUSED = [
    ({"trainable_token_indices": []}, r"trainable_token_indices is \[\], expected indices"),
    ({"trainable_token_indices": [11]}, r"model.embed_tokens.weight: rows are \[11\], expected indices from 0 to 10"),
    ({"trainable_token_indices": [2, 2]}, r"rows \[2\] are given twice"),
    ({"trainable_token_indices": {"x": [2]}}, r"trainable_token_indices has 'x', which is no module of the model"),
    ({"trainable_token_indices": {"norm": [2]}}, r"names model.norm, a LlamaRMSNorm, which has no matrix"),
    (
        {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
        r"names model.embed_tokens, which target_modules does too; leave it out of one",
    ),
    (
        {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
        r"names model.embed_tokens, which modules_to_save does too; leave it out of one",
    ),
    (
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
        r"has different indices for tied modules, .* and ensure_weight_tying is True",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        bind(llama(True), configs(fields)[0])
    model = llama(True)
    with pytest.raises(ValueError, match=message):
        adapters.inject_adapter_in_model(configs(fields)[0], model)
    assert not hasattr(model, "peft_config") and type(model.lm_head) is nn.Linear


def test_a_tied_head_with_an_adapter_is_refused_in_place_alone():
    config = configs({"trainable_token_indices": [1], "target_modules": ["lm_head"]})[0]
    with pytest.raises(ValueError, match="lm_head: carries an adapter, and tokens of it are trained"):
        adapters.inject_adapter_in_model(config, llama(True))
    graft = bind(llama(True), config)
    assert torch.equal(graft(graft.init(), IDS).logits, graft.model(IDS).logits)
    model = adapters.inject_adapter_in_model(configs({"trainable_token_indices": [1]})[0], llama(True))
    with pytest.raises(ValueError, match="lm_head: carries an adapter, and tokens of it are trained"):
        adapters.inject_adapter_in_model(configs({"target_modules": ["lm_head"]})[0], model, "b")


def test_nothing_to_tie_is_a_warning():
    for more in ({"trainable_token_indices": [1]}, {"modules_to_save": ["lm_head"]}):
        with pytest.warns(UserWarning, match="ensure_weight_tying is True, and nothing is tied to"):
            bind(llama(False), configs({**more, "ensure_weight_tying": True})[0])
    tied = {"target_modules": ["embed_tokens"], "modules_to_save": ["norm"], "ensure_weight_tying": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is targeted is tied, though what is saved is not
        bind(llama(True), configs(tied)[0])


@pytest.mark.slow
def test_compiles_without_recompiling_for_other_numbers():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4)).double()
    config, x = LoraConfig(target_modules=["1"], trainable_token_indices={"0": [2, 5]}), torch.arange(6)
    graft = bind(model, config)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda params, x: graft(params, x), backend=counter, fullgraph=True)
    mine = adapters.inject_adapter_in_model(config, copy.deepcopy(model))
    inside = torch.compile(mine, backend=counter, fullgraph=True)
    for seed in range(2):
        params = extract_params(numbers(mine, seed))
        torch.testing.assert_close(compiled(params, x), mine(x), **CLOSE)
        torch.testing.assert_close(inside(x), mine(x), **CLOSE)
    assert counter.frame_count == 2


def test_a_tied_lora_has_one_pair_of_matrices():
    config = configs(CASES["lora, ensured"][1])[0]
    graft = bind(llama(True), config)
    params = graft.init()
    assert "lm_head" not in params and "lora_embedding_A" in params["model.embed_tokens"]
    model = adapters.inject_adapter_in_model(config, llama(True))
    embed, head = model.model.embed_tokens, model.lm_head
    assert head.lora_A["default"].weight.data_ptr() == embed.lora_embedding_B["default"].data_ptr()
    moved = numbers(adapters.inject_adapter_in_model(config, llama(True)))
    params = extract_params(moved)
    delta = 4 * (params["model.embed_tokens"]["lora_embedding_B"] @ params["model.embed_tokens"]["lora_embedding_A"]).mT
    state = merge(graft, params)
    expected = llama(True).lm_head.weight + delta
    torch.testing.assert_close(state["lm_head.weight"], expected, **CLOSE)
    torch.testing.assert_close(state["model.embed_tokens.weight"], expected, **CLOSE)
    row = adapters.summary(model).rows[0]
    assert row.parameters == adapters.summary(graft, graft.init()).rows[0].parameters
    with pytest.raises(ValueError, match="which is for plain LoRA; leave out use_dora"):
        bind(llama(True), configs({**CASES["lora, ensured"][1], "use_dora": True})[0])
    with pytest.raises(ValueError, match="lm_head is tied to model.embed_tokens .*, and a stack of several configs"):
        bind(llama(True), [config, config])
    with pytest.warns(UserWarning, match="ensure_weight_tying is True, and nothing that is trained is tied"):
        bind(llama(True), configs({"ensure_weight_tying": True})[0])


class Part(nn.Module):
    """An encoder or a decoder with an embedding of its own."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.linear = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return self.linear(self.embed_tokens(ids))


class Shared(nn.Module):
    """An encoder-decoder whose embeddings are separate modules that share one weight, with its head."""

    _tied_weights_keys = {  # noqa: RUF012
        f"{name}.weight": "shared.weight" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    }

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = type("Config", (dict,), {"tie_word_embeddings": True, "to_dict": dict})(tie_word_embeddings=True)
        self.shared, self.encoder, self.decoder = nn.Embedding(10, 8), Part(), Part()
        self.lm_head = nn.Linear(8, 10, bias=False)
        for module in (self.encoder.embed_tokens, self.decoder.embed_tokens, self.lm_head):
            module.weight = self.shared.weight
        self.double()

    def get_input_embeddings(self):
        return self.shared

    def forward(self, ids):
        return self.lm_head(self.encoder(ids) + self.decoder(ids) + self.shared(ids))


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head", "shared", "decoder.embed_tokens"])
def test_embeddings_of_their_own_that_share_a_weight_have_one_adapter(name, tmp_path):
    model, ids = Shared(), torch.arange(10)
    config = LoraConfig(r=2, target_modules=["linear", name], ensure_weight_tying=True)
    graft = bind(model, config)
    assert sorted(graft.init()) == ["decoder.linear", "encoder.linear", "shared"]
    mine = numbers(adapters.inject_adapter_in_model(config, Shared()))
    params = extract_params(mine)
    assert {path: set(leaves) for path, leaves in params.items()} == {
        path: set(leaves) for path, leaves in graft.init().items()
    }
    expected = torch.func.functional_call(model, merge(graft, params), (ids,))
    torch.testing.assert_close(graft(params, ids), expected)
    torch.testing.assert_close(mine(ids), expected)
    save_adapter(mine, tmp_path)
    torch.testing.assert_close(load_adapter(Shared(), tmp_path)(ids), expected)
    torch.testing.assert_close(graft(load_adapter(graft, tmp_path), ids), expected)
    if name != "shared":  # which is the only one that PEFT adapts then
        theirs = peft.inject_adapter_in_model(
            peft.LoraConfig(r=2, target_modules=["linear", name], ensure_weight_tying=True), Shared()
        )
        own = adapters.get_peft_model_state_dict(mine, save_embedding_layers=False)
        assert own.keys() == peft.get_peft_model_state_dict(theirs).keys()
        peft.set_peft_model_state_dict(theirs, own)
        torch.testing.assert_close(theirs(ids), expected)
