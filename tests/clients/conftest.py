"""Small models of transformers with random weights, and torchgraft in the place of PEFT for the time of a test."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from torch import nn

from torchgraft.adapters import AdaLoraConfig, Alias, IA3Config, LoraConfig, OFTConfig, as_peft

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
IDS = torch.arange(3, 15).view(2, 6)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lora": (LoraConfig, peft.LoraConfig, {"r": 2, "lora_alpha": 3}),
    "ia3": (IA3Config, peft.IA3Config, {}),
    "adalora": (AdaLoraConfig, peft.AdaLoraConfig, {"init_r": 2, "target_r": 1, "total_step": 9}),
    "oft": (OFTConfig, peft.OFTConfig, {"oft_block_size": 2}),
}


class Family(NamedTuple):
    """How to make a model, what to give it and which modules to adapt."""

    cls: type[nn.Module]
    config: transformers.PreTrainedConfig
    inputs: dict[str, Any]
    targets: list[str]

    def model(self) -> Any:
        """The model, always with the same weights."""
        torch.manual_seed(0)
        return self.cls(self.config).eval()

    def config_of(self, method: str = "lora", real: bool = False, **more: Any) -> Any:
        """A config for an adapter, torchgraft's or real PEFT's."""
        ours, theirs, fields = METHODS[method]
        if method == "ia3":
            more = {"feedforward_modules": self.targets[-1:], **more}
        return (theirs if real else ours)(target_modules=list(self.targets), **fields, **more)

    def randomise(self, model: Any, scale: float = 0.3) -> Any:
        """Other values for all that is trained, so that the adapter shows."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        return model

    def adapted(self, method: str = "lora", name: str | None = None, **more: Any) -> Any:
        """A model with an adapter that `add_adapter` put there."""
        model = self.model()
        model.add_adapter(self.config_of(method, **more), name)
        return self.randomise(model)

    def logits(self, model: Any) -> torch.Tensor:
        """What the model says to the inputs."""
        with torch.no_grad():
            return model(**self.inputs).logits


def llama() -> Family:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=31)
    targets = ["q_proj", "v_proj", "down_proj"]
    return Family(transformers.LlamaForCausalLM, config, {"input_ids": IDS}, targets)


def bert() -> Family:
    config = transformers.BertConfig(**SMALL, vocab_size=31, num_labels=3)
    targets = ["query", "value", "output.dense"]
    return Family(transformers.BertForSequenceClassification, config, {"input_ids": IDS}, targets)


def t5() -> Family:
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=31, decoder_start_token_id=0
    )
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    return Family(transformers.T5ForConditionalGeneration, config, inputs, ["q", "v", "wo"])


def vit() -> Family:
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)
    targets = ["q_proj", "v_proj", "fc2"]
    return Family(transformers.ViTForImageClassification, config, {"pixel_values": IMAGES}, targets)


def whisper() -> Family:
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=31, num_mel_bins=8, max_source_positions=4,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    inputs = {"input_features": IMAGES[:, 0], "decoder_input_ids": IDS}
    return Family(transformers.WhisperForConditionalGeneration, config, inputs, ["q_proj", "v_proj", "fc1"])


FAMILIES: dict[str, Callable[[], Family]] = {"llama": llama, "bert": bert, "t5": t5, "vit": vit, "whisper": whisper}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]()


@pytest.fixture(name="llama")
def _llama() -> Family:
    return llama()


@pytest.fixture
def alias() -> Iterator[Alias]:
    with as_peft() as alias:
        yield alias
