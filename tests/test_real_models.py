"""Real architectures with random weights: identity, merge, gradients, vmap, compile and views, method by method."""

import copy

import optree
import pytest
import torch
import transformers
from torch import nn
from torch.func import grad, vmap

from torchgraft.adapters import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, VeraConfig
from torchgraft.functional import bind, merge, stack, unstack, value_and_grad

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # SDPA under vmap
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=31, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config), {"input_ids": IDS, "labels": IDS}, ["q_proj", "v_proj", "down_proj"]


def gpt2():
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=31, n_positions=16)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config), {"input_ids": IDS, "labels": IDS}, ["c_attn", "c_proj", "c_fc"]


def t5():
    config = transformers.T5Config(
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        vocab_size=31,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": IDS, "labels": IDS}, ["q", "v", "wo"]


def bert():
    config = transformers.BertConfig(**SMALL, vocab_size=31, num_labels=3)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = transformers.BertForSequenceClassification(config)
    return model, {"input_ids": IDS, "labels": torch.tensor([0, 2])}, ["query", "value", "dense"]


def vit():
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = transformers.ViTForImageClassification(config)
    inputs = {"pixel_values": IMAGES[:, :, :8, :8], "labels": torch.tensor([0, 2])}
    targets = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return model, inputs, targets


def whisper():
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=31, num_mel_bins=8, max_source_positions=8,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None, dropout=0.0,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": IMAGES[:, 0, :8, :16], "labels": IDS}, ["q_proj", "v_proj", "fc1"]


class Residual(nn.Module):
    def __init__(self, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels // stride, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(nn.Conv2d(channels // stride, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.layer1, self.layer2 = Residual(8, 1), Residual(16, 2)
        self.fc = nn.Linear(16, 3)

    def forward(self, pixel_values, labels):
        y = self.layer2(self.layer1(self.stem(pixel_values))).mean((2, 3))
        logits = self.fc(y)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(31, 8)
        self.lstm = nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 31))

    def forward(self, input_ids, labels):
        logits = self.head(self.lstm(self.embed(input_ids))[0])
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


torch.manual_seed(0)
IDS = torch.randint(3, 31, (2, 6))
IMAGES = torch.randn(2, 3, 8, 16)
MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "t5": t5,
    "bert": bert,
    "vit": vit,
    "whisper": whisper,
    "resnet": lambda: (
        ResNet(),
        {"pixel_values": IMAGES, "labels": torch.tensor([0, 2])},
        ["conv1", "conv2", "downsample.0", "fc"],
    ),
    "lstm": lambda: (Tagger(), {"input_ids": IDS, "labels": IDS}, ["0", "2"]),
}
METHODS = {
    "lora": lambda targets: LoraConfig(r=2, target_modules=targets),
    "dora": lambda targets: LoraConfig(r=2, use_dora=True, target_modules=targets),
    "ia3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=targets[-1:]),
    "adalora": lambda targets: AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=targets),
    "loha": lambda targets: LoHaConfig(r=2, use_effective_conv2d=True, target_modules=targets),
    "oft": lambda targets: OFTConfig(oft_block_size=2, target_modules=targets),
    "vera": lambda targets: VeraConfig(r=4, target_modules=targets),
}
UNSUPPORTED = {("vera", "resnet")}


@pytest.fixture(params=MODELS, scope="module")
def made(request):
    torch.manual_seed(0)
    model, inputs, targets = MODELS[request.param]()
    return request.param, model.eval(), inputs, targets


def randomised(graft, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: t + torch.randn(t.shape, generator=generator) * 0.2, graft.init())


def loss_of(graft, inputs):
    return lambda params: graft(params, **inputs)["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_architecture(made, method):
    name, model, inputs, targets = made
    config = METHODS[method](targets)
    if (method, name) in UNSUPPORTED:
        with pytest.raises(ValueError, match="does not support"):
            bind(model, config)
        return
    graft = bind(model, config)
    with torch.no_grad():  # a base that needs gradients may take other attention kernels, with other last bits
        base = model(**inputs)["logits"]
        assert torch.equal(graft(graft.init(), **inputs)["logits"], base), "identity at init"
    params = randomised(graft)
    adapted = graft(params, **inputs)["logits"]
    assert not torch.allclose(adapted, base, atol=1e-3)
    twin = copy.deepcopy(model)
    twin.load_state_dict(merge(graft, params))
    torch.testing.assert_close(adapted, twin(**inputs)["logits"], rtol=1e-3, atol=1e-4)
    view = graft.view(params)
    assert isinstance(view, type(model))
    torch.testing.assert_close(view(**inputs)["logits"], adapted)
    _, grads = value_and_grad(loss_of(graft, inputs))(params)
    torch.testing.assert_close(grad(loss_of(graft, inputs))(params), grads, rtol=1e-3, atol=1e-6)
    trees = [params, randomised(graft, 1)]
    many = stack(trees)
    losses = vmap(loss_of(graft, inputs))(many)
    torch.testing.assert_close(losses, torch.stack([loss_of(graft, inputs)(tree) for tree in trees]))
    for own, given in zip(trees, unstack(vmap(grad(loss_of(graft, inputs)))(many)), strict=True):
        torch.testing.assert_close(given, grad(loss_of(graft, inputs))(own), rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(model(**inputs)["logits"], base)


@pytest.mark.slow
def test_compiles_without_recompiling_for_new_values(made):
    name, model, inputs, targets = made
    if name == "lstm":
        pytest.xfail("torch.compile does not trace nn.LSTM whole")
    if name == "gpt2":
        inputs = {"input_ids": IDS}  # with labels, transformers logs a warning, which torch.compile cannot trace
    graft = bind(model, LoraConfig(r=2, target_modules=targets))
    model(**inputs)  # BERT notes in its config what kind of labels it has met
    torch._dynamo.reset()
    f = torch.compile(lambda params: graft(params, **inputs)["logits"], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        f(randomised(graft))
        with torch._dynamo.config.patch(error_on_recompile=True):
            params = randomised(graft, 1)
            torch.testing.assert_close(f(params), graft(params, **inputs)["logits"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "whisper"])
def test_views_generate_what_the_merged_model_generates(name):
    torch.manual_seed(0)
    model, inputs, targets = MODELS[name]()
    graft = bind(model.eval(), LoraConfig(r=2, target_modules=targets))
    params = optree.tree_map(lambda t: t * 5, randomised(graft))
    twin = copy.deepcopy(model)
    twin.load_state_dict(merge(graft, params))
    prompt = {key: value for key, value in inputs.items() if key != "labels"}
    settings = {"max_new_tokens": 5, "do_sample": False}
    own = graft.view(params).generate(**prompt, **settings)
    assert torch.equal(own, twin.generate(**prompt, **settings))
    assert not torch.equal(own, model.generate(**prompt, **settings))


def test_t5_takes_cached_encoder_outputs_when_allowed():
    torch.manual_seed(0)
    model, inputs, targets = t5()
    encoded = model.eval().encoder(inputs["input_ids"])
    config = LoraConfig(r=2, target_modules=targets)
    cached = {"encoder_outputs": encoded, "labels": IDS}
    graft = bind(model, config)
    with pytest.raises(RuntimeError, match="never reached 'encoder.block.0"):
        graft(graft.init(), **cached)
    graft = bind(model, config, allow_unreached=True)
    torch.testing.assert_close(graft(graft.init(), **cached)["logits"], model(**cached)["logits"])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_of_transformers():
    torch.manual_seed(0)
    model, inputs, targets = llama()
    graft = bind(model, LoraConfig(r=2, target_modules=targets))
    params = randomised(graft)
    _, expected = value_and_grad(loss_of(graft, inputs))(params)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, grads = value_and_grad(loss_of(graft, inputs))(params)
    torch.testing.assert_close(grads, expected)


def test_jvp_with_math_attention():
    torch.manual_seed(0)
    model, inputs, targets = llama()
    graft = bind(model.eval(), LoraConfig(r=2, target_modules=targets))
    params, tangent = randomised(graft), randomised(graft, 1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, given = torch.func.jvp(loss_of(graft, inputs), (params,), (tangent,))
    grads = grad(loss_of(graft, inputs))(params)
    pairs = zip(optree.tree_leaves(grads), optree.tree_leaves(tangent), strict=True)
    torch.testing.assert_close(given, sum((g * t).sum() for g, t in pairs), rtol=1e-3, atol=1e-5)
